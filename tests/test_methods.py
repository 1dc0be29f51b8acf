"CAM and Grad-CAM against implementations that share nothing with ours: finite differences, loops, whole-model autograd item by item."
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from fastai_cam.methods import METHODS, cam, gradcam
from fastai_cam.probe import Probe


@pytest.fixture
def net(seeded):
    "A body with an in-place ReLU, a head with a hidden layer: nothing about it is linear"
    body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3), nn.Tanh())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10), nn.Softplus(), nn.Linear(10, 4))
    model = nn.Sequential(body, head).double().eval()
    model[0][1].running_mean.uniform_(-.5, .5); model[0][1].running_var.uniform_(.5, 2)
    return model


@pytest.fixture
def x(seeded): return torch.randn(5, 3, 20, 28, dtype=torch.double)


def maps_of(model, x, method=gradcam, layers=None, score=lambda out: out):
    with Probe(model, layers) as p:
        cap = p(x)
        return method(cap, cap.score(score))


def test_gradcam_by_finite_differences(net, x):
    "The weight of a channel is how the score moves when the whole channel is turned up, divided by its size"
    with torch.no_grad():
        act = net[0](x)
        _, C, h, w = act.shape
        eps, expected = 1e-6, torch.zeros(len(x), 4, h, w, dtype=torch.double)
        for k in range(C):
            up, down = act.clone(), act.clone()
            up[:, k] += eps; down[:, k] -= eps
            slope = (net[1](up) - net[1](down))/(2*eps) # [B, classes]
            expected += (slope/(h*w))[:, :, None, None]*act[:, None, k]
    ours = maps_of(net, x)
    assert ours.shape==(5, 4, h, w) and ours.abs().max() > 1e-3
    assert torch.allclose(ours, expected, atol=1e-8)


@pytest.mark.parametrize('layer', ['0.0', '0.1', '0.2', '0.3', '0'])
def test_gradcam_by_whole_model_autograd_item_by_item(net, x, layer):
    ours = maps_of(net, x, layers=layer)
    for i in range(len(x)):
        for c in range(4):
            kept = []
            def keep(module, inputs, out): kept.append(out); return out.clone()
            hook = net.get_submodule(layer).register_forward_hook(keep)
            score = net(x[i:i+1])[0, c]
            hook.remove()
            grad, = torch.autograd.grad(score, kept[0])
            act, expected = kept[0].detach()[0], torch.zeros_like(ours[i, c])
            for k in range(len(act)): expected += grad[0, k].mean()*act[k]
            assert torch.allclose(ours[i, c], expected, atol=1e-12), (i, c)


def test_item_order_and_batch_size_do_not_matter(net, x):
    ours, order = maps_of(net, x), [3, 0, 4, 1, 2]
    assert torch.allclose(maps_of(net, x[order]), ours[order], atol=1e-13)
    assert torch.allclose(torch.cat([maps_of(net, x[i:i+2]) for i in (0, 2, 4)]), ours, atol=1e-13)


def test_gradcam_is_linear_in_the_score(net, x):
    a, b = maps_of(net, x, score=lambda out: out[:, 0]), maps_of(net, x, score=lambda out: out[:, 1])
    assert torch.allclose(maps_of(net, x, score=lambda out: 2*out[:, 0] - 3*out[:, 1]), 2*a - 3*b, atol=1e-12)


def test_negative_evidence_is_kept(net, x):
    assert torch.allclose(maps_of(net, x, score=lambda out: -out[:, 2]), -maps_of(net, x, score=lambda out: out[:, 2]), atol=1e-13)


def test_cam_head_gives_gradcam_times_hw(seeded):
    from fastai_cam.learner import cam_head
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()), cam_head(16, 6)).double().eval()
    x = torch.randn(4, 3, 17, 31, dtype=torch.double)
    by_cam, by_grad = maps_of(model, x, cam), maps_of(model, x)
    h, w = by_cam.shape[-2:]
    assert (h, w)==(8, 15)
    assert (by_grad*h*w - by_cam).abs().max() <= 1e-6*by_cam.abs().max()
    weight = model[1][-1].weight
    act = model[0](x)
    expected = torch.zeros_like(by_cam)
    for c in range(6):
        for k in range(16): expected[:, c] += weight[c, k]*act[:, k]
    assert torch.allclose(by_cam, expected.detach(), atol=1e-12)


def test_cam_of_a_difference_of_classes(seeded):
    from fastai_cam.learner import cam_head
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()), cam_head(16, 6)).double().eval()
    x = torch.randn(2, 3, 17, 17, dtype=torch.double)
    all_maps = maps_of(model, x, cam)
    assert torch.allclose(maps_of(model, x, cam, score=lambda out: out[:, 1] - out[:, 4]), all_maps[:, 1] - all_maps[:, 4], atol=1e-12)


@pytest.mark.parametrize('head', [
    nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 3)), # max pooling: the shapes fit, the arithmetic does not
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), # the last linear layer has 6 inputs, like the body
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 3))])
def test_cam_refuses_heads_that_only_fit_in_shape(seeded, head):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), head)
    with pytest.raises(ValueError, match='what makes the output here is Adaptive.*cam_learner'): maps_of(model, torch.randn(3, 3, 9, 9), cam)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(seeded, dtype):
    "Maps of a half-precision model are those of the same numbers in float32, to the precision of the format"
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))).eval()
    x = torch.randn(2, 3, 16, 16)
    reference = {name: maps_of(model, x, METHODS[name]) for name in ('cam', 'gradcam')}
    half = model.to(dtype)
    for name, expected in reference.items():
        ours = maps_of(half, x.to(dtype), METHODS[name])
        assert ours.dtype==torch.float32 and (ours - expected).abs().max() <= .03*expected.abs().max()


def test_several_layers_pair_with_their_maps(net, x):
    "Listed in any order, each layer's activation meets its own gradient"
    forwards, backwards = maps_of(net, x, layers=['0.0', '0']), maps_of(net, x, layers=['0', '0.0'])
    assert torch.allclose(forwards, backwards, atol=1e-12)
    deep, shallow = maps_of(net, x, layers='0'), maps_of(net, x, layers='0.0')
    scale = lambda m: m/m.abs().amax((-2, -1), keepdim=True)
    enlarged = F.interpolate(scale(deep), size=shallow.shape[-2:], mode='bilinear', align_corners=False)
    assert torch.allclose(forwards, (enlarged + scale(shallow))/2, atol=1e-12)


def test_channels_last(seeded):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))).eval()
    x = torch.randn(2, 3, 16, 20)
    expected = maps_of(model, x)
    assert torch.allclose(maps_of(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)), expected, atol=1e-6)
