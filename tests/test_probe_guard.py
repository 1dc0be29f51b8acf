"A probe while other threads run the model: none is disturbed, none waits for ever, and what is locked is let go."
import copy
import gc
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

import fastai_cam.probe.guard as probe_guard_room
from fastai_cam.probe.watch import Probe
from fastai_cam.probe.guard import eval_mode, model_lock

from helpers.probe import image, net, state


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
