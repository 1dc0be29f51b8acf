"Agreement with an independent implementation that is right on a plain last layer: pytorch-grad-cam."
import numpy as np
import pytest
import torch
from torch import nn
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision.models import resnet18

from fastai_cam.demo import efficientnet_lite0, imagenet_dls
from fastai_cam.maps import normalize, upsample
from fastai_cam.methods import gradcam
from fastai_cam.probe import Probe


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
