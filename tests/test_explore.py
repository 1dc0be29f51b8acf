"Marks that stay with their items whatever happens, and the explorer that sets them: in Python, in headless Chromium, in a real JupyterLab."
import asyncio
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from fastai.data.transforms import parent_label
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.vision.all import CategoryBlock, DataBlock, get_image_files, ImageBlock, ImageDataLoaders, IndexSplitter, Learner, MaskBlock, Resize

from fastai_cam.all import CAMInterpretation
from fastai_cam.captions import as_text
from fastai_cam.explore import Marks, marks as marks_room
from fastai_cam.explore.marks import FORMAT, mark_keys, remembered_marks
from fastai_cam.report.pictures import packed
from helpers.reports import body, HOSTILE, hostile_files, hostile_learner, interpretation, pictures as tensors, plain

pytest.importorskip('anywidget')
from helpers.explorer import Wire # noqa: E402

LABELS = ['cat', 'dog', 'cat', 'dog', 'bird', 'cat']
PHOTOS = [f'/data/pets/{label}/{i}.jpg' for i, label in enumerate(LABELS)]


def marks_of(file=None, photos=PHOTOS, labels=LABELS, **options):
    return Marks(photos, labels, **{'predictions': labels[::-1], 'classes': ['bird', 'cat', 'dog'], 'root': '/data/pets', 'file': file, **options})


# -- marks

def test_marks_are_what_was_said():
    marks = marks_of()
    marks.mark([0, 5], 'drop')
    marks.mark(3, 'relabel', 'cat')
    marks.mark(2, 'relabel', 2)
    marks.mark(1, 'keep')
    marks.mark(4, 'suspicious')
    marks.mark(1, None)
    assert marks.said()=={0: ('drop', None), 2: ('relabel', 'dog'), 3: ('relabel', 'cat'), 4: ('suspicious', None), 5: ('drop', None)}
    assert marks[3]==('relabel', 'cat') and marks[1] is None and len(marks)==5
    assert repr(marks)=='Marks(2 relabel, 2 drop, 1 suspicious; 6 items)'
    df = marks.to_df()
    assert list(df.columns)==['index', 'item', 'label', 'prediction', 'mark', 'new_label'] and list(df['index'])==[0, 2, 3, 4, 5]
    assert df.iloc[2].tolist()==[3, PHOTOS[3], 'dog', 'cat', 'relabel', 'cat'] and df.new_label.tolist()==[None, 'dog', 'cat', None, None]
    assert marks.delete()==[0, 5] and marks.change()==[(2, 'dog'), (3, 'cat')]
    assert marks.fns[3]==Path(PHOTOS[3]) and len(marks.fns)==6
    assert len(marks_of().to_df())==0


@pytest.mark.parametrize('call, sentence', [
    (lambda marks: marks.mark(6, 'drop'), 'there is no item 6: the set has 6, 0 to 5'),
    (lambda marks: marks.mark('x', 'drop'), "there is no item 'x'"),
    (lambda marks: marks.mark(0, 'delete'), "a mark is one of 'keep', 'relabel', 'drop', 'suspicious'"),
    (lambda marks: marks.mark([0, 1], 'relabel', 'horse'), "relabel to what? label='horse' is none of the 3 classes"),
    (lambda marks: marks.mark(0, 'drop', 'cat'), "only 'relabel' has a label"),
    (lambda marks: marks.cleaned(), 'the items are no rows of a table: give one'),
    (lambda marks: marks.cleaned(pd.DataFrame(dict(file=['a']))), 'item= names the column of their files'),
    (lambda marks: marks.cleaned(pd.DataFrame(dict(file=['a'])), item='path'), "the table has no column 'path': file")])
def test_what_makes_no_sense_changes_nothing(call, sentence):
    marks = marks_of()
    marks.mark(2, 'keep')
    with pytest.raises(ValueError, match=re.escape(sentence)): call(marks)
    assert marks.said()=={2: ('keep', None)}


@pytest.mark.parametrize('items, meant', [
    (torch.tensor([1, 4]), [1, 4]), (np.array([1, 4]), [1, 4]), (np.int64(3), [3]), (torch.tensor(3), [3]), ([np.int64(1), torch.tensor(2)], [1, 2]), (pd.Series([5]), [5]), (range(2), [0, 1]),
    ((i for i in (0, 2)), [0, 2]), ([True, False, False, False, False, True], [0, 5]), (torch.arange(6) > 3, [4, 5]), (np.arange(6) < 1, [0]), ([], []), (torch.tensor([], dtype=torch.long), [])])
def test_items_are_meant_as_select_says_them(items, meant):
    marks = marks_of()
    marks.mark(items, 'drop')
    assert list(marks.delete())==meant and all(type(i) is int for i in marks.said())


@pytest.mark.parametrize('items, sentence', [
    ([True, False], 'a mask has a bool for each of the 6 items, and this one has 2'), ([1.9], 'there is no item 1.9: the set has 6, 0 to 5'), (torch.tensor([1., 2.]), 'there is no item 1.0'),
    (True, 'there is no item True'), ([0, True], 'there is no item True'), (np.float32(1), 'there is no item 1.0'), ('12', "there is no item '12'"), (torch.tensor([[0, 1]]), 'there is no item [0, 1]')])
def test_what_is_no_position_is_refused(items, sentence):
    marks = marks_of()
    with pytest.raises(ValueError, match=re.escape(sentence)): marks.mark(items, 'drop')
    assert len(marks)==0


def test_what_is_relabelled_as_it_is_labelled_is_kept():
    marks = marks_of()
    marks.mark([0, 1, 2], 'relabel', 'cat')
    marks.mark(3, 'relabel', 2)
    assert marks.said()=={0: ('keep', None), 1: ('relabel', 'cat'), 2: ('keep', None), 3: ('keep', None)} and marks.change()==[(1, 'cat')]


def test_items_without_classes_are_not_relabelled():
    marks = marks_of(classes=[])
    with pytest.raises(ValueError, match=re.escape("label=(0.1, 0.2): these items have no class to be relabelled to, mark them 'suspicious' or 'drop'")): marks.mark(0, 'relabel', (.1, .2))
    marks.mark(0, 'relabel') # that its label is wrong, whatever is right
    assert marks.said()=={0: ('relabel', None)} and marks.change()==[]


def test_marks_follow_their_items(tmp_path):
    marks = marks_of(tmp_path/'marks.json')
    assert not (tmp_path/'marks.json').exists()
    marks.mark(1, 'drop')
    marks.mark(4, 'relabel', 'dog')
    moved = [name.replace('/data/pets', str(tmp_path/'pets')) for name in PHOTOS[::-1]]
    again = marks_of(tmp_path/'marks.json', moved, LABELS[::-1], root=tmp_path/'pets')
    assert again.said()=={1: ('relabel', 'dog'), 4: ('drop', None)} # in another order, elsewhere on the disk
    fewer = marks_of(tmp_path/'marks.json', PHOTOS[:3], LABELS[:3])
    fewer.mark(0, 'keep')
    assert fewer.said()=={0: ('keep', None), 1: ('drop', None)}
    assert marks_of(tmp_path/'marks.json').said()=={0: ('keep', None), 1: ('drop', None), 4: ('relabel', 'dog')} # what was not there has stayed
    assert json.loads((tmp_path/'marks.json').read_text())['format']==FORMAT and [file.name for file in tmp_path.iterdir()]==['marks.json']


def test_marks_of_other_items_are_refused(tmp_path):
    file = tmp_path/'marks.json'
    marks_of(file).mark(1, 'drop')
    before = file.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"the marks in {str(file)!r} are about other items: of 6 that it names none is here. Give a file of another name")):
        marks_of(file, ['/data/cars/1.jpg', '/data/cars/2.jpg'], ['x', 'y'], root='/data/cars')
    unnamed = tmp_path/'unnamed.json'
    marks_of(unnamed, [object()]*20, ['cat', 'dog']*10).mark(1, 'drop')
    assert len(marks_of(unnamed, [object()]*20, ['cat', 'dog']*10))==1
    for items, labels in (([object()]*20, ['dog', 'cat']*10), ([object()]*19, (['cat', 'dog']*10)[:19])):
        with pytest.raises(ValueError, match='are about items without names, which are not these'): marks_of(unnamed, items, labels)
    for text in (b'{"a": 1}', b'\xff\xfe', b'[]', b''):
        file.write_bytes(text)
        with pytest.raises(ValueError, match='holds no marks'): marks_of(file)
        assert file.read_bytes()==text
    file.write_bytes(before)
    with pytest.raises(FileNotFoundError, match='there is no folder'): marks_of(tmp_path/'none'/'marks.json')


@pytest.mark.parametrize('change', [
    dict(marks=['x']), dict(items=None), dict(items=[1]), dict(marks=[dict(item=['a'], mark='keep')]), dict(marks=[dict(item='a')]), dict(marks=[dict(item='a', mark='relabel', label=['b'])]), dict(marks={}), None])
def test_damaged_marks_are_refused_in_a_sentence(tmp_path, change):
    file = tmp_path/'marks.json'
    marks_of(file).mark(1, 'drop')
    file.write_text('['*100_000 + ']'*100_000 if change is None else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match='holds no marks: it is damaged, or was not written by interp.explore'): marks_of(file)


def test_two_kernels_do_not_undo_each_other(tmp_path):
    first, second = marks_of(tmp_path/'marks.json'), marks_of(tmp_path/'marks.json')
    first.mark(0, 'drop')
    second.mark(1, 'keep')
    first.mark(2, 'suspicious')
    second.mark(0, None)
    assert marks_of(tmp_path/'marks.json').said()=={1: ('keep', None), 2: ('suspicious', None)}==second.said()
    first.mark(5, 'keep') # what is written is not written again
    assert first.said()=={1: ('keep', None), 2: ('suspicious', None), 5: ('keep', None)}


def test_two_that_write_at_once_lose_nothing(tmp_path):
    both = [Marks([f'{i}.jpg' for i in range(40)], file=tmp_path/'marks.json') for _ in range(2)]
    threads = [threading.Thread(target=lambda k=k: [both[k].mark(20*k + i, 'drop') for i in range(20)]) for k in range(2)]
    for one in threads: one.start()
    for one in threads: one.join()
    for one in both: one.refresh()
    assert len(both[0])==40==len(both[1]) and [file.name for file in tmp_path.iterdir()]==['marks.json']


@pytest.mark.slow
def test_two_processes_lose_nothing(tmp_path):
    code = "from fastai_cam.explore import Marks; import sys; marks = Marks([f'{i}.jpg' for i in range(80)], file=sys.argv[1]); [marks.mark(i, 'drop') for i in range(int(sys.argv[2]), 80, 2)]"
    both = [subprocess.Popen([sys.executable, '-c', code, tmp_path/'marks.json', str(k)]) for k in range(2)]
    assert [one.wait(120) for one in both]==[0, 0] and len(Marks([f'{i}.jpg' for i in range(80)], file=tmp_path/'marks.json'))==80


def test_somebody_who_holds_the_folder_is_not_waited_for_forever(tmp_path, monkeypatch):
    fcntl = pytest.importorskip('fcntl')
    monkeypatch.setattr(marks_room, '_alone_with', partial(marks_room._alone_with, patience=.1))
    marks = marks_of(tmp_path/'marks.json')
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(TimeoutError, match='somebody else has been writing'): marks.mark(0, 'drop')
    os.close(folder)
    assert len(marks)==1 and not (tmp_path/'marks.json').exists()
    marks.mark(1, 'keep')
    assert len(marks_of(tmp_path/'marks.json'))==2
    monkeypatch.setattr(fcntl, 'flock', lambda *args: (_ for _ in ()).throw(OSError('no locks here')))
    marks.mark(2, 'keep')
    assert len(marks_of(tmp_path/'marks.json'))==3


def test_marks_wait_for_a_file_that_cannot_be_written(tmp_path):
    marks = marks_of(tmp_path/'marks.json')
    marks.mark(0, 'drop')
    (tmp_path/'marks.json').write_text('something else')
    with pytest.raises(ValueError, match='holds no marks'): marks.mark(1, 'keep')
    assert marks.said()=={0: ('drop', None), 1: ('keep', None)} and (tmp_path/'marks.json').read_text()=='something else'
    (tmp_path/'marks.json').unlink()
    marks.mark(2, 'suspicious')
    assert marks_of(tmp_path/'marks.json').said()=={0: ('drop', None), 1: ('keep', None), 2: ('suspicious', None)}


def test_hostile_names_in_a_file(tmp_path):
    names = [f'/data/pets/{name}' for name in ('\ud800broken\udcff', '"quoted"\n', "'; --", '\u202egpj', 'x'*10_000, '<script>', 'a', 'a')]
    marks = marks_of(tmp_path/'marks.json', names, HOSTILE + ['y']*3, classes=HOSTILE)
    for i in range(len(names)): marks.mark(i, 'relabel', (i + 1)%5)
    again = marks_of(tmp_path/'marks.json', names, HOSTILE + ['y']*3, classes=HOSTILE)
    assert again.said()=={i: ('relabel', HOSTILE[(i + 1)%5]) for i in range(8)} and again.keys[-2:]==['a', 'a (2)']
    (tmp_path/'marks.json').read_text(encoding='ascii')


def test_keys_are_below_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mark_keys(['pets/cat/1.jpg', str(tmp_path/'pets/cat/2.jpg'), '/elsewhere/3.jpg', 'item 3', '4', b'x'], 'pets')==['cat/1.jpg', 'cat/2.jpg', '/elsewhere/3.jpg', 'item 3', 'item 4', 'item 5']


def test_marks_are_merged(tmp_path):
    first, second = marks_of(), marks_of(photos=PHOTOS[::-1], labels=LABELS[::-1])
    first.mark(0, 'drop')
    second.mark([5, 4], 'keep') # the first and the second item
    first.merge(second)
    assert first.said()=={0: ('drop', None), 1: ('keep', None)}
    marks_of(tmp_path/'marks.json').mark(3, 'suspicious')
    first.merge(tmp_path/'marks.json')
    assert first.said()=={0: ('drop', None), 1: ('keep', None), 3: ('suspicious', None)}


class Data: pass


def test_marks_live_with_the_data(tmp_path):
    data = Data()
    remembered = lambda file=None, labels=LABELS: remembered_marks(data, lambda file: marks_of(file, labels=labels), file)
    remembered().mark(0, 'drop')
    assert remembered().said()=={0: ('drop', None)}
    kept = remembered(tmp_path/'marks.json') # what is in memory goes along
    kept.mark(1, 'keep')
    kept.mark(0, None)
    assert remembered(tmp_path/'marks.json').said()=={1: ('keep', None)} and remembered().said()=={0: ('drop', None)}
    assert remembered_marks(Data(), lambda file: marks_of(file), tmp_path/'marks.json').said()=={1: ('keep', None)}
    gone = weakref.ref(data)
    del data, remembered, kept
    gc.collect()
    assert gone() is None


def test_many_threads_lose_nothing(tmp_path):
    marks = Marks([f'{i}.jpg' for i in range(80)], file=tmp_path/'marks.json')
    threads = [threading.Thread(target=lambda k=k: [marks.mark(20*k + i, 'drop') for i in range(20)]) for k in range(4)]
    for one in threads: one.start()
    for one in threads: one.join()
    assert len(marks)==80==len(json.loads((tmp_path/'marks.json').read_text())['marks'])


# -- tables

def test_a_table_is_cleaned():
    table = pd.DataFrame(dict(name=[f'{i}.jpg' for i in range(6)], animal=LABELS, size=range(6)), index=[10, 11, 12, 13, 14, 15])
    marks = marks_of(table=table.iloc[::-1], photos=PHOTOS[::-1], labels=LABELS[::-1])
    marks.mark(0, 'drop') # row 15
    marks.mark(2, 'relabel', 'bird') # row 13
    found = marks.cleaned(table)
    assert list(found.index)==[10, 11, 12, 13, 14] and list(found.animal)==['cat', 'dog', 'cat', 'bird', 'bird'] and list(table.animal)==LABELS
    assert list(marks.cleaned().index)==[14, 13, 12, 11, 10]
    more = pd.concat([table, pd.DataFrame(dict(name=['n'], animal=['fox'], size=[9]), index=[99])])
    assert list(marks.cleaned(more).index)==[10, 11, 12, 13, 14, 99]
    assert list(marks.cleaned(table.astype(dict(animal='category'))).animal)==['cat', 'dog', 'cat', 'bird', 'bird']
    with pytest.raises(ValueError, match='row 15 of the table is another one'): marks.cleaned(table.assign(size=table['size'].to_numpy()[::-1]))
    with pytest.raises(ValueError, match="'cat/5.jpg' is marked, and is not in the table"): marks.cleaned(table.iloc[:5])
    with pytest.raises(ValueError, match='has the same twice'): marks.cleaned(pd.concat([table, table]))
    with pytest.raises(ValueError, match='which column has the labels?'): marks.cleaned(table.assign(again=LABELS))
    assert list(marks.cleaned(table.assign(again=LABELS), label='again').again)==['cat', 'dog', 'cat', 'bird', 'bird']


@pytest.mark.parametrize('name', [str, lambda name: name.removeprefix('/data/pets/'), lambda name: name.split('/')[-1]])
def test_a_table_of_files_is_cleaned(name):
    marks = marks_of()
    marks.mark(0, 'drop')
    marks.mark(1, 'relabel', 'cat')
    table = pd.DataFrame(dict(file=[name(one) for one in PHOTOS], y=LABELS)).sample(frac=1, random_state=1)
    found = marks.cleaned(table, item='file').sort_index()
    assert list(found.y)==['cat', 'cat', 'dog', 'bird', 'cat'] and list(found.index)==[1, 2, 3, 4, 5]


# -- the explorer, without a page

def test_two_items_in_one_row_are_not_cleaned():
    marks = marks_of(photos=['/data/pets/cat/0.jpg', '/data/pets/dog/0.jpg', '/data/pets/cat/1.jpg'], labels=LABELS[:3])
    table = pd.DataFrame(dict(file=['0.jpg', '1.jpg'], y=['cat', 'cat']))
    marks.mark(2, 'drop')
    assert list(marks.cleaned(table, item='file').file)==['0.jpg']
    marks.mark(1, 'drop')
    with pytest.raises(ValueError, match="'cat/0.jpg' and 'dog/0.jpg' are found in the same row of the table"): marks.cleaned(table, item='file')


def talk(explorer):
    "What the kernel says, in order"
    said = []
    explorer.widget.send = said.append
    return said


def ask(explorer, ask, **content): explorer._heard(None, dict(ask=ask, **content), [])


@pytest.fixture(scope='module')
def learn(tmp_path_factory): return hostile_learner(tmp_path_factory.mktemp('files'), 10)


@pytest.fixture(scope='module')
def interp(learn): return interpretation(learn)


@pytest.fixture
def explorer(interp):
    found = interp.explore(n_page=4)
    found.marks.mark(range(10), None)
    yield found
    found.marks.mark(range(10), None)
    found.close()


def test_the_page_knows_what_the_table_says(interp, explorer):
    df, F = interp.to_df(), explorer.widget.facts
    order = interp.top_losses(None)[1].tolist()
    assert F['position']==order and F['kind']=='classes' and F['n_all']==10 and F['page']==4
    df = df.iloc[order]
    for name, column in (('label', 'label'), ('prediction', 'prediction')): assert [interp.vocab[c] for c in F[name]]==list(df[column])
    for name, column in (('probability', 'probability'), ('loss', 'loss')): assert np.allclose(F[name], df[column], atol=2e-6)
    assert repr(explorer)=='Explorer(Marks(none; 10 items))' and F['relabel'] is True
    assert F['right']==df.is_right.tolist() and F['key']==[as_text(Path(item).name) for item in df['item']]
    json.dumps(F).encode() # whatever the names are
    assert list(explorer.widget.pictures)==[str(i) for i in order[:4]] and explorer.widget.maps=={}
    image = Image.open(io.BytesIO(__import__('base64').b64decode(explorer.widget.pictures[str(order[0])]['data'])))
    assert image.size==(64, 48)
    assert np.abs(np.asarray(image.convert('RGB')).astype(float) - np.asarray(Image.open(df['item'].iloc[0]))).mean() < 20 # decoded, not normalised


def test_maps_are_those_of_the_interpretation(interp, explorer):
    said = talk(explorer)
    method = explorer.widget.facts['methods'].index('gradcam')
    ask(explorer, 'maps', id='m', items=[3, 1], page=[1, 2, 3], method=method, layer=0)
    assert said==[dict(done='m', problem=None)] and set(explorer.widget.maps['views'])=={'3', '1'} and explorer.widget.maps['signed'] is False
    cams = interp.cams_of(torch.tensor([3, 1]), 'both', 'gradcam')
    for at, i in enumerate((3, 1)):
        assert explorer.widget.maps['views'][str(i)][0]['map']==packed(cams.maps[at, 0], 28)
        assert explorer.widget.maps['views'][str(i)][0]['text']==cams.question(at, 0, width=120)
    ask(explorer, 'maps', id='n', items=[2], page=[1, 2], method=method, layer=0)
    assert set(explorer.widget.maps['views'])=={'1', '2'} # what is not looked at any more is forgotten
    other = explorer.widget.facts['layers'].index('0')
    ask(explorer, 'maps', id='o', items=[2], page=[1, 2], method=method, layer=other)
    assert set(explorer.widget.maps['views'])=={'2'} and explorer.widget.maps['layer']==other
    assert explorer.widget.maps['views']['2'][0]['map']==packed(interp.cams_of(torch.tensor([2]), 'both', 'gradcam', '0').maps[0, 0], 28)


def test_an_error_is_a_sentence(interp):
    def broken(cap, scores): raise RuntimeError('there is nothing to be seen')
    explorer = interp.explore(method=['gradcam', broken])
    said = talk(explorer)
    ask(explorer, 'maps', id='m', items=[0], page=[0], method=1, layer=0)
    assert said[0]['done']=='m' and 'there is nothing to be seen' in said[0]['problem'] and explorer.widget.maps=={}
    ask(explorer, 'maps', id='n', items=[0], page=[0], method=0, layer=0)
    assert said[1]==dict(done='n', problem=None)
    def stopped(idxs, m, l): raise KeyboardInterrupt
    explorer._maps = stopped
    with pytest.raises(KeyboardInterrupt): ask(explorer, 'maps', id='o', items=[0], page=[0], method=0, layer=0)
    assert said[2]['done']=='o' # the page does not wait for ever
    explorer.close()


def test_a_picture_that_cannot_be_read_takes_none_with_it(tmp_path):
    learn = hostile_learner(tmp_path, 6)
    interp = interpretation(learn)
    Path(interp.to_df()['item'][2]).write_bytes(b'no picture')
    explorer = interp.explore(n_page=3)
    talk(explorer)
    ask(explorer, 'pictures', id='p', items=[1, 2, 3])
    assert explorer.widget.pictures['2'] is None and explorer.widget.pictures['1']['w']==64==explorer.widget.pictures['3']['w']
    explorer.close()


def test_marks_of_the_page(interp, explorer):
    said = talk(explorer)
    ask(explorer, 'marks', marks=[dict(id='a-1', item=3, mark='relabel', label=1), dict(id='a-2', item=4, mark='drop', label=None), dict(id='a-3', item=3, mark='keep', label=None)])
    assert explorer.marks.said()=={3: ('keep', None), 4: ('drop', None)} and said==[dict(taken=['a-1', 'a-2', 'a-3'], problem=None)]
    assert explorer.widget.marked=={'3': ['keep', None], '4': ['drop', None]}
    ask(explorer, 'marks', marks=[dict(id='a-4', item=3, mark='relabel', label=4)])
    assert explorer.change()==[(3, interp.vocab[4])] and explorer.delete()==[4] and explorer.widget.marked['3']==['relabel', 4]
    assert explorer.to_df().equals(explorer.marks.to_df()) and explorer.fns[4].name==Path(explorer.to_df()['item'][1]).name
    ask(explorer, 'marks', marks=[dict(id='a-5', item=99, mark='drop')])
    assert said[-1]['taken']==['a-5'] and 'there is no item 99' in said[-1]['problem']
    explorer.marks.mark(5, 'suspicious') # from a cell
    assert explorer.widget.marked['5']==['suspicious', None]
    ask(explorer, 'view', view=dict(page=1))
    assert explorer.widget.view==dict(page=1)


def test_marks_outlive_the_cell_and_the_kernel(interp, learn, tmp_path):
    first = interp.explore(file=tmp_path/'marks.json')
    first.marks.mark(2, 'drop')
    again = interpretation(learn).explore(file=tmp_path/'marks.json', cls=1) # the cell runs again, for another class
    assert again.marks is first.marks and again.widget.marked=={'2': ['drop', None]}
    again.marks.mark(3, 'keep')
    assert first.widget.marked=={'2': ['drop', None], '3': ['keep', None]} # pages of the same set say the same
    elsewhere = hostile_learner(Path(first.fns[0]).parent, 10) # as in another kernel
    other = interpretation(elsewhere).explore(file=tmp_path/'marks.json')
    assert other.marks is not first.marks and other.marks.said()==first.marks.said()
    for one in (first, again, other): one.close()


def test_the_learner_is_left_and_let_go(tmp_path):
    learn = hostile_learner(tmp_path, 6)
    interp, cbs = interpretation(learn), learn.cbs
    before = list(cbs)
    explorer = interp.explore()
    talk(explorer)
    ask(explorer, 'maps', id='m', items=[0], page=[0], method=0, layer=0)
    assert learn.cbs is cbs and list(cbs)==before and learn.model.training
    gone = weakref.ref(learn.dls)
    explorer.close()
    del learn, interp, explorer, cbs, before
    gc.collect()
    assert gone() is None


def test_fastais_recipe(tmp_path):
    for i, label in enumerate(['cat', 'dog']*6):
        (tmp_path/label).mkdir(exist_ok=True)
        Image.new('RGB', (32, 32), (20*i, 0, 0)).save(tmp_path/label/f'{i}.png')
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(32))
    learn = Learner(block.dataloaders(tmp_path, path=tmp_path, bs=4, num_workers=0), body(2), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    cleaner = CAMInterpretation.from_learner(learn, ds_idx=0).explore()
    at = {fn.name: i for i, fn in enumerate(cleaner.fns)}
    names = list(at)[:2]
    cleaner.marks.mark(at[names[0]], 'drop')
    was = cleaner.fns[at[names[1]]].parent.name
    now = dict(cat='dog', dog='cat')[was]
    cleaner.marks.mark(at[names[1]], 'relabel', now)
    for idx in cleaner.delete(): cleaner.fns[idx].unlink()
    for idx, cat in cleaner.change(): shutil.move(str(cleaner.fns[idx]), tmp_path/cat)
    assert len(get_image_files(tmp_path))==11 and (tmp_path/now/names[1]).exists() and not (tmp_path/was/names[1]).exists()
    cleaner.close()


def test_rows_of_a_table(tmp_path):
    table = pd.DataFrame(dict(name=[f'{i:02}.png' for i in range(12)], animal=['cat', 'dog']*6), index=range(100, 112))
    for name in table.name: Image.new('RGB', (32, 32)).save(tmp_path/name)
    options = dict(valid_pct=.5, seed=1, item_tfms=Resize(32), bs=4, num_workers=0)
    learn = Learner(ImageDataLoaders.from_df(table, tmp_path, **options), body(2), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    cleaner = CAMInterpretation.from_learner(learn).explore()
    assert sorted(cleaner.widget.facts['key'])==sorted(cleaner.marks.keys)==sorted(cleaner.marks.table.name)
    assert cleaner.fns[0]==tmp_path/cleaner.marks.table.name.iloc[0]
    cleaner.marks.mark(0, 'drop')
    cleaner.marks.mark(1, 'relabel', 'cat')
    found = cleaner.marks.cleaned(table)
    first, second = cleaner.marks.table.index[:2]
    assert set(table.index) - set(found.index)=={first} and found.animal[second]=='cat'
    tuples = Learner(ImageDataLoaders.from_lists(tmp_path, [tmp_path/name for name in table.name], list(table.animal), **options), body(2), loss_func=CrossEntropyLossFlat())
    tuples.remove_cb(tuples.progress)
    other = CAMInterpretation.from_learner(tuples).explore()
    assert sorted(other.marks.keys)==sorted(cleaner.marks.keys) # by their files, too
    for one in (cleaner, other): one.close()


@pytest.mark.parametrize('n_out, loss, label, kind', [(3, BCEWithLogitsLossFlat(), lambda i: torch.tensor([1., 0, i%2]), 'labels'), (2, MSELossFlat(), lambda i: torch.tensor([.5, i/4]), 'values'),
                                                      (2, CrossEntropyLossFlat(), lambda i: i%2, 'classes'), (1, BCEWithLogitsLossFlat(), lambda i: torch.tensor([float(i%2)]), 'labels')])
def test_other_tasks(n_out, loss, label, kind):
    interp = interpretation(plain([(picture, label(i)) for i, picture in enumerate(tensors(4))], n_out, loss))
    explorer = interp.explore()
    F, said = explorer.widget.facts, talk(explorer)
    ask(explorer, 'maps', id='m', items=[0, 1], page=[0, 1], method=0, layer=0)
    assert said==[dict(done='m', problem=None)] and all(one[0]['map'] for one in explorer.widget.maps['views'].values())
    assert F['kind'] in (kind, 'classes') and F['key'][0].startswith('item ') and len(F['names'])==(2 if n_out==1 else n_out)
    assert F['relabel']==(F['kind']=='classes')
    explorer.marks.mark(1, 'relabel', None if F['kind'] != 'classes' else 0)
    assert list(explorer.change())==([] if F['kind'] != 'classes' else [(1, explorer.marks.classes[0])])
    explorer.close()


def test_a_mask_is_not_relabelled(tmp_path):
    files = hostile_files(tmp_path, 4)
    get_mask = lambda file: np.repeat(np.arange(2, dtype=np.uint8), 32*16).reshape(32, 32)
    dls = DataBlock((ImageBlock, MaskBlock(['ground', 'sky'])), get_items=lambda _: files, get_y=get_mask, splitter=IndexSplitter([2, 3]), item_tfms=Resize(32)).dataloaders(tmp_path, bs=2, num_workers=0)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)), loss_func=CrossEntropyLossFlat(axis=1))
    learn.remove_cb(learn.progress)
    explorer = interpretation(learn).explore()
    F, said = explorer.widget.facts, talk(explorer)
    assert F['kind']=='classes' and F['relabel'] is False and explorer.marks.classes==[] and F['names']==['ground', 'sky']
    ask(explorer, 'marks', marks=[dict(id='a-1', item=1, mark='relabel', label=None)])
    assert said==[dict(taken=['a-1'], problem=None)] and explorer.change()==[] and explorer.marks[1]==('relabel', None)
    for label in ('sky', 1, (.1, .2)):
        with pytest.raises(ValueError, match="these items have no class to be relabelled to, mark them 'suspicious' or 'drop'"): explorer.marks.mark(0, 'relabel', label)
    assert explorer.marks[0] is None
    explorer.close()


@pytest.mark.parametrize('options, error, sentence', [
    (dict(file='marks.txt'), ValueError, 'name it \\*.json'), (dict(n_page=0), ValueError, 'n_page=0 leaves nothing to show'), (dict(method='nothing'), ValueError, 'nothing'),
    (dict(layer='nowhere'), ValueError, 'nowhere'), (dict(where='loss > 1e9'), ValueError, 'none is left'), (dict(by='weight'), ValueError, 'no column of numbers'),
    (dict(file='no/such/folder/marks.json'), FileNotFoundError, 'there is no folder')])
def test_refused_in_a_sentence(interp, options, error, sentence):
    with pytest.raises(error, match=sentence): interp.explore(**options)


def test_volumes_are_refused():
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    interp = interpretation(plain([(torch.rand(1, 6, 16, 16), i%2) for i in range(4)], 2, model=net))
    with pytest.raises(ValueError, match='this learner looks at volumes'): interp.explore()


def test_what_is_missing_is_named(interp, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name=='anywidget' else known(name))
    with pytest.raises(ImportError, match=re.escape("pip install 'fastai_cam[explore]'")): interp.explore()


def test_models_are_asked_in_the_thread_of_the_cells(interp):
    "Messages may come in a thread of their own, while a cell runs"
    async def cell():
        explorer, seen = interp.explore(), []
        said = talk(explorer)
        made = explorer._maps
        explorer._maps = lambda *asked: (seen.append(threading.current_thread()), made(*asked))[1]
        def messages():
            ask(explorer, 'maps', id='m', items=[0], page=[0], method=0, layer=0)
            ask(explorer, 'marks', marks=[dict(id='a-1', item=3, mark='drop')])
        thread = threading.Thread(target=messages)
        thread.start()
        thread.join() # a cell that takes its time
        busy = list(said), list(seen)
        await asyncio.sleep(.05)
        explorer.marks.mark(3, None)
        explorer.close()
        return busy, said, seen
    busy, said, seen = asyncio.run(cell())
    assert busy==([dict(taken=['a-1'], problem=None)], []) # marks at once, maps not
    assert seen==[threading.main_thread()] and said[1]==dict(done='m', problem=None)


# -- the page, in headless Chromium, with a kernel that answers when it is told to

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
AXE = Path(os.environ.get('AXE_CORE', Path(__file__).resolve().parent.parent/'.venv/axe/node_modules/axe-core/axe.min.js'))


@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api')
    if CHROMIUM is None: pytest.skip('no chromium here: make browser installs it')
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    "Opens pages; whatever the console or the policy say is an error"
    wires, contexts = [], []
    def go(explorer, body='', traits=None, pump=True, context=None, **options):
        if context is None:
            context = browser.new_context(**{'viewport': dict(width=1100, height=900), **options})
            contexts.append(context)
        wires.append(Wire(context, explorer, body, traits))
        if pump and explorer is not None: wires[-1].pump()
        return wires[-1]
    yield go
    said = [line for wire in wires for line in wire.said]
    for context in contexts: context.close()
    assert said==[]


def keys(page, *names):
    for name in names: page.keyboard.press(name)


def status(page): return page.locator('.count').inner_text()
def badges(page): return page.locator('.tile').evaluate_all("all => Object.fromEntries(all.map((one, i) => [i, one.querySelector('.badge')?.textContent]).filter(one => one[1]))")
def current(page): return page.evaluate("[...document.querySelectorAll('.tile')].indexOf(document.activeElement)")
def shot(page, selector): return np.asarray(Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert('RGB')).astype(int)


@pytest.mark.slow
def test_marks_are_set_with_keys(visit, explorer):
    wire = visit(explorer)
    page, order = wire.page, explorer.widget.facts['position']
    page.locator('.tile').nth(0).click()
    keys(page, 'd', 'ArrowRight', 'k', 'ArrowRight', 's')
    wire.pump()
    assert explorer.marks.said()=={order[0]: ('drop', None), order[1]: ('keep', None), order[2]: ('suspicious', None)} and badges(page)=={'0': 'drop', '1': 'keep', '2': 'suspicious'}
    keys(page, 's') # the same again
    assert badges(page)=={'0': 'drop', '1': 'keep'} # before the kernel knows
    keys(page, 'u', 'u')
    wire.pump()
    assert len(explorer.marks)==2 and current(page)==2
    keys(page, 'Home', 'Shift+K')
    assert current(page)==1 and badges(page)=={'0': 'keep', '1': 'keep'}
    page.locator('.markbutton.drop').click()
    assert page.locator('.markbutton.drop').get_attribute('aria-pressed')=='true' and status(page)=='10 pictures · 2 marked'
    wire.pump()
    assert explorer.marks.said()=={order[0]: ('keep', None), order[1]: ('drop', None)}


@pytest.mark.slow
def test_a_class_is_chosen_with_a_digit_or_its_name(visit, explorer, interp):
    wire = visit(explorer)
    page, F = wire.page, explorer.widget.facts
    page.locator('.tile').nth(0).click()
    keys(page, 'r')
    offers = page.locator('.offer bdi').all_inner_texts()
    assert len(offers)==4 and offers[0]==page.locator('.offer bdi').first.inner_text() and page.locator('.offer').first.inner_text().startswith('1')
    keys(page, '1')
    wire.pump()
    assert explorer.change()==[(F['position'][0], interp.vocab[F['prediction'][0]])] # what is predicted is offered first
    assert current(page)==0 and not page.locator('.chooser').is_visible()
    keys(page, 'ArrowRight', 'r')
    page.keyboard.type('JAVASCRIPT:')
    assert len(page.locator('.offer').all())==1
    keys(page, 'Enter')
    wire.pump()
    assert dict(explorer.change())[F['position'][1]]=="javascript:document.title='run'"
    keys(page, 'r', 'Escape')
    assert current(page)==1 and len(explorer.marks)==2
    keys(page, 'r')
    page.keyboard.type('no such class')
    assert page.locator('.offers').inner_text()=='no class has such a name'
    keys(page, 'Enter', 'Escape')
    wire.pump()
    assert len(explorer.marks)==2 and page.title()=='A notebook'


@pytest.mark.slow
def test_marks_stay_when_the_class_the_order_and_the_page_change(visit, explorer):
    wire = visit(explorer)
    page, F = wire.page, explorer.widget.facts
    page.locator('.tile').nth(3).click()
    keys(page, 'd', 'ArrowRight') # to the next page
    wire.pump()
    assert page.locator('.pages').inner_text().replace('\n', '')=='←page 2 of 3→' and current(page)==0 and badges(page)=={}
    keys(page, 'k', 'PageUp')
    wire.pump()
    assert badges(page)=={'3': 'drop'}
    page.select_option('select[aria-label=Class]', str(F['label'][4]))
    wire.pump()
    shown = [F['label'][4] in (F['label'][row], F['prediction'][row]) for row in range(10)]
    assert status(page)==f'{sum(shown)} of 10 pictures · 2 marked' and 'keep' in badges(page).values()
    page.select_option('select[aria-label=Class]', '')
    page.select_option('select[aria-label=Order]', '-loss')
    wire.pump()
    keys(page, 'Home')
    page.select_option('select[aria-label=Marks]', 'any')
    assert sorted(badges(page).values())==['drop', 'keep']
    page.select_option('select[aria-label=Marks]', 'drop')
    assert badges(page)=={'0': 'drop'} and status(page)=='1 of 10 pictures · 2 marked'
    page.select_option('select[aria-label=Marks]', 'all')
    page.locator('.segments label', has_text='Wrong').click()
    assert page.locator('.mark.ok').count()==0
    page.fill('.search >> nth=0', 'no such path')
    assert page.locator('.nothing').is_visible() and not page.locator('.detail').is_visible()
    wire.pump()
    assert explorer.marks.said()=={F['position'][3]: ('drop', None), F['position'][4]: ('keep', None)}


@pytest.mark.slow
def test_marks_wait_for_a_kernel_that_is_busy(visit, explorer):
    wire = visit(explorer)
    page, order = wire.page, explorer.widget.facts['position']
    page.select_option('select[aria-label=Method]', '1') # the kernel is asked for maps, and does not answer
    page.locator('.tile').nth(1).click()
    keys(page, 'd', 'ArrowRight', 'k', 's')
    assert badges(page)=={'1': 'drop', '2': 'suspicious'} and len(explorer.marks)==0
    page.wait_for_timeout(2800)
    assert '3 marks wait for the kernel' in status(page) and 'busy or gone' in status(page)
    explorer.marks.mark(order[0], 'keep') # a cell marks another item meanwhile
    page.evaluate('news => stub.receive(news)', wire.out)
    wire.out.clear()
    assert badges(page)=={'0': 'keep', '1': 'drop', '2': 'suspicious'}
    wire.pump()
    assert explorer.marks.said()=={order[0]: ('keep', None), order[1]: ('drop', None), order[2]: ('suspicious', None)} and status(page)=='10 pictures · 3 marked'


@pytest.mark.slow
def test_marks_that_no_kernel_has_taken_reach_the_next_one(visit, interp, learn, tmp_path):
    first = interp.explore(file=tmp_path/'marks.json')
    wire = visit(first)
    wire.page.locator('.tile').nth(0).click()
    keys(wire.page, 'd')
    wire.pump()
    keys(wire.page, 'ArrowRight', 'k') # and then the kernel dies
    order = first.widget.facts['position']
    assert first.marks.said()=={order[0]: ('drop', None)}
    again = interpretation(hostile_learner(Path(first.fns[0]).parent, 10)).explore(file=tmp_path/'marks.json')
    other = visit(again, context=wire.page.context)
    assert again.marks.said()=={order[0]: ('drop', None), order[1]: ('keep', None)} and badges(other.page)=={'0': 'drop', '1': 'keep'}
    assert other.page.evaluate('localStorage.length')==0 # taken
    for one in (first, again): one.close()


@pytest.mark.slow
def test_a_page_without_a_kernel(visit, explorer):
    wire = visit(explorer)
    wire.page.locator('.tile').nth(2).click()
    wire.page.select_option('select[aria-label=Order]', '-loss')
    keys(wire.page, 's')
    wire.page.wait_for_timeout(500)
    wire.pump()
    saved = json.loads(json.dumps({name: getattr(explorer.widget, name) for name in ('facts', 'view', 'marked', 'pictures', 'maps')})) # as a notebook keeps it
    assert len(json.dumps(saved)) < 150_000
    later = visit(None, traits=saved)
    page = later.page
    page.evaluate('window.isGone = true')
    assert page.locator('select[aria-label=Order]').input_value()=='-loss' and page.locator('.tile img').count()==4 and len(badges(page))==len(badges(wire.page))
    assert np.abs(shot(page, '.frame') - shot(wire.page, '.frame')).mean() < 2 # with its map
    page.locator('.tile').first.click()
    keys(page, 'd', 'PageDown') # is tried, and breaks nothing
    assert page.locator('.tile').count()==4 and '…' in page.locator('.none').first.inner_text()


@pytest.mark.slow
def test_maps_and_opacity(visit, explorer):
    wire = visit(explorer, context=None)
    page = wire.page
    seen = [shot(page, '.frame')]
    page.locator('.opacity').fill('0')
    photo = shot(page, '.frame')
    page.locator('.opacity').fill('100')
    assert np.abs(shot(page, '.frame') - photo).mean() > 1.2*np.abs(seen[0] - photo).mean() > 1
    at = explorer.widget.facts['methods'].index('gradcam')
    other = {'inferno': 'viridis', 'viridis': 'inferno'}[page.locator('select[aria-label=Colours]').input_value()]
    layer = str(explorer.widget.facts['layers'].index('0.0'))
    for change in (lambda: page.select_option('select[aria-label=Colours]', other), lambda: page.select_option('select[aria-label=Colours]', 'signed'), lambda: page.select_option('select[aria-label=Method]', str(at)),
                   lambda: page.select_option('select[aria-label=Layer]', layer), lambda: page.locator('.segments label', has_text='Label').click(), lambda: page.locator('.segments label', has_text='Difference').click()):
        seen.append(shot(page, '.frame'))
        change()
        wire.pump()
        assert np.abs(shot(page, '.frame') - seen[-1]).mean() > .5
    assert '−' in page.locator('figcaption bdi').get_attribute('title') or page.locator('figcaption').inner_text().startswith('no map')
    page.select_option('select[aria-label=Layer]', '0')
    page.select_option('select[aria-label=Method]', '0')
    wire.pump()
    explorer._maps = lambda *asked: 1/0
    keys(page, 'PageDown')
    page.locator('.pages button').last.click()
    wire.pump()
    assert page.locator('.alarm').inner_text().endswith('ZeroDivisionError: division by zero') and page.locator('.tile img').count()==4
    page.locator('.pages button').first.click()
    assert not page.locator('.alarm').is_visible() # here there are maps


@pytest.mark.slow
def test_hostile_names_are_read_and_not_run(visit, explorer):
    page = visit(explorer).page
    texts = ' '.join(page.locator('bdi').all_inner_texts()) + ' '.join(page.locator('option').all_inner_texts())
    assert '<script>document.title="run"</script>' in texts and '"><img src=x onerror=document.title="run">' in ' '.join(page.locator('option').all_inner_texts())
    for at in range(4): page.locator('.tile').nth(at).click()
    keys(page, 'r', '2', 'ArrowLeft', 'r', '3')
    assert page.title()=='A notebook' and page.evaluate('document.documentElement.scrollWidth') <= 1100
    assert max(map(len, page.locator('bdi').all_inner_texts())) <= 400 and page.locator('main script, main img[src=x]').count()==0


@pytest.mark.slow
def test_two_places_show_the_same_marks(visit, explorer):
    wire = visit(explorer)
    page = wire.page
    page.evaluate("async () => { const el = document.createElement('section'); document.body.append(el); await window.render(el); }")
    page.locator('main .tile').nth(1).click()
    keys(page, 'd')
    assert page.locator('.badge', has_text='drop').count()==3 # both tiles, and beside the one that is chosen
    page.evaluate('window.stop()')
    keys(page, 'ArrowRight', 'k')
    wire.pump()
    assert len(explorer.marks)==2


@pytest.mark.slow
@pytest.mark.parametrize('options, body', [(dict(viewport=dict(width=360, height=740), device_scale_factor=2), ''), (dict(viewport=dict(width=700, height=740)), 'data-jp-theme-light="false"'), (dict(color_scheme='dark'), '')])
def test_sizes_and_themes(visit, explorer, options, body):
    page = visit(explorer, body, **options).page
    ground = [int(x) for x in re.findall(r'\d+', page.evaluate("getComputedStyle(document.querySelector('.fastai-cam-explore')).backgroundColor"))[:3]]
    assert (max(ground) < 60)==bool(body or options.get('color_scheme')) and page.evaluate('document.documentElement.scrollWidth') <= options.get('viewport', dict(width=1100))['width']
    page.locator('.tile').first.click()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != 'none' or page.evaluate("getComputedStyle(document.querySelector('.current .frame')).boxShadow") != 'none'
    light = visit(explorer, 'data-jp-theme-light="true"', color_scheme='dark').page # the notebook's theme, not the system's
    assert '251, 250, 248' in light.evaluate("getComputedStyle(document.querySelector('.fastai-cam-explore')).backgroundColor")


@pytest.mark.slow
@pytest.mark.parametrize('body', ['', 'data-jp-theme-light="false" style="background: #111"'])
def test_it_is_accessible(visit, explorer, body):
    assert AXE.exists(), 'axe-core is not here: make browser brings it'
    wire = visit(explorer, body, bypass_csp=True)
    page = wire.page
    page.locator('.tile').first.click()
    keys(page, 'd', 'ArrowRight', 'k', 'ArrowRight', 's', '?', 'ArrowRight', 'r')
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document.querySelector('.fastai-cam-explore'), {resultTypes: ['violations']})")['violations']
    assert [(one['id'], [node['html'][:150] for node in one['nodes']][:3]) for one in found if one['impact'] in ('serious', 'critical', 'moderate')]==[]


@pytest.mark.slow
def test_five_thousand_items(visit, interp):
    F = dict(interp.explore().widget.facts)
    n, rng = 5000, np.random.default_rng(0)
    label, prediction = rng.integers(5, size=n).tolist(), rng.integers(5, size=n).tolist()
    F.update(position=list(range(n)), key=[f'{i}.jpg' for i in range(n)], label=label, prediction=prediction, probability=[.5]*n, loss=rng.random(n).tolist(), right=[a==b for a, b in zip(label, prediction)], page=48)
    page = visit(None, traits=dict(facts=F, view={}, marked={str(i): ['drop', None] for i in range(0, n, 2)}, pictures={}, maps={})).page
    took = lambda code: page.evaluate(f"async () => {{ const start = performance.now(); {code}; await new Promise(requestAnimationFrame); return performance.now() - start; }}")
    change = "const one = document.querySelector('select[aria-label=Order]'); one.value = '-loss'; one.dispatchEvent(new Event('change'))"
    assert took(change) < 1500 and page.locator('.pages').inner_text().replace('\n', '')=='←page 1 of 105→'
    page.locator('.tile').first.click()
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'k', bubbles: true}))"
    assert took(press) < 400 and status(page).startswith('5000 pictures · 25')


# -- a real JupyterLab, on the loopback interface

CELLS = ["""import warnings
warnings.filterwarnings('ignore')
import time
from pathlib import Path
from fastai_cam.all import *
from helpers.reports import hostile_learner
Path('files').mkdir(exist_ok=True)
learn = hostile_learner(Path('files'), 20)
interp = CAMInterpretation.from_learner(learn)""",
         "cleaner = interp.explore(file='marks.json')\ncleaner", "print('MARKS', cleaner.to_df()[['index', 'mark']].values.tolist(), len(cleaner.change()))", "time.sleep(4)\nprint('SLEPT')"]


def run_cell(page, at, said):
    "Run a cell by itself, and wait for what it says"
    cell = page.locator('.jp-CodeCell').nth(at)
    cell.locator('.jp-InputArea-editor').click()
    page.keyboard.press('Control+Enter')
    if said: cell.locator('.jp-OutputArea-output', has_text=said).wait_for(timeout=30_000)
    return cell.locator('.jp-OutputArea-output').all_inner_texts()


@pytest.mark.slow
def test_in_jupyterlab(browser, tmp_path):
    pytest.importorskip('jupyterlab')
    from helpers.jupyter import jupyter
    said, context = [], browser.new_context(viewport=dict(width=1300, height=1100))
    page = context.new_page()
    page.on('console', lambda message: said.append(message.text) if message.type in ('error', 'warning') else None)
    page.on('pageerror', lambda error: said.append(str(error)))
    explorer = page.locator('.fastai-cam-explore')
    def run_all(menu, item):
        page.get_by_role('menuitem', name=menu, exact=True).click()
        page.get_by_role('menuitem', name=item).first.click()
    with jupyter(tmp_path, CELLS) as address:
        page.goto(address)
        page.wait_for_selector('.jp-CodeCell', timeout=90_000)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]', timeout=60_000)
        page.wait_for_timeout(1500)
        for _ in range(10): # a kernel that says it is idle may not listen yet, and then nothing runs
            run_all('Run', re.compile('^Run All Cells'))
            page.wait_for_timeout(1500)
            for button in page.locator('.jp-Dialog .jp-mod-accept').all(): button.click()
            if re.search(r'[*\d]', page.locator('.jp-InputPrompt').first.inner_text()): break
        explorer.locator('.tile img').first.wait_for(timeout=60_000)
        page.locator('.jp-OutputArea-output', has_text='SLEPT').wait_for(timeout=60_000)
        explorer.locator('figcaption', has_text='map of').wait_for(timeout=60_000)
        # click, mark with keys that the notebook has a use for, too, and change the class
        explorer.locator('.tile').nth(1).click()
        keys(page, 'd', 'ArrowRight', 'k', 'ArrowRight', 's', 'ArrowRight', 'r', '2')
        assert page.locator('.jp-CodeCell').count()==4 # none was deleted, split or run by these keys
        explorer.get_by_text('20 pictures · 4 marked').wait_for()
        before = sorted(badges(page).values())
        assert len(before)==4 and {'drop', 'keep', 'suspicious'} < set(before)
        label = explorer.locator('select[aria-label=Class] option').nth(1).get_attribute('value')
        explorer.locator('select[aria-label=Class]').select_option(label)
        assert re.match(r'\d+ of 20 pictures · 4 marked', status(page))
        explorer.locator('select[aria-label=Class]').select_option('')
        assert sorted(badges(page).values())==before
        told = run_cell(page, 2, 'MARKS')[0]
        assert [f"'{name}'" in told for name in ('drop', 'keep', 'suspicious', 'relabel')]==[True]*4 and told.strip().endswith(' 1')
        # while a cell runs, marks arrive and maps wait
        run_cell(page, 3, None)
        explorer.locator('.tile').nth(5).click()
        keys(page, 'd')
        explorer.locator('select[aria-label=Method]').select_option('1')
        explorer.get_by_text('maps are being made').wait_for()
        page.wait_for_timeout(1000)
        assert len(json.loads((tmp_path/'work/marks.json').read_text())['marks']) in (4, 5) # at once where messages have a thread of their own
        page.locator('.jp-CodeCell').nth(3).locator('.jp-OutputArea-output', has_text='SLEPT').wait_for(timeout=30_000)
        page.wait_for_function("!document.querySelector('.fastai-cam-explore .count').textContent.includes('maps')", timeout=30_000)
        assert len(json.loads((tmp_path/'work/marks.json').read_text())['marks'])==5 and not explorer.locator('.alarm').is_visible()
        # the kernel starts again, and the cells run again
        run_all('Kernel', re.compile('^Restart Kernel and Run All Cells'))
        page.get_by_role('button', name=re.compile('Confirm Kernel Restart')).click()
        page.wait_for_function("![...document.querySelectorAll('.jp-OutputArea-output')].some(one => one.textContent.includes('SLEPT'))", timeout=60_000)
        page.locator('.jp-OutputArea-output', has_text='SLEPT').wait_for(timeout=120_000)
        explorer.get_by_text('20 pictures · 5 marked').wait_for(timeout=60_000)
        assert sorted(badges(page).values())==sorted([*before, 'drop'])
        told = run_cell(page, 2, 'MARKS')[0]
        assert told.count("'drop'")==2 and told.strip().endswith(' 1')
        assert 'jupyter' in page.title().lower() and 'run' not in page.title().lower().split()
    context.close()
    ours = [line for line in said if re.search('fastai|explore|anywidget|TypeError|ReferenceError', line)]
    assert ours==[]


@pytest.mark.slow
def test_in_notebook_7(browser, tmp_path):
    "It hands keys to its own commands before the page has seen them"
    pytest.importorskip('notebook')
    from helpers.jupyter import jupyter
    context = browser.new_context(viewport=dict(width=1300, height=1100))
    page = context.new_page()
    with jupyter(tmp_path, CELLS[:3], 'notebook') as address:
        page.goto(address)
        page.wait_for_selector('.jp-CodeCell', timeout=90_000)
        for _ in range(20):
            page.wait_for_timeout(1500)
            for button in page.locator('.jp-Dialog .jp-mod-accept').all(): button.click()
            page.get_by_role('menuitem', name='Run', exact=True).click()
            page.get_by_role('menuitem', name=re.compile('^Run All Cells')).first.click()
            page.wait_for_timeout(1500)
            if re.search(r'[*\d]', page.locator('.jp-InputPrompt').first.inner_text()): break
        explorer = page.locator('.fastai-cam-explore')
        explorer.locator('figcaption', has_text='map of').wait_for(timeout=120_000)
        explorer.locator('.tile').nth(1).click()
        for key in ('d', 'ArrowRight', 'k', 'ArrowRight', 's', 'ArrowRight', 'r', '2'):
            page.keyboard.press(key)
            page.wait_for_timeout(60)
        explorer.get_by_text('20 pictures · 4 marked').wait_for()
        assert page.locator('.jp-CodeCell').count()==3 and 'DROP' in str(badges(page)).upper()
        for _ in range(50):
            if (tmp_path/'work/marks.json').exists() and len(json.loads((tmp_path/'work/marks.json').read_text())['marks'])==4: break
            page.wait_for_timeout(100)
        assert sorted(one['mark'] for one in json.loads((tmp_path/'work/marks.json').read_text())['marks'])==['drop', 'keep', 'relabel', 'suspicious']
    context.close()
