"Many classes are asked at the price of a few; a region is a part of the picture; an embedding has the length of the model's."
from time import perf_counter

import numpy as np
import pytest
import torch
from torch import nn

from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import AllClasses, ClassIndex, Similarity, Target
from fastai_cam.targets.lookup import as_target, Region, Versus
from fastai_cam.tasks import MultiLabel, SingleLabel, Values

from helpers.targets import net, plain_learner

pytestmark = pytest.mark.usefixtures('maps_by_gradcam') # these tests are about what is asked, not about how maps are made


def test_a_class_index_is_a_position():
    assert ClassIndex(np.int64(2)).index==2 and ClassIndex(torch.tensor(1)).index==1 and as_target(ClassIndex(1, 'mine'), ['a', 'b']).labels==['mine']
    for wrong, kind in ((-1, ValueError), ('a', TypeError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(kind): ClassIndex(wrong)
    with pytest.raises(ValueError, match='class 3 does not exist: the model has 3 outputs'): as_target(ClassIndex(3), ['a', 'b', 'c'])(torch.zeros(1, 3))


def test_a_vocab_of_another_length_names_nothing():
    learn = plain_learner(5, ['a', 'b'])
    for cls in (None, 'actual'):
        with pytest.raises(ValueError, match='the vocab names 2 classes, but the model returns 5 numbers an item'): learn.get_cams(0, cls=cls)
    assert learn.get_cams(0, cls=ClassIndex(1)).maps.shape==(1, 4, 6)


# --- many classes

class Counts(Target):
    "A target of somebody else's"
    def classes(self, out, y=None): return torch.zeros(len(out), 1, dtype=torch.long)


def test_neighbours_are_asked_together_and_give_what_each_gives():
    out, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 0])
    asked = [3, 'actual', None, Versus(1, 2), 0, 5, lambda out: out[:, 0]*2, Counts(), 'all', [1, 2], lambda out, y: out[:, 1]*y]
    together = as_target(asked, n_classes=6)
    expected = torch.cat([as_target(one, n_classes=6)(out, y) for one in asked], dim=1)
    assert torch.equal(together(out, y), expected) and len(together.labels)==expected.shape[1]
    assert torch.equal(together.classes(out, y), torch.cat([as_target(one, n_classes=6).classes(out, y) for one in asked], dim=1))
    items, new = torch.tensor([3, 0, 0]), torch.randn(3, 6)
    assert torch.equal(together.score_fn(out, y)(new, items), torch.cat([as_target(one, n_classes=6).score_fn(out, y)(new, items) for one in asked], dim=1))


def test_regions_of_neighbours():
    out, mask = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    asked = [0, 1, Region([2, 0], 'actual'), Region(1, 'everywhere'), lambda out: out.mean((1, 2, 3)), Region(1, torch.ones(4, 5)), None]
    targets = [as_target(one, n_classes=3, task=SingleLabel()) for one in asked]
    together = as_target(asked, n_classes=3, task=SingleLabel())
    assert torch.allclose(together(out, mask), torch.cat([target(out, mask) for target in targets], dim=1))
    regions = [target.regions(out, mask) for target in targets]
    expected = torch.cat([torch.zeros(2, 1, 4, 5, dtype=torch.bool) if one is None else one for one in regions], dim=1)
    assert torch.equal(together.regions(out, mask), expected) and expected.shape[1]==8


def test_the_price_of_many_classes_is_that_of_all_at_once():
    learn = plain_learner(600, [f'class {i}' for i in range(600)], n_items=1)
    def seconds(cls):
        def one():
            start = perf_counter()
            maps.append(learn.get_cams(0, cls=cls).maps)
            return perf_counter() - start
        maps = []
        return min(one() for _ in range(3)), maps[0]
    at_once, expected = seconds('all')
    for cls in (list(range(600)), torch.arange(600), np.arange(600), learn.dls.vocab):
        spent, maps = seconds(cls)
        assert torch.allclose(maps, expected, atol=1e-7) and spent < 10*at_once + .1, (spent, at_once)


def test_gradients_of_a_wide_head_are_kept_in_pieces():
    "A gradient is as wide as the output, too: with few channels it is that which fills the memory"
    x = torch.rand(2, 3, 8, 8)
    with Probe(nn.Sequential(net(1)[0], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5000)))) as probe:
        cap = probe(x)
        score = cap.score(AllClasses(range(5000)))
        pieces = score.chunks()
        most = max(piece.shape[1] for piece in pieces)
        assert len(pieces) > 1 and torch.equal(torch.cat([piece.values for piece in pieces], 1), score.values) and 4*most*(3*score.values.numel() + cap.acts[0].numel()) <= 2**28
        assert torch.equal(pieces[1].of(cap.out), pieces[1].values)


# -- a region is a part of the picture, where the model speaks of it

@pytest.mark.parametrize('where', ['actual', 'predicted', 'everywhere', torch.ones(4, 5)])
@pytest.mark.parametrize('task', [SingleLabel(['a', 'b', 'c']), MultiLabel(['a', 'b', 'c']), Values()])
def test_a_region_of_a_classifier_is_refused(where, task):
    "In a list and in a part of the output too; the class by itself is asked about"
    out, y = torch.randn(2, 3), torch.tensor([0, 1])
    for cls in (Region(1, where), [Region(1, where)], [0, Region(1, where)], [Region([0, 1], where), 2]):
        target = as_target(cls, ['a', 'b', 'c'], task=task)
        for ask in (target, target.score_fn, target.regions):
            with pytest.raises(ValueError, match='a Region is for models that say something at every pixel') as caught: ask(out, y)
            assert '\n' not in str(caught.value)
    assert torch.equal(as_target([0, 1], ['a', 'b', 'c'], task=task)(out), out[:,:2])


def test_a_region_and_a_class_of_the_same_place_are_asked_apart():
    "The class's own part is the predicted one: joined with a region of it, in either order, each gives what it gives alone"
    out = torch.randn(2, 3, 4, 5)
    asked = [as_target(cls, task=SingleLabel()) for cls in (Region(1, 'predicted'), 0)]
    alone = torch.cat([target(out) for target in asked], dim=1)
    for order in ([0, 1], [1, 0]): assert torch.allclose(as_target([[Region(1, 'predicted'), 0][i] for i in order], task=SingleLabel())(out), alone[:,order])


@pytest.mark.parametrize('where', [(50, 50, 100, 100), [0, 0, 4, 4], np.array([0, 0, 4, 4]), torch.tensor([0., 0, 4, 4]), 7, lambda out: out, {'mask': 1}, [], 'here'])
def test_a_box_is_no_mask(where):
    with pytest.raises(ValueError, match=r"a region is 'predicted', 'actual', 'everywhere' or a mask \[height, width\], not "): Region(0, where)


# -- embeddings

def test_an_embedding_of_another_length_is_refused():
    out = torch.tensor([[3., 4., 0.], [0., 0., 2.]])
    for reference in (torch.tensor([1., 0, 0]), torch.tensor([[1., 0, 0]]), np.array([1., 0, 0]), [1., 0, 0]):
        assert torch.allclose(Similarity(reference)(out), torch.tensor([[.6], [0.]]))
    with pytest.raises(ValueError, match='to compare with has length 2, and the model returns 3 numbers an item'): Similarity(torch.ones(2))(out)
    for wrong in (torch.ones(1), torch.ones(1, 2)):
        with pytest.raises(ValueError, match='the model returns 3 numbers'): Similarity(wrong)(out)
    for wrong in (torch.ones(2, 3), torch.tensor(1.)):
        with pytest.raises(ValueError, match=r'one embedding \[length\], not with shape'): Similarity(wrong)
