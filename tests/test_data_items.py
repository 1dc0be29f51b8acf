"Long lists of items: nothing is opened before its turn, batches are as they are planned, and what cannot be read stops nobody."
import pickle

import pandas as pd
import pytest
import torch
from PIL import Image
from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, PILImage, Resize, get_image_files
from torch.utils.data import DataLoader as TorchLoader, IterableDataset

from fastai_cam.data.items import item_list, unread
from helpers.tables import learner


@pytest.fixture
def learn(dls): return learner(dls)


@pytest.fixture
def files(pictures): return sorted(get_image_files(pictures))


def batches_of(items, plan, notes, **kwargs):
    _, sample = items.first_readable()
    loader = items.loader(plan, notes, sample)
    for name, value in kwargs.items(): setattr(loader, name, value)
    return [batch[0].as_subclass(torch.Tensor) for batch in loader]


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_those_that_were_planned(learn, files, tmp_path, workers):
    items = item_list(learn, learn.dls.test_dl(files[:9], num_workers=workers))
    plan = [range(0, 4), range(4, 5), range(5, 9)]
    found = batches_of(items, plan, tmp_path)
    assert [len(batch) for batch in found]==[4, 1, 4]
    whole, = batches_of(item_list(learn, files[:9]), [range(9)], tmp_path)
    assert torch.equal(torch.cat(found), whole) and unread(tmp_path)=={}


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_cannot_be_read_is_noted_and_has_its_place_taken(learn, files, tmp_path, workers):
    cut, notes = tmp_path/'cut.png', tmp_path/'notes'
    cut.write_bytes(files[0].read_bytes()[:2000])
    notes.mkdir()
    names = [*files[:2], cut, files[2], tmp_path/'no.png']
    items = item_list(learn, names if not workers else learn.dls.test_dl(names, num_workers=workers))
    first, second = batches_of(items, [range(3), range(3, 5)], notes)
    wrong = unread(notes)
    assert list(wrong)==[2, 4] and wrong[4]==f'FileNotFoundError: [Errno 2] No such file or directory: {str(tmp_path/"no.png")!r}' and 'truncated' in wrong[2]
    assert torch.equal(first[2], first[0]) and torch.equal(second[1], first[0]) and not torch.equal(first[1], first[0])
    assert unread(notes)=={}


def test_files_are_opened_when_their_turn_comes_and_once(learn, files, tmp_path, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda file, *args, **kwargs: opened.append(str(file)) or real(file, *args, **kwargs))
    items = item_list(learn, files[:6])
    assert not opened and len(items)==6 and items.name(3)==str(files[3])
    place, sample = items.first_readable()
    assert place==0 and opened==[str(files[0])]
    list(items.loader([range(6)], tmp_path, sample))
    assert opened[1:]==list(map(str, files[:6]))


def test_whatever_holds_many_items(learn, files, dls):
    by_kind = dict(paths=files, texts=list(map(str, files)), frame=pd.DataFrame(dict(item=map(str, files))), column=pd.Series(map(str, files)), one=files[0])
    for kind, source in by_kind.items():
        items = item_list(learn, source)
        assert not items.labelled and items.name(0)==str(files[0]) and len(items)==(1 if kind=='one' else len(files)), kind
    valid = dls.valid.items
    for source, names in ((None, valid), (dls.valid, valid), ([3, 1], [valid[3], valid[1]]), (torch.tensor([2]), [valid[2]]), (range(2), valid[:2]), (dls.valid_ds, valid), (dls.test_dl(files[:3], with_labels=True), files[:3])):
        items = item_list(learn, source)
        assert items.labelled and [items.name(i) for i in range(len(items))]==list(map(str, names))
    pictures = item_list(learn, [PILImage.create(file) for file in files[:2]])
    assert [pictures.name(i) for i in range(2)]==['item 0', 'item 1']


def test_rows_of_the_learners_own_table(files):
    frame = pd.DataFrame(dict(file=map(str, files), side=[file.parent.name for file in files]))
    own = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('file'), get_y=ColReader('side'), item_tfms=Resize(32)).dataloaders(frame, bs=4, num_workers=0)
    learn = learner(own)
    items = item_list(learn, frame)
    assert items.labelled and items.name(5)==str(files[5])
    assert not item_list(learn, frame[['file']]).labelled


def test_loaders_survive_pickling(learn, files, tmp_path):
    items = item_list(learn, files[:4])
    loader = items.loader([range(2), range(2, 4)], tmp_path, items.first_readable()[1])
    again = pickle.loads(pickle.dumps(loader))
    assert [torch.equal(one, other) for (one,), (other,) in zip(loader, again)]==[True, True]


def test_what_is_refused(learn, files):
    with pytest.raises(ValueError, match='the list of items is empty'): item_list(learn, [])
    with pytest.raises(ValueError, match='none of the 1 items can be read: .no.png.: FileNotFoundError'): item_list(learn, ['no.png']).first_readable()
    with pytest.raises(FileNotFoundError, match='^there is no file or folder .nodata.$'): item_list(learn, 'nodata')
    with pytest.raises(ValueError, match='not one of the first 2 of the 3 items can be read'): item_list(learn, ['no.png', 'nor.png', files[0]]).first_readable(most=2)
    with pytest.raises(ValueError, match="a column 'item' with their files, and this one has 'a'"): item_list(learn, pd.DataFrame(dict(a=[1])))
    with pytest.raises(ValueError, match='in memory already: make their maps with learn.get_cams, and write them with to_table'): item_list(learn, [torch.randn(3, 64, 64)])
    class Stream(IterableDataset):
        def __iter__(self): yield from [(torch.zeros(3, 64, 64), 0)]*3
    with pytest.raises(ValueError, match='does not say which items are in its batches'): item_list(learn, TorchLoader(Stream()))


def test_pictures_of_different_sizes_say_what_to_do(pictures, files, tmp_path):
    learn = learner(DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda file: file.parent.name).dataloaders(pictures, bs=2, num_workers=0))
    Image.new('RGB', (32, 40)).save(tmp_path/'small.png')
    items = item_list(learn, [files[0], tmp_path/'small.png'])
    with pytest.raises(ValueError, match='the items make no batch .*need Resize among the item_tfms'): list(items.loader([range(2)], tmp_path, items.first_readable()[1]))
