"The probe leaves nothing behind, whatever interrupts it."
import gc
import random
import signal
import sys
from pathlib import Path
import time
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import fastai_cam.probe.watch as probe_watch_room
import fastai_cam.probe.guard as probe_guard_room
from fastai_cam.probe.watch import alignment, Probe

from helpers.probe import image, net, state

PROBE_FILES = {str(file) for file in Path(probe_watch_room.__file__).parent.glob('*.py')}


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
