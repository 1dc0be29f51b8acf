"The probe leaves nothing behind, whatever interrupts it and whoever else runs the model; and what it cannot do it says."
import copy
import gc
import pickle
import random
import signal
import sys
from pathlib import Path
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from torch import nn
import torch.nn.functional as F

import fastai_cam.probe.watch as probe_watch_room
import fastai_cam.probe.guard as probe_guard_room
import fastai_cam.probe.modes as probe_modes_room
from fastai_cam.probe.watch import alignment, Probe
from fastai_cam.probe.guard import eval_mode, model_lock


class Net(nn.Module):
    "Convolutions, a branch and a head: a layer inside it needs a recorded pass for its tail"
    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
    def forward(self, x):
        x = self.body(x)
        return self.head((self.side(x) + x).mean((2, 3)))

PROBE_FILES = {str(file) for file in Path(probe_watch_room.__file__).parent.glob('*.py')}


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def image(n=2, size=(8, 12), seed=1): return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def state(model):
    "What a pass must leave as it was"
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called), len(m._forward_hooks_with_kwargs)) for m in model.modules()]
    return dict(modes=[m.training for m in model.modules()], hooks=hooks, forwards=['forward' in vars(m) for m in model.modules()], grad=torch.is_grad_enabled(),
                inference=torch.is_inference_mode_enabled(), modes_of_functions=torch._C._len_torch_function_stack(), autocast=torch.is_autocast_enabled('cpu'), free=is_free(model))


def is_free(model):
    "Can another thread explain the model?"
    found = []
    def take():
        locks = probe_guard_room._locks_of(model)
        found.append(all(lock.acquire(timeout=.05) for lock in locks))
        for lock in locks[:len(locks)*found[0]]: lock.release()
    thread = threading.Thread(target=take)
    thread.start(); thread.join()
    return found[0]


def interrupted_at(n, work):
    "`work()`, with a KeyboardInterrupt at the n-th line of the probe's own code; whether it came"
    left = [n]
    def trace(frame, event, arg):
        if frame.f_code.co_filename not in PROBE_FILES: return None
        if event=='line':
            left[0] -= 1
            if left[0]==0: raise KeyboardInterrupt
        return trace
    before = sys.gettrace()
    sys.settrace(trace)
    try: work()
    except KeyboardInterrupt: pass
    finally: sys.settrace(before)
    return left[0] <= 0


def one_pass(model):
    with Probe(model, 'side') as p: p(image(1)).grads(lambda out: out[:, 1])


def a_search(model):
    with Probe(model) as p: p(image(1))


def asked_again(model):
    with Probe(model, 'side') as p:
        cap = p(image(1))
        cap.run_from(cap.acts[0])
        cap.run(image(1))
        cap.recapture(layers='body')


def attached(model):
    p = Probe(model, 'side').attach()
    with torch.no_grad():
        try: model(image(1)), p.take()
        finally: p.detach()


def guided(model):
    with Probe(model, 'body', guided=True, from_input=True) as p: p(image(1))


def aligned(model): alignment(model, image(1), layer='body', n_times=1)


@pytest.mark.parametrize('work,step', [(one_pass, 1), (attached, 1), (a_search, 3), (guided, 3), (aligned, 11), (asked_again, 11)], ids=lambda work: getattr(work, '__name__', work))
def test_an_interrupt_at_any_line_leaves_nothing(work, step):
    model = net().train()
    model.body[2].eval()
    before, n = state(model), 1
    while interrupted_at(n, lambda: work(model)):
        assert state(model)==before, f'after an interrupt at line event {n}'
        n += step
    assert n > 200


@pytest.mark.parametrize('work', [one_pass, attached, a_search, aligned], ids=lambda work: work.__name__)
@pytest.mark.parametrize('kind', ['register_forward_hook', 'register_forward_pre_hook'])
def test_an_interrupt_between_a_hook_and_its_handle_leaves_nothing(work, kind, monkeypatch):
    model, register, left = net().train(), getattr(nn.Module, kind), [0]
    before = state(model)
    def interrupted(self, *args, **kwargs):
        handle = register(self, *args, **kwargs)
        left[0] -= 1
        if not left[0]: raise KeyboardInterrupt
        return handle
    monkeypatch.setattr(nn.Module, kind, interrupted)
    for n in range(1, 20):
        left[0] = n
        try: work(model)
        except KeyboardInterrupt: assert state(model)==before, n
        else: break
    assert n > 1


def test_a_probe_keeps_what_it_was_told_and_each_pass_has_a_state_of_its_own():
    model, told = net(), set(vars(Probe(net(), 'side')))
    assert len(told - set(vars(ExitStack()))) <= 10
    with Probe(model, 'side') as p:
        states = [p._pass]
        for n in (2, 3):
            model(image(n))
            states.append(p._pass)
            assert (states[-1].n_items, len(states[-1].acts[0]), states[-1].is_running)==(n, 1, False)
            first = p.take()
            assert len(first)==n and (p._pass.acts, p._pass.out)==({}, None)
        assert len({id(state) for state in [*states, p._pass]})==4 and set(vars(p))==told


def test_a_pass_that_is_run_again_from_a_second_capture_is_not_watched_either():
    model = net()
    with Probe(model, 'side') as p:
        other = p(image(2)).recapture(layers='body')
        other.run(image(2))
        other.recapture().run(image(2))
        with pytest.raises(RuntimeError, match='has not run since'): p.take()


def test_a_hook_whose_probe_goes_while_it_is_called(monkeypatch):
    answers = [lambda *args: args, None]
    monkeypatch.setattr(probe_guard_room, 'WeakMethod', lambda method: lambda: answers.pop(0))
    assert probe_guard_room.weak_hook(None, 1)(2)==(1, 2)
    assert probe_guard_room.weak_hook(None, 1)(2) is None


def test_an_interrupt_by_a_signal_leaves_nothing():
    model, came = net().train(), 0
    before, generator = state(model), random.Random(0)
    start = time.perf_counter(); asked_again(model); duration = time.perf_counter() - start
    def stop(number, frame): raise KeyboardInterrupt
    found = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-4, duration))
                asked_again(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt: came += 1
            if state(model) != before: gc.collect() # what hit contextlib's own lines is undone with the objects
            assert state(model)==before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, found)
    assert came > 5


def test_what_fails_while_it_attaches_leaves_nothing(monkeypatch):
    model, watch = net(), Probe._watch
    before = state(model)
    for error in (KeyboardInterrupt, MemoryError):
        def stop(self):
            watch(self)
            raise error
        monkeypatch.setattr(Probe, '_watch', stop)
        with pytest.raises(error): Probe(model, 'side').attach()
        assert state(model)==before
        with pytest.raises(error), Probe(model, 'side'): pass
        assert state(model)==before


# -- threads

@pytest.fixture
def quick_switches():
    found = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(found)


def in_threads(*works):
    "Run them all at once; what they raised"
    errors = []
    def run(work):
        try: work()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads: thread.start()
    for thread in threads: thread.join(60)
    assert not any(thread.is_alive() for thread in threads), 'they wait for each other'
    return errors


def explained(model, x, layer='side'):
    with Probe(model, layer) as p:
        cap = p(x)
        score = cap.score(lambda out: out[:, 1])
        return torch.cat([cap.grads(score)[0].flatten(1), cap.acts[0].flatten(1), cap.run_from(cap.acts[0]), cap.out.detach()], 1)


def test_threads_that_explain_one_model(quick_switches):
    model = net().train()
    xs = [image(2, seed=seed) for seed in range(4)]
    expected = [explained(model, x) for x in xs]
    before = state(model)
    def work(i):
        for _ in range(15): assert torch.allclose(explained(model, xs[i]), expected[i], atol=1e-6)
    assert in_threads(*[lambda i=i: work(i) for i in range(4)])==[]
    assert state(model)==before


def test_threads_whose_models_share_a_body(quick_switches):
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout(.5))
    models = [nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))).train() for _ in range(3)]
    expected = [explained(model, image(), None) for model in models]
    def work(i):
        for _ in range(15): assert torch.allclose(explained(models[i], image(), None), expected[i], atol=1e-6)
    assert in_threads(*[lambda i=i: work(i) for i in range(3)])==[]
    assert all(module.training for model in models for module in model.modules())


def test_what_another_thread_runs_is_neither_captured_nor_disturbed():
    "A pass of the same model in another thread while a probe is attached: no gradients, nothing taken; and the other way round"
    model, found = net().eval(), []
    with Probe(model, 'side') as p:
        cap = p(image(1))
        def other():
            with torch.no_grad(): found.append((model(image(3, seed=9)).requires_grad, torch.is_grad_enabled()))
            found.append(model(image(3, seed=9)).requires_grad)
        model.body.register_forward_hook(lambda *_: in_threads(other) or None if threading.current_thread() is threading.main_thread() else None)
        again = p(image(1))
    assert found==[(False, False), True] and len(again.out)==1 and torch.equal(again.acts[0], cap.acts[0])


def test_the_tail_replaces_nothing_for_other_threads():
    model, found = net().eval(), []
    expected = model(image(3, seed=9)).detach()
    with Probe(model, 'side') as p:
        cap = p(image(1))
        cap.run_from(cap.acts[0]) # recorded
        def other():
            with torch.no_grad(): found.append(model(image(3, seed=9)))
        model.head.register_forward_pre_hook(lambda *_: in_threads(other) or None if threading.current_thread() is threading.main_thread() else None)
        cap.run_from(cap.acts[0]*2)
    assert len(found)==1 and torch.equal(found[0], expected)


def test_models_that_share_nothing_do_not_wait_and_one_thread_never_waits_for_itself():
    first, second, done = net(), net(), []
    with Probe(first, 'side') as p, model_lock(first), eval_mode(first):
        p(image(1))
        assert in_threads(lambda: done.append(explained(second, image())))==[] and len(done)==1
    both = nn.ModuleList([first, second])
    def nested(a, b):
        for _ in range(20):
            with model_lock(both), model_lock(a), model_lock(b): pass
    assert in_threads(lambda: nested(first, second), lambda: nested(second, first))==[]


def test_a_lock_does_not_travel_with_the_model():
    model = net()
    with model_lock(model), Probe(model, 'side'):
        for other in (copy.deepcopy(model.head), pickle.loads(pickle.dumps(model.head))):
            assert not set(probe_guard_room._locks_of(other)) & set(probe_guard_room._locks_of(model))
    known = len(probe_guard_room._LOCKS)
    del model, other
    gc.collect()
    assert len(probe_guard_room._LOCKS) < known


def test_warnings_filters_are_left_alone(quick_switches):
    "Filters belong to the process: what a thread saves and restores, another loses"
    import warnings
    model, before = net(), list(warnings.filters)
    with Probe(model, 'side') as p:
        cap = p(image())
        cap.prepare(1000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(warnings, 'catch_warnings', lambda *args, **kwargs: pytest.fail('the filters of the whole process were changed'))
            cap.prepare(1000), cap.grads(cap.out), cap.curvatures(cap.score(lambda out: out))
    assert list(warnings.filters)==before


# -- recurrent layers on CUDA

class Recurrent(nn.Module):
    "A recurrent layer with dropout behind a convolution"
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.conv, self.steps, self.head, self.seen = nn.Conv2d(3, 4, 3, 1, 1), kind(4, 4, 2, batch_first=True, dropout=.5), nn.Linear(4, 3), []
    def forward(self, x):
        self.seen.append((self.steps.training, self.steps.dropout))
        return self.head(self.steps(self.conv(x).mean(2).mT)[0].mean(1))


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_cudnn_gives_recurrent_layers_gradients_in_training_mode_only(kind, monkeypatch):
    "On CUDA the layer is in training mode while a pass is recorded, without its dropout; on the CPU nothing changes"
    torch.manual_seed(0)
    model = Recurrent(kind).eval()
    with Probe(model, 'conv') as p: expected = p(image()).grads(lambda out: out[:, 1])[0]
    assert model.seen==[(False, .5)]
    monkeypatch.setattr(probe_modes_room, '_is_cuda', lambda inp: True)
    with Probe(model, 'conv') as p:
        cap = p(image())
        assert model.seen[-1]==(True, 0.) and (model.steps.training, model.steps.dropout)==(False, .5)
        assert torch.equal(cap.grads(lambda out: out[:, 1])[0], expected)
        cap.run(image())
        assert model.seen[-1]==(False, .5) # nothing is recorded
    p = Probe(model, 'conv').attach()
    model.head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt): model(image())
    p.detach()
    assert (model.steps.training, model.steps.dropout)==(False, .5)


# -- what cannot be told, or can be all the same

class Blocks(nn.Module):
    "A body that runs in one of several ways"
    def __init__(self, way='plain', last=None):
        super().__init__()
        self.way, self.b, self.h, self.last = way, nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1)), nn.Linear(4, 3), last
    def forward(self, x):
        from torch.utils.checkpoint import checkpoint
        if self.way=='no_grad':
            with torch.no_grad(): f = self.b(x)
        elif self.way in ('reentrant', 'checkpoint'): f = checkpoint(self.b, x, use_reentrant=self.way=='reentrant')
        elif self.way=='detach': f = self.b(x).detach()
        else: f = self.b(x)
        out = self.h(f.relu().mean((2, 3)))
        return out if self.last is None else self.last(out)


def blocks(*args, **kwargs):
    torch.manual_seed(0)
    return Blocks(*args, **kwargs).eval()


def gradient(model, layer='b', x=None):
    with Probe(model, layer) as p:
        cap = p(image() if x is None else x)
        return cap.grads(cap.score(lambda out: out[:, 1]))[0]


@pytest.mark.parametrize('way', ['no_grad', 'checkpoint'])
def test_blocks_without_autograd_in_front_of_the_head(way):
    assert torch.allclose(gradient(blocks(way)), gradient(blocks()), atol=1e-7) and gradient(blocks()).abs().max() > 1e-3
    with Probe(blocks(way)) as p: assert p(image()).names==['b']


def test_compiled_parts():
    model = blocks()
    expected = gradient(model)
    model.b = torch.compile(model.b, backend='eager')
    with torch.no_grad(): model(image())
    for layer in ('b', 'b._orig_mod.2'): assert torch.equal(gradient(model, layer), expected)


def test_reasons_are_true():
    with pytest.raises(ValueError, match='use_reentrant'): gradient(blocks('reentrant'))
    traced = torch.jit.trace(blocks(), image())
    for scripted in (traced, torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))):
        with pytest.raises(ValueError, match='scripted or traced'): Probe(scripted)
    model = blocks()
    model.b = torch.jit.trace(model.b, image())
    with pytest.raises(ValueError, match="layer 'b' is scripted or traced"): Probe(model, 'b')
    quantised = torch.ao.quantization.quantize_dynamic(blocks(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="layer 'h' is quantised"): gradient(quantised)


def frozen(part): return torch.jit.freeze(torch.jit.script(part.eval()))


@pytest.mark.parametrize('how', [frozen, torch.jit.script, lambda part: torch.jit.trace(part, image())], ids=['frozen', 'scripted', 'traced'])
def test_a_scripted_part_is_named(how):
    model = blocks()
    model.b = how(model.b)
    with Probe(model) as p, pytest.raises(ValueError, match="layer 'b' is scripted or traced.*no other layer"): p(image())
    with pytest.raises(ValueError, match="layer 'b' is scripted or traced"): Probe(model, 'b')
    model, expected = blocks(), gradient(blocks())
    model.h = frozen(model.h) # behind the layer it does no harm
    assert torch.allclose(gradient(model), expected, atol=1e-7)


class Cut(Blocks):
    "Something behind the layer that gradients do not come through"
    def forward(self, x):
        from torch.utils.checkpoint import checkpoint
        if self.way=='inference':
            with torch.inference_mode(): f = self.b(x)
            return self.h(f.clone().mean((2, 3)))
        f = self.b(x)
        if self.way=='no_grad':
            with torch.no_grad(): return self.h(f.mean((2, 3)))
        if self.way=='reentrant': return checkpoint(lambda f: self.h(f.mean((2, 3))), f, use_reentrant=True)
        out = self.h(f.mean((2, 3)))
        return dict(detach=lambda: out.detach(), argmax=lambda: F.one_hot(out.argmax(1), 3).float(), round=lambda: out.round(), floor=lambda: 2*out.floor())[self.way]()


CUT = {'inference': 'torch.inference_mode', 'no_grad': 'the model itself cuts', 'detach': 'the model itself cuts', 'argmax': 'the model itself cuts',
       'reentrant': 'behind the layer runs in a checkpoint', 'round': 'torch.round', 'floor': 'torch.floor'}


@pytest.mark.parametrize('way', CUT)
@pytest.mark.parametrize('layer', ['b', None])
def test_a_model_that_cuts_is_said_to_cut(way, layer):
    with pytest.raises(ValueError, match=CUT[way]) as raised: gradient(Cut(way).eval(), layer)
    assert '\n' not in str(raised.value)


def test_a_target_that_cuts_is_not_the_model():
    with Probe(blocks(), 'b') as p, pytest.raises(ValueError, match='compute it from the output without detach'): p(image()).grads(lambda out: out.detach()[:, 1])


@pytest.mark.parametrize('last', [lambda out: (out*1e4).softmax(1), lambda out: (out*1e5).sigmoid()], ids=['softmax', 'sigmoid'])
@pytest.mark.parametrize('layer', ['b', None])
def test_saturated_probabilities(last, layer):
    with pytest.raises(ValueError, match='0 and 1 to the last digit'): gradient(blocks(last=last), layer)


def test_probabilities_that_are_not_saturated():
    assert gradient(blocks(last=lambda out: out.softmax(1))).abs().max() > 1e-5


# -- layers that return several things

class Returns(nn.Module):
    def __init__(self, how): super().__init__(); self.how, self.c = how, nn.Conv2d(3, 4, 3, 2, 1)
    def forward(self, x):
        f = self.c(x)
        return dict(tuple=(f, f.mean((2, 3))), dict=dict(pooled=f.mean((2, 3)), last=f), list=[f, f.mean((2, 3)), None])[self.how]


class Container(nn.Module):
    def __init__(self, how): super().__init__(); self.how, self.b, self.h = how, Returns(how), nn.Linear(4, 3)
    def forward(self, x):
        out = self.b(x)
        f, pooled = (out['last'], out['pooled']) if self.how=='dict' else out[:2]
        return self.h(f.relu().mean((2, 3)) + 2*pooled)


@pytest.mark.parametrize('how', ['tuple', 'dict', 'list'])
def test_the_activation_in_a_container(how):
    torch.manual_seed(0)
    model, x = Container(how).eval(), image()
    act, pooled = (out := model.b.c(x).detach()), out.mean((2, 3))
    with Probe(model, 'b') as p:
        cap = p(x)
        leaf = act.clone().requires_grad_()
        expected, = torch.autograd.grad(model.h(leaf.relu().mean((2, 3)) + 2*pooled)[:, 1].sum(), leaf)
        assert torch.equal(cap.acts[0], act) and torch.allclose(cap.grads(lambda out: out[:, 1])[0], expected, atol=1e-7)
        items = torch.tensor([1, 0, 1])
        by_hand = model.h((act[items]*3).relu().mean((2, 3)) + 2*pooled[items])
        assert torch.allclose(cap.run_from(act[items]*3, items=items), by_hand, atol=1e-6)
