"Agreement with an independent implementation that is right on a plain last layer: pytorch-grad-cam."
import numpy as np
import pytest
import torch
from torch import nn
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision.models import resnet18

from fastai_cam.examples.imagenet import efficientnet_lite0, imagenet_dls
from fastai_cam.maps.pixels import normalize, upsample
from fastai_cam.methods.registry import METHODS
from fastai_cam.methods.catalogue import gradcam
from fastai_cam.probe.watch import Probe


def resnet_body_head():
    torch.manual_seed(0)
    net = resnet18()
    return nn.Sequential(nn.Sequential(*list(net.children())[:-2]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc))


def peer_maps(model, layer, x, classes):
    "pytorch-grad-cam's maps: its low resolution, after its own ReLU and min–max scaling; and enlarged to the image"
    with GradCAM(model=model.eval(), target_layers=[layer]) as peer:
        large = peer(input_tensor=x, targets=[ClassifierOutputTarget(int(c)) for c in classes])
        acts, grads = (torch.as_tensor(peer.activations_and_grads.__dict__[key][0]) for key in ('activations', 'gradients'))
    low = np.stack([m for m in peer.get_cam_image(x, layer, None, acts.detach().numpy(), grads.detach().numpy(), False)])
    return torch.tensor(low), torch.tensor(large)


def min_max(maps):
    "The peer's scaling, map by map, with its 1e-7 in the denominator"
    maps = maps - maps.amin((1,2), keepdim=True)
    return maps/(1e-7 + maps.amax((1,2), keepdim=True))


@pytest.mark.parametrize('build', [resnet_body_head, efficientnet_lite0])
@pytest.mark.parametrize('which', ['predicted', 'fixed'])
def test_gradcam_equals_pytorch_grad_cam(build, which):
    model = build().eval()
    x = imagenet_dls(bs=4).valid.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad(): out = model(x)
    classes = out.argmax(1) if which=='predicted' else torch.tensor([609, 22, 3, 990])
    low, large = peer_maps(model, model[0], x, classes)
    with Probe(model) as p:
        cap = p(x)
        ours = gradcam(cap, cap.out[range(4), classes])
    assert ours.clamp(min=0).amax((1,2)).min() > 0 # something is compared
    assert torch.allclose(ours, low, atol=1e-5*low.abs().max(), rtol=1e-5) # the raw maps, signs and all

    # its normalisation: ReLU, minimum to maximum, enlarged, and minimum to maximum again
    enlarged = min_max(upsample(min_max(ours.clamp(min=0)), x.shape[-2:]))
    assert (enlarged - large).abs().max() <= 1e-5


def test_the_peer_would_catch_a_wrong_map():
    "The comparison is not vacuous: another class's map is far from the peer's"
    model = efficientnet_lite0().eval()
    x = imagenet_dls(bs=2).valid.one_batch()[0].as_subclass(torch.Tensor)
    _, large = peer_maps(model, model[0], x, [609, 22])
    with Probe(model) as p:
        cap = p(x)
        wrong = gradcam(cap, cap.out[range(2), [22, 609]])
    assert (upsample(normalize(wrong), x.shape[-2:]) - large).abs().max() > .1


# -- the other methods, on a small network with a tail that is not linear

@pytest.fixture
def small(seeded):
    "A body that ends in a ReLU at the images' own resolution, so that nobody's enlarging comes in; a curved head; batch norm statistics that matter"
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))).eval()
    body[1].running_mean.uniform_(-.5, .5); body[1].running_var.uniform_(.5, 2); body[1].bias.data.uniform_(-.5, .5)
    model[1][-1].bias.data += 3. # positive scores: pytorch-grad-cam's AblationCAM divides by them
    return model


def their_maps(model, name, x, target=3):
    "pytorch-grad-cam's maps before it cuts, scales and enlarges them"
    import pytorch_grad_cam
    kept = []
    with getattr(pytorch_grad_cam, name)(model=model, target_layers=[model[0]]) as peer:
        own = peer.get_cam_image
        def keep(*args, **kwargs): kept.append(own(*args, **kwargs)); return kept[-1]
        peer.get_cam_image = keep
        peer(input_tensor=x, targets=[ClassifierOutputTarget(target)]*len(x))
    return torch.as_tensor(np.asarray(kept[0]))


def our_maps(model, name, x, target=3, layer=None):
    with Probe(model, layer) as p:
        cap = p(x)
        return METHODS[name](cap, cap.score(lambda out: out[:, target]))


SAME = dict(hirescam='HiResCAM', layercam='LayerCAM', xgradcam='XGradCAM', elementwise='GradCAMElementWise', shapleycam='ShapleyCAM', scorecam='ScoreCAM', segeigencam='SegEigenCAM')
UP_TO_SIGN = dict(eigencam='EigenCAM', eigengradcam='EigenGradCAM', kpca_cam='KPCA_CAM')


@pytest.mark.parametrize('name', [*SAME, *UP_TO_SIGN, 'ablationcam', 'gradcam'])
def test_small_net_equals_pytorch_grad_cam(small, name):
    x = torch.randn(3, 3, 12, 10)
    theirs = their_maps(small, {**SAME, **UP_TO_SIGN, 'ablationcam': 'AblationCAM', 'gradcam': 'GradCAM'}[name], x)
    ours = our_maps(small, name, x)
    if name in UP_TO_SIGN: # their sign is that of the linear algebra library
        theirs = theirs*(theirs*ours).sum((1, 2), keepdim=True).sign()
    if name=='ablationcam': # the paper divides by the score; so do they
        with torch.no_grad(): theirs = theirs*small(x)[:, 3, None, None]
    assert ours.abs().amax((1, 2)).min() > 1e-4
    assert (ours - theirs).abs().max() <= 1e-5*theirs.abs().max()


def test_shapleycam_is_compared_where_it_differs_from_gradcam(small):
    x = torch.randn(3, 3, 12, 10)
    assert (our_maps(small, 'shapleycam', x) - our_maps(small, 'gradcam', x)).abs().max() > 1e-2*our_maps(small, 'gradcam', x).abs().max()


def test_gradcam_pp_equals_pytorch_grad_cam_where_its_epsilon_does_not_matter(small):
    """Equation 19 of the paper divides by 2g² + ΣA·g³; pytorch-grad-cam adds 1e-6 to it. With the layer in units in which gradients are a
    thousand times larger (equation 19 does not depend on the units) both agree; in the network's own units only ours is still the same map."""
    x = torch.randn(3, 3, 12, 10)
    ours = our_maps(small, 'gradcam_pp', x)
    class Unit(nn.Module):
        def __init__(self, factor): super().__init__(); self.factor = factor
        def forward(self, x): return x*self.factor
    large = nn.Sequential(nn.Sequential(*small[0], Unit(1e-3)), nn.Sequential(Unit(1e3), *small[1])).eval()
    theirs = their_maps(large, 'GradCAMPlusPlus', x)
    scale = lambda maps: maps/maps.abs().amax((1, 2), keepdim=True)
    assert (scale(ours) - scale(theirs)).abs().max() <= 1e-5
    assert (scale(our_maps(large, 'gradcam_pp', x)) - scale(ours)).abs().max() <= 1e-5
    assert (scale(their_maps(small, 'GradCAMPlusPlus', x)) - scale(ours)).abs().max() > 1e-4 # the epsilon at work


def test_fullgrad_equals_pytorch_grad_cam(small):
    import pytorch_grad_cam
    x = torch.randn(3, 3, 12, 12)
    large_score = lambda out: out[3]*1e4 # its 1e-7 is added to gradients of 1e-5; ours does not depend on the scale
    with pytorch_grad_cam.FullGrad(model=small, target_layers=[]) as peer: theirs = torch.as_tensor(peer(input_tensor=x, targets=[large_score]*3))
    assert (min_max(our_maps(small, 'fullgrad', x)) - theirs).abs().max() <= 1e-5


def test_guided_backprop_equals_pytorch_grad_cam(small):
    from copy import deepcopy
    from pytorch_grad_cam import GuidedBackpropReLUModel
    x = torch.randn(2, 3, 12, 10)
    expected = torch.stack([torch.as_tensor(GuidedBackpropReLUModel(deepcopy(small), 'cpu')(one[None].clone(), 3)).abs().amax(-1) for one in x]) # it replaces modules
    ours = our_maps(small, 'guided_backprop', x)
    assert (ours - expected).abs().max() <= 1e-5*expected.abs().max()
    with Probe(small) as p:
        cap = p(x)
        plain = cap.recapture(from_input=True)
        assert (plain.image_grads(lambda out: out[:, 3]).abs().amax(1) - ours).abs().max() > 1e-3*ours.abs().max() # not simply the gradient
