"Measures of maps against naive loops, other libraries and values by hand; nothing here needs a real model."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastai_cam.trust.rescore as trust_rescore_room
from fastai_cam.methods.registry import as_method
from fastai_cam.all import METRICS
from fastai_cam.trust.impute import road
from fastai_cam.trust.masks import iou
from fastai_cam.trust.metrics import (
    adcc, arcc, average_drop, coherency, complexity, curve_area, curve_shares, deletion, deletion_curve, drop_in_deletion, entropy,
    gini, increase_in_confidence, insertion, insertion_curve, insertion_deletion, max_sensitivity, pixel_flipping)
from fastai_cam.trust.rescore import Explainer, Rescorer
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import ClassIndex

from helpers.metrics import images, maps, masks, net

pytestmark = pytest.mark.filterwarnings('ignore:__array_wrap__') # pytorch-grad-cam hands tensors to numpy


def linear(images, items):
    "A score that depends on the item, the place and the channel, so that no mix-up goes unnoticed"
    weights = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(8))
    return 30*(images*weights).mean((1, 2, 3)) + items + 2


class Spy:
    "A rescorer that notes how many images come at once"
    def __init__(self): self.sizes = []
    def __call__(self, images, items):
        assert len(images)==len(items)
        self.sizes.append(len(images))
        return linear(images, items)


def explain(images, items): return F.avg_pool2d(images[:, 0] - images[:, 1], 4) + items[:, None, None]*.01


def arguments(metric, maps, images, masks, rescore=linear): return {name: dict(images=images, masks=masks, rescore=rescore, explain=explain)[name] for name in metric.needs}


# -- all of them

@pytest.mark.parametrize('name', list(METRICS))
def test_every_measure_gives_one_number_an_item_whatever_else_is_in_the_batch(name, maps, images, masks):
    metric = METRICS[name]
    together = metric(maps, **arguments(metric, maps, images, masks))
    assert together.shape==(5,) and together.is_floating_point()
    for i in range(5):
        part = slice(i, i+1)
        def shifted(images, items): return linear(images, items + i)
        given = arguments(metric, maps[part], images[part], masks[part], shifted)
        if 'explain' in given: given['explain'] = lambda images, items: explain(images, items + i)
        assert torch.allclose(metric(maps[part], **given), together[part], atol=2e-5, equal_nan=True), i


@pytest.mark.parametrize('name', list(METRICS))
def test_every_measure_leaves_inputs_and_random_numbers_alone_and_gives_the_same_again(name, maps, images, masks):
    metric = METRICS[name]
    given, before, state = arguments(metric, maps, images, masks), [t.clone() for t in (maps, images, masks)], torch.get_rng_state()
    first = metric(maps, **given)
    assert torch.equal(first, metric(maps, **given)) or torch.equal(first.isnan(), metric(maps, **given).isnan())
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(before, (maps, images, masks)): assert torch.equal(old, new)


@pytest.mark.parametrize('name', list(METRICS))
def test_a_map_that_is_not_finite_measures_nan_and_the_others_what_they_did(name, maps, images, masks):
    metric = METRICS[name]
    given = arguments(metric, maps, images, masks)
    expected = metric(maps, **given)
    broken = maps.clone(); broken[1, 0, 0] = math.nan
    found = metric(broken, **given)
    assert found[1].isnan()
    others = torch.tensor([0, 2, 3, 4])
    assert torch.allclose(found[others], expected[others], equal_nan=True)


@pytest.mark.parametrize('name', [name for name, metric in METRICS.items() if 'rescore' in metric.needs])
@pytest.mark.parametrize('bs', [1, 3, 100])
def test_no_more_than_bs_images_are_made_at_once(name, bs, maps, images, masks):
    metric, spy = METRICS[name], Spy()
    found = metric(maps, **arguments(metric, maps, images, masks, spy), bs=bs)
    assert max(spy.sizes) <= bs and (bs==100 or max(spy.sizes)==bs)
    assert torch.allclose(found, metric(maps, **arguments(metric, maps, images, masks)), atol=2e-5, equal_nan=True)


@pytest.mark.parametrize('name', [name for name, metric in METRICS.items() if 'explain' in metric.needs])
def test_no_more_than_bs_images_are_explained_at_once(name, maps, images, masks):
    metric, sizes = METRICS[name], []
    def watched(images, items): sizes.append(len(images)); return explain(images, items)
    metric(maps, **{**arguments(metric, maps, images, masks), 'explain': watched}, bs=2)
    assert max(sizes)==2


@pytest.mark.parametrize('name', [name for name, metric in METRICS.items() if metric.kind=='faithfulness'])
def test_faithfulness_depends_on_the_order_of_the_map_and_not_on_its_scale(name, maps, images, masks):
    metric = METRICS[name]
    given = arguments(metric, maps, images, masks)
    assert torch.allclose(metric(maps, **given), metric(maps*1e-12, **given), atol=1e-4, equal_nan=True)
    if name != 'increase_in_confidence': assert not torch.allclose(metric(maps, **given), metric(maps.flip(1), **given), atol=1e-6, equal_nan=True)


def test_half_precision_maps_are_measured_like_others(maps, images, masks):
    rounded = maps.half()
    for name in ('insertion', 'energy_in_mask', 'gini'):
        metric = METRICS[name]
        assert torch.allclose(metric(rounded, **arguments(metric, maps, images, masks)), metric(rounded.float(), **arguments(metric, maps, images, masks)), equal_nan=True)


def test_wrong_shapes_are_told_before_any_work(maps, images, masks):
    def never(images, items): raise AssertionError('asked')
    for call, said in [(lambda: insertion(maps[:, None], images, never), 'maps\\[:,k\\]'), (lambda: insertion(maps[:3], images, never), '3 maps do not fit 5 images'),
                       (lambda: insertion_curve(maps[:3], images, never), '3 maps do not fit 5 images'), (lambda: iou(maps, masks[:4]), '5 maps do not fit 4 masks'),
                       (lambda: deletion(maps, images[0], never), 'channels, height, width'), (lambda: deletion(maps, images, never, steps=0), 'steps=0'),
                       (lambda: deletion(maps, images, never, baseline='black'), "'zero'"), (lambda: road(maps, images, never, percentiles=[0, 50]), 'percent'),
                       (lambda: road(maps, images, never, percentiles=[]), 'percent'), (lambda: iou(maps, masks, threshold=2), 'threshold'), (lambda: pixel_flipping(maps, images, never, share=0), 'share=0')]:
        with pytest.raises(ValueError, match=said): call()
    with pytest.raises(TypeError, match='masks > 0'): iou(maps, masks.float())
    with pytest.raises(TypeError, match='rescore'): insertion(maps, images)


# -- faithfulness by naive loops

def enlarged(maps, images): return F.interpolate(maps[:, None], size=images.shape[-2:], mode='bilinear', align_corners=False)[:, 0].numpy()


def test_fading_by_loops(maps, images):
    for i, large in enumerate(enlarged(maps, images)):
        light = torch.tensor(large.clip(0)/large.max())
        whole, shown, rest = (linear(image[None], torch.tensor([i])).item() for image in (images[i], images[i]*light, images[i]*(1 - light)))
        assert average_drop(maps, images, linear)[i].item()==pytest.approx(max(0, whole - shown)/whole, abs=1e-6)
        assert drop_in_deletion(maps, images, linear)[i].item()==pytest.approx((whole - rest)/whole, abs=1e-6)
        assert increase_in_confidence(maps, images, linear)[i]==float(shown > whole)
    assert 0 < increase_in_confidence(maps, images, linear).sum() < 5


def test_every_pixel_shown_is_one_of_the_two_images(images):
    base, seen = 1e3*torch.randn(3, 24, 32), []
    def watch(some, items):
        is_own, is_base = some==images[items], some==base
        seen.append(is_own.float().mean((1, 2, 3)))
        assert (is_own | is_base).all() # to the last bit
        return some.sum((1, 2, 3))
    insertion_curve(torch.randn(5, 24, 32), images, watch, steps=6, baseline=base)
    assert torch.allclose(torch.cat(seen).view(5, 7), torch.linspace(0, 1, 7).expand(5, 7))


@pytest.mark.parametrize('steps', [1, 7, 20])
def test_curves_by_loops(images, steps):
    maps = torch.randn(5, 24, 32) # as large as the images: enlarging repeats the border, which makes ties
    base = torch.tensor([.3, -.2, .1])
    inserted, deleted = insertion_deletion(maps, images, linear, steps=steps, baseline=base, deletion_baseline='mean')
    for i in range(5):
        order = np.argsort(-maps[i].numpy().ravel())
        for k in range(steps + 1):
            first = order[:round(k*768/steps)]
            new, kept = images[i].clone().reshape(3, -1), base[:, None].repeat(1, 768)
            new[:, first], kept[:, first] = images[i].mean((1, 2))[:, None], images[i].reshape(3, -1)[:, first]
            assert deleted[i, k].item()==pytest.approx(linear(new.view(1, 3, 24, 32), torch.tensor([i])).item(), abs=1e-5)
            assert inserted[i, k].item()==pytest.approx(linear(kept.view(1, 3, 24, 32), torch.tensor([i])).item(), abs=1e-5)
    shares = np.array([round(k*768/steps)/768 for k in range(steps + 1)]) # of whole pixels
    assert torch.allclose(curve_shares(images, steps), torch.tensor(shares).float())
    assert torch.allclose(insertion(maps, images, linear, steps=steps, baseline=base), torch.tensor(np.trapezoid(inserted.numpy(), shares, axis=1)).float(), atol=1e-5)
    assert torch.allclose(deletion(maps, images, linear, steps=steps, baseline='mean'), torch.tensor(np.trapezoid(deleted.numpy(), shares, axis=1)).float(), atol=1e-5)


def test_maps_are_enlarged_as_interpolate_does(maps, images, masks):
    large = trust_rescore_room.at_pixels(maps, (24, 32))
    assert torch.allclose(large, torch.tensor(enlarged(maps, images)), atol=1e-5)
    for name in ('deletion', 'road', 'average_drop', 'coherency', 'energy_in_mask', 'average_precision'):
        metric = METRICS[name]
        assert torch.allclose(metric(maps, **arguments(metric, maps, images, masks)), metric(large, **arguments(metric, maps, images, masks)), atol=1e-6, equal_nan=True), name


def test_shared_ends_run_once(maps, images):
    for options, n in (dict(baseline='zero'), 2*21 - 2), ({}, 2*21 - 1), (dict(steps=1, baseline='zero'), 2):
        spy = Spy()
        inserted, deleted = insertion_deletion(maps, images, spy, **options)
        assert sum(spy.sizes)==5*n
        steps = options.get('steps', 20)
        assert torch.allclose(inserted, insertion_curve(maps, images, linear, steps, options.get('baseline', 'blur')), atol=1e-6)
        assert torch.allclose(deleted, deletion_curve(maps, images, linear, steps), atol=1e-6)


def test_the_area_of_a_linear_score_by_hand():
    "Score: sum of the pixels. Pixels 4, 3, 2, 1 removed in this order leave 10, 6, 3, 1, 0"
    image = torch.tensor([[[[4., 3.], [2., 1.]]]])
    def total(images, items): return images.sum((1, 2, 3))
    assert deletion(image[:, 0], image, total, steps=4).item()==pytest.approx(3.75)
    assert deletion(-image[:, 0], image, total, steps=4).item()==pytest.approx((5 + 9 + 7 + 4 + 0)/4)
    assert insertion(image[:, 0], image, total, steps=4, baseline='mean').item()==pytest.approx((5 + 11.5 + 12 + 11.5 + 5)/4)


def test_a_share_that_is_rounded_to_whole_pixels_keeps_its_true_size():
    "Six pixels worth 6 to 1 in four steps: 2, 3 and 4 of them are gone (1.5 and 4.5 are rounded to even), which is 1/3, 1/2 and 2/3; more steps than pixels tell no more than one for each"
    image = torch.tensor([[[[6., 5., 4.], [3., 2., 1.]]]])
    def total(images, items): return images.sum((1, 2, 3))
    left = {0: 21, 1: 15, 2: 10, 3: 6, 4: 3, 5: 1, 6: 0}
    def area(counts): return sum((after - before)/6*(left[before] + left[after])/2 for before, after in zip(counts, counts[1:]))
    for steps, counts in {4: [0, 2, 3, 4, 6], 6: range(7), 5: [0, 1, 2, 4, 5, 6], 7: range(7), 20: range(7), 1000: range(7)}.items():
        assert deletion(image[:, 0], image, total, steps=steps).item()==pytest.approx(area(list(counts))), steps
        assert insertion(image[:, 0], image, total, steps=steps, baseline='zero').item()==pytest.approx(21 - area(list(counts))), steps
    assert curve_area(torch.tensor([[0., 4., 4.]]), torch.tensor([0., .25, 1.])).item()==pytest.approx(.25*2 + .75*4)


def test_pixel_flipping_of_fewer_patches_than_steps():
    "Four patches, of which one holds everything: gone at the first step, (0/2 + 1 + 1 + 1 + 1/2)/4, in however many steps"
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, :16, :16] = 1/256
    def total(images, items): return images.sum((1, 2, 3))
    for steps in (4, 5, 7, 20, 400): assert pixel_flipping(image[:, 0], image, total, steps=steps, baseline='zero').item()==pytest.approx(3.5/4), steps
    assert pixel_flipping(image[:, 0], image, total, steps=2, baseline='zero').item()==pytest.approx(3/4) # 0, 2 and 4 patches
    assert pixel_flipping(image[:, 0], image, total, share=.5, baseline='zero').item()==pytest.approx(3/4)
    assert pixel_flipping(image[:, 0], image, total, share=.01, baseline='zero').item()==pytest.approx(.04/2) # of one patch a 25th


@pytest.mark.parametrize('share', [1., .4])
def test_pixel_flipping_by_loops(maps, images, share):
    found = pixel_flipping(maps, images, linear, patch=5, steps=6, share=share, baseline='zero')
    for i, large in enumerate(enlarged(maps, images)):
        corners = [(top, left) for top in range(0, 24, 5) for left in range(0, 32, 5)]
        corners.sort(key=lambda corner: -large[corner[0]:corner[0]+5, corner[1]:corner[1]+5].mean())
        whole, new, n_done, drops, places = linear(images[i:i+1], torch.tensor([i])).item(), images[i].clone(), 0, [], []
        for k in range(7):
            while n_done < round(k*math.ceil(share*len(corners))/6):
                top, left = corners[n_done]
                new[:, top:top+5, left:left+5] = 0
                n_done += 1
            drops.append(whole - linear(new[None], torch.tensor([i])).item())
            places.append(n_done)
        dense = np.linspace(0, share*len(corners), 10001)
        assert found[i].item()==pytest.approx(np.interp(dense, places, drops).mean(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 7, 9, 10, 23])
def test_pixel_flipping_of_a_sum_is_half_the_share(n):
    "Patches that all hold the same: half of the share is gone on average, whatever the number of patches and of steps"
    image = torch.full((1, 1, 2, 2*n), 1/(4*n))
    def total(images, items): return images.sum((1, 2, 3))
    for share in (1., .7, .5, .3, .1, .01):
        for steps in (1, 2, 3, 4, 5, 20):
            found = pixel_flipping(image[:, 0], image, total, patch=2, steps=steps, share=share, baseline='zero').item()
            assert found==pytest.approx(share/2, abs=1e-5), (share, steps)
    assert pixel_flipping(image[:, 0], image, total, patch=2, share=1e-9, baseline='zero').item()==pytest.approx(0, abs=1e-5)


def test_pixel_flipping_costs_a_pass_a_step():
    image, n_run = torch.rand(1, 1, 8, 8), []
    def total(images, items): n_run.extend(items.tolist()); return images.sum((1, 2, 3))
    for steps, share, expected in ((20, 1., 5), (3, 1., 4), (20, .3, 3), (1, .3, 2)):
        n_run.clear()
        pixel_flipping(image[:, 0], image, total, patch=4, steps=steps, share=share)
        assert len(n_run)==expected, (steps, share)


def test_uniform_maps_favour_no_place(images):
    "The order of ties is drawn by lot: every quadrant loses as much, and an enlarged map of one third is as flat as a map of ones"
    pictures, seen = torch.zeros(1, 1, 224, 224), []
    def where(images, items): seen.append(images.clone()); return images.mean((1, 2, 3))
    deletion(torch.full((1, 7, 7), 1/3), pictures, where, steps=4, baseline=torch.ones(1))
    half = torch.cat(seen)[2, 0]
    for part in (half[:112, :112], half[:112, 112:], half[112:, :112], half[112:, 112:]): assert abs(part.mean() - .5) < .01
    blocks = F.avg_pool2d(half[None], 16)
    assert abs(blocks.std().item() - .5/16) < .01 # as independent pixels have it


# -- composites

def test_composites_by_scipy_and_by_the_formula(maps, images):
    from scipy.stats import hmean, pearsonr
    large = enlarged(maps, images).clip(0)
    large = large/large.max((1, 2), keepdims=True)
    again = enlarged(explain(images*torch.tensor(large)[:, None], torch.arange(5)), images).clip(0)
    expected = np.array([(1 + pearsonr(a.ravel(), b.ravel())[0])/2 for a, b in zip(large, again)])
    coh, com, ad = coherency(maps, images, explain), complexity(maps), average_drop(maps, images, linear)
    assert np.allclose(coh.numpy(), expected, atol=1e-5)
    assert torch.allclose(com, (maps.clamp(min=0)/maps.amax((1, 2), keepdim=True)).mean((1, 2)))
    assert np.allclose(adcc(maps, images, linear, explain).numpy(), hmean(torch.stack([coh, 1 - com, 1 - ad]).numpy()), atol=1e-5)
    def steep(images, items): return 3*linear(images, items)
    removed = (2*road(maps, images, steep)).clamp(0, 1)
    assert (removed > 0).any()
    assert np.allclose(arcc(maps, images, steep, explain).numpy(), hmean(torch.stack([coh, 1 - com, removed]).numpy()), atol=1e-5) # 0 if one of them is


def test_arcc_is_that_of_pytorch_grad_cam(net, images, monkeypatch):
    peer = pytest.importorskip('pytorch_grad_cam.metrics.arcc')
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.metrics import road as road_peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    monkeypatch.setattr(road_peer.NoisyLinearImputer.__init__, '__defaults__', (0, road_peer.neighbors_weights))
    net.eval()
    net[1][2].weight.data[2].abs_() # positive evidence everywhere, so that nothing is cut off and their scaling from minimum to maximum is the one difference
    with Probe(net) as p:
        cap = p(images)
        score = cap.score(ClassIndex(2))
        maps = as_method('gradcam')(cap, score)[:, 0]
        large = torch.tensor(enlarged(maps, images))
        stretched = (large - large.amin((1, 2), keepdim=True))/(large.amax((1, 2), keepdim=True) - large.amin((1, 2), keepdim=True))
        found = arcc(stretched, images, Rescorer(cap, score), Explainer(cap, score), percentiles=[25, 50, 75], noise=0)
    with GradCAM(net, [net[0]]) as method: expected = peer.ARCC(method, [25, 50, 75])(images, stretched.numpy(), [ClassifierOutputTarget(2)]*5, net)
    assert np.allclose(found.numpy(), expected, atol=5e-3) and (found > 0).any()


def test_a_score_that_falls_below_zero_has_dropped_altogether(maps, images):
    def falls(images, items): return torch.where(images.flatten(1).std(dim=1) < .95, -1., 1.)
    assert (average_drop(maps, images, falls)==2).all() and (adcc(maps, images, falls, explain)==0).all()


def test_maps_that_are_the_same_everywhere_gain_nothing(images):
    ones = torch.ones(5, 6, 8)
    assert (adcc(ones, images, linear, lambda images, items: ones[items])==0).all()
    assert (coherency(ones, images, explain)==.5).all() and (complexity(ones)==1).all()
    assert (complexity(-ones)==0).all()


# -- the map by itself

def test_gini_and_entropy_by_loops(maps):
    for i in range(5):
        c = np.sort(maps[i].clamp(min=0).numpy().ravel())
        n = len(c)
        assert gini(maps)[i].item()==pytest.approx(1 - 2*sum(c[k-1]/c.sum()*(n - k + .5)/n for k in range(1, n + 1)), abs=1e-5)
        p = c[c > 0]/c.sum()
        assert entropy(maps)[i].item()==pytest.approx(-(p*np.log(p)).sum()/np.log(n), abs=1e-5)
    one = torch.zeros(1, 6, 8); one[0, 2, 2] = 3
    assert gini(one).item()==pytest.approx(1 - 1/48) and entropy(one)==0
    assert gini(torch.zeros(1, 2, 2)).isnan() and entropy(-torch.ones(1, 2, 2)).isnan()


def test_sensitivity_by_a_loop(maps, images):
    maps, worst, random = explain(images, torch.arange(5)), torch.zeros(5), torch.Generator().manual_seed(3)
    for _ in range(4):
        noise = torch.rand(3, 24, 32, generator=random)*2 - 1
        for i in range(5):
            moved = explain(images[i:i+1] + .1*(images[i].max() - images[i].min())*noise, torch.tensor([i]))
            worst[i] = max(worst[i], (moved[0] - maps[i]).norm()/maps[i].norm())
    assert torch.allclose(max_sensitivity(maps, images, explain, radius=.1, n=4, seed=3), worst, atol=1e-6) and (worst > .01).all()
    assert max_sensitivity(torch.zeros(5, 6, 8), images, explain, n=1).isnan().all()
