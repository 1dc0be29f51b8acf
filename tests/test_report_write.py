"The page: self-contained, closed to whatever names users have, small, and refused in a sentence where it would make no sense."
import base64
import gc
import hashlib
import importlib.util
import io
import json
import re
import weakref
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat

from fastai_cam.captions import cut
from fastai_cam.report import check_report, report_schema
from fastai_cam.report.page import block
from fastai_cam.report.pictures import encoded, encoded_by_position, MOST_BYTES, packed, Room
from fastai_cam.source.passes import PassRecord
from helpers.reports import body, HOSTILE, hostile_learner, interpretation, pictures, plain

jsonschema = pytest.importorskip('jsonschema')


class Elements(HTMLParser):
    "Tags and attributes of a page"
    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], {}
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))
    def handle_data(self, data):
        tag, attrs = self.found[-1] if self.found else ('', {})
        self.texts.setdefault((tag, attrs.get('id')), data)


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hostile')
    interp = interpretation(hostile_learner(folder))
    interp.report(folder/'page.html', method=['gradcam', 'layercam'], title='<h1>"title"</h1>', findings=[('<i>x</i>', '</script><script>1</script>')], json=folder/'page.json')
    return folder, (folder/'page.html').read_text(encoding='utf-8')


def test_names_are_shown_and_not_run(hostile):
    page = Elements(hostile[1])
    scripts = [attrs for tag, attrs in page.found if tag=='script']
    assert sum('type' not in attrs for attrs in scripts)==1 and all(attrs.get('type', 'application/json')=='application/json' for attrs in scripts)
    assert {tag for tag, _ in page.found}.isdisjoint({'img', 'b', 'iframe', 'object', 'embed', 'base'}) # pictures are made by the script
    assert not any(name.startswith('on') or name=='style' for _, attrs in page.found for name in attrs)
    facts = json.loads(page.texts['script', 'facts'])
    assert set(HOSTILE[:3]) <= set(facts['names']) and facts['title']=='<h1>"title"</h1>' and '\u202e' not in hostile[1]


def test_the_page_asks_nobody_and_allows_only_itself(hostile):
    page = Elements(hostile[1])
    policy = next(attrs['content'] for tag, attrs in page.found if attrs.get('http-equiv')=='Content-Security-Policy')
    rules = dict(rule.strip().split(' ', 1) for rule in policy.split(';'))
    assert rules['default-src']=="'none'" and rules['img-src']=='data:' and set(rules)=={'default-src', 'img-src', 'style-src', 'script-src', 'base-uri', 'form-action'}
    for tag, rule in (('style', 'style-src'), ('script', 'script-src')):
        inside = next(text for text in re.findall(f'<{tag}>(.*?)</{tag}>', hostile[1], re.S))
        assert rules[rule]==f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    assert not re.search(r'https?://|@import|url\(|fetch\(|XMLHttp|WebSocket|sendBeacon|innerHTML|eval\(', hostile[1])
    links = [attrs.get('href', attrs.get('src')) for _, attrs in page.found if 'href' in attrs or 'src' in attrs]
    assert set(links)=={'#pictures', 'data:,'}


def test_facts_and_page_agree(hostile):
    folder, _ = hostile
    facts = json.loads((folder/'page.json').read_text(encoding='utf-8'))
    jsonschema.validate(facts, report_schema())
    assert check_report(folder/'page.json', folder/'page.html')==[]
    other = folder/'other.html'
    other.write_text(hostile[1].replace(facts['sentences'][0]['text'], 'All is well.'), encoding='utf-8')
    assert any('the page does not say' in line for line in check_report(folder/'page.json', other))
    (folder/'none.html').write_text('<p>', encoding='utf-8')
    assert 'is no page that' in check_report(folder/'page.json', folder/'none.html')[0]


def test_the_set_is_not_run_again_for_what_is_known_of_it(tmp_path):
    learn = plain([(picture, i%2) for i, picture in enumerate(pictures(6))], 2)
    interp, n = interpretation(learn), []
    learn.model.register_forward_pre_hook(lambda module, x: n.append(len(x[0])))
    interp.report(tmp_path/'page.html')
    assert sorted(n)==[1, 2, 4], 'maps of two batches, one item to find the layer by, and no other pass'


def test_the_largest_losses_come_first_with_the_learners_own_answers(tmp_path):
    learn = plain([(picture, i%2) for i, picture in enumerate(pictures(6))], 2, vocab=['left', 'right'])
    interp = interpretation(learn)
    interp.report(tmp_path/'page.html', n=2, json=tmp_path/'page.json')
    facts = json.loads((tmp_path/'page.json').read_text())
    losses, order = interp.losses.sort(descending=True)
    assert [item['position'] for item in facts['items']]==order.tolist() and [item['shown'] for item in facts['items']]==[True]*2 + [False]*4
    assert [item['answers'][0]['loss'] for item in facts['items']]==pytest.approx(losses.tolist(), abs=1e-6)
    preds, targs = learn.get_preds()
    assert facts['models'][0]['summary']['n_right']==(preds.argmax(1)==targs).sum()
    page = (tmp_path/'page.html').read_text()
    assert page.count('<script type="application/json" id="i')==2 and 'The 2 with the largest losses of the 6 pictures are shown' in page


def test_the_items_that_are_shown_can_be_chosen(tmp_path):
    learn = plain([(picture, i%2) for i, picture in enumerate(pictures(8))], 2, vocab=['left', 'right'])
    interp = interpretation(learn)
    wrong = interp.select('wrong').tolist()
    assert 0 < len(wrong) < 8
    facts = {}
    for name, chosen in dict(wrong=dict(where='wrong'), one=dict(where='wrong', n=1), left=dict(cls='left', where='label == "left"')).items():
        interp.report(tmp_path/'page.html', json=tmp_path/'page.json', **chosen)
        assert check_report(tmp_path/'page.json', tmp_path/'page.html')==[]
        facts[name] = json.loads((tmp_path/'page.json').read_text())
        jsonschema.validate(facts[name], report_schema())
        shown = [item for item in facts[name]['items'] if item['shown']]
        assert (tmp_path/'page.html').read_text().count('<script type="application/json" id="i')==len(shown)
    shown = {name: [item['position'] for item in told['items'] if item['shown']] for name, told in facts.items()}
    by_loss = interp.losses.argsort(descending=True).tolist()
    assert shown['wrong']==[i for i in by_loss if i in wrong] and shown['one']==shown['wrong'][:1] and sorted(shown['left'])==[0, 2, 4, 6]
    assert {told['models'][0]['summary']['n'] for told in facts.values()}=={8}, 'numbers are of all'
    assert facts['one']['sentences'][-1]['text']=="1 of the 8 pictures are shown, those with the largest losses of what where='wrong' chose, each as the model saw it."
    with pytest.raises(ValueError, match='none is left by where='): interp.report(tmp_path/'none.html', where='loss > 1e9')
    assert not (tmp_path/'none.html').exists()


def test_training_pictures_stand_beside_and_each_is_there_once(tmp_path):
    interp = interpretation(hostile_learner(tmp_path))
    interp.report(tmp_path/'page.html', n=6, like=2, method='gradcam')
    page = (tmp_path/'page.html').read_text()
    blocks = {name: json.loads(data) for name, data in re.findall(r'<script type="application/json" id="([it]\d+)">(.*?)</script>', page, re.S)}
    shown = interp.top_losses(6)[1].tolist()
    table = interp.learn.get_like([interp.dl.items[i] for i in shown], 2).to_df()
    files = {str(file): i for i, file in enumerate(interp.learn.dls.train.items)}
    wanted = {name: [files[one] for one in rows.neighbour] for name, rows in table.groupby('item', sort=False)}
    found = [[one['at'] for row in blocks[f'i{i}']['like'] for one in row['found']] for i in range(6)]
    assert found==[wanted[str(interp.dl.items[i])] for i in shown] and all(found)
    beside = {at for one in found for at in one}
    assert {int(name[1:]) for name in blocks if name[0]=='t'}==beside and len(re.findall(r' id="t\d', page))==len(beside), 'once, and no other'
    assert all(page.index(f'id="t{at}"') < page.index(f'id="i{i}"') for i, one in enumerate(found) for at in one), 'before what it stands beside'
    words = [row['words'] for i in range(6) for row in blocks[f'i{i}']['like']]
    assert words==table.groupby(['item', 'cls'], sort=False).size().reset_index().cls.map(lambda name: cut(name, 80)).tolist() and {row['role'] for row in blocks['i0']['like']}=={'predicted', 'runner-up'}


@pytest.mark.parametrize('like, words', [(0, 'like=0 leaves nothing to show'), (11, 'at most 10'), ('3', 'like')])
def test_a_number_of_training_pictures_that_makes_none(tmp_path, interp, like, words):
    with pytest.raises((ValueError, TypeError), match=words): interp.report(tmp_path/'page.html', like=like)
    assert not list(tmp_path.iterdir())


def test_values_have_no_training_pictures_of_a_class(tmp_path):
    interp = interpretation(plain([(picture, torch.tensor([float(i)])) for i, picture in enumerate(pictures(4))], 1, MSELossFlat()))
    with pytest.raises(ValueError, match='this learner predicts no classes'): interp.report(tmp_path/'page.html', like=1)
    assert not list(tmp_path.iterdir())


def test_pictures_stand_under_their_items_where_losses_are_equal(tmp_path):
    class Same(nn.Module): # sure of everything: all losses are 0 or the same
        def __init__(self): super().__init__(); self.body = body(2)
        def forward(self, x): return self.body(x)*0 + torch.tensor([0., 1e4])
    interp = interpretation(plain([(torch.full((3, 24, 32), i/12), i%2) for i in range(12)], 2, model=Same()))
    for chosen in (dict(where='right'), dict(where=[5, 3, 3, 1]), {}):
        interp.report(tmp_path/'page.html', method='edge_map', json=tmp_path/'page.json', **chosen)
        page = (tmp_path/'page.html').read_text()
        shown = [item for item in json.loads((tmp_path/'page.json').read_text())['items'] if item['shown']]
        blocks = [json.loads(data) for data in re.findall(r'<script type="application/json" id="i\d+">(.*?)</script>', page, re.S)]
        grey = [np.asarray(Image.open(io.BytesIO(base64.b64decode(block['views'][0]['picture']['data']))).convert('L')).mean() for block in blocks]
        assert grey==pytest.approx([255*item['position']/12 for item in shown], abs=4)
        assert check_report(tmp_path/'page.json', tmp_path/'page.html')==[]


def test_page_and_facts_are_two_files(tmp_path, interp):
    with pytest.raises(ValueError, match='is the page itself'): interp.report(tmp_path/'page.html', json=tmp_path/'page.html')
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_read_takes_none_with_it():
    asked = []
    def read(idxs):
        asked.append(idxs)
        if 3 in idxs: raise OSError('gone')
        return [torch.full((3, 8, 8), i/10) for i in idxs]
    found = encoded_by_position(read, [5, 3, 9], 2000, 64)
    assert list(found)==[5, 3, 9] and found[3] is None and asked==[[5, 3, 9], [5], [3], [9]]
    grey = {i: np.asarray(Image.open(io.BytesIO(base64.b64decode(one['data'])))).mean() for i, one in found.items() if one}
    assert grey=={5: pytest.approx(127.5, abs=2), 9: pytest.approx(229.5, abs=2)}
    assert encoded_by_position(read, [], 2000, 64)=={}


def test_the_maps_in_the_page_are_the_learners_own(tmp_path):
    interp = interpretation(plain([(picture, i%2) for i, picture in enumerate(pictures(5))], 2))
    interp.report(tmp_path/'page.html', method=['gradcam', 'layercam'])
    page, cams = Elements((tmp_path/'page.html').read_text()), interp.top_losses_cams(5, show='both', method=['gradcam', 'layercam'])
    for i in range(5):
        maps = json.loads(page.texts['script', f'i{i}'])['views'][0]['maps']
        for k, one in enumerate(maps):
            found = maps[one['same']]['map'] if 'same' in one else one['map']
            values = np.frombuffer(base64.b64decode(found['data']), np.int8).reshape(found['h'], found['w'])/127*found['peak']
            assert np.abs(values - cams.maps[i, k].numpy()).max() <= cams.maps[i, k].abs().max()/200
            assert (one['method'], one['ask'])==(('gradcam', 'layercam')[k//2], k%2)


# -- two learners

def test_two_learners_side_by_side(tmp_path):
    samples = [(picture, i%2) for i, picture in enumerate(pictures(8))]
    first, second = (interpretation(plain(samples, 2, vocab=['left', 'right'], model=body(2, seed))) for seed in (0, 3))
    first.report(tmp_path/'page.html', other=second, names=('new', 'old'), json=tmp_path/'page.json')
    facts = json.loads((tmp_path/'page.json').read_text())
    jsonschema.validate(facts, report_schema())
    assert check_report(tmp_path/'page.json', tmp_path/'page.html')==[] and [model['name'] for model in facts['models']]==['new', 'old']
    for item in facts['items']:
        for answer, interp in zip(item['answers'], (first, second)): assert answer['loss']==pytest.approx(interp.losses[item['position']].item(), abs=1e-6)
    block = json.loads(Elements((tmp_path/'page.html').read_text()).texts['script', 'i0'])
    assert len(block['views'])==2 and block['views'][1]['picture'] is None # the same picture once


def test_the_same_model_twice_differs_in_nothing(tmp_path):
    folder = tmp_path/'files'
    folder.mkdir()
    first, second = (interpretation(hostile_learner(folder, 4, ['a', 'b'])) for _ in range(2))
    first.report(tmp_path/'page.html', other=second, json=tmp_path/'page.json')
    facts = json.loads((tmp_path/'page.json').read_text())
    assert facts['comparison']['better']==facts['comparison']['worse']==0 and all(item['answers'][0]==item['answers'][1] for item in facts['items'])


def test_classes_in_another_order(tmp_path):
    samples = [(picture, i%2) for i, picture in enumerate(pictures(4))]
    model = body(2)
    turned = body(2)
    turned[1][-1].weight.data, turned[1][-1].bias.data = model[1][-1].weight.data.flip(0), model[1][-1].bias.data.flip(0)
    first = interpretation(plain(samples, 2, vocab=['left', 'right'], model=model))
    second = interpretation(plain([(x, 1 - y) for x, y in samples], 2, vocab=['right', 'left'], model=turned))
    first.report(tmp_path/'page.html', other=second, json=tmp_path/'page.json')
    for item in json.loads((tmp_path/'page.json').read_text())['items']: assert item['answers'][0]['prediction']==item['answers'][1]['prediction'] and item['answers'][0]['right']==item['answers'][1]['right']


@pytest.mark.parametrize('change, message', [
    (lambda samples: samples[:-1], 'two learners are compared over the same items'),
    (lambda samples: [(x, 1 - y) for x, y in samples], 'has another one in the other set')])
def test_other_items_are_refused(change, message, tmp_path):
    samples = [(picture, i%2) for i, picture in enumerate(pictures(6))]
    first, second = (interpretation(plain(some, 2, vocab=['left', 'right'])) for some in (samples, change(samples)))
    with pytest.raises(ValueError, match=message): first.report(tmp_path/'page.html', other=second)
    assert not (tmp_path/'page.html').exists()


# -- other tasks

def test_several_labels(tmp_path):
    samples = [(picture, torch.tensor([1., i%2, 0])) for i, picture in enumerate(pictures(6))]
    interp = interpretation(plain(samples, 3, BCEWithLogitsLossFlat(), ['sea', 'sky', 'sand']))
    interp.report(tmp_path/'page.html', json=tmp_path/'page.json')
    facts = json.loads((tmp_path/'page.json').read_text())
    assert facts['kind']=='labels' and facts['items'][0]['label'][0]==0 and check_report(tmp_path/'page.json', tmp_path/'page.html')==[]


def test_numbers(tmp_path):
    samples = [(picture, torch.tensor([float(i)])) for i, picture in enumerate(pictures(6))]
    interp = interpretation(plain(samples, 1, MSELossFlat()))
    interp.report(tmp_path/'page.html', json=tmp_path/'page.json')
    facts = json.loads((tmp_path/'page.json').read_text())
    preds, targs = interp.learn.get_preds()
    assert facts['kind']=='values' and facts['models'][0]['summary']['errors'][0]['error']==pytest.approx((preds.flatten() - targs.flatten()).abs().mean().item(), abs=1e-5)
    assert check_report(tmp_path/'page.json', tmp_path/'page.html')==[]


def test_yes_or_no(tmp_path):
    samples = [(picture, torch.tensor([float(i%2)])) for i, picture in enumerate(pictures(6))]
    interpretation(plain(samples, 1, BCEWithLogitsLossFlat())).report(tmp_path/'page.html', json=tmp_path/'page.json')
    facts = json.loads((tmp_path/'page.json').read_text())
    assert facts['kind']=='classes' and facts['names']==['negative', 'positive'] and {item['label'] for item in facts['items']}=={0, 1}


def test_masks_are_refused_before_any_work(tmp_path):
    samples = [(picture, torch.zeros(24, 32).long()) for picture in pictures(6)]
    interp = interpretation(plain(samples, 2, CrossEntropyLossFlat(axis=1), model=nn.Conv2d(3, 2, 1)))
    with pytest.raises(ValueError, match='this learner gives a class at every pixel'): interp.report(tmp_path/'page.html')
    assert not list(tmp_path.iterdir())


def test_volumes_are_refused_before_any_work(tmp_path):
    samples = [(torch.rand(1, 4, 12, 12, generator=torch.Generator().manual_seed(i)), i%2) for i in range(4)]
    model = nn.Sequential(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)))
    interp = interpretation(plain(samples, 2, model=model))
    with pytest.raises(ValueError, match='this learner looks at volumes'): interp.report(tmp_path/'page.html')
    assert not list(tmp_path.iterdir())


# -- arguments, files, sizes

@pytest.fixture
def interp(): return interpretation(plain([(picture, i%2) for i, picture in enumerate(pictures(4))], 2))


@pytest.mark.parametrize('arguments, message', [
    (dict(path='page.pdf'), 'a report is a page: name it'), (dict(n=0), 'leaves nothing to show'), (dict(n=6000), 'at most 5000'), (dict(other=3), 'other is the interpretation of another learner'),
    (dict(names=('a',)), 'names are two'), (dict(method='gradcan'), 'gradcam'), (dict(layer='nowhere'), 'nowhere'), (dict(path='no/folder/page.html'), 'there is no folder')])
def test_what_makes_no_report_is_refused(interp, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message): interp.report(**arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(interp, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name=='jinja2' else found(name, *rest))
    with pytest.raises(ImportError, match=r"needs the package 'jinja2'.*pip install 'fastai_cam\[report\]'"): interp.report(tmp_path/'page.html')


def test_a_page_that_fails_leaves_the_old_one(interp, monkeypatch, tmp_path):
    page = tmp_path/'page.html'
    interp.report(page)
    before = page.read_bytes()
    def broken(*args): raise OSError('the disk is full')
    monkeypatch.setattr('fastai_cam.report.write.maps_of_item', broken)
    with pytest.raises(OSError): interp.report(page)
    assert page.read_bytes()==before and list(tmp_path.iterdir())==[page]


@pytest.mark.parametrize('findings, titles', [((), []), ('grey', ['Note']), (['grey', ('Mine', 'green')], ['Note', 'Mine']), (pd.DataFrame(dict(x=[1])), ['DataFrame'])])
def test_findings_are_one_or_several(interp, findings, titles, tmp_path):
    interp.report(tmp_path/'page.html', findings=findings)
    page = (tmp_path/'page.html').read_text()
    assert re.findall(r'<article class="card finding">\s*<h3><bdi>(.*?)</bdi>', page)==titles and ('What else was found' in page)==bool(titles)


def test_the_learner_is_left_as_it_was(interp, tmp_path):
    learn = interp.learn
    learn.model.train()
    before, callbacks, states = {name: value.clone() for name, value in learn.model.state_dict().items()}, list(learn.cbs), torch.get_rng_state()
    interp.report(tmp_path/'page.html')
    assert learn.model.training and list(learn.cbs)==callbacks and torch.equal(states, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())


def test_an_output_that_is_not_finite_has_no_map(tmp_path):
    samples = [(picture if i else picture*float('nan'), i%2) for i, picture in enumerate(pictures(4))]
    interp = interpretation(plain(samples, 2))
    interp.report(tmp_path/'page.html', json=tmp_path/'page.json')
    facts = json.loads((tmp_path/'page.json').read_text())
    assert sum(item['answers'][0]['prediction'] is None for item in facts['items'])==1 and check_report(facts)==[]


def test_pictures_are_forgotten_when_they_are_written(tmp_path, monkeypatch):
    interp, alive, passes = interpretation(plain([(picture, i%2) for i, picture in enumerate(pictures(40))], 2)), [], weakref.WeakSet()
    made = PassRecord.__init__
    monkeypatch.setattr(PassRecord, '__init__', lambda self, *args, **kwargs: (made(self, *args, **kwargs), passes.add(self))[0])
    gc.disable() # as if Python did not look by itself: what is large to torch is small to its collector
    def counted(position, data):
        alive.append(len(passes))
        return block(position, data)
    monkeypatch.setattr('fastai_cam.report.write.block', counted)
    try: interp.report(tmp_path/'page.html', method='gradcam')
    finally: gc.enable()
    assert len(alive)==40 and max(alive) <= 3, alive # that of the batch, and what decodes its pictures


@pytest.mark.parametrize('n, n_maps', [(9, 2), (500, 4), (5000, 2), (5000, 8)])
def test_however_many_there_are_they_have_room(n, n_maps):
    "As if all pictures were as large as they may be"
    room, total = Room(n, n_maps), 0
    for _ in range(n):
        size = int(1.34*room.picture + n_maps*(1.34*room.map_side**2 + 120) + 300)
        total += size
        room.take(size)
    assert total <= MOST_BYTES*1.001 and room.map_side >= 7


def test_photos_are_no_larger_than_they_may_be():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 600, 3), dtype=np.uint8))
    for limit in (2000, 6000, 60_000):
        found = encoded(noise, limit)
        assert len(base64.b64decode(found['data'])) <= limit and found['w'] > found['h']


def test_maps_keep_their_shape_and_sign():
    values = torch.linspace(-1, 3, 28*56).view(28, 56)
    found = packed(values, 14)
    cells = np.frombuffer(base64.b64decode(found['data']), np.int8).reshape(found['h'], found['w'])
    assert cells.shape==(7, 14) and cells[0, 0] < 0 < cells[-1, -1]==127
    zero = packed(torch.zeros(3, 3), 14)
    assert zero['peak']==0 and not np.frombuffer(base64.b64decode(zero['data']), np.int8).any()


@pytest.mark.parametrize('wrong, words', [(dict(nonsense=1), "there is no argument 'nonsense'"), (dict(target_layer='0'), "it is called 'layer'"), (dict(wher='wrong'), "did you mean 'where'")])
def test_arguments_that_do_not_exist(tmp_path, interp, wrong, words):
    with pytest.raises(TypeError, match=words): interp.report(tmp_path/'page.html', **wrong)
    assert not list(tmp_path.iterdir())
