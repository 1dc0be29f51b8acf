"Evidence that adds up, likeness, and the default map: by hand, on real learners, and on transformers."
import pytest
import torch
import torch.nn.functional as F
from fastai.vision.all import resnet18, vision_learner
from torch import nn

from fastai_cam.learner.cams import cam_learner
from fastai_cam.maps.cams import CAMs
from fastai_cam.methods import as_method, METHODS
from fastai_cam.methods.evidence import objectcam, path_evidence, pathcam, spread_alike, start_of_path
from fastai_cam.probe.layers import EVIDENCE
from fastai_cam.probe.scan import LayerScan
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import ClassIndex
from fastai_cam.targets.lookup import Versus

from helpers.transformers import vit


def classes(out): return out

def gap_of(cap, scores, layer=0):
    "Score less that of the layer where the path starts, by a run of the model"
    begin = start_of_path(cap, layer).to(cap.acts[layer].dtype)
    return scores.values.detach() - scores.of(cap.run_from(begin, layer)).detach()


# --- a pass that goes on from a layer, with gradients

@pytest.mark.parametrize('build', [lambda: vit().double(), lambda: vit(n_extra=0, pool='mean', fused=True).double()])
def test_gradients_of_what_follows_a_layer_are_those_of_the_pass(build):
    model, x = build(), torch.randn(2, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    with Probe(model, 'blocks.0') as p:
        cap = p(x)
        scores = cap.score(classes)
        values, grads = cap.grads_from(cap.acts[0], scores)
        torch.testing.assert_close(values, scores.values.detach())
        torch.testing.assert_close(grads, cap.grads(scores)[0])
        half, at_half = cap.grads_from(cap.acts[0]/2, scores)
        # finite differences of the tail
        step = torch.zeros_like(cap.acts[0])
        step[:, 1, 0, 1] = 1e-6
        up, down = (scores.of(cap.run_from(cap.acts[0]/2 + sign*step)) for sign in (1, -1))
        torch.testing.assert_close(at_half[:, :, 1, 0, 1], (up - down)/2e-6, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(at_half, grads)
    assert all(p.grad is None for p in model.parameters())


def test_what_goes_on_is_recorded_only_if_it_is_asked_to():
    model, x = vit(), torch.randn(2, 3, 16, 16).double()
    with Probe(model, 'blocks.0') as p:
        cap = p(x)
        assert not cap.run_from(cap.acts[0]).requires_grad
        with torch.no_grad(): assert cap.run_from(cap.acts[0], grad=True).requires_grad and not torch.is_grad_enabled()
        extra = cap.extras[0].clone().requires_grad_()
        grad, = torch.autograd.grad(cap.run_from(cap.acts[0], extra=extra, grad=True).sum(), extra)
        assert grad.abs().max() > 0 # the class token has a gradient of its own


# --- pathcam

def test_path_through_a_product_by_hand():
    "s = a·b·c·d: along the straight way from 0 each factor gets a quarter of 1·2·4·1"
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.keep = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.ones_(self.keep.weight)
        def forward(self, x): return self.keep(x).flatten(1).prod(1, keepdim=True)
    with Probe(Product().double(), 'keep') as p:
        cap = p(torch.tensor([1., 2, 4, 1]).double().view(1, 1, 2, 2))
        scores = cap.score(classes)
        torch.testing.assert_close(pathcam(cap, scores)[0, 0], torch.full((2, 2), 2.).double())
        torch.testing.assert_close(path_evidence(cap, scores, steps=1)[0, 0], torch.full((2, 2), 1.).double()) # half the way, where each gradient is an eighth
        torch.testing.assert_close(as_method('hirescam')(cap, scores)[0, 0], torch.full((2, 2), 8.).double()) # together four times the score


@pytest.mark.parametrize('build', [lambda: vit(), lambda: vit(n_extra=0, pool='mean', fused=True), lambda: vit(n_extra=2)])
@pytest.mark.parametrize('layer', ['blocks.0', EVIDENCE, None])
def test_cells_of_a_transformer_add_up(build, layer):
    model, x = build().double(), torch.randn(3, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    with Probe(model, layer) as p:
        cap = p(x)
        scores = cap.score(classes)
        cells, gap = pathcam(cap, scores), gap_of(cap, scores)
        assert ((cells.flatten(2).sum(-1) - gap).abs() <= .01*gap.abs() + 2e-6*cells.abs().flatten(2).sum(-1)).all()
        exact = pathcam(cap, scores, tol=1e-6, most=256)
        assert ((exact.flatten(2).sum(-1) - gap).abs() <= 1e-6*gap.abs() + 2e-6*exact.abs().flatten(2).sum(-1)).all()


def test_cells_add_up_on_the_default_head(dls):
    torch.manual_seed(0)
    learn = vision_learner(dls, resnet18, pretrained=False)
    learn.model.eval()
    x = learn.dls.valid.one_batch()[0]
    with Probe(learn.model) as p:
        cap = p(x)
        for target in (classes, ClassIndex(0), Versus(0, 1)):
            scores = cap.score(target).columns
            cells, gap = pathcam(cap, scores), gap_of(cap, scores)
            assert ((cells.flatten(2).sum(-1) - gap).abs() <= .011*gap.abs() + 1e-5*cells.abs().flatten(2).sum(-1)).all()
        one, other, both = (pathcam(cap, cap.score(target), tol=1e-4).flatten(1).sum(-1) for target in (ClassIndex(0), ClassIndex(1), Versus(0, 1)))
        torch.testing.assert_close(both, one - other, rtol=2e-3, atol=2e-3*one.abs().max().item())
        assert as_method('gradcam')(cap, cap.score(ClassIndex(0))).flatten(1).sum(-1).sub(one).abs().max() > .05*one.abs().max() # Grad-CAM's do not


def test_one_step_is_enough_for_a_linear_head(dls):
    learn = cam_learner(dls, resnet18, pretrained=False)
    learn.model.eval()
    with Probe(learn.model) as p:
        cap = p(learn.dls.valid.one_batch()[0])
        scores, runs = cap.score(classes), []
        hook = learn.model[1].register_forward_hook(lambda *_: runs.append(1))
        found = pathcam(cap, scores)
        hook.remove()
        torch.testing.assert_close(found, as_method('cam')(cap, scores)/49 if found.shape[-1]==7 else as_method('cam')(cap, scores)/found[0, 0].numel(), rtol=1e-4, atol=1e-6)
        assert len(runs)==2 # nothing, and half the way


def test_what_belongs_to_a_batch_stays_with_it():
    "A model may hold a table with a row for each item, and a score, too: steps are taken of the whole batch, as long as one item needs them"
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.keep, self.tail = nn.Conv2d(1, 1, 1, bias=False), nn.Flatten()
            nn.init.ones_(self.keep.weight)
            self.rows = torch.tensor([1., 2, 3]).double()
        def forward(self, x): return (self.tail(self.keep(x)) - 1).relu()*self.rows[:len(x), None]
    x = torch.tensor([[.5, .5, .5, .2], [.1, 0, 0, .9], [4, 4, 4, 4]]).double().view(3, 1, 2, 2) # only the last has a kink on its way
    weights = torch.tensor([[1.], [5], [7]]).double()
    with Probe(Scaled().double(), 'keep') as p:
        cap = p(x)
        found = pathcam(cap, cap.score(lambda out: (out*weights).sum(1)))
    torch.testing.assert_close(found.flatten(1).sum(1), torch.tensor([0., 0, 12*3*7]).double(), rtol=.01, atol=1e-9)


# --- likeness and spreading

def test_spreading_by_hand():
    "Two places with features (1, 0) and one with (0, 1): the evidence of the first is shared with its like"
    acts = torch.tensor([[[[1., 2, 0]], [[0., 0, 3]]]]).double()
    maps = torch.tensor([[[[6., 0, 1]]]]).double()
    found = spread_alike(maps, acts)
    torch.testing.assert_close(found, torch.tensor([[[[3., 3, 1]]]]).double())
    torch.testing.assert_close(spread_alike(-maps, acts), -found)
    torch.testing.assert_close(found.sum(), maps.sum())


# --- the default

def object_of_tokens(cap, scores, share=.75, steps=2):
    "The formula, one item, one score and one place at a time"
    evidence = path_evidence(cap, scores, len(cap.layers) - 1, steps=steps)
    maps = torch.zeros_like(evidence)
    for b in range(len(evidence)):
        own = F.normalize(cap.acts[-1][b].flatten(1), dim=0)
        own = own - own.mean(1, keepdim=True)
        unit, n = F.normalize(own, dim=0), own.shape[1]
        for k in range(evidence.shape[1]):
            flat, spread = evidence[b, k].flatten(), torch.zeros(n, dtype=torch.double)
            for q in range(n):
                likes = torch.tensor([max(0., float(unit[:, p] @ unit[:, q]))**2 for p in range(n)]).double()
                spread += flat[q]*likes/likes.sum()
            top, found = spread.abs().max(), torch.zeros(n, dtype=torch.double)
            for sign in (1, -1):
                prototype = (own*(sign*flat).clamp(min=0)).sum(1)
                like = torch.tensor([max(0., float(prototype @ own[:, p])) for p in range(n)]).double()
                if like.max() > 0: found += sign*top*(like/like.max())**share*((sign*spread).clamp(min=0)/top)**(1 - share)
            maps[b, k] = found.view(maps.shape[2:])
    return maps


@pytest.mark.parametrize('build', [lambda: vit(), lambda: vit(n_extra=0, pool='mean', fused=True)])
def test_object_of_tokens_against_the_formula(build):
    model, x = build().double(), torch.randn(2, 3, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    with Probe(model, EVIDENCE) as p:
        cap = p(x)
        scores = cap.score(classes)
        torch.testing.assert_close(objectcam(cap, scores), object_of_tokens(cap, scores))
        torch.testing.assert_close(objectcam(cap, scores, likeness=.5, steps=3), object_of_tokens(cap, scores, .5, 3))
        wanted = object_of_tokens(cap, scores)
    with Probe(model) as p: # watched elsewhere, it looks again where it should
        cap = p(x)
        assert cap.names != ['blocks.0']
        torch.testing.assert_close(objectcam(cap, cap.score(classes)), wanted)


def test_none_is_the_default(dls):
    learn = vision_learner(dls, resnet18, pretrained=False)
    assert as_method(None) is METHODS['objectcam']
    default, named = learn.get_cams([0, 1]), learn.get_cams([0, 1], method='objectcam')
    torch.testing.assert_close(default.maps, named.maps)
    assert default.method==['objectcam'] and default.layers==['0.6', '0'] or default.layers==['0.6', '0.7'], default.layers
    assert learn.get_cams(0, method='gradcam').method==['gradcam'] and learn.get_cams(0, method='gradcam').layers==['0']
    assert learn.get_cams(0, method=['gradcam', None]).method==['gradcam', 'objectcam']
    assert not torch.allclose(learn.get_cams([0, 1], method='gradcam').maps.sum(), default.maps.sum())


def test_what_made_the_maps_is_saved(dls, tmp_path):
    learn = vision_learner(dls, resnet18, pretrained=False)
    cams = learn.get_cams([0, 1])
    loaded = CAMs.load(cams.save(tmp_path/'maps.npz'))
    assert (loaded.method, loaded.layers)==(cams.method, cams.layers)==(['objectcam'], cams.layers)
    assert cams[:1].method==['objectcam']


# --- where evidence is looked for

def layers_of(model, size=64): return [(seen.name, seen.layout.grid) for seen in LayerScan(model.eval(), [torch.rand(1, 3, size, size)], {}).evidence()]

@pytest.mark.parametrize('name,options,expected', [
    ('vit_tiny_patch16_224', {}, [('blocks.1', (4, 4))]), ('vit_tiny_patch16_224', dict(global_pool='avg'), [('blocks.1', (4, 4))]),
    ('vit_tiny_patch16_224', dict(global_pool='map', class_token=False), [('blocks.1', (4, 4))]),
    ('deit_tiny_distilled_patch16_224', {}, [('blocks.1', (4, 4))]), ('vit_tiny_patch16_224', dict(depth=2), [('blocks.0', (4, 4))])])
def test_of_tokens_it_is_what_the_last_two_blocks_get(name, options, expected):
    import timm
    assert layers_of(timm.create_model(name, num_classes=3, img_size=64, **dict(dict(depth=4), **options)))==expected


def test_keys_that_are_made_coarser_end_no_stage():
    import timm
    model = timm.create_model('pvt_v2_b0', num_classes=3)
    assert [grid for _, grid in layers_of(model)]==[(4, 4), (2, 2)]
    assert [seen.layout.grid for seen in LayerScan(model, [torch.rand(1, 3, 64, 64)], {}).stages()]==[(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize('name,size', [
    ('mobilenetv3_small_050', 96), ('ghostnet_050', 96), ('tinynet_e', 96), ('repvgg_a0', 64), ('convnext_atto', 64), ('vit_tiny_patch16_224', 224),
    ('deit_tiny_distilled_patch16_224', 224), ('xcit_nano_12_p16_224', 224), ('mobilevit_xxs', 128), ('pvt_v2_b0', 64),
    ('edgenext_xx_small', 64)])
def test_cells_add_up_for_any_head(name, size):
    "Where a network ends, and where evidence is looked for: to 1% of the score less that of a layer which says nothing"
    import timm
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, size, size)
    for layer in (None, EVIDENCE):
        with Probe(model, layer) as p:
            cap = p(x).only(-1)
            scores = cap.score(classes)
            cells, gap = pathcam(cap, scores), gap_of(cap, scores)
            off, rounding = (cells.flatten(2).sum(-1) - gap).abs(), 1e-5*cells.abs().flatten(2).sum(-1) + 1e-6*scores.values.detach().abs()
            assert (off <= .01*gap.abs() + rounding).all(), (layer, cap.names, off/gap.abs())


def test_what_does_not_add_up_is_said(dls):
    learn = vision_learner(dls, resnet18, pretrained=False)
    learn.model.eval()
    with Probe(learn.model) as p:
        cap = p(learn.dls.valid.one_batch()[0])
        with pytest.warns(UserWarning, match=r"of 5 maps of pathcam at layer '0' do not add up to their score: give more steps"):
            pathcam(cap, cap.score(ClassIndex(0)), tol=1e-9, most=1)
