"`interp.cam_trust`: shares and their intervals, the order, and which items the verdicts are about."
import numpy as np
import pytest
import torch
from fastai.vision.all import CategoryBlock, ImageBlock
from scipy.stats import binomtest

from fastai_cam.all import CAMInterpretation, CAMMap
from fastai_cam.trust.survey import share_interval, TrustSurvey
from fastai_cam.trust.verdict import CAMTrust
from test_learner import learner_state, same
from helpers.compare import learner_of


def trust_of(placement, low, label='cat', similarity=.1):
    numbers = dict(score=.9, drop=.5, drop_elsewhere=.1, random_drops=[.1]*9, n_random=9, n_beaten=9, shown=.8, shown_elsewhere=.3, faithfulness=.3, places=[0.]*9,
                   average_place=0., best_place=.2, placement=placement, placement_low=low, placement_high=2*placement - low, randomized_similarity=similarity)
    return CAMTrust(CAMMap(torch.ones(2, 2), torch.rand(3, 8, 8)), label, numbers, .3)


@pytest.fixture
def survey(): return TrustSurvey([trust_of(.1, -.2, 'a'), trust_of(1., .6, 'b'), trust_of(.5, .1, 'c'), trust_of(1.4, .9, 'd'), trust_of(3., 2., 'e', .9)], [0, 5, 10, 15, 20], list('vwxyz'), 21)


@pytest.fixture(scope='module')
def interp(): return CAMInterpretation.from_learner(learner_of(ImageBlock, CategoryBlock, get_y=lambda i: ('a', 'b', 'c')[i%3]))


@pytest.mark.parametrize('n_found, n', [(0, 8), (3, 8), (8, 8), (150, 200)])
def test_the_interval_of_a_share_is_wilsons(n_found, n):
    theirs = binomtest(n_found, n).proportion_ci(method='wilson')
    assert share_interval(n_found, n)==pytest.approx((n_found/n, theirs.low, theirs.high), abs=1e-6)


def test_what_is_farther_out_than_is_drawn_is_marked(survey):
    import matplotlib.pyplot as plt
    ax = survey.plot().axes[0]
    marked = {line.get_marker(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines if line.get_marker() in '^v' and len(line.get_xdata())}
    plt.close('all')
    assert marked=={'^': ([2], [2.5])}, 'the item that is placed at 3'


def test_the_most_believable_come_first(survey):
    assert [trust.label for trust in survey]==['d', 'b', 'e', 'c', 'a'] and survey.counts=={'believed': 2, 'with care': 2, 'not': 1}
    table = survey.table
    assert list(table['index'])==[15, 5, 20, 10, 0] and list(table['item'])==['y', 'w', 'z', 'x', 'v'] and list(table['explains'])==['d', 'b', 'e', 'c', 'a'] and 'label' not in table and list(table['verdict'])==['believed']*2 + ['with care']*2 + ['not']
    assert table['hidden'].tolist()==[pytest.approx(.4)]*5 and table['placement'].tolist()==[1.4, 1., 3., .5, .1]
    assert len(survey)==5 and survey[0].label=='d' and survey.share==share_interval(2, 5)
    assert survey.verdict=='The maps of 2 of 5 pictures, taken from 21, can be believed: 40% (95% interval 12% to 77%). With care: 2; not at all: 1.'
    assert repr(survey).startswith(survey.verdict) and 'believed' in survey._repr_html_()


def test_the_figure_of_a_survey(survey, tmp_path):
    fig = survey.plot(n=3, save=tmp_path/'survey.png')
    order, *shown = fig.axes
    assert [ax.get_title() for ax in shown]==['d: believed', 'e: with care', 'a: not'] and (tmp_path/'survey.png').stat().st_size > 5000
    assert [text.get_text() for text in order.get_legend().get_texts()]==['believed: 2', 'with care: 2', 'not: 1']
    points = {line.get_color(): line.get_ydata().tolist() for line in order.get_lines() if line.get_marker()=='o'}
    assert points=={'C2': [1.4, 1.], 'C1': [2.5, .5], 'C3': [.1]} # what is far out stands at the edge


def test_verdicts_are_those_of_the_items_alone(interp):
    before = learner_state(interp.learn)
    survey = interp.cam_trust(n=3, n_random=2, steps=1, method='gradcam')
    assert survey.to_df().equals(survey.table) and survey.table.label.tolist()==[('a', 'b', 'c')[item%3] for item in survey.items] and survey.table.explains.tolist()==[trust.label for trust in survey]
    assert sorted(survey.indices)==[0, 3, 6] and same(before, learner_state(interp.learn)) and len(survey.table)==3
    for index, trust in zip(survey.indices, survey):
        alone = interp.learn.cam_trust(index, n_random=2, steps=1, method='gradcam').numbers
        assert trust.numbers['score']==pytest.approx(alone['score'], abs=1e-5) and trust.numbers['faithfulness']==pytest.approx(alone['faithfulness'], abs=1e-4)
    assert np.isfinite(survey.share).all()


@pytest.mark.parametrize('options, error, says', [
    (dict(n=0), ValueError, 'n=0'), (dict(n='4'), ValueError, "n is a whole number, not the text '4'"), (dict(method=['gradcam', 'cam']), TypeError, 'about one method'), (dict(share=2), ValueError, 'share is a part'), (dict(cls=['a', 'b']), ValueError, 'one question at a time'),
    (dict(target=1), TypeError, "it is called 'cls'"), (dict(nonsense=1), TypeError, 'the arguments are')])
def test_wrong_input_is_refused(interp, options, error, says):
    with pytest.raises(error, match=says): interp.cam_trust(**options)


def test_the_method_of_the_interpretation_is_asked():
    learn = learner_of(ImageBlock, CategoryBlock, get_y=lambda i: ('a', 'b', 'c')[i%3])
    asked = []
    def mine(cap, scores):
        asked.append(len(cap))
        return torch.rand(*scores.shape, 4, 4)
    CAMInterpretation.from_learner(learn, method=mine).cam_trust(n=1, n_random=2, steps=1)
    assert asked==[1]*(1 + 2*3) # the map, and for each of three copies its own once more


def test_of_the_items_that_are_meant(interp):
    survey = interp.cam_trust(2, where=[1, 4, 6], n_random=2, steps=1)
    assert sorted(survey.indices)==[1, 6] and 'of 2 pictures, taken from 3,' in survey.verdict
