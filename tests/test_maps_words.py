"Words from users are drawn as they are, in every figure: no formula, no markup, a font that has their letters."
import io
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Resize, get_image_files, resnet18, vision_learner

from fastai_cam.trust.sanity import SanityCheck
from fastai_cam.trust.compare import CAMTable
from fastai_cam.trust.verdict import CAMTrust
from fastai_cam.maps.draw import CAMMap
from fastai_cam.maps.cams import CAMs
from fastai_cam.maps.words import plain_html, plain_legend, plain_text, wrapped_title
from fastai_cam.shortcuts import Measurement, Shortcut, Shortcuts


# -- words from users

STRANGE = ['$0-$50', '$\\frac{$', 'a\\b_c^d $', '50% {x} %s', '_hidden', '猫と犬', 'قطة', '🐱', '\uf8ff']
EVERYTHING = '_<b>$1-$2 猫' # in one word, where figures take long


def check_drawn(fig, word, capfd):
    "Is `word` drawn, nowhere read as a formula, and nothing complained about?"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig.savefig(io.BytesIO(), dpi=20)
    holding = [text for text in fig.findobj(Text) if word in text.get_text() and text.get_visible()]
    assert holding and not any('$' in text.get_text() and text.get_parse_math() for text in holding) and not any(text.get_usetex() for text in holding)
    assert capfd.readouterr().err==''


@pytest.mark.parametrize('word', STRANGE)
def test_words_are_drawn_as_they_are(word, capfd):
    two = dict(vocab=[word, 'b'], preds=torch.tensor([[.9, .1]]), targs=torch.tensor([0]), classes=torch.tensor([0]))
    check_drawn(CAMMap(torch.ones(2, 2), title=word).show().figure, word, capfd)
    flat = CAMs(torch.ones(1, 2, 2), **two).show()
    assert flat[0].get_title()==f'predicted {word} 0.90\nactual {word}'
    check_drawn(flat[0].figure, word, capfd)


def test_words_are_drawn_as_they_are_in_every_title(capfd):
    word = EVERYTHING
    two = dict(vocab=[word, 'b'], preds=torch.tensor([[.9, .1]]), targs=torch.tensor([0]), classes=torch.tensor([0]))
    several = CAMs(torch.ones(2, 2, 2), labels=[word], vocab=[word, 'b'], preds=torch.eye(2), texts=[word, None], classes=torch.tensor([1, 0])).show(title=word)
    assert several[0].get_title()==f'{word}\npredicted {word} 1.00\n▸ b 0.00' and several[0].figure.get_suptitle()==word
    check_drawn(several[0].figure, word, capfd)
    columns = CAMs(torch.ones(1, 2, 2, 2), labels=[word, 'b'], vocab=[word, 'b'], preds=torch.tensor([[.9, .1]]), classes=torch.tensor([[0, -1]])).show()
    assert columns[0].get_title(loc='left')==f'predicted {word} 0.90\n▸ {word} 0.90'
    check_drawn(columns[0].figure, word, capfd)
    assert not columns[0].title.get_parse_math()
    check_drawn(CAMs(torch.ones(1, 2, 2, 2), n_space=3, **two).show()[0].figure, word, capfd)
    check_drawn(CAMs(torch.ones(1, 1, 2, 2), **{**two, 'classes': torch.tensor([[0]])})[0].show()[0].figure, word, capfd)


def test_words_are_drawn_as_they_are_in_every_figure(capfd):
    word = EVERYTHING
    maps = torch.rand(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    for how in ('cascading', 'independent'):
        check = SanityCheck({word: maps}, {word: 1.}, how)
        axs = check.plot()
        assert [text.get_text() for text in axs[-1].get_legend().get_texts()]==[word]
        check_drawn(axs[0].figure, word, capfd)
        check_drawn(check.show()[0].figure, word, capfd)
        assert check._repr_html_().count('mathjax_ignore')==1 and '<b>' not in check._repr_html_()
    columns = {'score_$a$': [1., 2.], 'score_$a$_low': [.5, 1.], 'score_$a$_high': [1.5, 3.]}
    table = CAMTable({'method': [word, 'gradcam'], 'layer': ['', ''], **columns})
    table.metrics = {'score_$a$': True}
    check_drawn(table.plot(), word, capfd)
    numbers = dict(score=.9, drop=.5, drop_elsewhere=.1, random_drops=[.1, .2], n_random=2, n_beaten=2, shown=.7, shown_elsewhere=.2, faithfulness=.4, places=[-1., 1.], average_place=.1, best_place=.3, placement=1.5, placement_low=.7,
                   placement_high=2.3, randomized_similarity=.1)
    trust = CAMTrust(CAMMap(torch.ones(2, 2), title=word), word, numbers, .2)
    check_drawn(trust.show(), word, capfd)
    assert 'mathjax_ignore' in trust._repr_html_() and '<b>' not in trust._repr_html_()
    measured = Measurement('mean', .9, (.8, 1.), .1, .9, (.5, .4, .6))
    found = Shortcut(word, 'place', 'top', [0], 3, 1, measured, torch.ones(8, 8) > 0, None, (torch.rand(3, 8, 8), torch.rand(3, 8, 8)))
    shortcuts = Shortcuts([found], {word: 3}, [torch.rand(3, 8, 8)], torch.rand(1, 4, 4))
    check_drawn(shortcuts.plot(n=1), word, capfd)
    assert 'mathjax_ignore' in shortcuts._repr_html_() and '<b>' not in shortcuts._repr_html_()


@pytest.mark.parametrize('name, drawn', [
    ('two\nlines\tand a tab', 'two lines and a tab'), ('', "''"), ('  ', "'  '"), (b'caf\xc3\xa9 $5', 'café $5'), (7, '7'), (2.5, '2.5'),
    (None, 'None'), (np.str_('np'), 'np'),
    ('nul\x00l', 'nul\ufffdl'), ('\udcff.png', '\ufffd.png'), ('\u202eabc', '\ufffdabc'), ('y'*300, 'y'*199 + '…'),
    ('Alien: Romulus', 'Alien: Romulus'),
])
def test_names_that_are_no_line_of_text(name, drawn):
    cams = CAMs(torch.ones(1, 1, 2, 2), vocab=[name, 'b'], preds=torch.tensor([[.75, .25]]), classes=torch.tensor([[0]]), labels=[str(name)])
    assert cams.item_title(0)==f'predicted {drawn} 0.75' and cams.question(0)==f'{drawn} 0.75'
    ax = cams.show()[0]
    short = drawn if len(drawn) < 69 else drawn[:67] + '…' # two lines of it
    assert ''.join(ax.get_title().split())==''.join(f'predicted{short}0.75'.split())
    ax.figure.savefig(io.BytesIO())


def test_letters_come_from_a_font_that_has_them():
    "Computer Modern has no Cyrillic; DejaVu, which comes with matplotlib, has; the font asked for comes first"
    text = plt.figure().text(0, 0, 'aж', fontfamily='cmr10')
    plain_text(text)
    assert text.get_fontfamily()[0]=='cmr10' and len(text.get_fontfamily())==2 and text.get_fontfamily()[1] != 'Last Resort High-Efficiency' and text.get_text()=='aж'
    ordinary = plt.figure().text(0, 0, 'ordinary ä')
    before = ordinary.get_fontfamily()
    plain_text(ordinary)
    assert ordinary.get_fontfamily()==before


def test_a_formula_that_is_written_later_is_one():
    ax = CAMMap(torch.ones(2, 2), title='cat').show()
    assert ax.set_title('$x^2$').get_parse_math()


def test_words_are_drawn_without_tex():
    with plt.rc_context({'text.usetex': True}): axs = CAMs(torch.ones(2, 2, 2), vocab=['a_b', '50%'], preds=torch.eye(2), targs=torch.arange(2)).show(title='a_b')
    assert not any(text.get_usetex() for text in [*(ax.title for ax in axs), axs[0].figure._suptitle])


def test_legends_have_every_name():
    lines = plt.plot([0, 1], [[0, 1, 2], [1, 2, 3]])
    assert [text.get_text() for text in plain_legend(plt.gca(), lines, ['_mine', '$a$', '']).get_texts()]==['_mine', '$a$', "''"]


def test_html_shows_text_as_it_is():
    assert plain_html('a < b & $c$\nd', '<table>')=='<div class="tex2jax_ignore mathjax_ignore"><p>a &lt; b &amp; $c$<br>d</p><table></div>'


# -- figures in files

def test_a_real_learner_with_strange_names(pictures, tmp_path, capfd):
    "From the data block to the file: nothing between them reads the names"
    names = {'left': '$0-$50', 'right': '_$50-$100 猫'}
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda f: names[f.parent.name], item_tfms=Resize(32))
    learn = vision_learner(block.dataloaders(pictures, bs=4, num_workers=0), resnet18, pretrained=False)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', category=UserWarning)
        learn.show_cam([0, 1], cls=list(names.values()), save=tmp_path/'$a$.png')
    titles = [ax.get_title(loc='left').split('▸ ')[1].rpartition(' ')[0] for ax in plt.gcf().axes]
    assert titles==list(names.values())*2 and (tmp_path/'$a$.png').stat().st_size > 5000 and 'lyph' not in capfd.readouterr().err
    learn.model[-1][-1].weight.data[0, 0] = float('nan') # of a unit that is off: the map knows nothing of it, the score does
    with pytest.warns(UserWarning, match='not finite'): learn.show_cam([0, 1])
    assert all('not finite' in ax.get_title() and len(ax.images)==1 for ax in plt.gcf().axes)


# -- titles beside one another

def test_words_are_wrapped_where_they_can_be():
    def lines(text): return wrapped_title(text, 12, 12)
    assert lines('short')==['short'] and lines('')==[] and lines('one two three four')==['one two', 'three four'] and lines('gradcam+tta+pca: x')==['gradcam+tta+', 'pca: x']
    assert lines('a'*30)==['a'*12, 'a'*12, 'a'*6] and ''.join(lines('ab:cd+ef'*5))=='ab:cd+ef'*5
