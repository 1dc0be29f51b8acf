"A batch of maps: what is indexed, shown and said of it, item by item, against values worked out by hand."
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from fastai_cam.tasks import NOT_ASKED
from fastai_cam.maps.draw import CAMMap, check_style
from fastai_cam.maps.cams import CAMs, Images, ItemMaps

from helpers.maps import everything, frames, VOCAB


# -- volumes

def test_volumes_are_shown_a_row_each():
    volumes = CAMs(torch.rand(2, 2, 3, 4, 4), [torch.rand(1, 8, 10, 10), torch.rand(1, 2, 10, 10)], torch.tensor([[0, 1], [1, NOT_ASKED]]), ['one', 'two'], vocab=VOCAB, n_space=3)
    axs = volumes.show(slices=3, cmap='viridis')
    assert [ax.get_title(loc='left').split('\n')[-1] for ax in axs]==['slice 1 of 8', 'slice 4 of 8', 'slice 6 of 8']*2 + ['slice 0 of 2', 'slice 1 of 2']
    assert [axs[i].get_title(loc='left').split('\n')[0] for i in (0, 3, 6)]==['▸ cat', '▸ dog', '▸ dog']
    assert axs[0].images[1].get_cmap().name=='viridis'
    rows = axs[0].figure.axes
    assert len(rows)==9 and not rows[8].images # the shallow volume has no third slice
    assert volumes.n_questions==2 and len(volumes[1])==1 and volumes[0, 1].map.shape==(3, 4, 4) and volumes[:, 0].n_questions==1
    assert repr(volumes)=='CAMs: 2 items × 2 (one, two), maps 3×4×4'
    assert len(volumes.show(slice=0))==3 and volumes.show(slice=-1)[0].get_title(loc='left')=='▸ cat\nslice 7 of 8'
    given = plt.subplots(2, 4)[1]
    assert volumes.show(slices=3, ax=given)==list(given.ravel())
    with pytest.raises(ValueError, match='8 slices need 8 axes, but 3'): volumes.show(slices=3, ax=given[0, :3])
    with pytest.raises(ValueError, match='a row of its own'): volumes.show(ncols=3)
    with pytest.raises(ValueError, match='are volumes'): volumes.peaks()
    with pytest.raises(ValueError, match=r'\[n, d, h, w\] or \[n, K, d, h, w\], not \[2, 4, 4\]'): CAMs(torch.zeros(2, 4, 4), n_space=3)


# -- a batch

def test_every_attribute_survives_indexing():
    cams, order = everything(), [2, 0]
    some = cams[order]
    for name in ('maps', 'classes', 'preds', 'targs', 'losses', 'regions'): assert torch.equal(getattr(some, name), getattr(cams, name)[order]), name
    assert (some.items, some.texts)==(['2.png', '0.png'], ['c', 'a']) and torch.equal(some.images[0], cams.images[2])
    assert (some.labels, some.vocab, some.n_space, some.task.name, some.signed, some.thresh)==(cams.labels, VOCAB, 2, 'multi', True, .3)
    second = cams[:, 1]
    assert torch.equal(second.regions, cams.regions[:, 1]) and torch.equal(second.maps, cams.maps[:, 1]) and second.labels==['two'] and second.task.name=='multi' and second.texts==cams.texts
    assert torch.equal(cams[3, 1].region, cams.regions[3, 1]) and torch.equal(cams[3][0].region, cams.regions[3, 0])


def test_a_region_can_belong_to_all_questions():
    shared = CAMs(torch.zeros(2, 3, 4, 4), regions=torch.rand(2, 8, 8) > .5)
    assert torch.equal(shared[1, 2].region, shared.regions[1]) and torch.equal(shared[:, 1].regions, shared.regions) and torch.equal(shared[1:].regions, shared.regions[1:])


def test_several_outputs_are_sliced_item_by_item():
    cams = CAMs(torch.zeros(3, 4, 4), preds=(torch.arange(3), torch.rand(3, 2)), targs=(torch.arange(3.), torch.arange(3)), items=(torch.zeros(1), torch.ones(1), torch.ones(2)))
    some = cams[[2, 1]]
    assert some.preds[0].tolist()==[2, 1] and torch.equal(some.preds[1], cams.preds[1][[2, 1]]) and some.targs[1].tolist()==[2, 1]
    assert [len(item) for item in some.items]==[2, 1] and some[0].title==''


@pytest.mark.parametrize('kwargs, message', [
    (dict(n_space=4), 'n_space is 2'), (dict(task='regression'), "task 'regression' is not known"), (dict(thresh=2), 'thresh is a probability'),
    (dict(texts='why?'), 'one for each of the 2 items'), (dict(texts=['a']), 'one for each of the 2 items'),
    (dict(regions=torch.zeros(2, 8, 8)), r'not torch.float32 \[2, 8, 8\]'), (dict(regions=torch.zeros(3, 8, 8, dtype=torch.bool)), 'n = 2'), (dict(regions=[1, 2]), 'not a list'),
])
def test_what_makes_no_sense_is_said_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message): CAMs(torch.zeros(2, 4, 4), **kwargs)


def test_a_question_that_was_not_asked_is_left_out():
    classes = torch.tensor([[0, 1, NOT_ASKED], [NOT_ASKED, 2, -1], [NOT_ASKED]*3])
    cams = CAMs(torch.rand(3, 3, 4, 4), [torch.rand(3, 8, 8) for _ in range(3)], classes, ['one', 'two', 'score'], torch.tensor([[.9, .8, .1], [.1, .2, .7], [0., 0., 0.]]), vocab=VOCAB, task='multi')
    assert [len(maps) for maps in cams]==[2, 2, 0] and all(isinstance(maps, ItemMaps) for maps in cams)
    assert torch.equal(cams[1][0].map, cams.maps[1, 1]) and torch.equal(cams[1, -1].map, cams.maps[1, 2])
    assert [ax.get_title(loc='left') for ax in cams.show()]==['predicted cat;dog\n▸ cat 0.90', '\n▸ dog 0.80', 'predicted car\n▸ car 0.70', '\n▸ score']
    grid = plt.gcf().axes
    assert [len(ax.images) for ax in grid]==[2, 2, 0, 0, 2, 2, 0, 0, 0] and grid[6].get_title(loc='left').strip()=='predicted –' # nothing was predicted: the title says so
    given = plt.subplots(1, 4)[1]
    assert cams.show(ax=given)==list(given) # blanks need no axes
    with pytest.raises(ValueError, match='4 maps need 4 axes'): cams.show(ax=given[:3])
    with pytest.raises(IndexError, match='question 0 was not asked about item 1'): cams[1, 0]
    with pytest.raises(IndexError, match='question 3 is out of range'): cams[0, 3]
    with pytest.raises(ValueError, match='no question was asked about this item'): cams[2].show()
    flat = cams[:, 0]
    assert len(flat.show())==1 and flat.boxes()[1:]==[[], []] and flat[1].title=='predicted car'


def test_points_of_a_batch():
    preds, targs = torch.tensor([[0., 0., .5, .5], [-1., -1., 1., 1.]]), torch.zeros(2, 2, 2)
    cams = CAMs(torch.ones(2, 2, 2), [torch.zeros(3, 10, 20)]*2, preds=preds, targs=targs, labels=['nose'], task='points')
    axs = cams.show()
    assert [ax.collections[0].get_offsets().tolist() for ax in axs]==[[[10, 5], [15, 7.5]], [[0, 0], [20, 10]]] and axs[0].collections[1].get_offsets().tolist()==[[10, 5]]*2
    assert axs[0].figure.get_supxlabel()=='● predicted   ✚ actual   red raises the score, blue lowers it'
    assert cams[:1].show(colorbar=False)[0].figure.get_supxlabel()==axs[0].figure.get_supxlabel() # what the marks mean is said for a single picture too
    assert torch.equal(cams[1].points['predicted'], preds[1].reshape(2, 2))


def test_options_are_checked_before_images_are_read():
    def fetch(idxs): raise AssertionError('read')
    cams = CAMs(torch.ones(2, 2, 2), Images(fetch, range(2)))
    for wrong, message in ((dict(boxes=[[]]), '1 entries for 2'), (dict(peaks=2), 'peaks is True'), (dict(slices=0), 'slices=0'), (dict(slice=1.), 'index of one slice')):
        with pytest.raises((ValueError, TypeError), match=message): cams.show(**wrong)
    check_style(boxes=True, peaks=[], slice=3, slices=2)


# -- words from users

def test_the_maps_of_an_item_are_saved_together(tmp_path):
    ItemMaps([CAMMap(torch.ones(2, 2)), CAMMap(torch.ones(2, 2))]).show(save=tmp_path/'two.png')
    width, height = Image.open(tmp_path/'two.png').size
    assert width > 1.5*height
    with pytest.raises(ValueError, match='saved as .xyz'): ItemMaps([CAMMap(torch.ones(2, 2))]).show(save='a.xyz')


# -- maps that are none

def test_one_bad_map_among_many(recwarn):
    maps = torch.rand(4, 3, 3) + .1
    maps[1, 0, 0], maps[3] = float('nan'), float('inf')
    cams = CAMs(maps, [torch.rand(3, 9, 9)]*4, items=['a.png', Path('far/b.png'), 'c.png', torch.zeros(3)])
    axs = cams.show()
    assert [len(ax.images) for ax in axs]==[2, 1, 2, 1] and [ax.get_title() for ax in axs]==['', 'not finite', '', 'not finite']
    assert [str(w.message).split('; ')[0] for w in recwarn if w.category is UserWarning]==['not finite (NaN or infinite values in the map or its score), so neither drawn nor searched: item 1 (b.png), item 3']
    recwarn.clear()
    for find in (cams.boxes, cams.peaks):
        with pytest.warns(UserWarning, match=r'item 1 \(b.png\), item 3;') as said: assert [len(found) > 0 for found in find()]==[True, False, True, False]
        assert len(said)==1
    assert cams.is_finite.tolist()==[True, False, True, False] and repr(cams)=='CAMs: 4 items, maps 3×3, 2 not finite'
    recwarn.clear()
    assert len(cams[[0, 2]].show())==2 and cams[0].show() and not [w for w in recwarn if 'not finite' in str(w.message)]


def test_volumes_and_questions_that_are_not_finite(recwarn, tmp_path):
    maps = torch.rand(2, 2, 2, 3, 3)
    maps[0, 1, 1, 1, 1] = float('nan')
    maps[1, 1] = float('nan') # not asked: nothing is missing
    cams = CAMs(maps, [torch.rand(1, 2, 9, 9)]*2, torch.tensor([[0, 1], [1, NOT_ASKED]]), n_space=3, vocab=VOCAB)
    assert cams.is_finite.tolist()==[[True, False], [True, True]]
    axs = cams.show()
    assert [ax.get_title(loc='left').split('\n')[-1] for ax in axs]==['slice 0 of 2', 'slice 1 of 2', 'slice 0 of 2 · not finite', 'slice 1 of 2 · not finite', 'slice 0 of 2', 'slice 1 of 2']
    assert [len(ax.images) for ax in axs]==[2, 2, 1, 1, 2, 2] and len([w for w in recwarn if 'item 0;' in str(w.message)])==1
    with pytest.warns(UserWarning, match='not finite'): cams[0, 1].show_slices()
    with pytest.warns(UserWarning, match='saved as they are: item 0'): cams.save(tmp_path/'cams.npz')


@pytest.mark.parametrize('task, preds', [('single', [[float('nan')]*3]), ('multi', [[.9, float('nan'), .1]]), ('binary', [[float('nan')]]), ('', [[float('inf'), 0., 0.]]), ('points', [[float('nan'), 0.]])])
def test_an_output_that_is_not_finite_names_no_class(task, preds):
    cams = CAMs(torch.ones(1, 2, 2), preds=torch.tensor(preds), targs=None if task=='points' else torch.tensor([1]), losses=torch.tensor([.5]), vocab=VOCAB[:len(preds[0])], task=task)
    assert cams.item_title(0, loss=True).startswith('output not finite') and 'cat' not in cams.item_title(0) and 'output not finite' in cams.show()[0].get_title()


@pytest.mark.parametrize('preds, classes, finite', [
    ([[float('nan'), .5], [.1, .9]], [0, 1], [False, True]), ([[float('nan'), .5], [.1, .9]], [1, 0], [True, True]), ([[float('nan')]*2, [.1, .9]], [-1, -1], [False, True]),
    ([[float('inf'), 0.], [.1, .9]], [-1, 0], [True, True]), ([[float('nan')], [.5]], [1, 1], [False, True]), ([float('nan'), .5], [0, 0], [False, True]), ([[float('nan')]*2, [.1, .9]], None, [False, True]),
])
@pytest.mark.parametrize('single', [True, False])
def test_a_map_of_a_score_that_is_not_finite_is_none(preds, classes, finite, single, recwarn):
    "The map itself may be: a ReLU that was off lets zeros through for NaN"
    maps = torch.rand(2, 3, 3) + .1
    classes = None if classes is None else torch.tensor(classes)
    cams = CAMs(maps if single else maps[:, None].repeat(1, 2, 1, 1), [torch.rand(3, 9, 9)]*2, classes if single or classes is None else classes[:, None].repeat(1, 2), preds=torch.tensor(preds))
    assert cams.is_finite.tolist()==(finite if single else [[one]*2 for one in finite])
    drawn = [len(ax.images)==2 for ax in cams.show()]
    assert drawn==(finite if single else np.repeat(finite, 2).tolist()) and torch.equal(cams.maps[:, 0] if not single else cams.maps, maps)
    assert any('not finite' in str(w.message) for w in recwarn)==(not all(finite))


def test_the_legend_is_of_an_item_whose_output_is_finite():
    cams = CAMs(torch.ones(2, 2, 2), preds=torch.tensor([[float('nan')]*2, [.1, .9]]), targs=torch.tensor([1, 1]), vocab=VOCAB[:2])
    assert [m.title for m in cams]==['output not finite', 'predicted dog 0.90 · actual dog']
    points = CAMs(torch.ones(2, 2, 2), preds=torch.tensor([[float('nan')]*2, [.1, .9]]), targs=torch.zeros(2, 2), task='points')
    assert points.legend()=='● predicted   ✚ actual'


# -- frames

def test_frames_are_saved_as_frames(tmp_path):
    back = CAMs.load(CAMs(torch.ones(1, 4, 2, 2), [frames(4)], n_space=3).save(tmp_path/'cams.npz', images=True))
    assert back[0].image.shape==(4, 6, 5, 3)
