"Asking a model again about changed images, and for maps of them: each item its own question, and nothing left behind."
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import fastai_cam.trust.rescore as trust_rescore_room
from fastai_cam.methods.registry import as_method
from fastai_cam.all import cam_metric
from fastai_cam.trust.masks import iou
from fastai_cam.trust.metrics import arcc, gini, insertion, max_sensitivity
from fastai_cam.trust.rescore import as_metrics, baseline_images, Explainer, Rescorer
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import ClassIndex, Predicted

from helpers.metrics import images, net

pytestmark = pytest.mark.filterwarnings('ignore:__array_wrap__') # pytorch-grad-cam hands tensors to numpy


# -- all of them

def test_names_and_partials_of_measures():
    assert as_metrics('insertion')==[insertion] and as_metrics(['gini', iou])==[gini, iou]
    strict, = as_metrics(partial(iou, threshold=.8))
    assert (strict.__name__, strict.kind, strict.higher, strict.needs)==('iou(threshold=0.8)', 'localisation', True, ('masks',))
    one = torch.tensor([[[1., .7], [0, 0]]]), torch.tensor([[[True, True], [False, False]]])
    assert strict(*one)==.5 and iou(*one)==1
    assert pickle.loads(pickle.dumps(insertion)) is insertion
    with pytest.raises(ValueError, match="did you mean 'insertion'"): as_metrics(['gini', 'insertoin'])
    with pytest.raises(ValueError, match='empty'): as_metrics([])
    with pytest.raises(TypeError, match='@cam_metric'): as_metrics(lambda maps: maps.mean((1, 2)))
    with pytest.raises(ValueError, match='localisation'): cam_metric('pretty', higher=True)


# -- asking the model

def test_rescore_asks_each_item_its_own_question_and_leaves_the_model_as_it_was(net, images):
    modes = [module.training for module in net.modules()]
    images = images + torch.linspace(-6, 6, 5)[:, None, None, None] # of which the model says different things
    with Probe(net) as p:
        cap = p(images)
        score = cap.score(Predicted())
        rescore = Rescorer(cap, score, partial(torch.softmax, dim=1), bs=4, n_images=1000)
        items = torch.tensor([4, 0, 0, 2, 3, 1, 4, 2, 2])
        others = torch.randn(9, 3, 24, 32)
        found = rescore(others, items)
    assert [module.training for module in net.modules()]==modes and not any(p.grad is not None for p in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    net.eval()
    with torch.no_grad(): asked, expected = net(images).argmax(1), net(others).softmax(1)
    assert asked.unique().numel() > 1
    assert torch.allclose(found, expected[torch.arange(9), asked[items]], atol=1e-5) and not found.requires_grad


def test_rescore_runs_bs_images_at_a_time(net, images, monkeypatch):
    with Probe(net) as p:
        cap = p(images)
        sizes, run = [], cap.run
        monkeypatch.setattr(cap, 'run', lambda images, items: (sizes.append(len(images)), run(images, items))[1])
        Rescorer(cap, cap.score(ClassIndex(1)), bs=4)(torch.randn(9, 3, 24, 32), torch.zeros(9, dtype=torch.long))
    assert sizes==[4, 4, 1]


def test_as_many_images_at_once_as_run_fast():
    assert [(piece.start, piece.stop) for piece in trust_rescore_room.slices_of(19, None, torch.device('cpu'))]==[(0, 8), (8, 16), (16, 19)]
    assert [(piece.start, piece.stop) for piece in trust_rescore_room.slices_of(65, None, torch.device('cuda'))]==[(0, 64), (64, 65)]
    assert [(piece.start, piece.stop) for piece in trust_rescore_room.slices_of(5, 2, torch.device('cuda'))]==[(0, 2), (2, 4), (4, 5)]


class Opaque(nn.Module):
    "Cannot be traced: what it does depends on its input"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize('traced', [True, False])
def test_rescore_in_lower_precision_is_close_and_comes_back_wide(net, images, traced):
    model, others, whose = net if traced else nn.Sequential(Opaque(net[0]), net[1]), torch.randn(9, 3, 24, 32), torch.arange(9)%5
    with Probe(model, '0') as p:
        cap = p(images)
        exact, low = (Rescorer(cap, cap.score(ClassIndex(1)), n_images=n, dtype=dtype)(others, whose) for n, dtype in ((0, None), (64, torch.bfloat16)))
        assert cap.run(others, whose).dtype==torch.float32 # softmax is not taken in bfloat16
    assert 0 < (low - exact).abs().max() < .03*exact.abs().max()
    with Probe(model, '0') as p:
        cap = p(images)
        assert torch.equal(Rescorer(cap, cap.score(ClassIndex(1)), n_images=63, dtype=torch.bfloat16)(others, whose), exact) # a few images are run as they are


def test_a_model_that_lower_precision_breaks_runs_as_it_is(images):
    body, head = nn.Conv2d(3, 2, 1, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        body.weight.copy_(torch.tensor([[1., 0, 0], [1., .001, 0]])[..., None, None])
        head.weight.copy_(torch.tensor([[-1000., 1000.], [0., 1.]])) # of two nearly equal channels the difference: the mean of the second colour
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))
    with Probe(model) as p:
        cap = p(images)
        found = Rescorer(cap, cap.score(ClassIndex(0)), n_images=100, dtype=torch.bfloat16)(images, torch.arange(5))
    assert torch.allclose(found, images[:, 1].mean((1, 2)), atol=1e-3)


def test_rescore_of_two_questions_or_of_a_score_by_hand_is_refused(net, images):
    with Probe(net) as p:
        cap = p(images)
        with pytest.raises(ValueError, match='Rescorer for each'): Rescorer(cap, cap.score(lambda out: out[:, :2]))
        with pytest.raises(ValueError, match='by hand'): Rescorer(cap, cap.out[:, 0])


def test_explain_gives_the_maps_that_the_method_gives(net, images):
    images = images + torch.linspace(-6, 6, 5)[:, None, None, None]
    with Probe(net) as p:
        cap = p(images)
        found = Explainer(cap, cap.score(Predicted()), 'gradcam', bs=2)(images.flip(0), torch.arange(4, -1, -1))
        expected = as_method('gradcam')(cap, cap.score(Predicted()))[:, 0]
    assert torch.allclose(found.flip(0), expected, atol=1e-6) and expected.abs().max() > 1e-3


def test_measures_of_a_learner_model_leave_nothing_behind(net, images):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with Probe(net) as p:
        cap = p(images)
        score = cap.score(Predicted())
        maps = as_method('gradcam')(cap, score)[:, 0]
        values = arcc(maps, images, Rescorer(cap, score, partial(torch.softmax, dim=1)), Explainer(cap, score))
        max_sensitivity(maps, images, Explainer(cap, score), n=2)
    assert values.isfinite().all()
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in net.modules())


# -- faithfulness by naive loops

def test_the_order_of_ties_is_the_seed_s():
    ranks = [trust_rescore_room.ranks_of(torch.zeros(2, 1000), seed) for seed in (0, 0, 1)]
    assert torch.equal(ranks[0], ranks[1]) and not torch.equal(ranks[0], ranks[2])
    assert torch.equal(ranks[0][0], ranks[0][1]) and torch.equal(ranks[0][0].sort().values, torch.arange(1000))


# -- baselines

def test_blur_is_a_truncated_gaussian():
    from scipy import ndimage
    image = torch.randn(1, 2, 224, 260, generator=torch.Generator().manual_seed(0))
    expected = ndimage.gaussian_filter(image.double().numpy(), 5, mode='mirror', radius=5, axes=(2, 3))
    assert np.allclose(baseline_images(image, 'blur').numpy(), expected, atol=1e-5)
