"The picture shown is the one that went in, whatever draws at random, however often, and looking leaves no trace."
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader as TorchLoader
from fastai.callback.core import Callback
from fastai.vision.all import DataLoaders, PILImage, TensorImage, TfmdDL, Transform

import fastai_cam.source.passes as source_passes_room
from fastai_cam.all import CAMInterpretation
from fastai_cam.source.items import as_source
from fastai_cam.source.passes import decode_images
from fastai_cam.source.loaders import dl_source

from helpers.source import inputs_of, learner, loaders, MEAN, net, pixels, same_pictures, STD


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


# ---- workers that are started anew, ranks, containers

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


# -- indices and masks, however they were found

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
