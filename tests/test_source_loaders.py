"Whatever a user calls an item: what is shown went in, what is named was read, and what cannot be said is said so."
import io
import pickle
import random
import struct
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader as TorchLoader, IterableDataset, RandomSampler, SubsetRandomSampler, Subset, TensorDataset, WeightedRandomSampler
from fastcore.foundation import L
from fastai.callback.core import Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.load import SkipItemException
from fastai.text.data import SortedDL
from fastai.vision.all import (CategoryBlock, ColReader, CrossEntropyLossFlat, DataBlock, DataLoader, DataLoaders, FuncSplitter, ImageBlock, ImageDataLoaders, IntToFloatTensor, ItemGetter, Learner, MaskBlock,
                               Normalize, PILImage, ProgressCallback, Resize, TensorImage, TfmdDL, Transform, TransformBlock, get_image_files, imagenet_stats, parent_label, set_seed)

import fastai_cam.source.passes as source_passes_room
from fastai_cam.all import CAMInterpretation
from fastai_cam.source.items import as_source
from fastai_cam.source.passes import decode_images
from fastai_cam.source.loaders import dl_source

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in imagenet_stats)


def net(n_in=3, n_out=2):
    set_seed(0)
    return nn.Sequential(nn.Conv2d(n_in, 6, 3, 4, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, n_out))


def learner(dls, model=None, **kwargs):
    learn = Learner(dls, model or net(), loss_func=kwargs.pop('loss_func', CrossEntropyLossFlat()), **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn


def loaders(pictures, item_tfms=None, batch_tfms=None, bs=5, **kwargs):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=FuncSplitter(lambda f: int(f.stem) >= 12),
                      item_tfms=item_tfms or Resize(64), batch_tfms=[*(batch_tfms or []), Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(pictures, bs=bs, num_workers=0, **kwargs)


@pytest.fixture
def learn(dls): return learner(dls)


def inputs_of(learn, call):
    "What `call` gives, and the inputs that fastai's loop gave to the model in the meantime"
    seen = []
    class Watches(Callback):
        def before_batch(self): seen.append(self.xb[0].detach().as_subclass(Tensor).clone())
    watch = Watches()
    learn.add_cb(watch)
    found = call()
    learn.remove_cb(watch)
    return found, torch.cat(seen)


def pixels(x): return ((x*STD + MEAN)*255).round()


def same_pictures(cams, x, which=None):
    torch.rand(7), np.random.rand(3), random.random() # what happens in between does not matter
    which = range(len(x)) if which is None else which
    return [bool((torch.as_tensor(cams.images[i]).as_subclass(Tensor).float() - pixels(x[i])).abs().max() <= 1) for i in which]


def crop_by(draw):
    class RandomPlace(Transform):
        "Draws also in validation"
        def encodes(self, x:PILImage): i = int(draw()*31); return x.crop((i, i, i + 32, i + 32))
    return RandomPlace()


class Noise(Transform):
    order = 50
    def encodes(self, x:TensorImage): return (x + torch.rand(len(x), 1, 1, 1)*.3).clamp(0, 1)


DRAWS = dict(torch=lambda: torch.rand(()), numpy=np.random.rand, python=random.random)
RANDOM = {**{name: dict(item_tfms=crop_by(draw)) for name, draw in DRAWS.items()}, 'batch': dict(batch_tfms=[Noise()])}


@pytest.mark.parametrize('kept', [2**26, 0, 5*3*64*64*4 + 40], ids=['kept', 'read again', 'first batch kept'])
@pytest.mark.parametrize('kind', RANDOM)
def test_the_picture_shown_is_the_one_that_went_in(pictures, monkeypatch, kind, kept):
    monkeypatch.setattr(source_passes_room, '_kept_bytes', kept)
    learn = learner(loaders(pictures, **RANDOM[kind]))
    cams, x = inputs_of(learn, lambda: learn.get_cams(learn.dls.valid))
    assert len(x)==12 and all(same_pictures(cams, x))
    some = cams[[11, 3, 3]]
    assert all((torch.as_tensor(picture).as_subclass(Tensor).float() - pixels(x[i])).abs().max() <= 1 for picture, i in zip(some.images.load(), (11, 3, 3)))


@pytest.mark.parametrize('kept', [2**26, 0])
def test_a_file_that_changed_since(pictures, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(source_passes_room, '_kept_bytes', kept)
    for i, file in enumerate(sorted(pictures.glob('*/*.png'))[:6]): (tmp_path/f'{i}.png').write_bytes(file.read_bytes())
    learn = learner(loaders(pictures))
    cams, x = inputs_of(learn, lambda: learn.get_cams([tmp_path/f'{i}.png' for i in range(6)]))
    changed = np.array(Image.open(tmp_path/'2.png'))
    changed[30:40, 30:40] = 0 # a small part of it
    Image.fromarray(changed).save(tmp_path/'2.png')
    assert all(same_pictures(cams, x, [0, 1, 3, 4, 5]))
    if kept: assert all(same_pictures(cams, x, [2]))
    else:
        with pytest.raises(ValueError, match=r"picture of item 2 \('.*2.png'\) is no longer the one"): cams.images[2]


def test_worker_processes_that_draw_show_what_went_in_or_say_so(pictures, monkeypatch):
    dls = loaders(pictures, item_tfms=crop_by(DRAWS['torch']))
    learn = learner(dls)
    several = dls.valid.new(num_workers=1)
    cams, x = inputs_of(learn, lambda: learn.get_cams(several))
    assert all(same_pictures(cams, x))
    monkeypatch.setattr(source_passes_room, '_kept_bytes', 0)
    cams, x = inputs_of(learn, lambda: learn.get_cams(several))
    with pytest.raises(ValueError, match='transforms draw at random in a way that cannot be repeated'): cams.images[7]


def test_a_model_that_writes_into_its_input_and_a_user_who_does(dls):
    class Writes(nn.Module):
        def __init__(self): super().__init__(); self.body = net()
        def forward(self, x): return self.body(x.mul_(0).add_(1))
    for item in ([0, 1], dls.one_batch()[0].as_subclass(Tensor)[:2].clone()):
        before = item.clone() if isinstance(item, Tensor) else torch.stack([dls.valid.do_batch([dls.valid.do_item(i)])[0][0] for i in item])
        cams = learner(dls, Writes()).get_cams(item)
        if isinstance(item, Tensor): item.zero_()
        else: before = (before/255 - MEAN)/STD
        assert all(same_pictures(cams, before.as_subclass(Tensor)))


def test_every_pass_has_its_own_pictures(pictures):
    learn = learner(loaders(pictures, item_tfms=crop_by(DRAWS['torch'])))
    class Peeks(Callback):
        "Reads a batch of the loader while it is gone through"
        def before_batch(self): self.learn.dl.one_batch()
    chosen = as_source(learn, [4, 5, 6])
    torch.manual_seed(1); first, x = inputs_of(learn, lambda: learn.get_cams(chosen))
    torch.manual_seed(2); second, x2 = inputs_of(learn, lambda: learn.get_cams(chosen))
    assert not torch.equal(x, x2) and all(same_pictures(first, x)) and all(same_pictures(second, x2))
    learn.add_cb(Peeks())
    cams, x = inputs_of(learn, lambda: learn.get_cams(learn.dls.valid))
    assert len(x)==12 and all(same_pictures(cams, x))


def test_memory_of_what_is_kept_is_bounded(dls, monkeypatch):
    size = 5*(3*64*64*4 + 8)
    for room, kept in ((3*size, [True, True, True]), (2*size, [True, True, False]), (size, [True, False, False]), (0, [False, False, False])):
        monkeypatch.setattr(source_passes_room, '_kept_bytes', room)
        chosen = dl_source(learner(dls), dls.valid)
        list(chosen.dl)
        assert [batch is not None for batch, *_ in chosen.dl.seen.batches]==kept


# ---- loaders that choose their items


def named_as_read(learn, cams, x):
    "Are items, labels, maps and pictures those of the inputs that went through?"
    for i, file in enumerate(cams.items):
        assert (torch.tensor(np.array(Image.open(file))).permute(2, 0, 1) - pixels(x[i])).abs().max() <= 1, (i, file)
        if cams.targs is not None: assert learn.dls.vocab[cams.targs[i]]==Path(file).parent.name
    assert all(same_pictures(cams, x)) and len(cams.items)==len(x)==len(cams.maps)
    return [learn.dls.valid.items.index(file) for file in cams.items]


def skips(*names):
    class Skips(Transform):
        "Some items are left out while they are read"
        def encodes(self, x:PILImage):
            if any(np.array_equal(np.array(x), np.array(Image.open(name))) for name in names): raise SkipItemException
            return x
    return Skips()


OWN_ORDER = dict(
    get_idxs=(lambda valid: valid.new(get_idxs=lambda: [5, 3], n=2), [5, 3]),
    repeats=(lambda valid: valid.new(get_idxs=lambda: [7, 7, 1, -1]), [7, 7, 1, 11]),
    arrays=(lambda valid: valid.new(get_idxs=lambda: iter(np.array([4, 0]))), [4, 0]),
    tensors=(lambda valid: valid.new(get_idxs=lambda: torch.tensor([4, 9, 0])), [4, 9, 0]),
    reversed=(lambda valid: valid.new(get_idxs=lambda: range(11, -1, -1)), list(range(11, -1, -1))),
    fewer=(lambda valid: valid.new(n=4), [0, 1, 2, 3]),
    shuffled=(lambda valid: valid.new(shuffle=True, drop_last=True), list(range(12))),
    shuffled_few=(lambda valid: valid.new(shuffle=True, n=3), [0, 1, 2]),
    weighted=(lambda valid: valid.new(cls=WeightedDL, wgts=[1.]*11 + [100.], shuffle=True), list(range(12))),
    sorted=(lambda valid: valid.new(cls=SortedDL, res=list(range(12))), list(range(12))),
    workers=(lambda valid: valid.new(get_idxs=lambda: [8, 2, 6, 6, 1, 0, 9], num_workers=2), [8, 2, 6, 6, 1, 0, 9]))


@pytest.mark.parametrize('kind', OWN_ORDER)
def test_items_are_those_that_the_loader_chose(dls, learn, kind):
    make, expected = OWN_ORDER[kind]
    loader = make(dls.valid)
    cams, x = inputs_of(learn, lambda: learn.get_cams(loader))
    assert named_as_read(learn, cams, x)==expected
    cams, x = inputs_of(learn, lambda: learn.get_cams(loader, max_n=2))
    assert named_as_read(learn, cams, x)==expected[:2]


@pytest.mark.parametrize('kind', OWN_ORDER)
def test_interpretation_of_a_loader_that_chose(dls, learn, kind):
    "Losses, items and maps are of the same items, in fastai's own words too"
    make, expected = OWN_ORDER[kind]
    interp = CAMInterpretation.from_learner(learn, dl=make(dls.valid))
    _, _, losses = learn.get_preds(dl=dls.valid, with_loss=True)
    assert torch.allclose(interp.losses.as_subclass(Tensor), losses[expected].as_subclass(Tensor), atol=1e-5)
    assert list(interp.dl.items)==[dls.valid.items[i] for i in expected]
    top, idxs, items = interp.top_losses(3, items=True)
    cams, x = inputs_of(learn, lambda: interp.top_losses_cams(3))
    assert [dls.valid.items[expected[i]] for i in idxs.tolist()]==list(items)==cams.items
    named_as_read(learn, cams, x)
    assert torch.allclose(cams.losses, top.as_subclass(Tensor), atol=1e-5)


def test_a_part_drawn_at_random_is_the_part_that_is_named(dls, learn):
    loader = dls.valid.new(cls=PartialDL, partial_n=5)
    cams, x = inputs_of(learn, lambda: learn.get_cams(loader))
    assert len(set(named_as_read(learn, cams, x)))==5


def test_training_items_that_a_loader_chose(dls, learn):
    loader = dls.train.new(get_idxs=lambda: [5, 3], shuffle=False)
    cams, x = inputs_of(learn, lambda: learn.get_cams(loader))
    assert cams.items==[dls.train.items[i] for i in (5, 3)] and all(same_pictures(cams, x))
    assert [dls.vocab[t] for t in cams.targs]==[file.parent.name for file in cams.items]


def test_items_that_are_skipped_are_not_named(pictures):
    names = sorted(pictures.glob('*/*.png'), key=lambda f: f.stem)[12:]
    dls = loaders(pictures, item_tfms=skips(names[1], names[5], names[11]))
    learn = learner(dls)
    cams, x = inputs_of(learn, lambda: learn.get_cams(dls.valid))
    assert len(x)==9 and named_as_read(learn, cams, x)==[i for i, f in enumerate(dls.valid.items) if f not in (names[1], names[5], names[11])]
    with pytest.raises(ValueError, match='skipped by a transform.*num_workers=0'): learn.get_cams(dls.valid.new(num_workers=1))


def test_a_loader_whose_batches_are_of_its_own_making(dls, learn):
    "It cannot be known which items they hold: these are numbers, and pictures and labels are those of the batches"
    every = [dls.valid.do_item(i) for i in range(12)]
    own = dict(sample=dls.valid.new(sample=lambda: iter([4, 2])), create_item=dls.valid.new(create_item=lambda s: dls.valid.dataset[11 - s]),
               iterable=TfmdDL((item for item in every[3:6]), bs=2, n=3, indexed=False, num_workers=0, after_batch=dls.valid.after_batch, do_setup=False))
    own['iterable']._n_inp, own['iterable']._types = dls.valid.n_inp, dls.valid._types
    expected = dict(sample=[4, 2], create_item=range(11, -1, -1), iterable=[3, 4, 5])
    for kind, loader in own.items():
        cams, x = inputs_of(learn, lambda: learn.get_cams(loader))
        assert cams.items==list(range(len(expected[kind]))), kind
        assert torch.equal(cams.targs, torch.stack([every[i][1] for i in expected[kind]]).as_subclass(Tensor))
        assert all((pixels(x[i]) - every[j][0]).abs().max() <= 1 for i, j in enumerate(expected[kind])) and all(same_pictures(cams, x))


def test_loaders_that_hold_several_sets_are_refused(dls, learn):
    for call in (lambda: learn.get_cams(dls), lambda: learn.show_cam(dls), lambda: CAMInterpretation.from_learner(learn, dl=dls)):
        with pytest.raises(TypeError, match=r'pass (one of its DataLoaders, )?dls\.valid'): call()
    with pytest.raises(TypeError, match=r'dl is a labelled DataLoader, not list: make one of files or other items with learn.dls.test_dl\(items, with_labels=True\)'): CAMInterpretation.from_learner(learn, dl=dls.valid.items)
    with pytest.raises(IndexError, match='goes to item 12, and its data set has 12 items'): learn.get_cams(dls.valid.new(get_idxs=lambda: [3, 12]))
    assert torch.allclose(learn.get_cams(dls.valid_ds).maps, learn.get_cams(dls.valid).maps) and learn.get_cams(dls.train_ds).items==list(dls.train.items)


# ---- PyTorch's own loaders


TWELVE = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(12)%2


class Reads(torch.utils.data.Dataset):
    "A data set that is read when it is asked"
    def __init__(self, labels=True, noise=False): self.labels, self.noise = labels, noise
    def __len__(self): return 12
    def __getitem__(self, i):
        x = TWELVE[i] + (torch.rand(()) if self.noise else 0)
        return (x, LABELS[i]) if self.labels else x


class Streams(IterableDataset):
    def __iter__(self): return iter(zip(TWELVE, LABELS))


def collated(samples): return [torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])]


TORCH = dict(plain=lambda ds: TorchLoader(ds, 5), shuffled=lambda ds: TorchLoader(ds, 5, shuffle=True, drop_last=True), collate=lambda ds: TorchLoader(ds, 5, collate_fn=collated),
             batch_sampler=lambda ds: TorchLoader(ds, batch_sampler=BatchSampler(RandomSampler(ds), 5, False)), workers=lambda ds: TorchLoader(ds, 5, num_workers=1))


@pytest.mark.parametrize('kind', TORCH)
def test_every_door_of_a_learner_with_loaders_of_torch(kind):
    make = TORCH[kind]
    learn = learner(DataLoaders(make(Reads()), make(Reads())), loss_func=nn.CrossEntropyLoss())
    with torch.no_grad(): out = learn.model.eval()(TWELVE)
    losses = nn.functional.cross_entropy(out, LABELS, reduction='none')
    reference = learn.get_cams(TWELVE, cls='predicted').maps
    doors = {'all': (learn.dls.valid, range(12)), 'an index': (3, [3]), 'indices': ([7, -1, 2], [7, 11, 2]), 'a tensor': (torch.tensor([5, 4]), [5, 4]), 'a data set': (learn.dls.valid_ds, range(12)),
             'another': (Reads(), range(12)), 'a sample': (Reads()[6], [6]), 'samples': ([Reads()[6], Reads()[1]], [6, 1]), 'a batch': (next(iter(TorchLoader(Reads(), 4))), range(4))}
    for door, (item, which) in doors.items():
        cams = learn.get_cams(item)
        which = list(which)
        assert torch.allclose(cams.maps, reference[which], atol=1e-6), door
        assert torch.equal(cams.targs, LABELS[which]) and torch.allclose(cams.losses, losses[which], atol=1e-5), door
        assert all(torch.allclose(torch.as_tensor(cams.images[i]), TWELVE[j]) for i, j in enumerate(which)), door
    assert len(learn.get_cams())==5 and learn.get_cams([7, 2]).items==[7, 2]
    assert torch.allclose(learn.get_cams([2, 3], cls='actual').maps, learn.get_cams(TWELVE[2:4], cls=[0, 1]).maps[[0, 1], LABELS[2:4]], atol=1e-6)
    learn.show_cam(), learn.show_cam(3), learn.show_cam([1, 2])
    interp = CAMInterpretation.from_learner(learn)
    assert torch.allclose(interp.losses.as_subclass(Tensor), losses, atol=1e-5)
    worst = losses.argsort(descending=True)[:4]
    cams = interp.top_losses_cams(4)
    assert cams.items==worst.tolist() and torch.allclose(cams.maps, reference[worst], atol=1e-6)
    interp.plot_top_losses_cam(2, show='both')


CHOOSES = dict(subset=(lambda: dict(sampler=SubsetRandomSampler([8, 1, 5])), [8, 1, 5]), drawn=(lambda: dict(sampler=WeightedRandomSampler([1.]*12, 6, generator=torch.Generator().manual_seed(1))), None),
               some=(lambda: dict(sampler=RandomSampler(range(12), num_samples=4)), None), mine=(lambda: dict(sampler=[3, 3, 0]), [3, 3, 0]),
               batches=(lambda: dict(batch_sampler=[[9, 2], [4], [0, 1]]), [9, 2, 4, 0, 1]))


@pytest.mark.parametrize('kind', CHOOSES)
def test_items_that_a_sampler_of_torch_chose(kind):
    make, expected = CHOOSES[kind]
    learn = learner(DataLoaders(TorchLoader(Reads(), 5), TorchLoader(Reads(), 5)), loss_func=nn.CrossEntropyLoss())
    options = make()
    generator = getattr(options.get('sampler'), 'generator', None)
    before = None if generator is None else generator.get_state()
    cams, x = inputs_of(learn, lambda: learn.get_cams(TorchLoader(Reads(), **{**({} if 'batch_sampler' in options else dict(batch_size=2)), **options})))
    assert torch.equal(x, TWELVE[cams.items]) and torch.equal(cams.targs, LABELS[cams.items]) and all(torch.equal(torch.as_tensor(cams.images[i]), x[i]) for i in range(len(x)))
    assert cams.items==expected if expected else len(cams.items)==(6 if kind=='drawn' else 4)
    assert before is None or torch.equal(before, generator.get_state())
    interp = CAMInterpretation.from_learner(learn, dl=TorchLoader(Reads(), **{**({} if 'batch_sampler' in options else dict(batch_size=2)), **make()}))
    assert torch.allclose(interp.top_losses_cams(3).preds, interp.top_losses_cams(3).preds)
    if expected: assert [expected[i] for i in interp.top_losses(3)[1].tolist()]==interp.top_losses_cams(3).items


def test_streams_and_unlabelled_loaders_of_torch():
    learn = learner(DataLoaders(TorchLoader(Reads(), 5), TorchLoader(Reads(), 5)), loss_func=nn.CrossEntropyLoss())
    for loader, labelled in ((TorchLoader(Streams(), 5), True), (TorchLoader(Streams(), None, collate_fn=lambda s: (s[0][None], s[1][None])), True), (TorchLoader(Reads(labels=False), 5), False)):
        cams, x = inputs_of(learn, lambda: learn.get_cams(loader))
        assert torch.equal(x, TWELVE) and cams.items==list(range(12)) and (cams.targs is not None)==labelled
        assert all(torch.equal(torch.as_tensor(cams.images[i]), x[i]) for i in range(12))
        assert len(learn.get_cams(loader, max_n=7))==7
    streaming = learner(DataLoaders(TorchLoader(Streams(), 5), TorchLoader(Streams(), 5)), loss_func=nn.CrossEntropyLoss())
    assert torch.equal(streaming.get_cams().targs, LABELS[:5]) and len(CAMInterpretation.from_learner(streaming, dl=TorchLoader(Streams(), 5)).top_losses_cams(2))==2


@pytest.mark.parametrize('kept', [2**26, 0])
def test_a_data_set_of_torch_that_draws(monkeypatch, kept):
    monkeypatch.setattr(source_passes_room, '_kept_bytes', kept)
    learn = learner(DataLoaders(TorchLoader(Reads(noise=True), 5), TorchLoader(Reads(noise=True), 5)), loss_func=nn.CrossEntropyLoss())
    cams, x = inputs_of(learn, lambda: learn.get_cams(learn.dls.valid))
    assert all(torch.equal(torch.as_tensor(cams.images[i]), x[i]) for i in (11, 3, 0, 7))


# ---- items that the learner reads itself


def table_of(pictures):
    files = sorted(pictures.glob('*/*.png'), key=lambda f: f.stem)
    return pd.DataFrame(dict(name=[f'{f.parent.name}/{f.name}' for f in files], label=[f.parent.name for f in files]))


def own_readers(pictures, tmp_path):
    "Learners whose items are no pictures for PIL, by what their items are"
    files = sorted(pictures.glob('*/*.png'), key=lambda f: f.stem)
    arrays = {f: np.array(Image.open(f)) for f in files}
    for f, array in arrays.items():
        np.save(tmp_path/f'{f.stem}_{f.parent.name}.npy', array)
        folder = tmp_path/f'{f.stem}_{f.parent.name}_bands'
        folder.mkdir()
        for c in range(3): np.save(folder/f'{c}.npy', array[..., c])
    def tensor(array): return TensorImage(torch.from_numpy(array).permute(2, 0, 1))
    def npy(fn:Path): return tensor(np.load(fn))
    def stem(p): return p.stem.split('_')[1]
    def block(read): return TransformBlock(type_tfms=read, batch_tfms=IntToFloatTensor)
    npys = sorted(tmp_path.glob('*.npy')) # by number, as `files`
    by_id = {f.stem: array for f, array in arrays.items()}
    rows = table_of(pictures)
    rows['id'] = [f.stem for f in files]
    samples = [(arrays[f], f.parent.name) for f in files]
    made = dict(array_files=(block(npy), npys, None, stem), no_annotation=(block(lambda p: tensor(np.load(p))), npys, None, stem), endless=(block(lambda p: npy(p.with_suffix('.npy'))), [p.with_suffix('') for p in npys], None, stem),
                folders=(block(lambda p: tensor(np.stack([np.load(p/f'{c}.npy') for c in range(3)], -1))), sorted(tmp_path.glob('*_bands')), None, stem),
                ids=(block(lambda s: tensor(by_id[s])), list(by_id), None, lambda s: ('left', 'right')[int(s)%2]), pil=(block(lambda p: PILImage.create(np.load(p))), npys, None, stem),
                dicts=(block(lambda d: tensor(d['pixels'])), [dict(pixels=x, label=y) for x, y in samples], None, lambda d: d['label']), tuples=(ImageBlock, samples, ItemGetter(0), ItemGetter(1)),
                rows=(ImageBlock, rows, ColReader('name', pref=f'{pictures}/'), ColReader('label')), rows_read=(block(lambda row: tensor(by_id[row['id']])), rows, None, ColReader('label')), paths=(ImageBlock, files, lambda f: f, parent_label))
    for name, (block, items, get_x, get_y) in made.items():
        dls = DataBlock((block, CategoryBlock), get_items=None if isinstance(items, pd.DataFrame) else lambda _, items=items: items, get_x=get_x, get_y=get_y, splitter=lambda o: (list(range(12)), list(range(12, 24))),
                        batch_tfms=Normalize.from_stats(*imagenet_stats)).dataloaders(items, bs=5, num_workers=0)
        yield name, learner(dls), items


def test_items_that_the_learner_reads_itself(pictures, tmp_path):
    reference = learner(loaders(pictures)).get_cams(sorted(pictures.glob('*/*.png'), key=lambda f: f.stem)[12:]).maps
    for name, learn, items in own_readers(pictures, tmp_path):
        one = items.iloc[15] if isinstance(items, pd.DataFrame) else items[15]
        forms = {'it': (one, [3]), 'in a list': ([one], [3]), 'with an index': ([one, 4, one], [3, 4, 3]), 'an index': (3, [3])}
        if isinstance(one, Path): forms.update({'a string': (str(one), [3]), 'strings and paths': ([str(one), one], [3, 3])})
        if isinstance(items, pd.DataFrame): forms['rows'] = (items.iloc[[15, 13]], [3, 1])
        for form, (item, which) in forms.items():
            cams = learn.get_cams(item)
            assert torch.allclose(cams.maps, reference[which], atol=1e-6), (name, form)
            assert len(cams.images.load())==len(which) and torch.as_tensor(np.array(cams.images[0])).shape==(3, 64, 64), (name, form)
        learn.show_cam(one)


def test_pictures_of_a_learner_that_reads_paths_itself(pictures, tmp_path):
    readers = {name: (learn, items) for name, learn, items in own_readers(pictures, tmp_path)}
    learn, items = readers['pil'] # it makes a PILImage in the end, so a picture enters there
    array = np.load(items[15])
    for picture in (array, Image.fromarray(array), torch.from_numpy(array), PILImage.create(array)):
        assert torch.allclose(learn.get_cams(picture).maps, learn.get_cams(3).maps, atol=1e-6)
    assert torch.allclose(learn.get_cams([array, items[15], 3]).maps, learn.get_cams([3, 3, 3]).maps, atol=1e-6)
    read, items = readers['array_files'] # it makes a tensor in the end
    for tensor in (torch.from_numpy(array).permute(2, 0, 1), TensorImage(array).permute(2, 0, 1)):
        assert torch.allclose(read.get_cams([tensor, items[15]]).maps, read.get_cams([3, 3]).maps, atol=1e-6)
    for name, wrong in (('ids', array), ('array_files', Image.fromarray(array)), ('dicts', 'a.png'), ('rows_read', dict(a=1))):
        with pytest.raises(TypeError, match='this learner reads its items itself'): readers[name][0].get_cams(wrong)


class ReaderError(Exception): pass


def raises_bare(): raise ReaderError


@pytest.mark.parametrize('workers', [0, 1])
def test_what_the_learners_own_reader_cannot_read_is_named(tmp_path, workers):
    files = [tmp_path/f'{i}.npy' for i in range(8)]
    for i, file in enumerate(files): np.save(file, np.full((3, 32, 32), i, dtype=np.float32))
    failures = {5: lambda: struct.unpack('<i', b'abc'), 6: lambda: [][3], 7: raises_bare}
    def read(fn:Path):
        if int(fn.stem) in failures and fails: failures[int(fn.stem)]()
        return TensorImage(np.load(fn))
    fails = False
    dls = DataBlock((TransformBlock(type_tfms=read), CategoryBlock), get_items=lambda _: files, get_y=lambda f: int(f.stem)%2, splitter=lambda o: (list(range(2)), list(range(8)))).dataloaders(None, bs=4, num_workers=0)
    learn = learner(dls)
    fails, ran = True, []
    learn.model.register_forward_pre_hook(lambda *args: ran.append(1))
    for i, why in ((5, 'error: unpack requires a buffer of 4 bytes'), (6, 'IndexError: list index out of range'), (7, 'ReaderError')):
        for call in (lambda: learn.get_cams([i]), lambda: learn.get_cams([files[i]]), lambda: learn.get_cams(dls.valid.new(get_idxs=lambda: [i], num_workers=workers)), lambda: CAMInterpretation.from_learner(learn, dl=dls.valid.new(get_idxs=lambda: [i]))):
            with pytest.raises(ValueError) as caught: call()
            assert f"{i}.npy') cannot be read: {why}" in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(ValueError, match=r"5.npy'\) cannot be read"): learn.get_cams(dls.valid.new(num_workers=workers))
    assert ran==[1]*len(ran) and len(ran) <= 4 # the first batch of a loader may have run


def broken_files(folder):
    "Files that PIL refuses in ways of their own"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for kind in 'jpg', 'png', 'gif', 'tif', 'bmp', 'webp':
        picture.save(folder/f'x.{kind}')
        content = (folder/f'x.{kind}').read_bytes()
        (folder/f'cut.{kind}').write_bytes(content[:len(content)//2])
        (folder/f'head.{kind}').write_bytes(content[:12])
    (folder/'bad.ppm').write_bytes(b'P6 3_ 3 255\n')
    (folder/'empty.png').write_bytes(b'')
    (folder/'text.jpg').write_text('no picture')
    png = bytearray((folder/'x.png').read_bytes())
    png[60:80] = b'\xff'*20
    (folder/'zlib.png').write_bytes(png)
    Image.new('1', (16000, 12000)).save(folder/'slide.png')
    return [f for f in sorted(folder.iterdir()) if not f.name.startswith('x.')]


def test_files_that_cannot_be_read_are_named(pictures, learn, tmp_path, monkeypatch):
    good, ran = next(pictures.glob('*/*.png')), []
    learn.model.register_forward_pre_hook(lambda *args: ran.append(1))
    def refused(file, item):
        with pytest.raises(ValueError) as caught: learn.get_cams([good, item])
        assert str(file) in str(caught.value) and '\n' not in str(caught.value) and 'read' in str(caught.value), str(caught.value)
    for file in broken_files(tmp_path):
        refused(file, file)
        if file.name in ('cut.jpg', 'zlib.png', 'cut.tif'): refused(file, Image.open(file)) # PIL reads when it must
    for error in (struct.error('x'), EOFError(), zlib.error('y'), IndexError('z'), MemoryError(), type('SomeExtensionError', (Exception,), {})()):
        def fail(*args, **kwargs): raise error
        with monkeypatch.context() as patched:
            patched.setattr(Image, 'open', fail)
            refused(good, good)
    assert ran==[]


# ---- forms that users type


def test_forms_that_mean_validation_items(dls, learn):
    _, idxs = CAMInterpretation.from_learner(learn).top_losses(3)
    reference, expected = learn.get_cams(dls.valid).maps, idxs.tolist()
    mask = torch.zeros(12, dtype=torch.bool); mask[[2, 7]] = True
    forms = {'top losses': (idxs, expected), 'one of them': (idxs[0], expected[:1]), 'a list of them': (list(idxs), expected), 'int32': (torch.tensor([3, -1], dtype=torch.int32), [3, 11]), 'bytes': (torch.tensor([3, 1], dtype=torch.uint8), [3, 1]),
             'array': (np.array([4, 2]), [4, 2]), 'np.int64': (np.int64(5), [5]), '0-d array': (np.array(5), [5]), 'Index': (pd.Index([1, 0]), [1, 0]), 'Series': (pd.Series([6, 1], index=[40, 3]), [6, 1]), 'L': (L(2, 3), [2, 3]),
             'range': (range(2, 5), [2, 3, 4]), 'generator': ((i for i in (1, 8)), [1, 8]), 'map': (map(int, '25'), [2, 5]), 'keys': ({4: 0, 1: 0}.keys(), [4, 1]), 'mask': (mask, [2, 7]), 'np mask': (mask.numpy(), [2, 7]),
             'Series mask': (pd.Series(mask.numpy()), [2, 7]), 'tuple': ((3, 1), [3, 1]), 'mixed': ([np.int64(3), torch.tensor(1), np.array(2)], [3, 1, 2])}
    for form, (item, which) in forms.items():
        cams = learn.get_cams(item)
        assert torch.allclose(cams.maps, reference[which], atol=1e-6) and cams.items==[dls.valid.items[i] for i in which] and cams.targs is not None, form
    learn.show_cam(idxs)
    for item, error, message in ((torch.tensor([0, 12]), IndexError, 'item 12 is out of range: the validation set has 12 items'), (mask[:5], IndexError, 'one value for each of the 12 of the validation set, and this one has 5'),
                                 (torch.tensor([], dtype=torch.int64), ValueError, 'empty'), (iter([]), ValueError, 'empty'), (~mask & mask, ValueError, 'empty'), (torch.tensor([.5, 1]), ValueError, 'rank 1'), (np.array([.5]), ValueError, 'rank 1'),
                                 ({1, 2}, TypeError, 'not set'), (True, TypeError, 'not bool'), ([True, False], TypeError, 'not bool'), (3., TypeError, 'not float'), (1j, TypeError, 'not complex'), ([[0, 1]], TypeError, 'not list'), (torch.tensor(2.5), ValueError, 'rank 0')):
        with pytest.raises(error, match=message): learn.get_cams(item)


def test_forms_that_mean_pictures(dls, learn, tmp_path, monkeypatch):
    files = [dls.valid.items[i] for i in (5, 2)]
    reference = learn.get_cams([5, 2]).maps
    content = files[0].read_bytes()
    class Odd:
        def read(self): return content
    opened = open(files[0], 'rb')
    opened.seek(7)
    forms = {'paths': np.array(files), 'strings': np.array([str(f) for f in files]), 'Series': pd.Series(files, index=[3, 9]), 'Index': pd.Index([str(f) for f in files]), 'generator': (f for f in files), 'map': map(str, files), 'keys': dict.fromkeys(files).keys(), 'tuple': tuple(files),
             'bytearray': bytearray(content), 'memoryview': memoryview(content), 'BytesIO': io.BytesIO(content), 'a file': opened, 'a response': Odd(), 'TensorImage': TensorImage(torch.tensor(np.array(Image.open(files[0]))).permute(2, 0, 1)), 'in a list': [io.BytesIO(content), files[1]],
             'a number type': torch.tensor(np.array(Image.open(files[0]))).permute(2, 0, 1).int()}
    for form, item in forms.items():
        cams = learn.get_cams(item)
        assert torch.allclose(cams.maps, reference[:len(cams)], atol=1e-6), form
    assert opened.tell()==7
    opened.close()
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'mine.png').write_bytes(content)
    for home in ('~/mine.png', Path('~/mine.png')): assert torch.allclose(learn.get_cams(home).maps, reference[:1], atol=1e-6)
    for address in ('https://example.com/a.jpg', 'http://example.com/a.jpg', 's3://bucket/a.jpg', 'data:image/png;base64,AAAA', Path('https://example.com/a.jpg'), ['ftp://example.com/a.jpg']):
        with pytest.raises(ValueError, match=r"is an address, not a file: download it first, e.g. with urlsave\(address, 'photo.jpg'\)"): learn.get_cams(address)
    assert torch.allclose(learn.get_cams(PurePosixPath(files[0])).maps, reference[:1], atol=1e-6)
    for name in ('a'*5000, 'a\0b.png', 'none.png'):
        with pytest.raises(FileNotFoundError, match='there is no file'): learn.get_cams(name)
    with pytest.raises(TypeError, match="open it with 'rb'"), open(__file__) as text: learn.get_cams(text)
    with pytest.raises(TypeError, match='pass its column of paths'): learn.get_cams(pd.DataFrame(dict(file=files)))


@pytest.mark.parametrize('mode', ['P', 'LA', 'PA', 'CMYK', 'I;16', 'L', 'RGBA', '1', 'I', 'F', 'YCbCr', 'HSV'])
def test_pictures_in_every_mode_are_as_fastai_has_them(learn, tmp_path, mode):
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(array[..., 0].astype(np.uint16)) if mode=='I;16' else Image.fromarray(array).convert(mode) if mode not in ('LA', 'PA') else Image.fromarray(array).convert('L' if mode=='LA' else 'P').convert(mode)
    before = picture.tobytes()
    expected = learn.get_cams(PILImage.create(np.array(picture.convert('RGB'))))
    assert torch.allclose(learn.get_cams(picture).maps, expected.maps, atol=1e-6) and picture.mode==mode and picture.tobytes()==before
    kind = dict(CMYK='tif', YCbCr='jpg', HSV='', F='tif', I='tif', PA='').get(mode, 'png')
    if kind:
        picture.save(tmp_path/f'a.{kind}')
        x = learn.dls.test_dl([tmp_path/f'a.{kind}']).one_batch()[0]
        cams, seen = inputs_of(learn, lambda: learn.get_cams(tmp_path/f'a.{kind}'))
        assert torch.equal(seen, x.as_subclass(Tensor)) and torch.equal(inputs_of(learn, lambda: learn.get_cams(Image.open(tmp_path/f'a.{kind}')))[1], seen)


def test_turned_photographs_are_as_fastai_has_them(learn, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6 # turned by a quarter
    picture.save(tmp_path/'turned.png', exif=exif)
    x = learn.dls.test_dl([tmp_path/'turned.png']).one_batch()[0]
    for item in (tmp_path/'turned.png', Image.open(tmp_path/'turned.png'), (tmp_path/'turned.png').read_bytes()): assert torch.equal(inputs_of(learn, lambda: learn.get_cams(item))[1], x.as_subclass(Tensor))


def test_batches_and_samples_with_their_labels(dls, learn):
    x, y = dls.valid.one_batch()
    reference, right = learn.get_cams(list(range(5)), cls='all'), learn.get_cams(list(range(5)), cls='actual')
    for form, batch in {'a batch': (x, y), 'plain': (x.as_subclass(Tensor), y.as_subclass(Tensor)), 'a list': [x, y]}.items():
        cams = learn.get_cams(batch, cls='actual')
        assert torch.allclose(cams.maps, right.maps, atol=1e-6) and torch.equal(cams.targs, right.targs) and torch.allclose(cams.losses, right.losses, atol=1e-5), form
        assert all((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()==0 for a, b in zip(cams.images.load(), right.images.load()))
    assert len(learn.get_cams((x, y), max_n=2))==2 and learn.get_cams((x,)).targs is None and len(learn.get_cams(dls.train.one_batch()))==5
    for form, item, which in (('a sample', dls.valid_ds[3], [3]), ('samples', [dls.valid_ds[3], dls.valid_ds[1]], [3, 1]), ('with an index', [dls.valid_ds[3], 4, -12], [3, 4, 0]),
                              ('a subset', Subset(dls.valid_ds, [3, 1, 4]), [3, 1, 4])):
        cams = learn.get_cams(item, cls='actual')
        assert torch.allclose(cams.maps, right.maps[which], atol=1e-6) and torch.equal(cams.targs, right.targs[which]), form
    assert torch.allclose(learn.get_cams([x[0], x[1]]).maps, learn.get_cams([0, 1]).maps, atol=1e-6) # two inputs are no batch
    assert torch.allclose(learn.get_cams([x, x]).maps[5:], learn.get_cams(list(range(5))).maps, atol=1e-6) # nor are two batches
    learn.show_cam(dls.one_batch()), learn.show_cam(dls.valid_ds[0])


def test_samples_of_masks_and_of_random_crops(pictures):
    files = sorted(pictures.glob('*/*.png'))
    from fastai.vision.all import RandomResizedCrop, unet_learner, resnet18
    dls = DataBlock((ImageBlock, MaskBlock(codes=['no', 'yes'])), get_items=lambda _: files, get_y=lambda f: PILImage.create((np.array(Image.open(f))[..., 0] > 200).astype(np.uint8)).convert('L'), splitter=lambda o: (list(range(12)), list(range(12, 24))),
                    item_tfms=RandomResizedCrop(64), batch_tfms=Normalize.from_stats(*imagenet_stats)).dataloaders(pictures, bs=4, num_workers=0)
    learn = unet_learner(dls, resnet18, pretrained=False)
    learn.remove_cb(ProgressCallback)
    by_index, by_sample, by_batch = learn.get_cams([2, 3]), learn.get_cams([dls.valid_ds[2], dls.valid_ds[3]]), learn.get_cams(dls.valid.one_batch())
    assert torch.allclose(by_sample.maps, by_index.maps, atol=1e-5) and torch.allclose(by_batch.maps[2:], by_index.maps, atol=1e-4) # as validation crops: in the middle


# ---- workers that are started anew, ranks, containers


def test_what_goes_to_worker_processes_can_be_sent(dls, learn):
    for chosen in (dl_source(learn, dls.valid), as_source(learn, [3, 1]), as_source(learn, dls.train), dl_source(learn, dls.valid.new(n=4))):
        list(chosen.dl)
        sent = pickle.loads(pickle.dumps(chosen.dl.fake_l)).d
        assert [b[1].tolist() for b in sent]==[b[1].tolist() for b in chosen.dl] and 'seen' not in sent.__dict__ and isinstance(sent, TfmdDL)
        assert len(pickle.dumps(chosen.dl)) < 200_000 # without the pictures that went through
    torch_learn = learner(DataLoaders(TorchLoader(Reads(), 5), TorchLoader(Reads(), 5)), loss_func=nn.CrossEntropyLoss())
    assert len(list(pickle.loads(pickle.dumps(dl_source(torch_learn, torch_learn.dls.valid).dl.fake_l)).d))==3


def test_workers_that_are_started_anew():
    "In a process that shares nothing with this one; its start takes seconds"
    from fastai.data.load import _FakeLoader
    loader = TfmdDL([(TWELVE[i], LABELS[i]) for i in range(5)], bs=3, num_workers=1)
    learn = learner(DataLoaders(loader, loader))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_FakeLoader, 'multiprocessing_context', property(lambda self: torch.multiprocessing.get_context('spawn')))
        cams = learn.get_cams(loader)
    assert torch.allclose(cams.maps, learn.get_cams(list(range(5))).maps, atol=1e-6) and all(torch.equal(torch.as_tensor(cams.images[i]), TWELVE[i]) for i in range(5))


Pair = namedtuple('Pair', 'image extra')


def test_inputs_in_containers():
    x, extra = torch.rand(6, 3, 32, 32), torch.rand(6, 4)
    class Takes(nn.Module):
        def __init__(self): super().__init__(); self.body = net()
        def forward(self, inp): return self.body(inp['image'])
    plain = TfmdDL([(x[i], i%2) for i in range(6)], bs=4, num_workers=0)
    reference = learner(DataLoaders(plain, plain)).get_cams(plain)
    for make in (lambda i: dict(image=x[i], extra=extra[i]), lambda i: dict(extra=extra[i], image=x[i])):
        samples = [(make(i), i%2) for i in range(6)]
        for dl in (TfmdDL(samples, bs=4, num_workers=0), TorchLoader(samples, 4)):
            learn = learner(DataLoaders(dl, dl), Takes(), loss_func=nn.CrossEntropyLoss())
            for item, which in ((dl, range(6)), ([4, 1], [4, 1]), (samples[3], [3])):
                cams = learn.get_cams(item)
                assert torch.allclose(cams.maps, reference.maps[list(which)], atol=1e-6) and torch.equal(cams.targs, reference.targs[list(which)])
                assert all(torch.equal(torch.as_tensor(cams.images[i]).as_subclass(Tensor), x[j]) for i, j in enumerate(which))
    for batch in ((Pair(x, extra), torch.arange(6)), (dict(extra=extra, image=x), torch.arange(6)), (extra, [x])):
        assert all(torch.equal(a, b) for a, b in zip(decode_images(TorchLoader([0]), batch), x))


class Frames(nn.Module):
    "Frames folded into the batch and their scores averaged"
    def __init__(self): super().__init__(); self.body = net()
    def forward(self, x): return self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


@pytest.mark.parametrize('shape', [(6, 3, 32, 32), (3, 6, 32, 32), (3, 40), (2, 4, 3, 16, 16)])
def test_an_input_has_the_rank_of_the_learners_own(shape):
    "A tensor of that many dimensions is one item, one more is a batch"
    x = torch.rand(5, *shape)
    dl = TfmdDL([(x[i], i%2) for i in range(5)], bs=4, num_workers=0)
    learn = learner(DataLoaders(dl, dl))
    for item, n in ((x[1], 1), (x[:3], 3), ([x[1], x[2]], 2), ([x[:2], x[3]], 3), ((x[1], 1), 1), ((x[:3], torch.tensor([0, 1, 0])), 3), (x[:2].double(), 2), ([2, 3], 2)):
        batches = list(as_source(learn, item).dl)
        assert [tuple(batch[0].shape) for batch in batches]==[(n, *shape)] and batches[0][0].dtype==torch.float32
        assert len(decode_images(dl, batches[0]))==n and decode_images(dl, batches[0])[0].shape==shape
    for wrong in (x[0][0], x[None]):
        with pytest.raises(ValueError, match=f'has rank {wrong.dim()}'): as_source(learn, wrong)


def test_checks_of_a_learner_with_loaders_of_torch():
    "Loaders of torch know no device; the model does"
    loader = TorchLoader(Reads(), 5)
    learn = learner(DataLoaders(loader, loader), loss_func=nn.CrossEntropyLoss())
    assert learn.cam_trust(1, n_random=2, steps=2) is not None and learn.sanity_check([0, 1, 2], n_steps=2) is not None
    interp = CAMInterpretation.from_learner(learn)
    assert len(interp.compare_cams(['gradcam'], n=3))==5
    many = TorchLoader(TensorDataset(torch.rand(24, 3, 32, 32), torch.arange(24)%2), 8)
    CAMInterpretation.from_learner(learn, dl=many).find_shortcuts()


def test_rows_of_a_table_and_batches_without_a_validation_set(pictures, tmp_path):
    rows = table_of(pictures)
    dls = ImageDataLoaders.from_df(rows, pictures, item_tfms=Resize(64), num_workers=0, bs=4, valid_pct=.5, seed=1)
    learn = learner(dls)
    reference = learn.get_cams(pictures/rows['name'][2]).maps
    for row in (rows.iloc[2], rows.iloc[2].to_dict(), dict(name=rows['name'][2]), list(rows.itertuples())[2], [rows.iloc[2].to_dict()], rows.iloc[2:3]):
        assert torch.allclose(learn.get_cams(row).maps, reference, atol=1e-6)
    x, y = dls.valid.one_batch()
    learn.export(tmp_path/'learn.pkl')
    from fastai.vision.all import load_learner
    loaded = load_learner(tmp_path/'learn.pkl')
    cams = loaded.get_cams((x, y), cls='actual')
    assert torch.equal(cams.targs, y.as_subclass(Tensor)) and torch.allclose(cams.maps, learn.get_cams(list(range(4)), cls='actual').maps, atol=1e-6)
    assert torch.allclose(loaded.get_cams(x[0]).maps, learn.get_cams(0).maps, atol=1e-6)
    with pytest.raises(IndexError, match='no validation set'): loaded.get_cams(torch.tensor([0]))


def test_loaders_whose_data_set_holds_batches_or_nothing(learn):
    xs = [(TWELVE[i], LABELS[i]) for i in range(6)]
    batches = [tuple(map(torch.stack, zip(*xs[:3]))), tuple(map(torch.stack, zip(*xs[3:])))]
    for loader in (DataLoader(batches, bs=None, num_workers=0), DataLoader(xs, bs=4, indexed=False, num_workers=0), DataLoader(xs, bs=4, num_workers=0)):
        learn = learner(DataLoaders(loader, loader), loss_func=nn.CrossEntropyLoss())
        for item, which in ((loader, range(6)), ([4, -5], [4, 1]), (3, [3])):
            cams = learn.get_cams(item)
            assert torch.equal(cams.targs, LABELS[list(which)]) and all(torch.equal(torch.as_tensor(cams.images[i]), TWELVE[j]) for i, j in enumerate(which))
        with pytest.raises(IndexError, match='item 6 is out of range'): learn.get_cams(6)
        interp = CAMInterpretation.from_learner(learn)
        assert torch.equal(interp.top_losses_cams(3).targs, LABELS[interp.top_losses(3)[1]]) and len(interp.compare_cams(['gradcam'], n=3))==5


@pytest.mark.parametrize('kind', ['torch', 'python'])
def test_looking_at_pictures_leaves_no_trace(pictures, monkeypatch, kind):
    "Also where a picture turns out to be another one: random states and the learner are as they were"
    monkeypatch.setattr(source_passes_room, '_kept_bytes', 0)
    dls = loaders(pictures, item_tfms=crop_by(DRAWS[kind]))
    learn = learner(dls)
    cams, x = inputs_of(learn, lambda: learn.get_cams(dls.valid.new(num_workers=1)))
    good = learn.get_cams(dls.valid)
    def state(): return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), [m.training for m in learn.model.modules()], list(learn.cbs), dls.valid.rng.getstate()
    learn.model.train()
    before = state()
    assert len(good.images.load())==12 and state()==before
    try: cams.images[7]
    except ValueError as e: assert state()==before and 'no longer' in str(e) # while the traceback is alive
    else: raise AssertionError('another picture was shown')


def test_items_that_make_no_batch(tmp_path):
    files = [tmp_path/f'{i}.png' for i in range(8)]
    for i, file in enumerate(files): Image.new('RGB', (32 + 8*(i==5), 32)).save(file)
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: files, get_y=lambda f: int(f.stem)%2, splitter=lambda o: (list(range(4)), list(range(8)))).dataloaders(None, bs=4, num_workers=0)
    learn = learner(dls)
    for call in (lambda: learn.get_cams([4, 5]), lambda: learn.get_cams(files[4:6]), lambda: learn.get_cams(dls.valid), lambda: learn.get_cams(dls.valid.new(num_workers=1))):
        with pytest.raises(ValueError, match='the items make no batch .*images of different sizes need Resize among the item_tfms, or a call each') as caught: call()
        assert '\n' not in str(caught.value)
    assert learn.get_cams(5).images[0].shape==(3, 32, 40)


# -- indices and masks, however they were found

def indices_of(mask):
    "The same choice of items, in the forms in which it is found"
    chosen = mask.nonzero()
    return [chosen, chosen.T, chosen.squeeze(1), chosen.numpy(), np.argwhere(mask.numpy()), np.argwhere(mask.numpy()).T, chosen.int(), list(chosen), list(chosen.numpy()),
            chosen.tolist(), np.where(mask.numpy()), mask.nonzero(as_tuple=True), L(chosen), mask, mask[:,None], mask[None], mask.numpy()[:,None], mask.tolist(), list(mask), tuple(mask.numpy())]


@pytest.mark.parametrize('chosen', [[1, 4, 5], [7]])
def test_indices_of_any_shape_are_indices(dls, chosen):
    learn, mask = learner(dls), torch.zeros(12, dtype=torch.bool)
    mask[chosen] = True
    plain = learn.get_cams(chosen)
    for form in indices_of(mask):
        found = learn.get_cams(form)
        assert found.items==plain.items and torch.equal(found.maps, plain.maps), form


def test_a_column_of_pixels_is_a_picture(dls):
    "Bytes are pixels, also where the picture is one pixel wide"
    learn = learner(dls)
    column = np.full((12, 1), 200, dtype=np.uint8)
    assert torch.equal(learn.get_cams(column).maps, learn.get_cams(np.repeat(column[...,None], 3, 2)).maps)


@pytest.mark.parametrize('items', [False, True])
def test_top_losses_as_they_come(dls, items):
    learn = learner(dls)
    interp = CAMInterpretation.from_learner(learn)
    top = interp.top_losses(3, items=items)
    plain = learn.get_cams(top[1])
    for form in (top, list(top), (top[0].numpy(), top[1].numpy(), *top[2:])):
        assert learn.get_cams(form).items==plain.items and torch.equal(learn.get_cams(form).maps, plain.maps)


def test_one_row_of_a_batch(dls):
    learn = learner(dls)
    xb, yb = dls.valid.one_batch()
    batch, row = learn.get_cams((xb, yb), cls='actual'), learn.get_cams((xb[2], yb[2]), cls='actual')
    assert len(row)==1 and torch.allclose(row.maps[0], batch.maps[2], atol=1e-6) and torch.allclose(row.losses[0], batch.losses[2], atol=1e-6) and row.targs.tolist()==[yb[2].item()]


def test_channels_last_are_named(dls):
    learn = learner(dls)
    learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    for x in (torch.rand(64, 48, 3), torch.rand(2, 64, 48, 3), [torch.rand(64, 48, 3)]):
        with pytest.raises(ValueError, match=r'has its 3 channels last: pass it.movedim\(-1, -3\)'): learn.get_cams(x)
    x = torch.randn(64, 48, 3)
    assert torch.equal(learner(dls).get_cams(x.movedim(-1, -3)).maps, learner(dls).get_cams(x.permute(2, 0, 1)).maps)


def test_no_pass_draws_from_the_global_generator(dls, monkeypatch):
    "Putting the state back is of no use where another thread draws meanwhile: nothing is drawn at all"
    learn = learner(dls)
    interp = CAMInterpretation.from_learner(learn)
    monkeypatch.setattr('fastai_cam.state._at_work', lambda: True) # as if another thread did: then nothing is put back
    calls = dict(cams=lambda: learn.get_cams([0, 1]), a_loader=lambda: learn.get_cams(dls.valid), losses=lambda: CAMInterpretation.from_learner(learn), top=lambda: interp.top_losses_cams(2),
                 sanity=lambda: learn.sanity_check([0, 1], n_steps=1), confusion=interp.confusion_matrix, shown=lambda: learn.show_cam([0, 1]))
    for name, call in calls.items():
        state = torch.get_rng_state()
        call()
        assert torch.equal(torch.get_rng_state(), state), name
