"CAM and Grad-CAM against implementations that share nothing with ours: finite differences, loops, whole-model autograd item by item."
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from fastai_cam.methods.registry import as_method, METHODS, WRAPPERS
from fastai_cam.methods.catalogue import cam, gradcam
from fastai_cam.methods.combine import fuse_layers, principal_component
from fastai_cam.probe.watch import Probe

from helpers.oracles import OF_ATTENTION


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


# -- CAM is exact behind 1×1 convolutions too

def body(n=6): return nn.Sequential(nn.Conv2d(3, n, 3, stride=2), nn.ReLU())


class Functional(nn.Module):
    "As SqueezeNet: no `nn.Sequential`, a convolution for the classes, then the mean"
    def __init__(self, relu):
        super().__init__()
        self.features, self.classifier, self.relu = body(), nn.Conv2d(6, 4, 1), relu
    def forward(self, x):
        x = self.classifier(self.features(x))
        return (x.relu() if self.relu else x).mean((2, 3))


POINTWISE = dict(conv_then_pool=lambda: nn.Sequential(body(), nn.Sequential(nn.Dropout(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
                 pool_then_conv=lambda: nn.Sequential(body(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1, bias=False), nn.Flatten())),
                 square=lambda: nn.Sequential(body(4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Flatten())),
                 functional=lambda: Functional(False))


@pytest.mark.parametrize('name', POINTWISE)
def test_cam_behind_a_pointwise_convolution(seeded, name):
    "The map is Grad-CAM times HW, and its mean plus the bias is the logit"
    model, x = POINTWISE[name]().double().eval(), torch.randn(3, 3, 17, 13, dtype=torch.double)
    layer = 'features' if name=='functional' else '0'
    by_cam, by_grad = maps_of(model, x, cam, layer), maps_of(model, x, gradcam, layer)
    assert by_cam.shape==(3, 4, 8, 6) and torch.allclose(by_cam, by_grad*48, atol=1e-12) and by_cam.std() > .01
    conv = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    bias = 0 if conv.bias is None else conv.bias
    assert torch.allclose(by_cam.mean((2, 3)) + bias, model(x), atol=1e-12)


def test_cam_of_the_maps_of_the_classes_themselves(seeded):
    "Behind the convolution, and behind SqueezeNet's ReLU, each class has its own map; before that ReLU nothing is exact"
    x = torch.randn(3, 3, 17, 13, dtype=torch.double)
    model = POINTWISE['conv_then_pool']().double().eval()
    assert torch.allclose(maps_of(model, x, cam, '1.1'), model[1][1](model[0](x)), atol=1e-12)
    squeezed = nn.Sequential(body(), nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())).double().eval()
    for layer in ('0', '1.0'):
        with pytest.raises(ValueError, match=r'or 1×1 convolution\), but what makes the output here is (Conv2d → )?ReLU → Adaptive'): maps_of(squeezed, x, cam, layer)
    with Probe(squeezed, '1.1') as p: assert torch.allclose(p(x).fc, torch.eye(4, dtype=torch.double))
    with pytest.raises(ValueError, match='here is a Functional'): maps_of(Functional(True).double().eval(), x, cam, 'features')


@pytest.mark.parametrize('head', [nn.Conv2d(6, 4, 1, stride=3), nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 4, 2), nn.ConvTranspose2d(6, 6, 1)])
def test_cam_refuses_convolutions_that_do_more(seeded, head):
    model = nn.Sequential(body(), nn.Sequential(head, nn.AdaptiveAvgPool2d(1), nn.Flatten())).double().eval()
    with pytest.raises(ValueError, match='CAM needs'): maps_of(model, torch.randn(3, 3, 17, 13, dtype=torch.double), cam, '0')


# -- what is not finite is said

class Broken(nn.Module):
    "A small network, three things of which can be broken: a weight of its head, a channel of the items whose images are bright, the logits of these"
    def __init__(self, where=None):
        super().__init__()
        self.where, self.body = where, nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.ReLU())
        self.last, self.head = nn.Conv2d(5, 5, 1), nn.Linear(5, 4)
        if where=='weight': self.head.weight.data[0, 2] = torch.nan
    def forward(self, x):
        is_bright = x.amax((1, 2, 3)) > 50
        broken = torch.zeros_like(x[:, :1, :1, :1]).masked_fill(is_bright[:, None, None, None], {'nan': torch.nan, 'inf': torch.inf}.get(self.where, 0.))
        act = self.body(x)
        act = torch.cat([act[:, :1], act[:, 1:2] + broken, act[:, 2:]], 1)
        out = self.head(self.last(act).mean((2, 3)))
        if self.where=='logits': out = torch.where(is_bright[:, None], torch.tensor([torch.inf, -torch.inf, torch.inf, 0.]).to(out), out)
        return out


NAMES = [name for name in METHODS if name not in OF_ATTENTION]
WRAPPED = ['gradcam+tta', 'gradcam+pca', 'gradcam+stages', 'elementwise+stages', 'gradcam_pp+pca', 'refinecam+tta', 'fullgrad+pca', 'layercam+tta+pca', 'likenesscam+stages']


def test_every_wrapper_is_tried(): assert set(WRAPPERS)=={wrapper for name in WRAPPED for wrapper in name.split('+')[1:]}


@pytest.mark.parametrize('where', ['weight', 'nan', 'inf', 'logits'])
@pytest.mark.parametrize('name', NAMES + WRAPPED)
def test_what_is_not_finite_makes_no_ordinary_map(name, where):
    "Of the broken item or class the map is not finite; those of the others are what they were"
    torch.manual_seed(0)
    whole, broken, x = Broken(), Broken(where), torch.randn(3, 3, 12, 12)
    broken.load_state_dict(whole.state_dict())
    if where=='weight': broken.head.weight.data[0, 2] = torch.nan
    if where!='weight': x[1] += 60 # nobody knows this item
    is_known = torch.tensor([True, where=='weight', True])
    expected, found = (maps_of(model.eval(), x, as_method(name), 'last' if where!='weight' else None, score=lambda out: out[:, :2]) for model in (whole, broken))
    assert torch.isfinite(expected).all()
    is_finite = found.isfinite().flatten(2).all(-1)
    if where=='weight': assert not is_finite[:, 0].any()
    else:
        assert not is_finite[1].any() and is_finite[is_known].all()
        assert torch.allclose(found[is_known], expected[is_known], rtol=1e-3, atol=1e-5*expected[is_known].abs().max())


class RootAtZero(torch.autograd.Function):
    "Finite in every value, and with a gradient that is not, at one item"
    @staticmethod
    def forward(ctx, x, bad): ctx.bad = bad; return x.clone()
    @staticmethod
    def backward(ctx, grad): return torch.where(ctx.bad[:, None, None, None], torch.tensor(-torch.inf), grad), None


@pytest.mark.parametrize('name', [name for name in NAMES if METHODS[name].facts.grad and name != 'shapleycam'] + ['fullgrad', 'guided_backprop', 'opticam', 'elementwise+stages', 'layercam+pca', 'gradcam_pp+tta'])
def test_gradients_that_are_not_finite_are_said(name):
    class Net(nn.Sequential):
        def forward(self, x): return self[1](RootAtZero.apply(self[0](x), x.amax((1, 2, 3)) > 20))
    torch.manual_seed(0)
    net, x = Net(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))), torch.randn(3, 3, 9, 9)
    x[1] += 30
    found = maps_of(net.eval(), x, as_method(name), score=lambda out: out[:, :2]).isfinite().flatten(2).all(-1)
    assert not found[1].any() and found[[0, 2]].all()


def test_parts_do_not_hide_what_is_not_finite():
    good, bad = torch.rand(1, 2, 3, 3), torch.full((1, 2, 3, 3), torch.nan)
    for how in ('mean', 'max', 'product'): assert fuse_layers([good, bad], how).isnan().all()
    acts = torch.randn(3, 4, 3, 3)
    acts[1, 2, 0, 0] = torch.inf
    found, alone = principal_component(acts, torch.ones(3, 1, 4)), principal_component(acts[[0, 2]], torch.ones(2, 1, 4))
    assert found[1].isnan().all() and torch.allclose(found[[0, 2]], alone, atol=1e-6)
    flat = torch.cat([torch.zeros(1, 4, 3, 3), torch.randn(1, 4, 3, 3)]) # an empty item takes another way, and no other with it
    assert torch.equal(principal_component(flat, torch.ones(2, 1, 4))[1:], principal_component(flat[[1, 1]], torch.ones(2, 1, 4))[1:])


def test_a_wrapped_method_that_asks_nothing_still_asks_nothing():
    from fastai_cam.methods.registry import as_method, facts_of
    assert [facts_of(as_method(name)).class_free for name in ('eigencam+tta', 'gradcam+tta')]==[True, False]
