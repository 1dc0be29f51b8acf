"Who is suspected, and of what: things, surroundings, places together."
import numpy as np
import pytest
import torch

from fastai_cam.shortcuts.evidence import Evidence, LIMITS
from fastai_cam.shortcuts.candidates import _joined_places, _surroundings_by_model, _where_in_words, find_candidates, Separable
from fastai_cam.shortcuts.edits import edge_places
from fastai_cam.shortcuts.matching import PieceSearch

from helpers.shortcuts import blotches, evidence_of_maps


# -- pieces, by hand

@pytest.mark.parametrize('where', ['different places', 'one place'])
def test_a_thing_is_suspect_and_its_place_is_said(where):
    rng, images = np.random.default_rng(0), blotches(70)
    places = {i: tuple(int(v) for v in rng.integers(0, 53, 2)) if where == 'different places' else (20, 36) for i in range(36)}
    for i, (top, left) in places.items(): images[i, :, top:top+12, left:left+12] = torch.tensor([1., 0., 0.])[:, None, None] # of one colour: told from the ground by its edges
    evidence, positives, negatives = evidence_of_maps(images, places, 12, 36)
    evidence = evidence._replace(predicted=torch.stack([torch.arange(70) < 36, torch.arange(70) >= 36], 1), labelled=torch.stack([torch.arange(70) < 36, torch.arange(70) >= 36], 1))
    things = [candidate for candidate in find_candidates(evidence, {}, PieceSearch(images), 0, positives, 0) if candidate.kind == 'thing']
    assert 1 <= len(things) <= 2 and {thing.where for thing in things} == {where}
    assert all(len(thing.carriers) >= 33 and thing.carriers.tolist() == thing.match.items and thing.min_effect == LIMITS.thing_effect for thing in things)
    put = things[0].edits['piece'](torch.zeros(3, 3, 64, 64), None, None, torch.Generator().manual_seed(0))
    assert ((put[:, 0] > .99).sum((1, 2)) > 120).all() and put[:, 1].max() < .2 # its 144 pixels

def test_where_a_thing_is_in_words():
    assert [_where_in_words(corners, 1) for corners in ([(0, 0), (9, 9), (20, 30)], [(5, 0), (5, 9), (6, 30)], [(0, 3), (9, 4), (20, 3)], [(3, 3), (4, 3), (40, 40)])] == ['different places', 'one height', 'different heights', 'one place'] # of the last, one was found by mistake


def evidence_of_surroundings(share, n=60):
    "Class 0 is half of the pictures; the model says it to the surroundings of `share` of them"
    mine, rng = torch.arange(n) < n//2, np.random.default_rng(0)
    surroundings = torch.as_tensor(rng.normal(size=(n, 2))).float()
    surroundings[:round(share*n/2), 0] += 6
    one_hot = torch.stack([mine, ~mine], 1)
    return Evidence(torch.zeros(n, 1, 8, 8), one_hot.float(), one_hot, one_hot, torch.zeros(n, 2, 2), torch.zeros(n, 3), surroundings)

def test_surroundings_are_suspect_where_the_model_says_the_class_to_them():
    positives, negatives = torch.arange(30), torch.arange(30, 60)
    [candidate] = _surroundings_by_model(evidence_of_surroundings(.7), 0, positives, negatives)
    assert candidate.kind == 'surroundings' and set(range(21)) <= set(candidate.carriers.tolist()) and candidate.min_effect <= LIMITS.min_effect(LIMITS.surroundings_auc)
    rare = evidence_of_surroundings(0.)
    rare.surroundings[:, 0] = torch.cat([torch.linspace(0, .4, 16), torch.linspace(.76, .9, 14), torch.linspace(0, 1, 30)]) # many above most others, and as many below
    assert _surroundings_by_model(rare, 0, positives, negatives) == []
    assert _surroundings_by_model(evidence_of_surroundings(0.), 0, positives, negatives) == [] == _surroundings_by_model(evidence_of_surroundings(.7)._replace(surroundings=None), 0, positives, negatives)

def test_places_that_tell_are_tried_together_too():
    places, positives, p = edge_places(12, 12), torch.arange(4), np.array([.9, .8, .6, .1, 0, 0])
    [both] = _joined_places(0, positives, {'left edge': Separable(.8, p, None), 'right edge': Separable(.9, p[[0, 1, 3, 3, 4, 5]], None)}, places)
    assert torch.equal(both.mask, places['left edge'] | places['right edge']) and both.where == 'left edge and right edge' and both.n_places == 2
    assert both.carriers.tolist() == [0, 1] and both.min_effect == LIMITS.min_effect(.9)
    assert _joined_places(0, positives, {'left edge': Separable(.8, p, None)}, places) == []
    assert _joined_places(0, positives, {name: Separable(.8, p, None) for name in ('left edge', 'border', 'top edge')}, places)[0].where == 'edges'


# -- the test of a candidate, by hand

def test_the_better_it_tells_the_less_is_asked():
    assert np.allclose([LIMITS.min_effect(area) for area in (.6, .68, .7, .72, .82, .95)], [.3, .3, .18, .06, .045, .03])
