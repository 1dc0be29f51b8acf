"Methods at several layers and of several copies of an image, against the naive implementations put together: stages, tta, LikenessCAM, layers that are named together."
import pytest
import torch
from torch import nn
import torchvision
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL

import fastai_cam.learner # gives learners get_cams
from fastai_cam.methods.registry import as_method
from fastai_cam.probe.layers import LAST_TWO_STAGES
from fastai_cam.probe.watch import Probe
from fastai_cam.probe.scan import LayerScan
from fastai_cam.targets.kinds import ClassIndex, Predicted

from helpers.oracles import (
    all_classes, assert_same, each, EVERY, fused, images, large, likeness_at, odd, ON_ANY_NET, oracle, ours, plain, stack, TERM_ORACLES)


# --- several layers, several copies

@pytest.mark.parametrize('build,names', [(plain, ['0.1', '0']), (odd, ['mix', 'last'])])
@pytest.mark.parametrize('name', ['gradcam', 'layercam', 'scorecam', 'ablationcam', 'finercam', 'smooth_gradcam_pp'])
def test_stages(name, build, names):
    "'+stages' finds the last layer with parameters at each resolution"
    model, x = build(), images(2)
    assert_same(ours(model, x, name + '+stages'), fused([oracle(name, model, layer, x) for layer in names], 'mean'))


@pytest.mark.parametrize('base', ['gradcam_pp', 'layercam', 'hirescam'])
def test_refinecam(base):
    for build, names in ((plain, ['0.1', '0']), (odd, ['mix', 'last'])):
        model, x = build(), images(2)
        expected = fused([oracle(base, model, layer, x) for layer in names], 'product')
        assert_same(ours(model, x, 'refinecam', base=base), expected)
        assert_same(ours(model, x, 'refinecam', names[::-1], base=base), expected) # the layers may be listed


@pytest.mark.parametrize('build,names', [(plain, ['0.1', '0']), (plain, ['0.0', '0.3']), (odd, ['mix', 'last']), (odd, ['stem', 'down'])])
def test_likenesscam_at_two_layers(build, names):
    "In one pass, the finer one named first; of more than two, the last two"
    model, x = build(), images(2)
    asks, layers = all_classes(x), names if build is odd else ['0.0', *names] if names[0] != '0.0' else names
    expected = stack({(i, c): likeness_at(*names)(model, image, ask) for i, c, image, ask in each(x, asks)}, asks)
    for asked in (names, layers): assert_same(ours(model, x, 'likenesscam', asked), expected)


def test_likenesscam_asks_for_the_last_two_stages_itself():
    "The same map whether they are watched from the start, which needs no second pass, or from one layer"
    for build in (plain, odd):
        model, x, passes = build(), images(2), []
        expected = ours(model, x, 'likenesscam')
        hook = model.register_forward_hook(lambda module, inputs, out: passes.append(len(out)))
        with Probe(model, LAST_TWO_STAGES) as p:
            cap = p(x)
            passes.clear()
            assert cap.names==(['mix', 'last'] if build is odd else ['0.1', '0'])
            assert_same(as_method('likenesscam')(cap, cap.score(EVERY)), expected)
        hook.remove()
        assert passes==[]


def test_likenesscam_at_one_resolution():
    "Where all layers have one size there is one layer, which stands for both"
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Softplus(), nn.Conv2d(5, 6, 3, padding=1), nn.Softplus())
    model, x = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))).double().eval(), images(2)[:, :, :7, :9]
    asks = all_classes(x)
    with Probe(model, LAST_TWO_STAGES) as p: assert p(x).names==['0']
    assert_same(ours(model, x, 'likenesscam'), stack({(i, c): likeness_at('0', '0')(model, image, ask) for i, c, image, ask in each(x, asks)}, asks))


def of_torchvision(name, **kwargs):
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(num_classes=4, **kwargs).eval()


@pytest.mark.parametrize('name,expected', [('resnet18', ['layer3', 'layer4']), ('resnet50', ['layer3', 'layer4']), ('vgg11', ['features.18', 'features'])])
def test_the_last_two_stages_of_known_networks(name, expected):
    "The last block at the finer resolution, not a layer inside the block that makes it coarser"
    survey = LayerScan(of_torchvision(name), [torch.randn(1, 3, 64, 64)], {})
    found = survey.last_two()
    assert [seen.name for seen in found]==expected
    assert found[-1] is survey.last and found[0].layout.grid==tuple(2*n for n in found[1].layout.grid)


def learner_of(model, n=5):
    samples = [(image, i%4) for i, image in enumerate(images(n, torch.float))]
    learn = Learner(DataLoaders(*[TfmdDL(samples, bs=3, num_workers=0) for _ in range(2)]), model, loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def test_likenesscam_through_get_cams():
    "Both layers are watched in the pass that predicts; layers that are named are respected, and so are methods beside it"
    learn, x, sizes = learner_of(odd(torch.float)), images(5, torch.float), []
    predicted = learn.model(x).argmax(1)
    def of(layers, name='likenesscam'): return torch.stack([ours(learn.model, x[i:i+1], name, layers, ClassIndex(int(c)))[0, 0] for i, c in enumerate(predicted)])
    learn.model.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    def run_of(**kwargs):
        sizes.clear()
        return learn.get_cams(learn.dls.valid, **kwargs).maps
    default = run_of(method='likenesscam')
    assert [n for n in sizes if n > 1]==[3, 2] and len(sizes) <= 4 and default.shape==(5, 9, 13) # beside the batches, one item shows which layers these are
    assert_same(default, of(None), 1e-5)
    named = run_of(method='likenesscam', layer=['stem', 'down'])
    assert sizes==[3, 2]
    assert_same(named, of(['stem', 'down']), 1e-5)
    assert (named - default).abs().max() > .1
    mixed = run_of(method=['gradcam', 'likenesscam'])
    assert_same(mixed[:, 1], default, 1e-5)
    assert_same(mixed[:, 0], large(of(None, 'gradcam').double(), (9, 13)).float(), 1e-5)
    assert run_of(method='gradcam').shape==(5, 3, 4) # who asks for another method alone gets the last layer


def undecided(model, n=3):
    "Items whose predicted class is not that of all their copies"
    pool, looks = images(200), [lambda x, f=f, flip=flip: (x.flip(-1) if flip else x)*f for f in (.9, 1., 1.1) for flip in (False, True)]
    with torch.no_grad(): classes = torch.stack([model(look(pool)).argmax(1) for look in looks])
    found = pool[(classes != classes[1]).any(0) | (classes != classes[0]).any(0)][:n]
    assert len(found)==n
    return found


@pytest.mark.parametrize('name', ['gradcam', 'gradcam_pp', 'hirescam', 'scorecam', 'ablationcam', 'reciprocam', 'guided_backprop', 'finercam'])
def test_tta(name):
    "'+tta': the mean over six copies, each flipped back, of the map for the class of the image itself"
    model = odd()
    x = undecided(model)
    with torch.no_grad(): classes = model(x).argmax(1)
    for asks, score in ((all_classes(x[:1]), EVERY), ([[lambda out, c=int(c): out[0, c]] for c in classes], Predicted())):
        some, total = x[:len(asks)], 0
        for factor in (.9, 1., 1.1):
            total = total + oracle(name, model, 'down', some*factor, asks) + oracle(name, model, 'down', some.flip(-1)*factor, asks).flip(-1)
        assert_same(ours(model, some, name + '+tta', 'down', score), total/6)


def test_stages_and_tta_together():
    model, x = plain(), images(2)
    one = lambda x: fused([oracle('gradcam', model, layer, x) for layer in ('0.1', '0')], 'mean')
    expected = sum(one(x*f) + one(x.flip(-1)*f).flip(-1) for f in (.9, 1., 1.1))/6
    assert_same(ours(model, x, 'gradcam+stages+tta'), expected)


# --- several layers

AT_THE_LAST_LAYER = {'cam', 'likenesscam', 'objectcam', 'uniform_map', 'random_map'} # CAM belongs to the layer before the head, which is to be listed last, and the evidence of likenesscam and objectcam to the last; the baselines have that layer's size

@pytest.mark.parametrize('name', [name for name in ON_ANY_NET if name not in AT_THE_LAST_LAYER])
def test_order_of_the_layers(name):
    for build, names in ((plain, ['0.1', '0', '0.3']), (odd, ['mix', 'act', 'down'])):
        model, x = build(), images(2)
        first = ours(model, x, name, names)
        for other in (names[::-1], names[1:] + names[:1]): assert_same(ours(model, x, name, other), first)


@pytest.mark.parametrize('name', [*TERM_ORACLES, 'finercam', 'reciprocam'])
def test_several_layers_are_fused(name):
    model, x, names = odd(), images(2), ['last', 'act', 'down'] if name=='shapleycam' else ['mix', 'act', 'down']
    assert_same(ours(model, x, name, names), fused([oracle(name, model, layer, x) for layer in names], 'mean'))


def test_a_reused_module_is_captured_at_its_last_call():
    model, x, seen = odd(), images(), []
    hook = model.act.register_forward_hook(lambda module, inputs, out: seen.append(out.detach().clone()))
    with torch.no_grad(): model(x)
    hook.remove()
    with Probe(model, 'act') as p: cap = p(x)
    assert len(seen)==2 and seen[0].shape != seen[1].shape and torch.equal(cap.acts[0], seen[1])
    with Probe(model, 'act', grad=False) as p: assert torch.equal(p(x).acts[0], seen[1])
