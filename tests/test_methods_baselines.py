"Maps that know nothing of the model: they depend on the image alone, and edges are those of scikit-image."
import numpy as np
import pytest
import torch
from torch import nn

from fastai_cam.methods.registry import METHODS
from fastai_cam.all import METHODS
from fastai_cam.methods.baselines import BASELINES
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import ClassIndex, Predicted

from helpers.metrics import images, net

pytestmark = pytest.mark.filterwarnings('ignore:__array_wrap__') # pytorch-grad-cam hands tensors to numpy


# -- baselines

@pytest.mark.parametrize('name', BASELINES)
def test_baseline_maps_depend_on_nothing_but_the_image(name, net, images):
    def made(x, model, target):
        with Probe(model, grad=False) as p:
            cap = p(x)
            return METHODS[name](cap, cap.score(target))
    found = made(images, net, Predicted())
    assert found.shape[:2]==(5, 1) and found.isfinite().all() and (found >= 0).all()
    other = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, stride=4)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    assert torch.allclose(made(images, other, ClassIndex(1)), found)
    assert made(images, net, lambda out: out[:, :3]).shape[:2]==(5, 3)
    assert (name in ('edge_map', 'random_map'))==(not torch.allclose(found[0], found[1]))


def test_edges_by_skimage(net, images):
    filters = pytest.importorskip('skimage.filters')
    with Probe(net, grad=False) as p:
        cap = p(images)
        found = METHODS['edge_map'](cap, cap.score(ClassIndex(0)))[:, 0]
    assert found.shape==(5, 6, 8)
    for i in range(5):
        grey = images[i].mean(0).numpy()
        expected = np.hypot(filters.sobel_h(grey), filters.sobel_v(grey))[4:20, 4:28].reshape(4, 4, 6, 4).mean((1, 3)) # theirs leaves the border out
        assert np.allclose(found[i, 1:5, 1:7].numpy()/expected, found[i, 1, 1].item()/expected[0, 0], rtol=1e-4)
