"Whole learners: what is planted is found, what is clean is left alone, everything is left as it was, and the words say what the table says."
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock

from fastai_cam.interpret import CAMInterpretation
import fastai_cam.shortcuts.report as shortcuts_report_room
from fastai_cam.shortcuts.report import _findings, Shortcut
from fastai_cam.shortcuts.edits import edge_places
from fastai_cam.shortcuts.testing import Finding, Measurement

from helpers.shortcuts import corner_candidate, corner_reader


# -- pieces, by hand

def finding_of(candidate, low=.1, edit='mean'):
    "A finding of which nothing matters but these"
    return Finding(candidate, Measurement(edit, low, (low, low), 0., 1., (1., 1., 1.)), candidate.donors, low)

def test_of_the_same_evidence_the_plainest_is_reported():
    corner = corner_candidate(corner_reader(4.))
    few = corner._replace(donors=corner.donors[:5])
    ranked = [finding_of(corner, .3), finding_of(corner), finding_of(few, .9), finding_of(corner._replace(n_places=2), .9),
              finding_of(corner._replace(where='one place'), .9), finding_of(corner, .9, 'overlay')]
    assert sorted(ranked[::-1], key=lambda finding: finding.rank) == ranked and finding_of(corner, edit='pattern').rank[0]
    assert not finding_of(corner, edit='texture').rank[0] and ranked[0].low == .3

def test_of_evidence_the_strongest_counts_and_the_simplest_is_reported(monkeypatch):
    tester, places = corner_reader(4.), edge_places(8, 8)
    corner = corner_candidate(tester)
    everywhere = corner._replace(mask=torch.ones(8, 8).bool(), where='edges', n_places=5)
    thing = corner._replace(kind='thing', where='one place', mask=None)
    lows = {'top left corner': .1, 'edges': .4, 'one place': .2}
    monkeypatch.setattr(shortcuts_report_room, 'find_candidates', lambda *args: [thing, everywhere, corner])
    monkeypatch.setattr(tester, 'test', lambda candidate: finding_of(candidate, lows[candidate.where]))
    [found] = _findings(tester, {}, 0, corner.donors)
    assert found.candidate.where == 'top left corner' and found.low == .1 and found.strongest == .4


# -- the test of a candidate, by hand

def a_shortcut():
    measured = Measurement('own', .9, (.8, 1.), .1, .7, (.5, .4, .6))
    return Shortcut('cat', 'place', 'top edge', [3, 5], 4, 1, measured, torch.ones(4, 4).bool(), None, (1, 2))

def test_a_shortcut_has_what_was_measured_of_it():
    shortcut = a_shortcut()
    assert (shortcut.edit, shortcut.effect, shortcut.interval, shortcut.before, shortcut.after) == ('own', .9, (.8, 1.), .1, .7)
    assert shortcut.removed == (.5, .4, .6) and {'effect', 'removed', 'edit', 'sentence'} <= set(dir(shortcut))
    with pytest.raises(AttributeError, match='n_group of a Shortcut is called n_predicted now'): shortcut.n_group
    with pytest.raises(AttributeError, match='detail of a Shortcut is called edit now'): shortcut.detail
    assert not hasattr(shortcut, 'nothing')

def test_shortcuts_can_be_pickled_and_those_of_before_read():
    shortcut = a_shortcut()
    again = pickle.loads(pickle.dumps(shortcut))
    assert repr(again) == repr(shortcut) and again.measured == shortcut.measured and torch.equal(again.mask, shortcut.mask)
    flat = dict(cls='cat', kind='place', where='top edge', items=[3, 5], n_group=4, right=1, effect=.9, interval=(.8, 1.), before=.1, after=.7,
                removed=(.5, .4, .6), detail='own', mask=shortcut.mask, boxes=None, pictures=(1, 2))
    before = Shortcut.__new__(Shortcut)
    before.__setstate__({**flat, '__stored_args__': flat}) # as `store_attr` left it
    assert {**vars(before), 'mask': None} == {**vars(shortcut), 'mask': None} and repr(before) == repr(shortcut)


# -- whole learners

KINDS = ('stripes', 'dots')

def picture(rng, kind, mark=None):
    "Stripes or dots of random colour, size and place on a blotchy ground: objects that differ from picture to picture"
    ground = np.asarray(Image.fromarray(rng.integers(60, 160, (5, 5, 3)).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)).astype(float)
    side, colour = int(rng.integers(16, 26)), rng.integers(0, 255, 3)
    rows, columns = np.indices((side, side))/side*rng.uniform(3, 5)
    inside = np.sin(2*np.pi*rows) > 0 if kind == 'stripes' else (np.sin(2*np.pi*rows) > .2) & (np.sin(2*np.pi*columns) > .2)
    top, left = rng.integers(0, 48 - side, 2)
    ground[top:top+side, left:left+side][inside] = colour
    if mark is not None and kind == 'dots' and rng.random() < .9: mark(ground, rng)
    return PILImage.create(ground.clip(0, 255).astype(np.uint8))

def corner_mark(ground, rng): ground[-8:-1, -12:-1] = (255, 220, 0)
def tint(ground, rng): ground *= (1., .6, .4)

def learner(mark=None, seed=0, n=320):
    rng = np.random.default_rng(seed)
    pictures = [picture(rng, KINDS[i % 2], mark) for i in range(n)]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: pictures[i], get_y=lambda i: KINDS[i % 2], splitter=IndexSplitter(range(n - 100, n)), batch_tfms=Normalize.from_stats([.4]*3, [.25]*3))
    dls = block.dataloaders(range(n), bs=32, num_workers=0)
    torch.manual_seed(seed)
    stage = lambda n_in, n_out: nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
    model = nn.Sequential(nn.Sequential(stage(3, 16), stage(16, 32), stage(32, 48)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2)))
    learn = Learner(dls, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x = torch.cat([torch.Tensor(b[0]).as_subclass(torch.Tensor) for b in dls.train.new(shuffle=False, drop_last=False)])
    y = torch.cat([torch.Tensor(b[1]).as_subclass(torch.Tensor).long() for b in dls.train.new(shuffle=False, drop_last=False)])
    for _ in range(6):
        for some in torch.randperm(len(x)).split(32):
            loss = nn.functional.cross_entropy(model(x[some]), y[some])
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    optimizer.zero_grad()
    return learn

def interpretation(learn):
    with learn.no_bar(): return CAMInterpretation.from_learner(learn)

@pytest.fixture(scope='module')
def planted(): return interpretation(learner(corner_mark))

@pytest.fixture(scope='module')
def found(planted):
    with planted.learn.no_bar(): return planted.find_shortcuts()

def test_a_planted_corner_is_found(found, planted):
    assert {shortcut.kind for shortcut in found} == {'place'} # of two classes, one has it and the other lacks it: both may be reported
    assert {shortcut.where for shortcut in found} <= {'bottom right corner', 'bottom edge', 'right edge'}
    first = next(shortcut for shortcut in found if shortcut.cls == 'dots')
    assert first.after - first.before > .1 and first.effect > .2 and first.interval[0] <= first.effect <= first.interval[1] and first.removed[1] > .1
    marked = {i for i in range(100) if np.asarray(planted.learn.dls.valid_ds[i][0])[-4, -4].tolist() == [255, 220, 0]}
    assert len(marked & set(first.items)) > .8*len(first.items) # those that have it

def test_the_table_and_the_words_say_the_same(found):
    rows = found.table.to_dict('records')
    assert [row['class'] for row in rows] == [shortcut.cls for shortcut in found] and rows[0]['effect_low'] == max(row['effect_low'] for row in rows)
    row = rows[0]
    assert row['class'] == found[0].cls and row['items'] == len(found[0].items) and row['effect'] == found[0].effect and row['examples'] == found[0].items[:5]
    assert f'in {row["items"]} of {row["of"]} pictures' in repr(found) and found[0].where in found._repr_html_()

def test_the_figure_has_a_row_a_finding(found, tmp_path):
    fig = found.plot(n=2, save=tmp_path/'found.png')
    assert (tmp_path/'found.png').exists() and len(fig.axes) == len(found)*4 + 1 # below: which classes were looked over
    without, with_it = (ax.images[0].get_array() for ax in fig.axes[2:4])
    assert not np.array_equal(without[-6:, -8:], with_it[-6:, -8:]) and np.abs(np.asarray(without[:20, :20], dtype=float) - np.asarray(with_it[:20, :20], dtype=float)).max() < 1e-3

def test_a_clean_learner_has_none(found, tmp_path):
    interp = interpretation(learner())
    with interp.learn.no_bar(): clean = interp.find_shortcuts()
    assert len(clean) == 0 and repr(clean).startswith('No shortcut was found (100 pictures of 2 classes') and len(clean.table) == 0 and list(clean.table)==list(found.table)
    assert clean.plot(save=tmp_path/'none.png').axes[0].texts[0].get_text() == repr(clean) and (tmp_path/'none.png').stat().st_size > 1000

@pytest.mark.slow
def test_a_tint_is_found_in_the_surroundings():
    interp = interpretation(learner(tint, seed=1))
    with interp.learn.no_bar(): tinted = interp.find_shortcuts()
    assert 'dots' in {shortcut.cls for shortcut in tinted} and all(shortcut.kind == 'surroundings' and shortcut.edit == 'colours' and shortcut.after - shortcut.before > .5 for shortcut in tinted)

@pytest.mark.slow
def test_the_same_again(found, planted):
    with planted.learn.no_bar(): again = planted.find_shortcuts()
    assert [(s.items, s.effect, s.removed) for s in again] == [(s.items, s.effect, s.removed) for s in found]

@pytest.mark.slow
def test_the_learner_is_left_as_it_was(planted, monkeypatch):
    learn = planted.learn
    def state(): return ([module.training for module in learn.model.modules()], [p.requires_grad for p in learn.model.parameters()], [p.grad for p in learn.model.parameters()],
                         sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in learn.model.modules()), list(learn.cbs), torch.get_rng_state().tolist())
    def interrupt(*args): raise KeyboardInterrupt
    with learn.no_bar():
        before = state()
        planted.find_shortcuts(n=60)
        assert state() == before
        monkeypatch.setattr(shortcuts_report_room, 'find_candidates', interrupt)
        with pytest.raises(KeyboardInterrupt): planted.find_shortcuts(n=60)
        assert state() == before

@pytest.mark.parametrize('wrong, message', [(dict(n=3), 'too few'), (dict(min_items=2), 'too few'), (dict(method='gradcm'), 'gradcam'), (dict(layer='nowhere'), 'no layer named')])
def test_wrong_input_is_refused(planted, wrong, message):
    with pytest.raises(ValueError, match=message): planted.find_shortcuts(**wrong)

def test_too_few_pictures_are_said(planted):
    with planted.learn.no_bar(): nothing = planted.find_shortcuts(n=50, min_items=25)
    assert 'Nothing could be looked for' in repr(nothing)
    assert 'at least 25 pictures (min_items), beside as many others' in repr(nothing) and 'or lower min_items (to 6 at least)' in repr(nothing)
    assert sum(nothing.counts.values())==50 and all(f'{name} {n}' in repr(nothing) for name, n in nothing.counts.items())

@pytest.mark.parametrize('picked, min_items', [([0], 8), ([0, 1, 2], 8), ([0, 1, 2, 3], 6)])
def test_a_handful_of_pictures_is_too_few(planted, picked, min_items):
    "One or two of a class: what is there, what is needed, and what can be done"
    learn = planted.learn
    few = learn.dls.test_dl([learn.dls.valid_ds.items[i] for i in picked], with_labels=True)
    with learn.no_bar(): nothing = planted.find_shortcuts(few, min_items=min_items)
    assert len(nothing)==0 and sum(nothing.counts.values())==len(picked) and '\n' not in repr(nothing)
    assert f'at least {min_items} pictures' in repr(nothing) and 'larger set' in repr(nothing)
    assert ('min_items is as low as it can be' if min_items==6 else 'to 6 at least') in repr(nothing)
    assert len(nothing.table)==0 and nothing.plot().axes[0].texts[0].get_text()==repr(nothing)

def test_of_many_classes_the_largest_are_said():
    nothing = shortcuts_report_room.Shortcuts([], {}, counts={f'c{i}': i for i in range(100)}, min_items=200)
    assert 'c99 99, c98 98, c97 97, c96 96, c95 95, and 95 classes of fewer.' in repr(nothing)
    assert repr(shortcuts_report_room.Shortcuts([], {}))=='Nothing could be looked for: no class has enough pictures. Look over a larger set, or lower min_items (to 6 at least).'


# -- what was looked at

def looked(found=(), **counts):
    "Shortcuts of these classes among as many pictures as are taken for each, of which 8 are needed"
    enough = {name: n for name, n in counts.items() if 8 <= n <= 92}
    return shortcuts_report_room.Shortcuts(list(found), enough, [torch.rand(3, 8, 8)]*6, torch.rand(6, 4, 4), counts, 8)

def test_what_was_left_out_is_said_and_why():
    shortcuts = looked(cat=40, dog=30, cow=5, sheep=2, any=95)
    assert shortcuts.left_out == dict(cow='too few pictures are taken for it', sheep='too few pictures are taken for it', any='all but too few pictures are taken for it')
    first, scope = repr(shortcuts).splitlines()
    assert first == 'No shortcut was found (70 pictures of 2 classes).' and scope == shortcuts.scope
    assert scope.startswith('Looked over, by the class that pictures are taken for: cat 40, dog 30. Left out, as too few pictures are taken for it (at least 8')
    assert 'cow 5, sheep 2.' in scope and 'Left out, as all but too few pictures are taken for it' in scope and scope.endswith('any 95.')
    assert repr(looked(cat=40, dog=30)) == 'No shortcut was found (70 pictures of 2 classes).' # nothing was left out
    assert repr(looked([a_shortcut()], cat=40, dog=30)).splitlines()[1] == 'Looked over, by the class that pictures are taken for: cat 40, dog 30.'
    assert '93 more' not in looked(**{f'c{i}': i for i in range(8, 14)}).scope and ' and 1 more.' in looked(**{f'c{i}': i for i in range(8, 14)}).scope

def test_the_figure_shows_what_was_left_out():
    ax = looked(cat=40, cow=5, dog=30).plot().axes[1]
    assert [text.get_text() for text in ax.get_yticklabels()] == ['cat', 'dog', 'cow (left out)'] and [bar.get_width() for bar in ax.patches] == [40, 30, 5]
    assert len({bar.get_facecolor() for bar in ax.patches[:2]}) == 1 and ax.patches[2].get_facecolor() != ax.patches[0].get_facecolor()
    shortcut = a_shortcut()
    shortcut.pictures = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    *_, below = looked([shortcut], cat=40, cow=5, dog=30).plot(n=1).axes
    assert len({bar.get_facecolor() for bar in below.patches}) == 3 # cat has a shortcut
    many = looked(**{f'c{i}': 8 + i for i in range(50)}).plot().axes[1]
    assert len(many.patches) == 20 and 'the largest 20 of 50 classes' in many.get_title()

def test_it_is_said_what_it_costs_where_bars_are_shown(planted, capsys):
    from fastai.callback.progress import ProgressCallback
    learn, shown = planted.learn, [cb for cb in planted.learn.cbs if isinstance(cb, ProgressCallback)]
    if not shown: learn.add_cb(ProgressCallback())
    try: planted.find_shortcuts(n=50, min_items=25)
    finally:
        if not shown: learn.remove_cb(ProgressCallback)
    said = capsys.readouterr().out
    assert 'shortcuts in 50 pictures: a pass of each, then about 1,000 for each class that has a suspect' in said and 'forward passes' not in said # no class has enough
    with learn.no_bar(): planted.find_shortcuts(n=50, min_items=25)
    assert capsys.readouterr().out == ''
