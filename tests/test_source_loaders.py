"Loaders that choose their items, of fastai and of PyTorch: items are those that the loader chose, or none is named."
import gc
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler, DataLoader as TorchLoader, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler)
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.load import SkipItemException
from fastai.text.data import SortedDL
from fastai.vision.all import CategoryBlock, DataBlock, DataLoader, DataLoaders, ImageBlock, PILImage, TfmdDL, Transform

import fastai_cam.source.passes as source_passes_room
from fastai_cam.all import CAMInterpretation
from fastai_cam.core import tensors_in
from fastai_cam.source.items import as_source
from fastai_cam.source.loaders import dl_source

from helpers.source import inputs_of, learn, learner, loaders, pixels, same_pictures


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


# ---- workers that are started anew, ranks, containers

def test_what_goes_to_worker_processes_can_be_sent(dls, learn):
    for chosen in (dl_source(learn, dls.valid), as_source(learn, [3, 1]), as_source(learn, dls.train), dl_source(learn, dls.valid.new(n=4))):
        list(chosen.dl)
        sent = pickle.loads(pickle.dumps(chosen.dl.fake_l)).d
        assert [b[1].tolist() for b in sent]==[b[1].tolist() for b in chosen.dl] and 'seen' not in sent.__dict__ and isinstance(sent, TfmdDL)
        assert len(pickle.dumps(chosen.dl)) < 200_000 # without the pictures that went through
    torch_learn = learner(DataLoaders(TorchLoader(Reads(), 5), TorchLoader(Reads(), 5)), loss_func=nn.CrossEntropyLoss())
    assert len(list(pickle.loads(pickle.dumps(dl_source(torch_learn, torch_learn.dls.valid).dl.fake_l)).d))==3


@pytest.mark.slow
def test_workers_that_are_started_anew():
    "In a process that shares nothing with this one; its start takes seconds"
    from fastai.data.load import _FakeLoader
    loader = TfmdDL([(TWELVE[i], LABELS[i]) for i in range(5)], bs=3, num_workers=1)
    learn = learner(DataLoaders(loader, loader))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_FakeLoader, 'multiprocessing_context', property(lambda self: torch.multiprocessing.get_context('spawn')))
        cams = learn.get_cams(loader)
    assert torch.allclose(cams.maps, learn.get_cams(list(range(5))).maps, atol=1e-6) and all(torch.equal(torch.as_tensor(cams.images[i]), TWELVE[i]) for i in range(5))


def test_checks_of_a_learner_with_loaders_of_torch():
    "Loaders of torch know no device; the model does"
    loader = TorchLoader(Reads(), 5)
    learn = learner(DataLoaders(loader, loader), loss_func=nn.CrossEntropyLoss())
    assert learn.cam_trust(1, n_random=2, steps=2) is not None and learn.sanity_check([0, 1, 2], n_steps=2) is not None
    interp = CAMInterpretation.from_learner(learn)
    assert len(interp.compare_cams(['gradcam'], n=3))==5
    many = TorchLoader(TensorDataset(torch.rand(24, 3, 32, 32), torch.arange(24)%2), 8)
    CAMInterpretation.from_learner(learn, dl=many).find_shortcuts()


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


def test_items_that_make_no_batch(tmp_path):
    files = [tmp_path/f'{i}.png' for i in range(8)]
    for i, file in enumerate(files): Image.new('RGB', (32 + 8*(i==5), 32)).save(file)
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=lambda _: files, get_y=lambda f: int(f.stem)%2, splitter=lambda o: (list(range(4)), list(range(8)))).dataloaders(None, bs=4, num_workers=0)
    learn = learner(dls)
    for call in (lambda: learn.get_cams([4, 5]), lambda: learn.get_cams(files[4:6]), lambda: learn.get_cams(dls.valid), lambda: learn.get_cams(dls.valid.new(num_workers=1))):
        with pytest.raises(ValueError, match='the items make no batch .*images of different sizes need Resize among the item_tfms, or a call each') as caught: call()
        assert '\n' not in str(caught.value)
    assert learn.get_cams(5).images[0].shape==(3, 32, 40)


# ---- what is let go is gone

@pytest.mark.parametrize('make', [lambda learn: dl_source(learn, learn.dls.valid), lambda learn: dl_source(learn, learn.dls.train, [0, 2]), lambda learn: as_source(learn, [torch.rand(3, 32, 32)]),
                                  lambda learn: as_source(learn, list(learn.dls.valid.items[:2]))], ids=['loader', 'some', 'batches', 'files'])
def test_a_source_that_is_let_go_is_freed_at_once(learn, make):
    "And with it the pictures that went through, without a visit of the garbage collector"
    learn.get_cams(0)
    gc.collect()
    gc.disable()
    try:
        source = make(learn)
        assert len(list(source.dl)) and source.images[0] is not None and len(source.items)
        held = [weakref.ref(part) for part in (source, source.dl, source.dl.seen, source.dl.seen.batches[0][0][0])]
        del source
        assert [one() is None for one in held]==[True]*4
    finally: gc.enable()


def test_tensors_that_were_looked_for_are_not_held():
    gc.collect()
    gc.disable()
    try:
        x = torch.rand(3)
        held = weakref.ref(x)
        assert tensors_in([x, dict(y=x)])[1] is x
        del x
        assert held() is None
    finally: gc.enable()
