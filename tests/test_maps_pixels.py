"Pixels of maps and pictures: one scale, slices, frames, and what is no number."
import numpy as np
import pytest
import torch
from PIL import Image

from fastai_cam.maps.draw import CAMMap
from fastai_cam.maps.pixels import normalize, to_pixels, to_slices

from helpers.maps import frames


# -- one map

def test_a_volume_has_one_scale():
    maps = torch.arange(8.).reshape(1, 2, 2, 2) - 2
    assert torch.equal(normalize(maps, n_space=3), maps.clamp(min=0)/5)
    assert torch.equal(normalize(maps, True, 3), maps/5)
    assert torch.equal(normalize(maps)[0, 0], torch.tensor([[0., 0.], [0., 1.]]))


# -- volumes

def test_volume_images_in_any_layout():
    volume = torch.arange(24., dtype=torch.float32).reshape(2, 3, 4)
    assert np.allclose(to_slices(volume), volume/23)
    assert np.allclose(to_slices(volume[None]), volume/23) and np.allclose(to_slices(volume.numpy()), volume/23)
    colour = torch.rand(3, 5, 6, 7)
    assert np.array_equal(to_slices(colour)[4], colour[:, 4].permute(1, 2, 0)) and np.array_equal(to_slices(colour.permute(1, 2, 3, 0).numpy()), to_slices(colour))
    assert to_slices((colour*255).byte()).dtype==np.uint8


# -- maps that are none

def test_pictures_with_values_that_are_no_numbers():
    picture = torch.tensor([[0., float('nan')], [2., float('inf')]])
    assert to_pixels(picture).tolist()==[[0., 0.], [1., 0.]] and to_pixels(picture*float('nan')).tolist()==[[0., 0.], [0., 0.]]


# -- frames

@pytest.mark.parametrize('depth, n, c, is_frames', [
    (8, 8, 3, True), (2, 8, 3, True), (3, 8, 3, False), (4, 4, 3, True), (3, 4, 3, False), (2, 2, 3, True), (3, 2, 3, False),
    (16, 16, 1, True), (1, 16, 1, True), (16, 16, 4, True), (4, 16, 4, False),
    (3, 3, 3, False), (2, 3, 4, False), (3, 3, 4, True),
])
def test_what_tells_frames_from_channels(depth, n, c, is_frames):
    "`[n, c, H, W]`: n frames, or c slices of n channels"
    assert len(to_slices(frames(n, c), depth))==(n if is_frames else c)


def test_frames_in_other_containers():
    stack = frames(5)
    expected = to_slices(stack)
    assert expected.shape==(5, 6, 5, 3) and np.array_equal(to_slices(stack.movedim(1, 0)), expected) and np.array_equal(to_slices(stack.numpy()), expected)
    assert np.array_equal(to_slices(stack.permute(0, 2, 3, 1).numpy()), expected) and np.array_equal(to_slices(list(stack)), expected)
    pictures = [Image.fromarray(np.uint8(frame.permute(1, 2, 0)*255)) for frame in stack]
    assert np.allclose(to_slices(pictures)/255, expected, atol=1/255)
    with pytest.raises(ValueError, match=r'a picture is \[C, H, W\] or \[H, W\], not \[5, 3, 6, 5\]'): CAMMap(torch.ones(2, 2), stack).show()
