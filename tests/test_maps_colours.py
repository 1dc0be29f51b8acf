"Colours that can be told from the picture's."
import numpy as np
import pytest
import torch
from matplotlib import colormaps

from fastai_cam.maps.cams import CAMs
from fastai_cam.maps.colours import HEAT, alike, heat_colours, veil
from fastai_cam.maps.draw import CAMMap


def plain(*rgb): return np.broadcast_to(np.array(rgb, dtype=np.float32), (40, 50, 3))


ORANGE, LEAF, SKY, SKIN = plain(.9, .45, .1), plain(.2, .5, .25), plain(.4, .6, .9), plain(.85, .6, .45)


def test_orange_objects_are_not_under_orange_heat():
    assert [heat_colours([picture]) for picture in (ORANGE, plain(.75, .3, .15), LEAF, SKY, plain(.5, .5, .5), plain(0, 0, 0))]==['viridis', 'viridis', 'inferno', 'inferno', 'inferno', 'inferno']
    half = ORANGE.copy()
    half[:, 25:] = LEAF[0, 0]
    assert alike(half, 'inferno')==.5 and heat_colours([(half*255).astype(np.uint8)])==heat_colours([half])
    def colours(picture, **kwargs): return CAMMap(torch.ones(2, 2), picture).show(**kwargs).images[-1].get_cmap().name
    assert (colours(ORANGE), colours(LEAF), colours(ORANGE, signed=True), colours(ORANGE, cmap='jet'))==('viridis', 'inferno', 'RdBu_r', 'jet')


def test_a_figure_has_one_colour_map():
    cams = CAMs(torch.ones(3, 2, 2), [ORANGE, ORANGE, LEAF])
    assert {ax.images[-1].get_cmap().name for ax in cams.show()}=={'viridis'} and cams[2:].show()[0].images[-1].get_cmap().name=='inferno'


@pytest.mark.parametrize('name', HEAT)
def test_colours_are_uniform_to_the_eye(name):
    "Lightness rises evenly, so that the maps can be read in grey, and by everybody"
    rgb = colormaps[name](np.linspace(0, 1, 20))[:, :3]
    linear = np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4) @ [.2126, .7152, .0722]
    lightness = 116*np.cbrt(np.clip(linear, .008856, None)) - 16
    assert (np.diff(lightness[2:]) > 2).all() and np.ptp(lightness) > 70


def test_a_veil_hides_what_nothing_speaks_for():
    assert veil()(0.)==(0, 0, 0, .9) and veil()(1.)[3]==0 and veil(True)(.5)[3] > .89 and veil(True)(0.)[3]==veil(True)(1.)[3]==0
    assert veil(picture=plain(.1, .1, .1))(0.)==(1, 1, 1, .9) and veil(picture=(LEAF*255).astype(np.uint8))(0.)==(0, 0, 0, .9)
