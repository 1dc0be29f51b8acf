"Maps against masks, boxes and points: by naive loops, scikit-learn and scipy, and by hand."
import math

import numpy as np
import pytest
import torch

from fastai_cam.all import METRICS
from fastai_cam.trust.masks import (
    average_precision, best_iou, boxes_to_masks, energy_in_mask, iou, pointing_game, points_to_masks, relevance_rank)

from helpers.metrics import maps, masks

pytestmark = pytest.mark.filterwarnings('ignore:__array_wrap__') # pytorch-grad-cam hands tensors to numpy


# -- localisation

def test_localisation_by_loops_and_libraries(masks):
    from scipy import ndimage
    from sklearn.metrics import average_precision_score, jaccard_score
    maps = torch.randn(5, 24, 32)
    large = maps.numpy()
    for i in range(4):
        values, mask = large[i], masks[i].numpy()
        y, x = np.unravel_index(values.argmax(), values.shape)
        evidence = values.clip(0)
        n = mask.sum()
        strongest = np.argsort(-values.ravel())[:n]
        expected = dict(pointing_game=float(mask[y, x]), energy_in_mask=evidence[mask].sum()/evidence.sum(), iou=jaccard_score(mask.ravel(), values.ravel() >= values.max()/2),
                        relevance_rank=mask.ravel()[strongest].mean(), average_precision=average_precision_score(mask.ravel(), values.ravel()))
        for name, value in expected.items(): assert METRICS[name](maps, masks)[i].item()==pytest.approx(value, abs=1e-4), name
        ious = [jaccard_score(mask.ravel(), values.ravel() >= level) for level in np.unique(values[values > 0])]
        assert best_iou(maps, masks)[i].item()==pytest.approx(max(ious), abs=1e-5)
        near = ndimage.binary_dilation(mask, np.hypot(*np.mgrid[-4:5, -4:5]) <= 4) # a disc
        assert pointing_game(maps, masks, tolerance=4)[i]==near[y, x]
        assert iou(maps, masks, threshold='mean')[i].item()==pytest.approx(jaccard_score(mask.ravel(), evidence.ravel() >= evidence.mean()), abs=1e-6)
    assert all(METRICS[name](maps, masks)[4].isnan() for name in METRICS if METRICS[name].kind=='localisation')
    assert energy_in_mask(maps, masks)[1]==pytest.approx(1) and relevance_rank(maps, masks)[1]==1


def test_ties_by_sklearn_and_by_shuffling(masks):
    from sklearn.metrics import average_precision_score
    stepped = torch.randint(0, 4, (5, 24, 32), generator=torch.Generator().manual_seed(4)).float()
    found, rng, masks = average_precision(stepped, masks), np.random.default_rng(0), masks
    for i in range(4): assert found[i].item()==pytest.approx(average_precision_score(masks[i].numpy().ravel(), stepped[i].numpy().ravel()), abs=1e-6)
    for i in (0, 2):
        values, mask, shares = stepped[i].numpy().ravel(), masks[i].numpy().ravel(), []
        for _ in range(3000):
            order = np.lexsort((rng.random(768), -values))
            shares.append(mask[order[:mask.sum()]].mean())
        assert relevance_rank(stepped, masks)[i].item()==pytest.approx(np.mean(shares), abs=4*np.std(shares)/3000**.5)
    peaks = (stepped[0]==3)
    assert pointing_game(stepped, masks)[0].item()==pytest.approx((masks[0] & peaks).sum().item()/peaks.sum().item())


@pytest.mark.parametrize('name', [name for name in METRICS if METRICS[name].kind=='localisation'])
def test_the_uniform_map_scores_the_area(name, masks):
    area = masks.float().mean((1, 2))
    for value in (1., 1/3, 7e-5): assert torch.allclose(METRICS[name](torch.full((5, 7, 7), value), masks)[:4], area[:4], atol=1e-6), value


@pytest.mark.parametrize('name', [name for name in METRICS if METRICS[name].kind=='localisation'])
def test_the_mask_itself_is_a_perfect_map(name, masks):
    assert torch.allclose(METRICS[name](masks.float(), masks)[:4], torch.ones(4))


def test_a_map_without_positive_evidence_has_failed(maps, masks):
    for empty in (torch.zeros(5, 6, 8), -maps.abs() - .1):
        for name in ('pointing_game', 'energy_in_mask', 'iou', 'best_iou'): assert (METRICS[name](empty, masks)[:4]==0).all(), name
    assert torch.allclose(relevance_rank(torch.zeros(5, 6, 8), masks)[:4], masks.float().mean((1, 2))[:4])
    assert relevance_rank(masks.float() - 2, masks)[0]==1 # the order counts, not the sign


def test_levels_and_distances_by_hand():
    "A pixel at the threshold counts, also at the mean of equal values; the tolerance is a disc"
    one_map, upper = torch.tensor([[[4., 1.], [2., 0.]]]), torch.tensor([[[True, True], [False, False]]])
    assert iou(one_map, upper).item()==pytest.approx(1/3) and iou(one_map, upper, threshold=.51)==.5
    thirds = torch.full((1, 7, 7), 1/3)
    assert iou(thirds, torch.ones(1, 30, 30, dtype=torch.bool), threshold='mean')==1
    place = torch.zeros(1, 20, 20, dtype=torch.bool); place[0, 10, 10] = True
    for y, x, hit in [(10, 14, 1), (10, 15, 0), (13, 13, 0), (12, 13, 1)]:
        peak = torch.zeros(1, 20, 20); peak[0, y, x] = 1
        assert pointing_game(peak, place, tolerance=4)==hit and pointing_game(peak, place)==0


def test_boxes_and_points():
    boxes = [[(2, 1, 5, 3), (0, 0, 1, 1)], (1.5, .5, 3.5, 2.4), [], [[0, 0, 99, 99]]]
    found = boxes_to_masks(boxes, (4, 6))
    expected = torch.zeros(4, 4, 6, dtype=torch.bool)
    expected[0, 1:3, 2:5] = expected[0, 0, 0] = True
    expected[1, 0:2, 1:3] = True # middles at 1.5 and 2.5, and at .5 and 1.5
    expected[3] = True
    assert torch.equal(found, expected)
    assert torch.equal(boxes_to_masks(torch.tensor([[2, 1, 5, 3], [0, 0, 1, 1]]), (4, 6)).sum((1, 2)), torch.tensor([6, 1]))
    discs = points_to_masks([(3, 2), [(0, 0), (5, 3)]], (4, 6), radius=1.5)
    for i, points in enumerate([[(3, 2)], [(0, 0), (5, 3)]]):
        for y in range(4):
            for x in range(6): assert discs[i, y, x].item()==any(math.hypot(x - px, y - py) <= 1.5 for px, py in points)
