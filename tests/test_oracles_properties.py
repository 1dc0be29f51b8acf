"What every registered method keeps to, a new one as soon as it is registered: the order of items, the unit of the score, the model as it was, identities, precision."
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from fastai_cam.methods.registry import METHODS
from fastai_cam.probe.capture import Capture
from fastai_cam.probe.finder import _SHOWN
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import ClassIndex

from helpers.oracles import assert_same, each, EVERY, gap, images, odd, OF_ATTENTION, ON_ANY_NET, oracle, ours, plain, stack, terms_of
from helpers.transformers import vit


# --- every registered method: a new one is tested as soon as it is registered

every_method = pytest.mark.parametrize('name', [*ON_ANY_NET, *OF_ATTENTION])

def net_for(name, dtype=torch.double):
    "Each net and layer to try a method on; CAM is defined for one head only, some methods for transformers"
    if name in OF_ATTENTION: return [(vit().to(dtype), None), (vit(n_extra=0, pool='mean', fused=True).to(dtype), 'blocks.1')]
    return [(gap(dtype), None)] if name=='cam' else [(plain(dtype), None), (odd(dtype), 'act')]


@every_method
def test_order_and_batch_size(name):
    for model, layer in net_for(name):
        x, order = images(4), [2, 0, 3, 1]
        together = ours(model, x, name, layer)
        assert_same(ours(model, x[order], name, layer), together[order])
        assert_same(torch.cat([ours(model, x[i:i+1], name, layer) for i in range(4)]), together)


@every_method
def test_one_score_is_a_column_of_several(name):
    column = 0 if name=='random_map' else 2 # noise for each of K columns; one score has the noise of the first
    for model, layer in net_for(name):
        x = images()
        several = ours(model, x, name, layer)
        one = ours(model, x, name, layer, lambda out: out[:, column])
        assert one.dim()==several.dim() - 1
        assert_same(one, several[:, column])
        assert_same(ours(model, x, name, layer, ClassIndex(column)), several[:, column:column+1])


@every_method
def test_no_graph_remains(name):
    for model, layer in net_for(name):
        for score in (EVERY, lambda out: out[:, 1]): assert not ours(model, images(), name, layer, score).requires_grad


def normalised(maps):
    "Divided by the largest magnitude; a map that is empty stays so"
    peak = maps.abs().amax((-2, -1), keepdim=True)
    return torch.where(peak > 0, maps/peak, maps)


DEPENDS_ON_SCALE = dict( # whose formula is not homogeneous in the score
    gradcam_pp='alpha has g in its denominator next to a constant: the score is to be a logit', smooth_gradcam_pp='as gradcam_pp', refinecam='its base is gradcam_pp: see below for another',
    scorecam='softmax of the score', sscam='softmax of the score', iscam='softmax of the score', opticam='Adam has its ε next to the gradient', finercam='logits are taken from the score: see below for a scaled model', **{'scorecam+stages': 'softmax of the score'})

@pytest.mark.parametrize('name', [name for name in [*ON_ANY_NET, *OF_ATTENTION] if name not in DEPENDS_ON_SCALE])
@pytest.mark.parametrize('scale', [1e-8, 1e-15]) # guided_gradcam is a product of two gradients: smaller ones are too little for float32
def test_scale_of_the_score(name, scale):
    for model, layer in net_for(name, torch.float):
        x = images(dtype=torch.float)
        at_1, tiny = ours(model, x, name, layer), ours(model, x, name, layer, lambda out: out*scale)
        assert (normalised(at_1) - normalised(tiny)).abs().max() <= 1e-4


@pytest.mark.parametrize('name,options', [('finercam', {}), ('refinecam', dict(base='layercam')), ('refinecam', dict(base='gradcam')), ('gradcam', {}), ('ablationcam', {}), ('fullgrad', {})])
def test_scale_of_the_logits(name, options):
    "A model whose logits are all 1e-8 of what they were"
    for build, layer, last in ((plain, None, lambda model: model[1][4]), (odd, 'act', lambda model: model.fc)):
        model, x = build(torch.float), images(dtype=torch.float)
        at_1 = ours(model, x, name, layer, **options)
        with torch.no_grad():
            for parameter in last(model).parameters(): parameter *= 1e-8
        assert (normalised(at_1) - normalised(ours(model, x, name, layer, **options))).abs().max() <= 1e-4


class Times(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
    def forward(self, x): return x*self.by


# Grad-CAM++'s alpha is 1/(2 + g ΣA), so a tiny score changes its maps by right; but g ΣA has no unit of the layer's, so another unit for the activations must change nothing,
# whether the gradients or the activations get tiny: an underflow of g² or g³ would show. And at a tiny score the map has to be the formula's, computed in float64.
@pytest.mark.parametrize('name', ['gradcam_pp', 'smooth_gradcam_pp'])
@pytest.mark.parametrize('unit', [1e8, 1e-8, 1e12])
def test_unit_of_the_layer(name, unit):
    model, x = plain(torch.float), images(dtype=torch.float)
    at_1 = ours(model, x, name, '0')
    scaled = nn.Sequential(nn.Sequential(model[0], Times(unit)), nn.Sequential(Times(1/unit), model[1])).eval()
    assert (normalised(at_1) - normalised(ours(scaled, x, name, '0'))).abs().max() <= 1e-4


@pytest.mark.parametrize('scale', [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize('name', ['gradcam_pp', 'smooth_gradcam_pp', 'scorecam', 'sscam', 'iscam', 'finercam', 'opticam'])
def test_tiny_scores_have_the_map_of_the_formula(name, scale):
    x, asks = images(2), [[lambda out, c=c: out[0, c]*scale for c in range(4)] for _ in range(2)]
    found = ours(plain(torch.float), x.float(), name, '0', lambda out: out*scale)
    if name=='finercam': # which classes are near s·scale, and how far its logits outweigh it, is read off the same docstring
        expected, model = {}, plain()
        for i, c, image, ask in each(x, asks):
            out = model(image)[0].tolist()
            near = sorted((d for d in range(4) if d != c), key=lambda d: abs(out[d] - out[c]*scale))[:3]
            expected[i, c] = terms_of('gradcam')(model, '0', image, lambda out: out[0, c]*scale - .6*sum(out[0, d] for d in near)/3).sum(0)
        expected = stack(expected, asks)
    else: expected = oracle(name, plain(), '0', x, asks)
    assert bool(torch.isfinite(found).all())
    assert (normalised(found) - normalised(expected)).abs().max() <= 1e-4


# --- the model is left as it was

def state(model):
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks', '_forward_hooks_always_called', '_forward_hooks_with_kwargs')
    return dict(training=[m.training for m in model.modules()], hooks=[len(getattr(m, kind)) for m in model.modules() for kind in hooks], own_forward=['forward' in m.__dict__ for m in model.modules()],
                types=[type(m) for m in model.modules()], requires_grad=[p.requires_grad for p in model.parameters()], grad_ids=[id(p.grad) for p in model.parameters()],
                modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'), torch._C._len_torch_function_stack()))


def tensors(model): return [t.detach().clone() for p in model.parameters() for t in (p, p.grad) if t is not None] + [b.clone() for b in model.buffers()] + [torch.get_rng_state()]


class as_it_was:
    "Some modules in train mode, one parameter frozen, one with a gradient: all of it, and the random state, is the same after the block"
    def __init__(self, model):
        self.model, self.modules = model, list(model.modules())
        for module in self.modules[1::2]: module.training = True
        parameters = list(model.parameters())
        parameters[0].requires_grad_(False)
        parameters[-1].grad = torch.ones_like(parameters[-1])
    def __enter__(self):
        torch.manual_seed(99) # another state than an earlier call may have left behind
        self.state, self.tensors = state(self.model), tensors(self.model)
    def __exit__(self, kind, *exc):
        if kind is AssertionError: return False
        assert state(self.model)==self.state
        assert all(torch.equal(a, b) for a, b in zip(tensors(self.model), self.tensors, strict=True))


@every_method
@pytest.mark.parametrize('grad_mode', [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_model_is_as_it_was(name, grad_mode):
    for model, layer in net_for(name):
        x = images()
        copy, expected = x.clone(), ours(model, x, name, layer)
        with grad_mode(), as_it_was(model): found = ours(model, x, name, layer)
        assert torch.equal(x, copy)
        assert_same(found, expected) # and it ran in eval mode


def last_linear(model): return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


FEW = dict(sscam=dict(n=2), iscam=dict(n=2), smooth_gradcam_pp=dict(n=3), rise=dict(n=40), groupcam=dict(n_groups=4), opticam=dict(n=4)) # from 64 images on, a copy of the model runs, which cannot be interrupted from here

@every_method
@pytest.mark.parametrize('error,grad_mode', [(RuntimeError, torch.no_grad), (KeyboardInterrupt, torch.enable_grad), (KeyboardInterrupt, torch.inference_mode)])
def test_the_model_is_as_it_was_after_an_interruption(name, error, grad_mode):
    "The first, second or third time that the model (or its tail) runs, its last layer raises"
    for model, layer in net_for(name):
        x, calls, stop, options = images(2), [], 0, FEW.get(name, {})
        def count(module, inputs):
            calls.append(1)
            if len(calls)==stop: raise error('stopped')
        hook = last_linear(model).register_forward_pre_hook(count)
        expected = ours(model, x, name, layer, **options)
        for stop in range(1, min(3, len(calls)) + 1):
            calls.clear()
            _SHOWN.clear() # as a model that was never looked at: the pass that finds the layers is interrupted, too
            with grad_mode(), as_it_was(model):
                try: found = ours(model, x, name, layer, **options)
                except error as e: assert str(e)=='stopped'
                else: # of tokens, a pass asks whether another question would find the same layer, and may fail: then nothing is remembered
                    assert error is RuntimeError and stop > 1 and name in ('rollout', 'grad_rollout', 'legrad', 'attention_value')
                    assert_same(found, expected)
            stop = 0
            assert_same(ours(model, x, name, layer, **options), expected) # it can go on
        hook.remove()


@pytest.mark.parametrize('error', [RuntimeError]) # no hook is told of a KeyboardInterrupt: see the docstring of `attach`
@pytest.mark.parametrize('place', [0, 4])
def test_an_attached_probe_gives_the_grad_mode_back_when_the_model_is_interrupted(error, place):
    "Before the layer and behind it; whoever runs the model may have autograd on or off"
    model = plain()
    probe = Probe(model, '0.2').attach()
    def stop(module, inputs): raise error('stopped')
    hook = model[0][place].register_forward_pre_hook(stop)
    try:
        for grad_mode in (True, False):
            with torch.set_grad_enabled(grad_mode):
                with pytest.raises(error, match='stopped'): model(images(1))
                assert torch.is_grad_enabled()==grad_mode
    finally:
        hook.remove()
        probe.detach()


# --- identities

def test_identities_on_gap_and_a_linear_layer():
    model, x = gap(), images(4)
    act, weight = model[0](x).detach(), model[1][2].weight.detach()
    hw, by_cam = act[0, 0].numel(), ours(model, x, 'cam')
    assert (act.sum((2, 3)) != 0).all()
    for name, options in (('gradcam', {}), ('hirescam', {}), ('xgradcam', {}), ('shapleycam', {}), ('reciprocam', dict(gaussian=False))):
        assert_same(ours(model, x, name, **options)*hw, by_cam)
    expected = torch.stack([torch.stack([sum(weight[c, k]*act[i, k].mean()*act[i, k] for k in range(8)) for c in range(4)]) for i in range(4)])
    assert_same(ours(model, x, 'ablationcam'), expected)
    assert_same(ours(model, x, 'cam', score=lambda out: 2*out[:, 1] - out[:, 3]), 2*by_cam[:, 1] - by_cam[:, 3])


def test_shapleycam_is_gradcam_where_the_tail_is_piecewise_linear():
    torch.manual_seed(0)
    model = nn.Sequential(plain()[0], nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))).double().eval()
    assert_same(ours(model, images(), 'shapleycam'), ours(model, images(), 'gradcam'), 1e-12)


def test_full_gradients_add_up_to_the_score():
    "What is stretched and added up in FullGrad is complete: gradient × image and gradients × biases are the score, for a network of ReLUs"
    from fastai_cam.probe.biases import bias_layers, effective_bias
    model, x = gap(), images().requires_grad_()
    layers, kept = bias_layers(model, x), []
    def keep(module, inputs, out): kept.append(out); return out.clone()
    hooks = [module.register_forward_hook(keep) for _, module in layers]
    out = model(x)
    for hook in hooks: hook.remove()
    of_image, *of_layers = torch.autograd.grad(out[:, 1].sum(), [x, *kept])
    total = (of_image*x).sum((1, 2, 3)) + sum((grad.sum((2, 3))*effective_bias(module)).sum(1) for (_, module), grad in zip(layers, of_layers))
    assert len(layers)==4 and (total + model[1][2].bias[1] - out[:, 1]).abs().max() < 1e-12


@pytest.mark.parametrize('name', ['ablationcam', 'reciprocam', 'gradcam', 'shapleycam', 'scorecam', 'iscam', 'rise', 'groupcam', 'opticam', 'segeigencam'])
def test_a_constant_in_the_score_changes_nothing(name):
    "The weights do not flip where a constant makes the score negative"
    for model, layer in net_for(name):
        x = images()
        assert ours(model, x, name, layer).abs().max() > 0 and (model(x) - 100).max() < 0
        assert_same(ours(model, x, name, layer, lambda out: out - 100), ours(model, x, name, layer))


# --- precision, memory format

GRADIENT_METHODS = [name for name, method in METHODS.items() if method.facts.grad]

def correlation(a, b, of=min):
    "The least over items and scores, or another statistic; maps that are empty on both sides agree"
    pairs = zip(a.double().flatten(0, 1).flatten(1).numpy(), b.double().flatten(0, 1).flatten(1).numpy(), strict=True)
    return of([1. if not one.any() and not other.any() else float(np.corrcoef(one, other)[0, 1]) for one, other in pairs])


@pytest.mark.parametrize('name', GRADIENT_METHODS)
@pytest.mark.parametrize('how', ['float16', 'bfloat16', 'autocast', 'autocast around the pass', 'autocast around the method', 'channels last'])
def test_precision_and_memory_format(name, how, record_property):
    least = 1.
    # Group-CAM's weights are differences of scores that bfloat16 rounds to three digits: of a class whose score no mask changes much, nothing is left
    of = np.median if name=='groupcam' and how in ('bfloat16', 'autocast', 'autocast around the pass') else min
    for build, layer in ((plain, None), (odd, 'act'), (gap, None)):
        model, x = build(torch.float), images(dtype=torch.float)
        expected = ours(model, x, name, layer)
        if how in ('float16', 'bfloat16'): model, x = model.to(getattr(torch, how)), x.to(getattr(torch, how))
        if how=='channels last': model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        mixed = lambda on: torch.autocast('cpu', dtype=torch.bfloat16) if on else nullcontext()
        with Probe(model, layer) as p:
            with mixed(how in ('autocast', 'autocast around the pass')):
                cap = p(x)
                score = cap.score(EVERY)
            with mixed(how in ('autocast', 'autocast around the method')): found = METHODS[name](cap, score)
        assert found.dtype==torch.float32 and bool(torch.isfinite(found).all())
        least = min(least, correlation(found, expected, of))
    record_property('correlation', float(least))
    coarse = .95 if name in ('likenesscam', 'objectcam') else .99 # where its evidence is about 0, a place may fall on the other side: 1 in 100 does here
    assert least > (.99999 if how in ('channels last', 'autocast around the method') else coarse)


# --- several layers

@every_method
def test_scores_in_pieces(name, monkeypatch):
    "Gradients of many scores are computed in pieces: the maps are the same, and so is what a piece asks"
    for model, layer in net_for(name):
        x = images(2)
        expected = ours(model, x, name, layer)
        with monkeypatch.context() as patch:
            patch.setattr(Capture._most, '__defaults__', (1,))
            assert_same(ours(model, x, name, layer), expected, 1e-12)
            with Probe(model, layer) as p:
                cap = p(x)
                pieces = cap.score(EVERY).chunks(1)
        assert [piece.shape for piece in pieces]==[(2, 1)]*4
        for c, piece in enumerate(pieces): assert torch.equal(piece.of(model(x.flip(0))), model(x.flip(0))[:, c:c+1])
