"What can be asked of a picture: every word that is not known is refused before any work, with the right one where it is near."
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

import fastai_cam.learner # adds show_cam to Learner
from fastai_cam.interpret import CAMInterpretation
from fastai_cam.maps.style import SCALES, STYLES, check_style


@pytest.mark.parametrize('kwargs, message', [
    (dict(style='blend'), "style is 'overlay', 'heat'"), (dict(style=None), 'style is'), (dict(scale='own scale'), "scale is 'item'"), (dict(contour=1.5), 'contour is a share'), (dict(contour=[.5, -1]), 'contour is a share'),
    (dict(dpi=0), 'dpi is a number'), (dict(dpi='high'), 'dpi is a number'), (dict(photo='left'), 'photo is True or False'), (dict(colorbar=.1), 'colorbar is True or False'), (dict(text='none'), 'text is True or False'),
])
def test_what_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message): check_style(**kwargs)


def test_what_makes_sense_is_not():
    for style in STYLES: check_style(style=style)
    for scale in SCALES: check_style(scale=scale)
    check_style(contour=True, photo=None, colorbar=False, text=None, dpi=72.5)
    check_style(contour=(.2, .8), photo=True)


@pytest.mark.parametrize('word, right', [('threshold', 'boxes'), ('original', 'photo'), ('colormap', 'cmap'), ('color_bar', 'colorbar'), ('mode', 'style'), ('contours', 'contour'), ('scales', 'scale')])
def test_words_of_others_lead_to_the_right_one(dls, word, right):
    with pytest.raises(TypeError, match=f'did you mean {right}\\?'): check_style(**{word: 1})
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))), loss_func=CrossEntropyLossFlat())
    interp = CAMInterpretation.from_learner(learn)
    learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    for call in (learn.show_cam, lambda **kwargs: interp.plot_top_losses_cam(2, **kwargs)):
        with pytest.raises(TypeError, match=f'did you mean {right}\\?'): call(**{word: 1})
        with pytest.raises(ValueError, match='style is'): call(style='blend')
        with pytest.raises(ValueError, match='scale is'): call(scale='blend')


def test_a_learner_hands_on_what_is_asked_of_the_picture(dls):
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))), loss_func=CrossEntropyLossFlat())
    learn.show_cam(0)
    assert [len(ax.images) for ax in plt.gcf().axes[:2]]==[1, 2]
    learn.show_cam(0, photo=False, style='heat', scale='own', colorbar=False)
    assert [len(ax.images) for ax in plt.gcf().axes]==[1]
    CAMInterpretation.from_learner(learn).plot_top_losses_cam(2, show='both', photo=True, style='contour')
    assert all(len(ax.images) <= 1 for ax in plt.gcf().axes) and len(plt.gcf().axes)==6
