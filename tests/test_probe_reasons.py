"Why a layer has no gradient: what cannot be told, or can be all the same."
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from fastai_cam.probe.watch import Probe

from helpers.probe import image


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
