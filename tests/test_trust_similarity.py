"Similarity of maps against scipy and scikit-image, and of maps that are empty, constant or broken."
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity

from fastai_cam.trust.similarity import spearman, ssim


def shown(maps): return (maps.clamp(min=0)/maps.clamp(min=0).amax((1, 2), keepdim=True)).double().numpy()


def test_similarity_against_scipy_and_skimage():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, 11, generator=rng), torch.randn(4, 9, 11, generator=rng)
    b = a + .5*b
    for measure, expected in ((spearman, [spearmanr(p.ravel(), q.ravel())[0] for p, q in zip(shown(a), shown(b))]),
                              (ssim, [structural_similarity(p, q, data_range=1.) for p, q in zip(shown(a), shown(b))])):
        assert np.allclose(measure(a, b).numpy(), expected, atol=1e-12) and .2 < np.mean(expected) < .98
        assert measure(a, b).dtype is torch.float64 and torch.allclose(measure(a, 7*a), torch.ones(4, dtype=torch.float64))


def test_spearman_by_hand():
    a = torch.tensor([[[1., 2], [3, 4]]])
    assert abs(spearman(a, torch.tensor([[[2., 1], [3, 4]]])).item() - .8) < 1e-12 # 1 - 6·(1 + 1)/(4·15)
    assert abs(spearman(a, torch.tensor([[[4., 3], [2, 1]]])).item() + 1) < 1e-12
    assert spearman(a, torch.tensor([[[-1., -9], [3, 4]]])).item()==pytest.approx(spearmanr([1, 2, 3, 4], [0, 0, 3, 4])[0])


@pytest.mark.parametrize('measure', [spearman, ssim])
def test_empty_constant_and_broken_maps(measure):
    some = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    empty, flat = -some, torch.ones(1, 8, 8)
    assert measure(some, empty)==0 and measure(empty, some).isnan() and measure(empty, empty).isnan()
    assert measure(flat, flat)==1 and measure(flat, 3*flat)==1 and abs(measure(some, flat)) < .2
    assert measure(some, torch.full_like(some, torch.nan))==0
    with pytest.raises(ValueError, match='one shape'): measure(some, torch.rand(1, 4, 4))
