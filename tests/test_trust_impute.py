"Pixels that are filled in from their neighbours, and ROAD: against pytorch-grad-cam, and equations solved as exactly as asked."
import pytest
import torch
import torch.nn.functional as F

import fastai_cam.trust.rescore as trust_rescore_room
from fastai_cam.methods.combine import enlarge
from fastai_cam.trust.impute import impute, road, road_lerf, road_morf
from fastai_cam.trust.rescore import Rescorer
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import ClassIndex

from helpers.metrics import images, net

pytestmark = pytest.mark.filterwarnings('ignore:__array_wrap__') # pytorch-grad-cam hands tensors to numpy


# -- ROAD

def smooth(seed, size, n=1, grid=(5, 7)): return F.interpolate(torch.randn(n, 3, *grid, generator=torch.Generator().manual_seed(seed)), size=size, mode='bicubic')


@pytest.mark.parametrize('size', [(40, 56), (33, 47), (7, 9), (3, 4), (1, 12)])
@pytest.mark.parametrize('share', [.1, .5, .9])
@pytest.mark.parametrize('grid', [(3, 4), (40, 56)])
def test_imputation_is_that_of_pytorch_grad_cam(size, share, grid):
    road_peer = pytest.importorskip('pytorch_grad_cam.metrics.road')
    image = smooth(0, size, 2) + .1*torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    values = enlarge(torch.randn(2, *grid, generator=torch.Generator().manual_seed(1)), size)
    removed = trust_rescore_room.ranks_of(values.flatten(1)).view(2, *size) < max(1, round(share*size[0]*size[1]))
    found = impute(image, removed, noise=0)
    for i in range(2):
        expected = road_peer.NoisyLinearImputer(noise=0)(image[i], 1 - removed[i].float())
        assert (found[i] - expected).abs().max() <= 1e-4*(image[i].max() - image[i].min())
    assert torch.equal(found[~removed[:, None].expand_as(found)], image[~removed[:, None].expand_as(found)])


def test_an_image_is_imputed_alike_alone_and_beside_a_harder_one():
    image, removed = smooth(0, (64, 64), 2), torch.zeros(2, 64, 64, dtype=torch.bool)
    removed[0, 5:9, 5:9] = True
    removed[1, 2:62, 2:62] = True
    together, alone = impute(image, removed, noise=0), impute(image[:1], removed[:1], noise=0)
    assert (together[0] - alone[0]).abs().max() < 1e-7*(image[0].max() - image[0].min())


def test_the_equations_hold_in_double_precision_as_exactly_as_asked():
    image, removed = smooth(0, (64, 64)).double(), torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(2)) < .7
    removed[0, 10:50, 10:50] = True
    found = impute(image, removed, noise=0, tol=1e-12)
    weights = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.double)[None, None]/12
    ones = torch.ones(1, 1, 64, 64, dtype=torch.double)
    mean = F.conv2d(found.view(3, 1, 64, 64), weights, padding=1)/F.conv2d(ones, weights, padding=1)
    assert ((mean - found.view(3, 1, 64, 64))*removed).abs().max() < 1e-10


def test_noise_is_the_seed_s_and_only_on_what_was_removed():
    image, removed = smooth(0, (32, 32), 2), torch.zeros(2, 32, 32, dtype=torch.bool)
    removed[:, 8:24, 8:24] = True
    plain, noisy = impute(image, removed, noise=0), impute(image, removed, noise=.2)
    inside = (noisy - plain)[:, :, 8:24, 8:24]
    assert torch.equal(noisy, impute(image, removed, noise=.2)) and not torch.equal(noisy, impute(image, removed, noise=.2, seed=1))
    assert torch.equal(noisy*~removed[:, None], image*~removed[:, None])
    assert .18 < inside.std() < .22 and torch.allclose(inside[0], inside[1], atol=1e-5)
    assert not torch.allclose(inside[0, 0], inside[0, 1])


def test_road_is_that_of_pytorch_grad_cam(images, net, monkeypatch):
    peer = pytest.importorskip('pytorch_grad_cam.metrics.road')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    monkeypatch.setattr(peer.NoisyLinearImputer.__init__, '__defaults__', (0, peer.neighbors_weights))
    net.eval()
    maps = torch.randn(5, 24, 32)
    for ours, theirs in [(road, peer.ROADCombined), (road_morf, peer.ROADMostRelevantFirstAverage), (road_lerf, peer.ROADLeastRelevantFirstAverage)]:
        expected = theirs(percentiles=[25, 50, 75])(images, maps.numpy(), [ClassifierOutputTarget(2)]*5, net) # 768 pixels in quarters: no rounding
        with Probe(net) as p:
            cap = p(images)
            found = ours(maps, images, Rescorer(cap, cap.score(ClassIndex(2))), percentiles=[25, 50, 75], noise=0)
            assert torch.allclose(found, torch.as_tensor(expected), atol=2e-4*found.abs().max() + 1e-4), ours.__name__
            assert found.abs().max() > 1e-3


def test_road_prefers_the_pixels_that_count(images):
    weights = torch.rand(1, 24, 32, generator=torch.Generator().manual_seed(5))
    def score(images, items): return (images[:, 0]*(weights > .8)).abs().sum((1, 2))
    right = (weights > .8).float().expand(5, -1, -1)
    assert (road(right, images, score, percentiles=[20]) > 0).all() and (road(-right, images, score, percentiles=[20]) < 0).all()
