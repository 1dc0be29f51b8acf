"Token models: methods on tokens against naive loops, the tail with its extra tokens."
import pytest
import torch

from fastai_cam.methods.registry import METHODS
from fastai_cam.probe.watch import Probe
from fastai_cam.probe.scan import LayerScan

from helpers.transformers import vit


def images(n=2, size=(12, 20)): return torch.randn(n, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(3))


CASES = [dict(n_extra=1), dict(n_extra=3), dict(n_extra=0, pool='mean'), dict(n_extra=2, pool='mean')]


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_layer_is_the_last_whose_places_are_read(case, fused):
    model = vit(**case, fused=fused)
    last = LayerScan(model, [images()], {}).last
    assert last.name==('blocks.2.norm1' if case.get('pool') is None else 'norm')
    assert (last.layout.kind, last.layout.grid, last.layout.n_extra)==('tokens', (3, 5), case['n_extra'])


@pytest.mark.parametrize('case', CASES, ids=str)
def test_gradcam_on_tokens_against_a_loop(case):
    model, x = vit(**case), images()
    with Probe(model) as p:
        cap = p(x)
        found, layer = METHODS['gradcam'](cap, cap.score(lambda out: out)), cap.names[0]
        assert torch.equal(cap.out.detach(), model(x).detach())
    for i in range(len(x)):
        kept = []
        hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, out: kept.append(out))
        out = model(x[i:i+1])
        hook.remove()
        for c in range(4):
            grad, = torch.autograd.grad(out[0, c], kept[0], retain_graph=True)
            expected = torch.zeros(3, 5, dtype=torch.double)
            places = range(case['n_extra'], case['n_extra'] + 15)
            for channel in range(12):
                weight = sum(grad[0, token, channel] for token in places)/15
                for number, token in enumerate(places): expected[number//5, number%5] += weight*kept[0][0, token, channel].detach()
            assert torch.allclose(found[i, c], expected, atol=1e-12) and expected.abs().max() > 1e-6


@pytest.mark.parametrize('layer', ['blocks.1', 'blocks.2.norm1', 'norm'])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_tail_keeps_the_extra_tokens(case, layer):
    model, x = vit(**case), images(3)
    with Probe(model, layer) as p:
        cap = p(x)
        assert torch.allclose(cap.run_from(cap.acts[0]), cap.out.detach(), atol=1e-12)
        items = torch.tensor([2, 0, 2])
        changed = cap.acts[0][items]*torch.tensor([0., 2., -1.], dtype=torch.double)[:, None, None, None]
        found = cap.run_from(changed, items=items)
    expected = []
    for row in range(3): # the whole model, with one item's tokens replaced
        hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, out, row=row: torch.cat([out[:, :case['n_extra']], changed[row:row+1].flatten(2).mT], 1))
        expected.append(model(x[items[row]:items[row]+1]).detach())
        hook.remove()
    assert torch.allclose(found, torch.cat(expected), atol=1e-12)


def test_ablation_of_tokens_against_the_whole_model():
    "Weights of Ablation-CAM: by how much the score falls when a channel is silent at every place, the class token left alone"
    model, x = vit(n_extra=1), images(1)
    with Probe(model, 'blocks.1') as p:
        cap = p(x)
        found = METHODS['ablationcam'](cap, cap.score(lambda out: out[:, 1]))
        act, score = cap.acts[0][0], cap.out[0, 1].item()
    expected = torch.zeros(3, 5, dtype=torch.double)
    for channel in range(12):
        def silent(module, inputs, out):
            out = out.clone()
            out[:, 1:, channel] = 0
            return out
        hook = model.blocks[1].register_forward_hook(silent)
        expected += (score - model(x)[0, 1].item())*act[channel]
        hook.remove()
    assert torch.allclose(found[0]/found.abs().max(), expected/expected.abs().max(), atol=1e-10)


def test_shapleycam_behind_fused_attention():
    "Fused attention has no second derivative: the pass is taken again without it, and gives what the spelled out one gives"
    x, maps = images(), []
    for fused in (False, True):
        with Probe(vit(fused=fused), 'blocks.1') as p:
            cap = p(x)
            maps.append(METHODS['shapleycam'](cap, cap.score(lambda out: out[:, :2])))
    assert torch.allclose(*maps, atol=1e-10) and maps[0].abs().max() > 1e-6
