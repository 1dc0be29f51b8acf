"A page: what stands where, on which scale, and what it cannot have."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from fastai_cam.all import CAMMap
from fastai_cam.interpret.page import check_page, Drawn, draw_page, full_of, Panel, percent, Row

PHOTO = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))


def rows(*peaks):
    maps = [CAMMap(torch.tensor([[0., 2], [-4, 1]]), PHOTO, peak=peak) for peak in peaks]
    return [Row([Panel(image=PHOTO, title='photo'), *[Panel(one, title=f'map {i}\nbelow') for i, one in enumerate(maps)]], 'over the row')]


def test_titles_stand_in_lines():
    "What is said over the row stands above all, and the last line of each panel over its picture"
    axs = draw_page(rows(None, None), {})
    assert [ax.get_title(loc='left') for ax in axs]==['over the row\n\nphoto', '\nmap 0\nbelow', '\nmap 1\nbelow']
    assert isinstance(axs, Drawn) and axs[0].images[0].get_array().shape==(20, 30, 3)


def test_scales():
    axs = draw_page(rows(None, 4., 8.), dict(style='heat', interpolation='nearest'))
    assert [np.asarray(ax.images[-1].get_array()).tolist() for ax in axs[1:]]==[[[0, 1], [0, .5]], [[0, .5], [0, .25]], [[0, .25], [0, .125]]]
    maps = [panel.map for panel in rows(None)[0].panels[1:]]
    assert (full_of(*maps), full_of(*maps, signed=True), full_of()) == (2, 4, 0)


def test_a_signed_map_among_others():
    page = rows(4.)
    page[0].panels.append(Panel(page[0].panels[1].map, signed=True, bar='what it means'))
    axs = draw_page(page, dict(style='heat', interpolation='nearest', cmap='gray'))
    assert np.asarray(axs[2].images[-1].get_array()).tolist()==[[0, .5], [-1, .25]]
    assert (axs[1].images[-1].get_cmap().name, axs[2].images[-1].get_cmap().name)==('gray', 'RdBu_r')
    bar, = [ax for ax in axs[0].figure.axes if ax not in axs]
    assert bar.get_ylabel()=='what it means' and [text.get_text() for text in bar.get_yticklabels()]==['-4', '0', '4']


def test_words_and_blank_places():
    axs = draw_page([Row([Panel(words='nothing'), Panel()]), Row([Panel(image=PHOTO)])], {}, 'a legend', 'a title')
    assert len(axs)==3 and [text.get_text() for text in axs[0].texts]==['nothing'] and not axs[1].images and not axs[1].texts
    figure = axs[0].figure
    assert (figure._suptitle.get_text(), figure._supxlabel.get_text())==('a title', 'a legend') and not figure.axes[3].axison
    assert draw_page([Row([Panel(image=PHOTO)])], dict(title='mine'), title='a title')[0].figure._suptitle.get_text()=='mine'


def test_options(tmp_path):
    own = plt.subplots(1, 4)[1]
    assert draw_page(rows(None), dict(ax=own, save=tmp_path/'page.svg'))==own[:2].tolist() and 'over the row' in (tmp_path/'page.svg').read_text()
    assert draw_page(rows(None), dict(figsize=(5, 3)))[0].figure.get_size_inches().tolist()==[5, 3]
    marked = draw_page(rows(None), dict(boxes=.5, peaks=True))
    assert marked[1].patches and marked[1].collections
    for options, error, message in ((dict(max_n=3), TypeError, "'max_n' is no option of this view: the options are alpha, ax, boxes"), (dict(style='side'), ValueError, 'leave it out'), (dict(cmap='none'), ValueError, 'not known'),
                                    (dict(save='/nowhere/x.png'), ValueError, 'folder that exists')):
        with pytest.raises(error, match=message) as caught: check_page(options)
        assert '\n' not in str(caught.value)


def test_shares_in_words(): assert [percent(share) for share in (0, .005, .0449, .999, 1.5, -.25)]==['0%', '0.5%', '4.5%', '100%', '150%', '-25%']
