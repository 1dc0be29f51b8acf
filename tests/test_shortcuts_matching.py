"Pieces of pictures that come again: found where they are, against the naive formula."
from collections import Counter

import numpy as np
import pytest
import torch

from fastai_cam.shortcuts.matching import (
    _best_matches, _most_common_pieces, _shared_pixels, fill_hidden, median_and_spread, PieceSearch, recurring_things, thing_masks)

from helpers.shortcuts import blotches, evidence_of_maps


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
