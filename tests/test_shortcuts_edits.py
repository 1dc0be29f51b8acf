"Edits of a picture by hand: places, fillings, colours of others."
import torch

from fastai_cam.shortcuts.edits import (
    _add_difference, _add_fine_difference, _centre_weight, _smooth, corner_crops, edge_places, match_colours, place_edits, tile_corner)
from fastai_cam.shortcuts.matching import paste_at_random


def test_places_are_where_their_names_say():
    places = edge_places(24, 48)
    assert {name: int(mask.sum()) for name, mask in places.items()} == {
        'top left corner': 72, 'top right corner': 72, 'bottom left corner': 72, 'bottom right corner': 72,
        'top edge': 4*48, 'bottom edge': 4*48, 'left edge': 24*8, 'right edge': 24*8, 'border': 24*48 - 20*40}
    assert places['top right corner'][:6, 36:].all() and places['bottom left corner'][18:, :12].all()
    assert places['right edge'][:, 40:].all() and places['bottom edge'][20:].all()


def test_smoothing_one_direction_after_the_other_is_smoothing():
    image, sigma = torch.rand(1, 1, 31, 31, generator=torch.Generator().manual_seed(5)), 31/24
    weight = torch.exp(-torch.arange(-2, 3.)**2/(2*sigma**2))
    weight = torch.outer(weight, weight)/weight.sum()**2
    expected = sum(weight[i, j]*image[0, 0, 13 + i, 13 + j] for i in range(5) for j in range(5)) # around the pixel (15, 15)
    assert abs(_smooth(image)[0, 0, 15, 15] - expected) < 1e-6


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
