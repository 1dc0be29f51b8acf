"What long checks cost: counted, said before they start, and not a word where the learner shows no bars."
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.vision.all import CategoryBlock, ImageBlock

from fastai_cam.all import CAMInterpretation, METRICS
from fastai_cam.trust.cost import in_words, n_passes_of, PassBar
from helpers.compare import learner_of


@pytest.fixture(scope='module')
def learn(): return learner_of(ImageBlock, CategoryBlock, get_y=lambda i: ('a', 'b', 'c')[i%3])


@pytest.mark.parametrize('metric, n', [('insertion', 21), ('deletion', 21), ('average_drop', 2), ('iou', 0), ('gini', 0), ('coherency', 1), ('adcc', 3)])
def test_the_passes_of_a_measure_are_counted(metric, n): assert n_passes_of(METRICS[metric])==n


def test_a_measure_of_ones_own_is_counted_and_one_that_fails_is_not():
    from fastai_cam.trust.rescore import as_metrics
    assert n_passes_of(as_metrics(partial(METRICS['insertion'], steps=4))[0])==5
    def fails(maps, rescore): raise RuntimeError
    fails.needs = ('rescore',)
    assert n_passes_of(fails)==0


def test_it_is_said_before_it_starts_and_how_long_it_takes(capsys):
    bar = PassBar(SimpleNamespace(cbs=[ProgressCallback()]), 1200, 'two methods', patience=0)
    assert capsys.readouterr().out.startswith('two methods: about 1,200 forward passes\n')
    scores = bar.watched(lambda images, items: images.sum(1))(torch.ones(8, 2), None)
    assert scores.tolist()==[2]*8 and bar.n_done==8 and 'to go' not in capsys.readouterr().out # the first passes are no measure
    bar.advance(300)
    assert 'a few seconds to go' in capsys.readouterr().out
    bar.advance(300)
    assert 'to go' not in capsys.readouterr().out # once
    bar.close()
    assert bar.n_done==1200


def test_a_stage_ends_where_it_should():
    bar, ends = PassBar(SimpleNamespace(cbs=[ProgressCallback()]), 300, ''), []
    for passes in bar.stages([10, 1000, 0]):
        bar.advance(passes)
        ends.append(bar.n_done)
    assert ends==[10, 200, 200] and bar.n_done==300


def test_times_as_one_says_them(): assert [in_words(seconds) for seconds in (1, 20, 89, 95, 3600, 7200)]==['a few seconds', 'about 20 seconds', 'about 90 seconds', 'about 2 minutes', 'about 60 minutes', 'about 2.0 hours']


CHECKS = dict(compare=lambda interp: interp.compare_cams(['gradcam', 'layercam'], n=4), trust=lambda interp: interp.cam_trust(n=2, n_random=2, steps=1),
              verdicts=lambda interp: interp.learn.cam_trust([0, 1], n_random=2, steps=1))


@pytest.mark.parametrize('check', CHECKS)
def test_checks_are_silent_where_no_bars_are_shown(learn, check, capsys):
    interp = CAMInterpretation.from_learner(learn)
    CHECKS[check](interp)
    assert capsys.readouterr().out==''


@pytest.mark.parametrize('check, says', [('compare', '6 methods × 2 measures on 4 pictures: about 1,008 forward passes'), ('trust', 'verdicts on 2 pictures: about 28 forward passes'),
                                         ('verdicts', 'verdicts on 2 pictures: about 28 forward passes')])
def test_checks_say_what_they_cost(learn, check, says, capsys):
    interp = CAMInterpretation.from_learner(learn)
    learn.add_cb(ProgressCallback())
    try:
        capsys.readouterr()
        CHECKS[check](interp)
        assert says in capsys.readouterr().out
    finally: learn.remove_cb(ProgressCallback)


def test_one_verdict_is_not_announced(learn, capsys):
    learn.add_cb(ProgressCallback())
    try: learn.cam_trust(0, n_random=2, steps=1)
    finally: learn.remove_cb(ProgressCallback)
    assert 'forward passes' not in capsys.readouterr().out
