"A learner is left as it was found: at any point of a fit, whatever its callbacks keep, for success and for every kind of failure."
import hashlib
import random
import sys
import threading
import types
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
                                  CancelTrainException, CancelValidException, TrainEvalCallback, _events)
from fastai.callback.fp16 import MixedPrecision, ModelToHalf, NonNativeMixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import SkipItemException
from fastai.learner import CastToTensor, Learner, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import DataBlock, CategoryBlock, FuncSplitter, ImageBlock, Normalize, Resize, accuracy, aug_transforms, get_image_files, imagenet_stats, \
    parent_label, resnet18, vision_learner

from fastai_cam.all import CAMCallback, CAMInterpretation, METHODS
from fastai_cam.state import random_states_kept


class Net(nn.Module):
    "Batch norm and dropout: a pass in the wrong mode, or a number drawn, changes what is trained"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.3), nn.Linear(4, 2))
    def forward(self, x): return self.head(self.body(x))


@pytest.fixture(scope='module')
def dls(pictures):
    "Transforms that draw random numbers, in validation too"
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=FuncSplitter(lambda f: int(f.stem) >= 12),
                      item_tfms=Resize(32), batch_tfms=[*aug_transforms(size=24), Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(pictures, bs=4, num_workers=0)


def make(dls, cbs=(), model=None, **kwargs):
    set_seed(1)
    with_no_bar = [TrainEvalCallback(), Recorder(), CastToTensor()]
    return Learner(dls, Net() if model is None else model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[*with_no_bar, *cbs], default_cbs=False, **kwargs)


def fingerprint(value, seen=None):
    "Everything that can be reached from `value`, deeply, as something to compare"
    seen = {} if seen is None else seen
    if isinstance(value, (int, float, complex, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType, np.generic)): return repr(value)
    if id(value) in seen: return f'#{seen[id(value)]}'
    seen[id(value)] = len(seen)
    go = lambda part: fingerprint(part, seen)
    if isinstance(value, torch.Tensor):
        whole = hashlib.md5(value.detach().cpu().as_subclass(torch.Tensor).contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest() if value.numel() else ''
        return 'tensor', id(value), tuple(value.shape), str(value.dtype), value.requires_grad, whole, None if not value.is_leaf or value.grad is None else go(value.grad)
    if isinstance(value, np.ndarray): return 'array', repr(value)
    if isinstance(value, random.Random): return 'random', value.getstate()
    if isinstance(value, torch.Generator): return 'generator', value.get_state().tolist()
    if isinstance(value, np.random.Generator): return 'generator', repr(value.bit_generator.state)
    if isinstance(value, TfmdDL): return 'loader', id(value), value.rng.getstate(), value.bs, value.n, value.shuffle, value.drop_last, sorted(vars(value)) # its transforms keep what they drew last
    if isinstance(value, dict): return 'dict', id(value), [(repr(k) if isinstance(k, (str, int)) else go(k), go(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, set, deque)): return type(value).__name__, [go(part) for part in value]
    if hasattr(value, '__dict__') and not isinstance(value, types.ModuleType): return type(value).__name__, id(value), [(k, go(v)) for k, v in vars(value).items()]
    return type(value).__name__, id(value)


def difference(a, b, where=''):
    "Where two fingerprints differ first; '' if they do not"
    if type(a) is not type(b) or not isinstance(a, (tuple, list)): return '' if a==b else f'{where}: {str(a)[:80]} != {str(b)[:80]}'
    if len(a) != len(b): return f'{where}: {len(a)} != {len(b)} parts, {str(a)[:300]} != {str(b)[:300]}'
    name = a[0] if a and isinstance(a[0], str) else ''
    return next((found for i, (x, y) in enumerate(zip(a, b)) if (found := difference(x, y, f'{where}/{name}{i}'))), '')


def rng(): return [repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()]
def around(learn): return fingerprint(learn), rng(), torch.is_grad_enabled(), torch.is_autocast_cache_enabled()


class Cancels(Callback):
    "Once in a fit of three epochs, every exception that a callback may stop something with"
    order = 90
    def after_loss(self):
        if self.training and self.train_iter==1: raise CancelBatchException
    def before_backward(self):
        if self.train_iter==2 and self.epoch==0: raise CancelBackwardException
    def before_step(self):
        if self.train_iter==0: raise CancelStepException
    def before_train(self):
        if self.epoch==1: raise CancelTrainException
    def after_batch(self):
        if not self.training and self.epoch==1 and self.iter==1: raise CancelValidException
    def before_epoch(self):
        if self.epoch==2: raise CancelEpochException
    def after_epoch(self):
        if self.epoch==2: raise CancelFitException


class Normalises(Callback):
    "Must see the pass, and keeps things of many kinds while it does"
    def __init__(self): self.count, self.seen, self.own, self.mean = 0, [], dict(rng=np.random.default_rng(0), g=torch.Generator(), r=random.Random(3)), torch.zeros(1)
    def before_batch(self):
        self.count += 1
        self.seen.append(len(self.x))
        self.mean += self.x.mean()
        self.own['rng'].random(); self.own['r'].random(); torch.rand(1, generator=self.own['g'])
        self.learn.xb = (self.x*.5 + .1,)


class Watch(Callback):
    "Calls `look` in one event, or in all"
    order = 70
    def __init__(self, look, events):
        self.n = 0
        for event in events: setattr(self, event, lambda: self.call(look))
    def call(self, look):
        if self.learn is None: return
        self.n += 1
        look(self.learn, self.n)


def trained(dls, look=None, events=(), model=None, cbs=None, make=make):
    "What a fit leaves: parameters and optimizer, what was recorded, and the random states"
    dls.train.rng = random.Random(0)
    watch = Watch(look or (lambda learn, n: None), events)
    learn = make(dls, cbs=[watch, *(usual() if cbs is None else cbs)], **({} if model is None else dict(model=model)))
    set_seed(5)
    with learn.no_logging(): learn.fit(3, 1e-2, wd=.1)
    rec = learn.recorder
    kept = [cb for cb in learn.cbs if isinstance(cb, (Normalises, ActivationStats, ParamScheduler))]
    kept = [{k: v for k, v in vars(cb).items() if k not in ('learn', 'hooks', 'modules')} for cb in kept]
    ids = lambda tree: tree if not isinstance(tree, (tuple, list)) else [ids(part) for i, part in enumerate(tree) if not (i==1 and isinstance(part, int))]
    left = dict(weights=[t.clone() for t in learn.model.state_dict().values()], opt=[t for state in learn.opt.state.values() for t in state.values() if isinstance(t, torch.Tensor)],
                losses=list(rec.losses), values=[list(v) for v in rec.values], lrs=list(rec.lrs), iters=list(rec.iters), kept=ids(fingerprint(kept)), rng=rng(),
                shuffled=dls.train.rng.getstate())
    return left, watch


def usual(): return [Cancels(), Normalises(), TerminateOnNaNCallback(), GradientClip(), ActivationStats(with_hist=True), ParamScheduler({'lr': SchedCos(1e-2, 1e-3)})]


def assert_same(a, b):
    assert a.keys()==b.keys()
    for key in a:
        same = all(torch.equal(x, y) for x, y in zip(a[key], b[key])) and len(a[key])==len(b[key]) if key in ('weights', 'opt') else a[key]==b[key]
        assert same, (key, difference(a[key], b[key]))


class Odd(Exception): pass


def fails_with(error):
    def raises(*args): raise error
    return raises


def broken_layer(learn, error):
    hook = learn.model.body[3].register_forward_pre_hook(fails_with(error)) if isinstance(learn.model, Net) else None
    try: learn.get_cams([0, 5])
    finally: hook.remove()


FAILURES = dict(target=(Odd, lambda learn, e: learn.get_cams([0, 5], cls=fails_with(e))), method=(KeyboardInterrupt, lambda learn, e: learn.get_cams([0, 5], method=fails_with(e))),
                stop=(StopIteration, lambda learn, e: learn.get_cams([0, 5], method=fails_with(e))), forward=(MemoryError, broken_layer),
                file=(FileNotFoundError, lambda learn, e: learn.get_cams('no/such/file.png')), name=(ValueError, lambda learn, e: learn.get_cams(0, cls='nobody')))


def looks_at_everything(learn, n):
    "A look and all the failures, twice an event: the learner, deeply, and the random states are what they were"
    if n > 2: return
    before = around(learn)
    cams = learn.get_cams([0, 5, 1], cls=['left', 'right'], method=['gradcam', 'fullgrad'])
    assert cams.maps.shape[:2]==(3, 4) and cams.maps.abs().max() > 0
    assert not difference(before, around(learn))
    learn.show_cam(None, method=METHODS['scorecam'], max_n=2)
    assert not difference(before, around(learn))
    for kind, (error, call) in FAILURES.items():
        raised = error()
        with pytest.raises(error) as caught: call(learn, raised)
        assert caught.value is raised and not raised.args or kind in ('file', 'name')
        assert not difference(before, around(learn)), kind


@pytest.fixture(scope='module')
def undisturbed(dls): return trained(dls)[0]


@pytest.mark.parametrize('event', [e for e in _events])
def test_training_is_the_same_to_the_last_bit(dls, undisturbed, event):
    looked, watch = trained(dls, looks_at_everything, [event])
    assert watch.n > 0
    assert_same(undisturbed, looked)


def test_a_vision_learner_that_is_looked_at_in_all_events(dls):
    "fastai's own learner, frozen, with its default head; and an interpretation in the middle of it all"
    def make_vision(dls, cbs):
        set_seed(1)
        learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy).add_cbs(cbs)
        learn.freeze()
        return learn
    def look(learn, n):
        if n % 9==1: learn.get_cams([0, 5], cls='actual')
        if n==30: CAMInterpretation.from_learner(learn).plot_top_losses_cam(2, show='both')
    own = lambda: [Cancels()]
    plain, _ = trained(dls, None, [], cbs=own(), make=make_vision)
    looked, watch = trained(dls, look, list(_events), cbs=own(), make=make_vision)
    assert watch.n > 60
    assert_same(plain, looked)


@pytest.mark.parametrize('cbs', [lambda: [MixUp(.4)], lambda: [GradientAccumulation(8)], lambda: [ShortEpochCallback(.5)], lambda: [MixedPrecision()], lambda: [ChannelsLast()],
                                 lambda: [SaveModelCallback(), EarlyStoppingCallback(patience=1)], lambda: [CSVLogger()], lambda: [ReduceLROnPlateau(patience=0)]])
def test_callbacks_of_all_kinds(dls, tmp_path, cbs):
    "Looked at after every batch and epoch, in training and validation, with losses of the items"
    def build(dls, cbs): return make(dls, cbs, path=tmp_path)
    found = []
    def look(learn, n):
        if n > 6 and n % 8: return
        cams = learn.get_cams([0, 5, 1])
        found.append((cams.losses + cams.preds[range(3), cams.targs].log()).abs().max()) # the loss is −log p, whatever loss is trained with
    plain, _ = trained(dls, None, [], cbs=cbs(), make=build)
    files = sorted((f.name, f.read_text() if f.suffix=='.csv' else '') for f in tmp_path.rglob('*') if f.is_file())
    looked, watch = trained(dls, look, ['after_pred', 'after_batch', 'after_train', 'after_epoch', 'after_fit'], cbs=cbs(), make=build)
    assert_same({**plain, 'values': []}, {**looked, 'values': []})
    assert max(found) < 1e-4 and watch.n > 10
    assert [name for name, _ in files]==sorted(f.name for f in tmp_path.rglob('*') if f.is_file())


def test_what_must_be_seen_is_seen_and_by_copies(dls):
    "A callback that changes the input makes the map another one, the one of the changed input; its own state stays"
    learn, normalises = make(dls), Normalises()
    x, y = dls.valid.one_batch()
    expected = learn.get_cams(list(x.as_subclass(torch.Tensor)*.5 + .1)).maps
    plain = learn.get_cams([0, 1, 2, 3]).maps
    learn.add_cb(normalises)
    before = fingerprint(normalises)
    assert torch.allclose(learn.get_cams([0, 1, 2, 3]).maps, expected, atol=1e-6) and not torch.allclose(plain, expected, atol=1e-3)
    assert not difference(before, fingerprint(normalises))


def test_a_callback_that_looks_in_the_event_that_it_changes(dls):
    "The event that asks is not called again inside itself, the others are"
    class Both(Callback):
        looks = []
        def before_batch(self): self.learn.xb = (self.x*.5 + .1,)
        def after_pred(self): self.looks.append(self.learn.get_cams([0, 1, 2, 3]).maps)
    learn = make(dls, [Normalises()])
    expected = learn.get_cams([0, 1, 2, 3]).maps
    learn = make(dls, [Both()])
    with learn.no_bar(): learn.get_preds()
    assert len(Both.looks)==3 and all(torch.allclose(maps, expected, atol=1e-6) for maps in Both.looks)


class Box:
    def __init__(self): self.n, self.seen = 0, []


class KeepsOnLearner(Callback):
    "Scales the input by what it has kept on the learner, in things of many kinds; one of them is its own too"
    kinds = dict(count=int, seen=list, groups=dict, names=set, box=Box, total=lambda: torch.zeros(1), array=lambda: np.zeros(1), queue=lambda: deque(maxlen=9),
                 nested=lambda: dict(a=[[]]), rng=lambda: random.Random(3), note=Box)
    def after_create(self):
        for name, kind in self.kinds.items(): setattr(self.learn, name, kind())
        self.box, self.learn.method = self.learn.box, self.learn.note.seen.append
    def before_batch(self):
        learn = self.learn
        learn.count += 1
        learn.seen.append(1)
        learn.groups[len(learn.groups)] = 1
        learn.names.add(len(learn.names))
        self.box.n += 1
        learn.total += 1
        learn.array += 1
        learn.queue.append(1)
        learn.nested['a'][0].append(1)
        n = [learn.count, len(learn.seen), len(learn.groups), len(learn.names), learn.box.n, float(learn.total), float(learn.array[0]), len(learn.nested['a'][0])]
        assert len(set(n))==1 # one copy of all
        self.learn.xb = (self.x*(1 + .01*len(learn.seen) + .1*learn.rng.random()),)


@pytest.mark.parametrize('event', ['before_fit', 'before_batch', 'after_pred', 'after_backward', 'after_step', 'after_batch', 'before_validate', 'after_validate', 'after_epoch'])
def test_what_a_callback_keeps_on_the_learner_stays(dls, event):
    "Training that depends on it is the same to the last bit, and a second look sees what the first saw"
    plain, _ = trained(dls, cbs=[KeepsOnLearner()])
    def look(learn, n):
        if n > 4: return
        before = around(learn)
        maps = [learn.get_cams([0, 5], cls=1).maps for _ in range(2)]
        assert torch.equal(*maps) and not difference(before, around(learn))
    looked, watch = trained(dls, look, [event], cbs=[KeepsOnLearner()])
    assert watch.n > 0
    assert_same(plain, looked)


def test_what_is_kept_on_the_learner_is_what_the_map_is_made_with(dls):
    learn = make(dls)
    x = dls.valid.one_batch()[0].as_subclass(torch.Tensor)[:2]
    expected = learn.get_cams(list(x*1.04), cls=1).maps
    class Scales(Callback):
        def before_batch(self): self.learn.seen.append(1); self.learn.xb = (self.x*(1 + .01*len(self.learn.seen)),)
    learn.seen = [1, 1, 1]
    learn.add_cb(Scales())
    for _ in range(2): assert torch.allclose(learn.get_cams([0, 1], cls=1).maps, expected, atol=1e-6)
    assert learn.seen==[1, 1, 1]


def test_a_learner_of_its_own_class_keeps_what_its_methods_change(dls):
    class Counting(Learner):
        def one_batch(self, i, b):
            self.batches.append(i)
            return super().one_batch(i, b)
    learn = Counting(dls, Net(), loss_func=CrossEntropyLossFlat(), cbs=[TrainEvalCallback(), Recorder(), CastToTensor()], default_cbs=False)
    learn.batches = []
    learn.get_cams(dls.valid)
    CAMInterpretation.from_learner(learn)
    assert learn.batches==[]
    learn.get_preds()
    assert learn.batches==[0, 1, 2]


def test_what_is_big_and_of_no_concern_is_not_copied(dls):
    from fastai_cam.state import preserve_state
    learn = make(dls)
    with learn.no_logging(): learn.fit(1)
    learn.kept = dict(model=learn.model, dls=learn.dls, opt=learn.opt, loss=learn.loss_func, recorder=learn.recorder)
    with preserve_state(learn) as twin:
        assert all(twin.kept[name] is value for name, value in learn.kept.items()) and twin.kept is not learn.kept
        assert twin.recorder is learn.recorder and twin.model is learn.model and twin.opt is learn.opt and twin.dls is learn.dls


def test_other_callbacks_are_not_told(dls):
    "Neither events nor hooks, nor in the pass nor at its ends"
    calls = []
    class Counts(Callback):
        def __init__(self):
            for event in set(_events) - {'before_batch', 'after_pred', 'after_create'}: setattr(self, event, lambda event=event: calls.append(event))
    learn = make(dls, [Counts()])
    learn.get_cams()
    CAMInterpretation.from_learner(learn)
    assert calls==[]


def test_inside_other_passes(dls):
    "In a `get_preds` (which holds fastai's lock), a `validate`, and a search for a learning rate"
    learn, found = make(dls), []
    expected = learn.get_cams([0, 5]).maps
    class Looks(Callback):
        def after_batch(self): found.append(self.learn.get_cams([0, 5]).maps)
    with learn.no_logging():
        preds = learn.get_preds()[0]
        assert torch.equal(learn.get_preds(cbs=Looks())[0], preds)
        assert list(learn.validate(cbs=Looks()))==list(learn.validate())
    assert len(found)==6 and all(torch.allclose(maps, expected, atol=1e-6) for maps in found)


def test_lr_find(dls, tmp_path):
    from fastai.callback.schedule import LRFinder
    def search(look):
        dls.train.rng = random.Random(0)
        learn = make(dls, path=tmp_path)
        class Looks(Callback):
            order = 95
            def after_batch(self):
                if look: self.learn.get_cams([0])
        set_seed(2)
        with learn.no_logging(), learn.no_bar(): learn.fit(3, cbs=[LRFinder(num_it=6), Looks()])
        return list(learn.recorder.losses), list(learn.recorder.lrs), [p.clone() for p in learn.model.parameters()]
    (losses, lrs, weights), (losses2, lrs2, weights2) = search(False), search(True)
    assert losses==losses2 and lrs==lrs2 and len(losses) > 4 and all(torch.equal(a, b) for a, b in zip(weights, weights2))


def test_half_precision_of_fastai_does_not_convert_the_model(dls):
    learn = make(dls)
    expected, weights = learn.get_cams([0, 5]).maps, [p.clone() for p in learn.model.parameters()]
    learn.add_cbs([ModelToHalf(), NonNativeMixedPrecision()])
    assert torch.allclose(learn.get_cams([0, 5]).maps, expected, atol=1e-6)
    assert all(torch.equal(a, b) and a.dtype is torch.float32 for a, b in zip(weights, learn.model.parameters()))
    learn.model.half() # as it is inside a fit
    assert (learn.get_cams([0, 5]).maps - expected).abs().max() < 2e-2*expected.abs().max()


def test_autocast_keeps_no_weights_of_a_pass_without_a_graph(dls):
    "Inside an autocast block the weights are cast once; cast under no_grad they would give no gradient"
    class Casts(Callback):
        order, run_valid = 20, False
        def __init__(self, look): self.look = look
        def before_batch(self):
            self.cast = torch.autocast('cpu', torch.bfloat16)
            self.cast.__enter__()
            if self.look: self.learn.get_cams([0])
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.cast.__exit__(None, None, None)
    plain, _ = trained(dls, cbs=[Casts(False)])
    looked, _ = trained(dls, cbs=[Casts(True)])
    assert_same(plain, looked)


# -- items and results belong together

class Skips(Callback):
    def before_batch(self):
        if not self.training and self.iter==0: raise CancelBatchException


class Drops(Callback):
    def before_batch(self): self.learn.xb, self.learn.yb = (self.x[:-1],), (self.y[:-1],)


class Twice(Callback):
    def before_batch(self): self.learn.xb, self.learn.yb = (torch.cat([self.x, self.x]),), (torch.cat([self.y, self.y]),)


@pytest.mark.parametrize('callback, message', [(Skips, 'cancelled 1 of 3 batches'), (Drops, 'made 3 items of the 4 in a batch'), (Twice, 'made 8 items of the 4')])
def test_maps_are_never_joined_with_other_items(dls, callback, message):
    learn = make(dls, [callback()])
    with pytest.raises(ValueError, match=message): learn.get_cams(dls.valid)
    if callback is Skips:
        with pytest.raises(ValueError, match=message): CAMInterpretation.from_learner(learn)
        own = CAMCallback()
        with learn.removed_cbs([learn.recorder]): learn.get_preds(reorder=False, cbs=own)
        assert len(own.cams.maps)==8 # nothing is joined there
    with learn.removed_cbs([cb for cb in learn.cbs if isinstance(cb, callback)]): assert len(learn.get_cams(dls.valid).maps)==12


def test_items_that_a_loader_skips(dls):
    def skip(sample):
        if sample.ndim and sample.max()==2/8: raise SkipItemException # called with the image, then with the label
        return sample
    samples = [(torch.full((3, 24, 24), i/8), torch.tensor(i % 2)) for i in range(8)]
    loader, without = TfmdDL(samples, bs=4, after_item=skip, num_workers=0), TfmdDL(samples[:2] + samples[3:], bs=4, num_workers=0)
    learn = make(DataLoaders(loader, loader))
    found, expected = learn.get_cams(loader), learn.get_cams(without)
    assert torch.equal(found.maps, expected.maps) and [float(x.max()) for x, _ in found.items]==[float(x.max()) for x, _ in expected.items]
    with pytest.raises(ValueError, match='item 2 is skipped by a transform, and in worker processes it is not known'): learn.get_cams(loader.new(num_workers=1))
    with pytest.raises(ValueError, match='8 items were asked for and the DataLoader gave 7'): CAMInterpretation.from_learner(learn)


# -- exceptions arrive as they were raised

@pytest.mark.parametrize('error', [StopIteration, AssertionError, MemoryError, KeyboardInterrupt, Odd, GeneratorExit, lambda: Odd(3, 'x'), lambda: OSError(2, 'no')])
def test_an_exception_arrives_as_it_was_raised(dls, error):
    raised = error()
    args = raised.args
    class Fails(Callback):
        def before_batch(self): raise raised
    def in_metric(pred, targ): raise raised
    kinds = dict(target=lambda: make(dls).get_cams([0], cls=fails_with(raised)), method=lambda: make(dls).get_cams([0], method=fails_with(raised)),
                 callback=lambda: make(dls, [Fails()]).get_cams([0]), own=lambda: make(dls).get_preds(cbs=CAMCallback(method=fails_with(raised))),
                 own_target=lambda: make(dls).validate(cbs=CAMCallback(fails_with(raised))))
    for kind, call in kinds.items():
        if kind.startswith('own') and isinstance(raised, StopIteration): # fastai's own loop would lose it
            with pytest.raises(RuntimeError, match='raised StopIteration') as caught: call()
            assert caught.value.__cause__ is raised
            continue
        with pytest.raises(type(raised)) as caught: call()
        assert caught.value is raised and raised.args==args and raised.__cause__ is None, kind
        assert any(entry.name in ('raises', 'before_batch') for entry in caught.traceback), kind


# -- interrupts

def test_an_interrupt_at_any_line_leaves_nothing(dls):
    "Ctrl-C at each line of these rooms that a call goes through, once: on the way in, and on the way out"
    learn = make(dls, [Normalises()])
    import fastai_cam.learner, fastai_cam.state
    rooms = {fastai_cam.learner.__file__, fastai_cam.state.__file__}
    lines, target = [], [None]
    def trace(frame, event, arg):
        if frame.f_code.co_filename not in rooms: return None
        place = frame.f_code.co_filename, frame.f_lineno
        if event=='line':
            lines.append(place)
            if (place, lines.count(place))==target[0]: raise KeyboardInterrupt
        return trace
    def run():
        lines.clear()
        sys.settrace(trace)
        try: learn.get_cams([0, 5])
        finally: sys.settrace(None)
    run()
    places = [(place, nth) for place in dict.fromkeys(lines) for nth in ({1, lines.count(place)} if place[0]==fastai_cam.state.__file__ else {1})]
    assert len(places) > 120
    before = around(learn)
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules())
    for place in places:
        target[0] = place
        with pytest.raises(KeyboardInterrupt): run()
        assert hooks()==0 and not difference(before, around(learn)), place
    target[0] = None
    run()


def test_an_interrupted_fit_with_the_callback_trains_all_of_the_model_afterwards(dls):
    "No event follows an interrupt; the callback lets go when it is taken off, and at the latest before anything is trained"
    class Stops(Callback):
        order, on = 5, True
        def after_loss(self):
            if not self.training and self.on: raise KeyboardInterrupt
    for stays in (False, True):
        learn, stops = make(dls), Stops()
        if stays: learn.add_cb(CAMCallback())
        with learn.no_logging():
            with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2, cbs=[stops, *([] if stays else [CAMCallback()])])
            if not stays: assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules())==0
            before = [p.clone() for p in learn.model.parameters()]
            learn.fit(1, 1e-2)
        assert not any(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))


# -- threads

def test_threads(dls):
    "On one learner, and on learners that share a model: right by value, nothing left"
    model = Net().eval()
    learns = [make(dls, model=model) for _ in range(2)]
    learns.append(learns[0])
    asked = [[0, 5], [1], [7, 2, 3]]
    expected, found, switch = [learn.get_cams(items, cls=1).maps for learn, items in zip(learns, asked)], [], sys.getswitchinterval()
    def work(k):
        for _ in range(8):
            try: found.append(torch.allclose(learns[k].get_cams(asked[k], cls=1).maps, expected[k], atol=1e-6))
            except Exception as e: found.append(e)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    finally: sys.setswitchinterval(switch)
    assert found==[True]*24
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())==0 and not model.training


def test_a_look_into_a_model_that_another_thread_trains_is_refused(dls):
    learn, at_work, go_on = make(dls), threading.Event(), threading.Event()
    class Waits(Callback):
        def after_batch(self): at_work.set(); go_on.wait(20)
    def train():
        with learn.no_logging(): learn.fit(1, cbs=Waits())
    thread = threading.Thread(target=train)
    thread.start()
    assert at_work.wait(20)
    try:
        with pytest.raises(RuntimeError, match='another thread runs this model'): learn.get_cams(0)
        assert learn.model.training
    finally: go_on.set(); thread.join()
    assert learn.get_cams(0).maps.abs().max() > 0


class Headed(nn.Module):
    "A body, of others too, without anything that draws"
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 2)
    def forward(self, x): return self.head(self.body(x).mean((2, 3)))


def plain_learner(model, n=8):
    "Data that draws nothing, so that training depends on the model alone"
    g = torch.Generator().manual_seed(0)
    samples = [(torch.rand(3, 16, 16, generator=g), torch.tensor(i % 2)) for i in range(n)]
    loader = lambda: TfmdDL(samples, bs=4, num_workers=0)
    return make(DataLoaders(loader(), loader()), model=model)


def state_of(model): return [value.clone() for value in model.state_dict().values()]
def all_equal(a, b): return len(a)==len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('run', ['fit', 'validate', 'get_preds'])
@pytest.mark.parametrize('share', ['body', 'layer', 'weight', 'dropout'])
def test_a_look_into_a_model_that_shares_a_part_with_one_at_work_is_refused(share, run):
    one, other = Net(), Net()
    if share=='body': other.body = one.body
    if share=='layer': other.body[1] = one.body[1]
    if share=='weight': other.body[0].weight = one.body[0].weight
    if share=='dropout': other.head[2] = one.head[2]
    learn, looked, at_work, go_on = plain_learner(one), plain_learner(other), threading.Event(), threading.Event()
    class Waits(Callback):
        def after_batch(self): at_work.set(); go_on.wait(20)
    def work():
        with learn.no_logging(), learn.no_bar(): learn.fit(1, cbs=Waits()) if run=='fit' else getattr(learn, run)(cbs=Waits())
    thread = threading.Thread(target=work)
    thread.start()
    assert at_work.wait(20)
    try:
        modes = [m.training for m in one.modules()]
        with pytest.raises(RuntimeError, match='another thread runs this model, or one that shares layers with it'): looked.get_cams([0])
        assert [m.training for m in one.modules()]==modes
        assert plain_learner(Net()).get_cams([0]).maps.abs().max() > 0 # one that shares nothing
    finally: go_on.set(); thread.join()
    assert looked.get_cams([0]).maps.abs().max() > 0


@pytest.mark.usefixtures('maps_by_gradcam')
@pytest.mark.parametrize('shares', ['learner', 'model', 'body'])
@pytest.mark.parametrize('run', ['fit', 'validate'])
def test_what_another_thread_begins_during_a_look_waits_for_its_end(shares, run):
    "Training is the same to the last bit, batch norm's counters too, and the map is that of the model before it"
    def trained(look):
        torch.manual_seed(0)
        body = Net().body
        learn = plain_learner(Headed(body))
        looked = dict(learner=lambda: learn, model=lambda: plain_learner(learn.model), body=lambda: plain_learner(Headed(body)))[shares]()
        batches = []
        class Counts(Callback):
            def before_batch(self): batches.append(1)
        def work():
            with learn.no_logging(), learn.no_bar(): learn.fit(2, 1e-2, cbs=Counts()) if run=='fit' else learn.validate(cbs=Counts())
        thread = threading.Thread(target=work)
        def during(cap, score):
            if thread.ident is None: thread.start()
            thread.join(.3)
            assert not batches and not any(m.training for m in looked.model.modules())
            return METHODS['gradcam'](cap, score)
        if look:
            expected = looked.get_cams([0, 1], cls=1).maps
            assert torch.equal(looked.get_cams([0, 1], cls=1, method=during).maps, expected)
        else: thread.start()
        thread.join()
        assert len(batches)==(8 if run=='fit' else 2)
        return state_of(learn.model)
    assert all_equal(trained(False), trained(True))


@pytest.mark.usefixtures('maps_by_gradcam')
def test_training_in_a_loop_of_the_users_own_ends_a_look_with_a_sentence():
    "Whether autograd notices or not; one that only runs the model does not matter"
    learn, sentence = plain_learner(Headed(Net().body)), 'the weights or modes of the model changed while it was looked into'
    x, opt = torch.rand(4, 3, 16, 16), torch.optim.SGD(learn.model.parameters(), .1)
    def step():
        opt.zero_grad()
        learn.model(x).sum().backward()
        opt.step()
    def mode(): learn.model.body[1].train()
    def only_runs():
        with torch.no_grad(): learn.model(x)
    expected = learn.get_cams([0]).maps
    def look(work, method):
        stop, done = threading.Event(), threading.Event()
        def go():
            while not stop.is_set(): work(); done.set()
        thread = threading.Thread(target=go)
        def during(cap, score):
            thread.start()
            assert done.wait(20)
            return METHODS[method](cap, score)
        try: return learn.get_cams([0], method=during).maps
        finally: stop.set(); thread.join()
    assert torch.equal(look(only_runs, 'gradcam'), expected)
    for work, method in ((step, 'gradcam'), (step, 'eigencam'), (mode, 'eigencam')):
        with pytest.raises(RuntimeError, match=sentence) as caught: look(work, method)
        assert '\n' not in str(caught.value)
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules())==0
    def forgets(cap, score): # an error of the user's own keeps its words
        raise RuntimeError('modified by an inplace operation')
    with pytest.raises(RuntimeError, match='^modified by'): learn.get_cams([0], method=forgets)


def test_no_number_is_drawn_twice_by_another_thread(dls):
    "The random states belong to all threads: they are not put back where another one draws"
    learn, drawn, stop = make(dls), [], threading.Event()
    def draw():
        while not stop.is_set(): drawn.append((random.random(), torch.rand(1).item(), np.random.random()))
    thread = threading.Thread(target=draw)
    thread.start()
    for _ in range(6): learn.get_cams([0, 5])
    stop.set(); thread.join()
    assert len(drawn) > 50
    for column in (0, 2): assert len({row[column] for row in drawn})==len(drawn)
    pairs = [(a[1], b[1]) for a, b in zip(drawn, drawn[1:])] # single precision repeats itself by chance
    assert len(set(pairs))==len(pairs)


def test_all_random_states_are_put_back():
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with random_states_kept(): draw()
    assert draw()==expected
