"The shortcut finder: what raises a suspicion, by hand, and what is found, left alone and left as it was"
import pickle
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock

from fastai_cam.interpret import CAMInterpretation
import fastai_cam.shortcuts.evidence as shortcuts_evidence_room
import fastai_cam.shortcuts.report as shortcuts_report_room
import fastai_cam.shortcuts.testing as shortcuts_testing_room
from fastai_cam.shortcuts.evidence import (
    _cells, _least_salient_corners, Evidence, LIMITS, log_odds, separability, shrunken_auc, surroundings_log_odds)
from fastai_cam.shortcuts.report import _findings, as_shortcut, Shortcut
from fastai_cam.shortcuts.candidates import (
    _joined_places, _surroundings_by_model, _where_in_words, Candidate, find_candidates, Separable)
from fastai_cam.shortcuts.edits import (
    _add_difference, _add_fine_difference, _centre_weight, _smooth, corner_crops, edge_places, match_colours, place_edits, tile_corner)
from fastai_cam.shortcuts.matching import (
    _best_matches, _most_common_pieces, _shared_pixels, fill_hidden, Match, median_and_spread, paste_at_random, PieceSearch,
    recurring_things, thing_masks)
from fastai_cam.shortcuts.testing import EditTester, Finding, Measurement


# -- pieces, by hand

def test_places_are_where_their_names_say():
    places = edge_places(24, 48)
    assert {name: int(mask.sum()) for name, mask in places.items()} == {
        'top left corner': 72, 'top right corner': 72, 'bottom left corner': 72, 'bottom right corner': 72,
        'top edge': 4*48, 'bottom edge': 4*48, 'left edge': 24*8, 'right edge': 24*8, 'border': 24*48 - 20*40}
    assert places['top right corner'][:6, 36:].all() and places['bottom left corner'][18:, :12].all()
    assert places['right edge'][:, 40:].all() and places['bottom edge'][20:].all()

def test_log_odds():
    found = log_odds(torch.tensor([.5, .75, 1., 0.]))
    assert torch.allclose(found[:2], torch.tensor([0., float(np.log(3))]), atol=1e-6) and found[2] == -found[3] and found[2] > 15

def test_cells_tell_colour_contrast_and_edges():
    images = torch.zeros(2, 3, 8, 8)
    images[1, 0, :, 4:] = 1.
    features = _cells(images, 2)
    assert features.shape == (2, 12 + 4 + 4) # 3 colours, contrast, edges in 2×2 cells
    assert features[1, :4].tolist() == [0, 1, 0, 1] and (features[0, :12] == 0).all()

def test_a_telling_feature_is_told_from_noise():
    rng = np.random.default_rng(0)
    is_class = np.arange(90) % 3 == 0
    told, p = separability(np.c_[is_class + .1*rng.normal(size=90), rng.normal(size=(90, 3))], is_class)
    assert told > .99 and (p[is_class] > .5).all() and (p[~is_class] < .5).all()
    assert abs(separability(rng.normal(size=(90, 4)), is_class)[0] - .5) < .2
    assert separability(rng.normal(size=(90, 4)), np.arange(90) < 2)[0] == .5 # too few to tell
    few = np.arange(90) < 6
    assert abs(separability(few[:, None] + .01*rng.normal(size=(90, 1)), few)[0] - (.5 + .5*.065/np.sqrt(91/(12*6*84)))) < 1e-9 # told without error, but they are few

def test_the_same_piece_is_found_again_where_it_is():
    generator = torch.Generator().manual_seed(0)
    images, piece = torch.rand(4, 3, 20, 30, generator=generator), torch.rand(1, 3, 5, 5, generator=generator)
    images[2, :, 7:12, 20:25] = piece[0]
    similar, places = _best_matches(images, piece)
    assert similar.shape == (1, 4) and similar[0].argmax() == 2 and similar[0, 2] > .999 and (similar[0, [0, 1, 3]] < .7).all()
    assert divmod(int(places[0, 2]), 30 - 5 + 1) == (7, 20)

def test_similarity_is_the_naive_formula():
    generator = torch.Generator().manual_seed(1)
    image, piece = torch.rand(1, 2, 6, 6, generator=generator), torch.rand(1, 2, 3, 3, generator=generator)
    best = max((1 - ((window - piece[0])**2).sum()/(((window - window.mean())**2).sum() + ((piece - piece.mean())**2).sum() + 18*(.03*(image.max() - image.min()))**2)).item()
               for i in range(4) for j in range(4) for window in [image[0, :, i:i+3, j:j+3]])
    assert abs(_best_matches(image, piece)[0].item() - best) < 1e-5

def blotches(n, side=64, seed=0):
    "Pictures that are smooth and have nothing in common, `[n, 3, side, side]`, about from 0 to 1"
    coarse = torch.rand(n, 3, side//8, side//8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode='bicubic')

def test_smoothing_one_direction_after_the_other_is_smoothing():
    image, sigma = torch.rand(1, 1, 31, 31, generator=torch.Generator().manual_seed(5)), 31/24
    weight = torch.exp(-torch.arange(-2, 3.)**2/(2*sigma**2))
    weight = torch.outer(weight, weight)/weight.sum()**2
    expected = sum(weight[i, j]*image[0, 0, 13 + i, 13 + j] for i in range(5) for j in range(5)) # around the pixel (15, 15)
    assert abs(_smooth(image)[0, 0, 15, 15] - expected) < 1e-6

def test_what_is_hidden_is_filled_from_around_it():
    images, hidden = torch.full((2, 3, 12, 16), 7.), torch.zeros(2, 1, 12, 16).bool()
    hidden[0, :, 3:9, 4:12] = True
    images[0, :, 3:9, 4:12] = 99.
    assert torch.allclose(fill_hidden(images, hidden), torch.full((2, 3, 12, 16), 7.)) # nothing of what was there is left
    ramp = torch.arange(16.).expand(1, 1, 12, 16).clone()
    filled = fill_hidden(ramp, hidden[:1])
    assert torch.equal(filled[~hidden[:1]], ramp[~hidden[:1]]) # what is seen stays
    assert (filled - ramp)[0, 0, 3:9, [4, 11]].abs().max() < 2.5 and filled[0, 0, 5, 4] < 6 and filled[0, 0, 5, 11] > 9 # nearer to what is nearer
    assert (fill_hidden(ramp, torch.ones(1, 1, 12, 16).bool()) == 0).all() # nothing to fill it from

def test_what_is_laid_over_whatever_is_there():
    stack = torch.rand(60, 3, 24, 24, generator=torch.Generator().manual_seed(9))*.1 + blotches(60, side=24)
    natural = median_and_spread(stack)[1].mean()
    sticker, where = torch.tensor([1., .8, 0.])[:, None, None].expand(3, 24, 24), torch.zeros(24, 24).bool()
    where[9:15, 8:14] = True
    where[11:13, 10:12] = False # has a hole
    for opacity in (1., .6):
        found = torch.where(where, (1 - opacity)*stack + opacity*sticker, stack)
        middle, same, differs = _shared_pixels(found, natural)
        assert torch.equal(same, where) and differs < (1e-5 if opacity == 1 else .2)
        assert (middle - sticker)[:, where].abs().max() < (1e-5 if opacity == 1 else .4)
    beyond = found.clone()
    beyond[:10, :, :, 20:] = np.nan # the picture ends there
    assert torch.equal(_shared_pixels(beyond, natural)[1], where)
    beyond[:40, :, :12], beyond[40:, :, :12] = np.nan, stack[40:, :, :12]*.1 # what only a third of the pictures show is not said to be the same
    assert torch.equal(_shared_pixels(beyond, natural)[1], where & (torch.arange(24)[:, None] >= 12))
    assert _shared_pixels(stack, natural)[1:][1] == 1 and not _shared_pixels(stack, .1)[1].any() # nothing is the same
    alike = torch.where(where, sticker + .25*natural*torch.randn(stack.shape, generator=torch.Generator().manual_seed(6)), stack) # an object: the same but for what no opacity explains
    assert torch.equal(_shared_pixels(alike, natural)[1], where) and abs(_shared_pixels(alike, natural)[2] - .25*.6745) < .02 # the median of how far a normal number is from 0

def evidence_of_maps(images, places, size, n_positives):
    "The maps light the places (top, left) of the positives"
    n, maps = len(images), torch.zeros(len(images), 8, 8)
    for i, (top, left) in places.items(): maps[i, min((top + size//2)*8//images.shape[-2], 7), min((left + size//2)*8//images.shape[-1], 7)] = 1.
    features = torch.rand(n, 4, generator=torch.Generator().manual_seed(2))
    return Evidence(images, torch.rand(n, 2), torch.zeros(n, 2).bool(), torch.zeros(n, 2).bool(), maps, features), torch.arange(n_positives), torch.arange(n_positives, n)

@pytest.mark.parametrize('opacity', [1., .7])
def test_a_thin_thing_is_found_again_and_where(opacity):
    rng, ring = np.random.default_rng(0), torch.zeros(12, 12).bool()
    ring[1:11, 1:11] = True
    ring[3:9, 3:9] = False
    images, places = blotches(70), {i: tuple(int(v) for v in rng.integers(0, 53, 2)) for i in range(36)}
    for i, (top, left) in places.items():
        place = images[i, :, top:top+12, left:left+12]
        place[:, ring] = (1 - opacity)*place[:, ring] + opacity*torch.tensor([1., 0., 0.])[:, None]
    evidence, positives, negatives = evidence_of_maps(images, places, 12, 36)
    search, natural = PieceSearch(images), median_and_spread(images[:36])[1].mean()
    found = recurring_things(search, evidence, positives, negatives, 1/5, natural)
    assert found
    for match in found:
        assert len(match.items) >= 33 and len(match.items) == len(match.corners)
        offsets = Counter((top - places[i][0], left - places[i][1]) for i, (top, left) in zip(match.items, match.corners))
        [((down, right), n_right)] = offsets.most_common(1)
        assert n_right >= .8*len(match.items) # the same part of it, wherever it is; at the edge of a picture a piece may not fit
        high, wide = match.mask.shape
        expected = torch.nn.functional.pad(ring, (64,)*4)[64+down:64+down+high, 64+right:64+right+wide]
        assert (match.mask & ~expected).sum() == 0 and match.mask.sum() > .9*ring.sum() # all of it, of a piece too
        assert opacity < 1 or (match.crop - torch.tensor([1., 0., 0.])[:, None, None])[:, match.mask].abs().max() < 1e-6

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

def finding_of(candidate, low=.1, edit='mean'):
    "A finding of which nothing matters but these"
    return Finding(candidate, Measurement(edit, low, (low, low), 0., 1., (1., 1., 1.)), candidate.donors, low)

def test_of_the_same_evidence_the_plainest_is_reported():
    corner = corner_candidate(corner_reader(4.))
    few = corner._replace(donors=corner.donors[:5])
    ranked = [finding_of(corner, .3), finding_of(corner), finding_of(few, .9), finding_of(corner._replace(n_places=2), .9),
              finding_of(corner._replace(where='one place'), .9), finding_of(corner, .9, 'overlay')]
    assert sorted(ranked[::-1], key=lambda finding: finding.rank) == ranked and finding_of(corner, edit='pattern').rank[0]
    assert not finding_of(corner, edit='texture').rank[0] and ranked[0].low == .3

def test_of_evidence_the_strongest_counts_and_the_simplest_is_reported(monkeypatch):
    tester, places = corner_reader(4.), edge_places(8, 8)
    corner = corner_candidate(tester)
    everywhere = corner._replace(mask=torch.ones(8, 8).bool(), where='edges', n_places=5)
    thing = corner._replace(kind='thing', where='one place', mask=None)
    lows = {'top left corner': .1, 'edges': .4, 'one place': .2}
    monkeypatch.setattr(shortcuts_report_room, 'find_candidates', lambda *args: [thing, everywhere, corner])
    monkeypatch.setattr(tester, 'test', lambda candidate: finding_of(candidate, lows[candidate.where]))
    [found] = _findings(tester, {}, 0, corner.donors)
    assert found.candidate.where == 'top left corner' and found.low == .1 and found.strongest == .4

def test_what_is_only_alike_is_not_found_again():
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(3)
    images, places = blotches(50), {i: tuple(int(v) for v in rng.integers(0, 53, 2)) for i in range(20)}
    evidence, positives, negatives = evidence_of_maps(images, places, 12, 20)
    natural = median_and_spread(images[:20])[1].mean()
    assert recurring_things(PieceSearch(images), evidence, positives, negatives, 1/5, natural) == [] # nothing
    object_ = torch.rand(3, 12, 12, generator=generator)
    for i, (top, left) in places.items(): images[i, :, top:top+12, left:left+12] = object_ + .12*torch.randn(3, 12, 12, generator=generator)
    assert _most_common_pieces(PieceSearch(images).small, evidence, positives, negatives, 13, 0) # all have it
    assert recurring_things(PieceSearch(images), evidence, positives, negatives, 1/5, natural) == [] # but it is never the same

def test_pieces_that_lie_over_what_was_chosen_are_not_chosen_again():
    images = blotches(40, seed=7)
    places = {i: (8 + i % 3, 40) for i in range(20)}
    for i, (top, left) in places.items(): images[i, :, top:top+12, left:left+12] = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(8))
    evidence, positives, negatives = evidence_of_maps(images, places, 12, 20)
    chosen = _most_common_pieces(PieceSearch(images).small, evidence, positives, negatives, 8, 0)
    best = chosen[0]
    offset = lambda one: (one[1] - places[one[0]][0], one[2] - places[one[0]][1])
    assert all(max(abs(a - b) for a, b in zip(offset(one), offset(best))) > 8 for one in chosen[1:])

def test_a_thing_covers_what_of_it_is_in_the_picture():
    same = torch.tensor([[True, False], [True, True]])
    covers = thing_masks(same, [(0, 1), (-1, 3), (5, 0), (-3, 2)], (4, 4))
    assert covers.shape == (4, 1, 4, 4) and covers[0, 0].nonzero().tolist() == [[0, 1], [1, 1], [1, 2]]
    assert covers[1, 0].nonzero().tolist() == [[0, 3]] and not covers[2:].any()

def test_ways_to_put_something_elsewhere():
    images, donors, others = torch.zeros(2, 3, 8, 8), torch.ones(5, 3, 8, 8), torch.zeros(4, 3, 8, 8)
    mask = edge_places(8, 8)['top left corner']
    for edit in place_edits(mask).values():
        found = edit(images, donors, others, torch.Generator().manual_seed(0))
        assert (found[:, :, mask] == 1).all() and (found[:, :, ~mask] == 0).all()
    added = _add_difference(images, donors, others, None)
    assert (added[:, :, 0] == 1).all() and (added[:, :, 3:5, 3:5] == 0).all() # nothing where the objects are
    speck = torch.zeros(5, 3, 96, 96)
    speck[:, :, 2, 50] = 1.
    fine, blob = (_add_fine_difference(torch.zeros(2, 3, 96, 96), some, torch.zeros(4, 3, 96, 96), None) for some in (speck, torch.ones(5, 3, 96, 96)))
    assert (fine[:, :, 2, 50] > .95).all() and fine[:, :, 20:].abs().max() < 1e-6 and blob[:, :, :8, :8].abs().max() < .1
    stuck = paste_at_random(torch.full((3, 2, 2), 5.), torch.tensor([[True, True], [False, True]]))(images, None, None, torch.Generator().manual_seed(0))
    assert (stuck == 5).sum(dim=(1, 2, 3)).tolist() == [9, 9] and (images == 0).all() # three of its pixels, on a copy

def test_colours_are_moved_to_those_of_the_donors():
    generator = torch.Generator().manual_seed(0)
    others, images = torch.rand(6, 3, 8, 8, generator=generator), torch.rand(6, 3, 8, 8, generator=generator)
    donors = others*.5 + torch.tensor([.4, .2, 0.])[:, None, None]
    moved = match_colours(images, donors, others, None)
    assert torch.allclose(moved.std((2, 3)), images.std((2, 3))*.5, atol=1e-6)
    expected = images.mean((2, 3)) + (donors.mean((0, 2, 3)) - others.mean((0, 2, 3)))
    assert torch.allclose(moved.mean((2, 3)), expected, atol=1e-6)

def test_tiles_and_the_middle():
    corner = torch.arange(4.).view(1, 2, 2)
    assert tile_corner(corner, 4, 5)[0].tolist() == [[0, 1, 1, 0, 0], [2, 3, 3, 2, 2], [2, 3, 3, 2, 2], [0, 1, 1, 0, 0]]
    middle = _centre_weight(21, 21)
    assert middle[10, 10] == 1 and middle[0, 0] == 0 and middle[0, 20] == 0
    assert [tuple(c.shape) for c in corner_crops(torch.zeros(2, 3, 16, 24))] == [(2, 3, 4, 6)]*4

def test_few_pictures_prove_less():
    is_class = np.arange(288) % 6 == 0
    assert shrunken_auc(is_class, is_class + 0.) == 1 and abs(shrunken_auc(is_class, -(is_class + 0.))) < 1e-9 and shrunken_auc(is_class, np.ones(288)) == .5 # 48 of 288: chance is .046, less than .065
    few = np.arange(40) < 6
    assert abs(shrunken_auc(few, few + 0.) - (.5 + .5*.065/np.sqrt(41/(12*6*34)))) < 1e-9

def test_corners_without_the_object_come_first():
    images = torch.zeros(2, 1, 16, 16)
    for value, place in zip((1., 2., 3., 4.), (np.s_[:6, :6], np.s_[:6, 10:], np.s_[10:, :6], np.s_[10:, 10:])): images[(slice(None), 0, *place)] = value
    maps = torch.tensor([[[3., 2.], [-5., 0.]], [[0., 4.], [5., 1.]]]) # what speaks against the class is as good as nothing
    first, second = _least_salient_corners(images, maps)
    assert first.shape == (2, 1, 6, 6) and first.flatten(1).unique(dim=1).tolist() == [[4], [1]] and second.flatten(1).unique(dim=1).tolist() == [[3], [4]] # the top left one reaches further down than the top right one

def test_what_the_model_says_to_the_surroundings_alone():
    images = torch.zeros(2, 1, 16, 16)
    images[0, 0, :6, :6], images[1, 0, 10:, 10:] = .5, .25
    images[:, :, 6:10, 6:10] = 100. # the object: never seen
    maps = torch.tensor([[[0., 1.], [1., 1.]], [[1., 1.], [1., 0.]]])
    def predict(some):
        assert some.max() < 1
        p = some.mean((1, 2, 3))/2 + .25 # a corner of .5 gives 1/2, of .25 gives 3/8, of nothing 1/4
        return torch.stack([p, 1 - p], 1)
    odds = lambda p: np.log(p/(1 - p))
    found = surroundings_log_odds(images, maps, predict)
    assert np.allclose(found[:, 0], [(odds(.5) + odds(.25))/2, (odds(.375) + odds(.25))/2], atol=1e-5) and torch.allclose(found[:, 0], -found[:, 1], atol=1e-5)

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

def corner_reader(slope, n=24):
    "Pictures of class 0 have a bright corner; the log-odds of class 0 are `slope`·corner + 4·middle − 2, and its middle makes up for what the corner does not say"
    images = torch.zeros(n, 1, 8, 8)
    mine = torch.arange(n) < n//2
    images[mine, :, :2, :2] = 1.
    images[mine, :, 4, 4] = (4 - slope)/4
    def predict(some):
        p = (slope*some[:, 0, :2, :2].mean((1, 2)) + 4*some[:, 0, 4, 4] - 2).sigmoid()
        return torch.stack([p, 1 - p], 1)
    one_hot = torch.stack([mine, ~mine], 1)
    return EditTester(Evidence(images, predict(images), one_hot, one_hot, torch.zeros(n, 2, 2), torch.zeros(n, 3)), predict, 0)

def corner_candidate(tester, min_effect=.1):
    mask = edge_places(8, 8)['top left corner']
    mine = tester.evidence.predicted[:, 0].nonzero()[:, 0]
    return Candidate(0, 'place', 'top left corner', mine, mine, place_edits(mask), min_effect, mask)

def test_effects_are_shares_of_the_way():
    tester = corner_reader(4.)
    assert abs(tester.log_odds_gap(0) - 4) < 1e-5 # from -2 to 2
    found = tester.test(corner_candidate(tester))
    measured = found.measured
    assert all(abs(value - 1) < 1e-5 for value in (measured.effect, *measured.interval, *measured.removed))
    assert abs(measured.before - 1/(1 + np.exp(2))) < 1e-6 and abs(measured.after - 1/(1 + np.exp(-2))) < 1e-6

def test_it_must_go_as_far_as_is_asked():
    tester = corner_reader(1.) # a quarter of the way
    assert abs(tester.test(corner_candidate(tester, .2)).measured.effect - .25) < 1e-5
    assert tester.test(corner_candidate(tester, .3)) is None
    assert corner_reader(0.).test(corner_candidate(tester)) is None # the model does not look at it

def test_what_is_lost_is_measured_against_others_of_the_class():
    tester = corner_reader(4.)
    images, mine = tester.evidence.images.clone(), tester.evidence.predicted[:, 0]
    images[mine, :, 3, 3] = 1.
    def predict(some):
        p = (4*some[:, 0, :2, :2].mean((1, 2)) - 8*(some[:, 0, 3, 3] == 0).float() + 4*some[:, 0, 4, 4] - 2).sigmoid()
        return torch.stack([p, 1 - p], 1)
    tester = EditTester(Evidence(images, predict(images), *tester.evidence[2:]), predict, 0)
    whole = edge_places(8, 8)['top left corner'] | (torch.arange(64).view(8, 8) == 27) # and the place (3, 3)
    candidate = corner_candidate(tester)
    assert abs(tester.effect_of_removal(candidate._replace(edits=place_edits(whole), mask=whole), 'mean')[0] - 12/tester.log_odds_gap(0)) < 1e-4
    assert abs(tester.effect_of_removal(candidate, 'mean')[0] - 4/tester.log_odds_gap(0)) < 1e-4
    speckled = images + torch.rand(images.shape, generator=torch.Generator().manual_seed(0))*(torch.arange(8) > 5)
    unread = EditTester(Evidence(speckled, predict(speckled), *tester.evidence[2:]), predict, 0)
    right = edge_places(8, 8)['right edge']
    assert unread.effect_of_removal(candidate._replace(edits=place_edits(right), mask=right), 'mean') == (0., 0., 0.) # the model does not look there

def test_damage_is_no_loss():
    codes, mine = torch.linspace(0, 1, 24), torch.arange(24) < 12
    images = torch.zeros(24, 1, 8, 8)
    images[:, 0, :2, :2] = codes[torch.randperm(24, generator=torch.Generator().manual_seed(0))][:, None, None] # as of an object that reaches into the corner
    images[:, 0, 4, 4], images[:, 0, 5, 5] = images[:, 0, 0, 0], mine.float()
    def predict(some):
        p = (4*some[:, 0, 5, 5] - 2 - 8*(some[:, 0, 0, 0] != some[:, 0, 4, 4]).float()).sigmoid() # everything falls apart where the corner is not the picture's own
        return torch.stack([p, 1 - p], 1)
    one_hot = torch.stack([mine, ~mine], 1)
    tester = EditTester(Evidence(images, predict(images), one_hot, one_hot, torch.zeros(24, 2, 2), torch.zeros(24, 3)), predict, 0)
    lost, low, high = tester.effect_of_removal(corner_candidate(tester), 'mean')
    assert abs(lost) < .4 # of a way of 4; 8 are lost by the damage. Some get their own corner back by chance

def reader_of_a_thing():
    "A tester of a model that counts pixels of 1, and the suspect: four of them, in pictures of class 0"
    images, mine = torch.zeros(24, 1, 16, 16), torch.arange(24) < 12
    corners = [(3, 2 + k % 5) for k in range(12)]
    for image, (top, left) in zip(images, corners): image[0, top:top+2, left:left+2] = 1.
    def predict(some):
        p = (2*(some[:, 0] == 1).float().sum((1, 2)) - 4).sigmoid() # from -4 to 4
        return torch.stack([p, 1 - p], 1)
    one_hot, items = torch.stack([mine, ~mine], 1), list(range(12))
    tester = EditTester(Evidence(images, predict(images), one_hot, one_hot, torch.zeros(24, 2, 2), torch.zeros(24, 3)), predict, 0)
    match = Match(torch.ones(1, 2, 2), torch.ones(2, 2).bool(), torch.zeros(1, 2, 2), items, corners)
    return tester, Candidate(0, 'thing', 'different places', torch.tensor(items), torch.tensor(items), dict(piece=paste_at_random(match.crop, match.mask)), .1, match=match)

def test_a_thing_is_painted_over_and_as_much_elsewhere(monkeypatch):
    tester, candidate = reader_of_a_thing()
    here = candidate.match.corners
    monkeypatch.setattr(shortcuts_testing_room, 'random_corners', lambda images, size, generator: [(12, 12)]*6 + here[6:]) # half of them miss it, the others are painted over twice in the same place
    lost, low, high = tester.effect_of_removal(candidate, 'piece')
    assert abs(lost - .5) < 1e-5 and low < .5 < high # the whole way of the first half, nothing of the second

def test_a_thing_put_into_others(monkeypatch):
    tester, candidate = reader_of_a_thing()
    found = tester.test(candidate)
    assert abs(found.measured.effect - 1) < 1e-5 and abs(found.measured.after - 1/(1 + np.exp(-4))) < 1e-6
    beyond = candidate._replace(match=candidate.match._replace(corners=[(-1, 15), *candidate.match.corners[1:]]))
    shortcut = as_shortcut(tester, replace(found, candidate=beyond), 'ones', list)
    assert shortcut.boxes[0] == (15, 0, 16, 1) and shortcut.boxes[1] == (3, 3, 5, 5) # left, top, right, bottom; what of it is in the picture
    assert repr(shortcut).startswith('ones: one and the same small thing at different places, in 12 of 12 pictures')
    before, after = shortcut.pictures
    assert (before == 1).sum() == 0 and (after == 1).sum() == 4

def test_limits_are_fields_and_old_keys_say_so():
    assert LIMITS.place_auc == .6 and LIMITS.auc_effects[0] == (.68, .3)
    with pytest.raises(TypeError, match=r"LIMITS\['lit place'\] is called LIMITS.salient_effect now"): LIMITS['lit place']
    with pytest.raises(KeyError, match='nothing'): LIMITS['nothing']
    with pytest.raises(FrozenInstanceError): LIMITS.place_auc = .7
    with pytest.raises(ImportError, match='EFFECTS is called LIMITS now'): from fastai_cam.shortcuts import EFFECTS
    assert set(shortcuts_evidence_room._FIELD_OF.values()) <= set(vars(LIMITS))

def a_shortcut():
    measured = Measurement('own', .9, (.8, 1.), .1, .7, (.5, .4, .6))
    return Shortcut('cat', 'place', 'top edge', [3, 5], 4, 1, measured, torch.ones(4, 4).bool(), None, (1, 2))

def test_a_shortcut_has_what_was_measured_of_it():
    shortcut = a_shortcut()
    assert (shortcut.edit, shortcut.effect, shortcut.interval, shortcut.before, shortcut.after) == ('own', .9, (.8, 1.), .1, .7)
    assert shortcut.removed == (.5, .4, .6) and {'effect', 'removed', 'edit', 'sentence'} <= set(dir(shortcut))
    with pytest.raises(AttributeError, match='n_group of a Shortcut is called n_predicted now'): shortcut.n_group
    with pytest.raises(AttributeError, match='detail of a Shortcut is called edit now'): shortcut.detail
    assert not hasattr(shortcut, 'nothing')

def test_shortcuts_can_be_pickled_and_those_of_before_read():
    shortcut = a_shortcut()
    again = pickle.loads(pickle.dumps(shortcut))
    assert repr(again) == repr(shortcut) and again.measured == shortcut.measured and torch.equal(again.mask, shortcut.mask)
    flat = dict(cls='cat', kind='place', where='top edge', items=[3, 5], n_group=4, right=1, effect=.9, interval=(.8, 1.), before=.1, after=.7,
                removed=(.5, .4, .6), detail='own', mask=shortcut.mask, boxes=None, pictures=(1, 2))
    before = Shortcut.__new__(Shortcut)
    before.__setstate__({**flat, '__stored_args__': flat}) # as `store_attr` left it
    assert {**vars(before), 'mask': None} == {**vars(shortcut), 'mask': None} and repr(before) == repr(shortcut)

def test_the_better_it_tells_the_less_is_asked():
    assert np.allclose([LIMITS.min_effect(area) for area in (.6, .68, .7, .72, .82, .95)], [.3, .3, .18, .06, .045, .03])


# -- whole learners

KINDS = ('stripes', 'dots')

def picture(rng, kind, mark=None):
    "Stripes or dots of random colour, size and place on a blotchy ground: objects that differ from picture to picture"
    ground = np.asarray(Image.fromarray(rng.integers(60, 160, (5, 5, 3)).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)).astype(float)
    side, colour = int(rng.integers(16, 26)), rng.integers(0, 255, 3)
    rows, columns = np.indices((side, side))/side*rng.uniform(3, 5)
    inside = np.sin(2*np.pi*rows) > 0 if kind == 'stripes' else (np.sin(2*np.pi*rows) > .2) & (np.sin(2*np.pi*columns) > .2)
    top, left = rng.integers(0, 48 - side, 2)
    ground[top:top+side, left:left+side][inside] = colour
    if mark is not None and kind == 'dots' and rng.random() < .9: mark(ground, rng)
    return PILImage.create(ground.clip(0, 255).astype(np.uint8))

def corner_mark(ground, rng): ground[-8:-1, -12:-1] = (255, 220, 0)
def tint(ground, rng): ground *= (1., .6, .4)

def learner(mark=None, seed=0, n=320):
    rng = np.random.default_rng(seed)
    pictures = [picture(rng, KINDS[i % 2], mark) for i in range(n)]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: pictures[i], get_y=lambda i: KINDS[i % 2], splitter=IndexSplitter(range(n - 100, n)), batch_tfms=Normalize.from_stats([.4]*3, [.25]*3))
    dls = block.dataloaders(range(n), bs=32, num_workers=0)
    torch.manual_seed(seed)
    stage = lambda n_in, n_out: nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
    model = nn.Sequential(nn.Sequential(stage(3, 16), stage(16, 32), stage(32, 48)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 2)))
    learn = Learner(dls, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x = torch.cat([torch.Tensor(b[0]).as_subclass(torch.Tensor) for b in dls.train.new(shuffle=False, drop_last=False)])
    y = torch.cat([torch.Tensor(b[1]).as_subclass(torch.Tensor).long() for b in dls.train.new(shuffle=False, drop_last=False)])
    for _ in range(6):
        for some in torch.randperm(len(x)).split(32):
            loss = nn.functional.cross_entropy(model(x[some]), y[some])
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    optimizer.zero_grad()
    return learn

def interpretation(learn):
    with learn.no_bar(): return CAMInterpretation.from_learner(learn)

@pytest.fixture(scope='module')
def planted(): return interpretation(learner(corner_mark))

@pytest.fixture(scope='module')
def found(planted):
    with planted.learn.no_bar(): return planted.find_shortcuts()

def test_a_planted_corner_is_found(found, planted):
    assert {shortcut.kind for shortcut in found} == {'place'} # of two classes, one has it and the other lacks it: both may be reported
    assert {shortcut.where for shortcut in found} <= {'bottom right corner', 'bottom edge', 'right edge'}
    first = next(shortcut for shortcut in found if shortcut.cls == 'dots')
    assert first.after - first.before > .1 and first.effect > .2 and first.interval[0] <= first.effect <= first.interval[1] and first.removed[1] > .1
    marked = {i for i in range(100) if np.asarray(planted.learn.dls.valid_ds[i][0])[-4, -4].tolist() == [255, 220, 0]}
    assert len(marked & set(first.items)) > .8*len(first.items) # those that have it

def test_the_table_and_the_words_say_the_same(found):
    rows = found.table.to_dict('records')
    assert [row['class'] for row in rows] == [shortcut.cls for shortcut in found] and rows[0]['effect_low'] == max(row['effect_low'] for row in rows)
    row = rows[0]
    assert row['class'] == found[0].cls and row['items'] == len(found[0].items) and row['effect'] == found[0].effect and row['examples'] == found[0].items[:5]
    assert f'in {row["items"]} of {row["of"]} pictures' in repr(found) and found[0].where in found._repr_html_()

def test_the_figure_has_a_row_a_finding(found, tmp_path):
    fig = found.plot(n=2, save=tmp_path/'found.png')
    assert (tmp_path/'found.png').exists() and len(fig.axes) == len(found)*4
    without, with_it = (ax.images[0].get_array() for ax in fig.axes[2:4])
    assert not np.array_equal(without[-6:, -8:], with_it[-6:, -8:]) and np.abs(np.asarray(without[:20, :20], dtype=float) - np.asarray(with_it[:20, :20], dtype=float)).max() < 1e-3

def test_a_clean_learner_has_none(found, tmp_path):
    interp = interpretation(learner())
    with interp.learn.no_bar(): clean = interp.find_shortcuts()
    assert len(clean) == 0 and repr(clean).startswith('No shortcut was found (100 pictures of 2 classes') and len(clean.table) == 0 and list(clean.table)==list(found.table)
    assert clean.plot(save=tmp_path/'none.png').axes[0].texts[0].get_text() == repr(clean) and (tmp_path/'none.png').stat().st_size > 1000

def test_a_tint_is_found_in_the_surroundings():
    interp = interpretation(learner(tint, seed=1))
    with interp.learn.no_bar(): tinted = interp.find_shortcuts()
    assert 'dots' in {shortcut.cls for shortcut in tinted} and all(shortcut.kind == 'surroundings' and shortcut.edit == 'colours' and shortcut.after - shortcut.before > .5 for shortcut in tinted)

def test_the_same_again(found, planted):
    with planted.learn.no_bar(): again = planted.find_shortcuts()
    assert [(s.items, s.effect, s.removed) for s in again] == [(s.items, s.effect, s.removed) for s in found]

def test_the_learner_is_left_as_it_was(planted, monkeypatch):
    learn = planted.learn
    def state(): return ([module.training for module in learn.model.modules()], [p.requires_grad for p in learn.model.parameters()], [p.grad for p in learn.model.parameters()],
                         sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in learn.model.modules()), list(learn.cbs), torch.get_rng_state().tolist())
    def interrupt(*args): raise KeyboardInterrupt
    with learn.no_bar():
        before = state()
        planted.find_shortcuts(n=60)
        assert state() == before
        monkeypatch.setattr(shortcuts_report_room, 'find_candidates', interrupt)
        with pytest.raises(KeyboardInterrupt): planted.find_shortcuts(n=60)
        assert state() == before

@pytest.mark.parametrize('wrong, message', [(dict(n=3), 'too few'), (dict(min_items=2), 'too few'), (dict(method='gradcm'), 'gradcam'), (dict(layer='nowhere'), 'no layer named')])
def test_wrong_input_is_refused(planted, wrong, message):
    with pytest.raises(ValueError, match=message): planted.find_shortcuts(**wrong)

def test_too_few_pictures_are_said(planted):
    with planted.learn.no_bar(): nothing = planted.find_shortcuts(n=50, min_items=25)
    assert 'Nothing could be looked for' in repr(nothing)
    assert 'at least 25 pictures (min_items), beside as many others' in repr(nothing) and 'or lower min_items (to 6 at least)' in repr(nothing)
    assert sum(nothing.counts.values())==50 and all(f'{name} {n}' in repr(nothing) for name, n in nothing.counts.items())

@pytest.mark.parametrize('picked, min_items', [([0], 8), ([0, 1, 2], 8), ([0, 1, 2, 3], 6)])
def test_a_handful_of_pictures_is_too_few(planted, picked, min_items):
    "One or two of a class: what is there, what is needed, and what can be done"
    learn = planted.learn
    few = learn.dls.test_dl([learn.dls.valid_ds.items[i] for i in picked], with_labels=True)
    with learn.no_bar(): nothing = planted.find_shortcuts(few, min_items=min_items)
    assert len(nothing)==0 and sum(nothing.counts.values())==len(picked) and '\n' not in repr(nothing)
    assert f'at least {min_items} pictures' in repr(nothing) and 'larger set' in repr(nothing)
    assert ('min_items is as low as it can be' if min_items==6 else 'to 6 at least') in repr(nothing)
    assert len(nothing.table)==0 and nothing.plot().axes[0].texts[0].get_text()==repr(nothing)

def test_of_many_classes_the_largest_are_said():
    nothing = shortcuts_report_room.Shortcuts([], {}, counts={f'c{i}': i for i in range(100)}, min_items=200)
    assert 'c99 99, c98 98, c97 97, c96 96, c95 95, and 95 classes of fewer.' in repr(nothing)
    assert repr(shortcuts_report_room.Shortcuts([], {}))=='Nothing could be looked for: no class has enough pictures. Look over a larger set, or lower min_items (to 6 at least).'
