"What is kept of a pass: the same as running the set again, in one pass, and bounded."
import io
import pickle
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import classification_report
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import (BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataBlock, FuncSplitter, ImageBlock, MaskBlock, MSELossFlat, MultiCategoryBlock, PILMask, Resize, get_image_files,
                               resnet18, unet_learner, vision_learner)

from fastai_cam.all import CAMInterpretation, cam_head
from fastai_cam.interpret.answers import answers_of_batch
from fastai_cam.tasks import MultiLabel, SingleLabel


def learner(targets, n_out, loss, vocab=None, n=10, head=None):
    set_seed(4)
    samples = [(torch.rand(3, 16, 16), targets(i)) for i in range(n)]
    dls = DataLoaders(*[TfmdDL(samples, bs=4, num_workers=0) for _ in range(2)])
    dls.vocab = vocab
    return Learner(dls, head or nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), cam_head(8, n_out)), loss_func=loss)


class Passes:
    "Counts the items that go through a model"
    def __init__(self, model):
        self.n = 0
        model.register_forward_pre_hook(lambda module, xb: setattr(self, 'n', self.n + len(xb[0])))


def test_one_pass_for_all_that_is_asked():
    learn = learner(lambda i: i%3, 3, CrossEntropyLossFlat(), ['a', 'b', 'c'])
    passes = Passes(learn.model)
    with learn.no_bar(), redirect_stdout(io.StringIO()):
        interp = CAMInterpretation.from_learner(learn)
        assert passes.n==10
        matrix = interp.confusion_matrix()
        interp.most_confused(); interp.plot_confusion_matrix(); interp.print_classification_report(); interp.to_df(); interp.select('wrong'); interp.select('loss > 0', cls='a')
        assert passes.n==10
        interp.plot_top_losses_cam(2, where='wrong', show='diff', method='gradcam')
        assert passes.n==10 + 2 + 1 # the items that are shown, and what finds the layer once
        matrix[0, 0] = 99
    assert interp.confusion_matrix()[0, 0] != 99 and interp.confusion_matrix().sum()==10


def test_report_is_that_of_the_items(capsys):
    learn = learner(lambda i: i%3, 3, CrossEntropyLossFlat(), ['a', 'b', 'c'])
    with learn.no_bar():
        interp, (preds, targs) = CAMInterpretation.from_learner(learn), learn.get_preds()
    capsys.readouterr()
    interp.print_classification_report()
    assert capsys.readouterr().out.strip()==classification_report(targs, preds.argmax(1), labels=[0, 1, 2], target_names=['a', 'b', 'c']).strip()


def test_what_was_answered_stays_when_training_goes_on():
    learn = learner(lambda i: i%2, 2, CrossEntropyLossFlat(), ['a', 'b'])
    with learn.no_bar():
        interp = CAMInterpretation.from_learner(learn)
        before = interp.confusion_matrix()
        with torch.no_grad(): learn.model[-1][-1].weight.mul_(-5)
        assert (interp.confusion_matrix()==before).all()
        assert (pickle.loads(pickle.dumps(interp)).confusion_matrix()==before).all()


def test_an_interpretation_of_an_earlier_version_asks_when_it_has_to():
    learn = learner(lambda i: i%2, 2, CrossEntropyLossFlat(), ['a', 'b'])
    passes = Passes(learn.model)
    with learn.no_bar():
        interp = CAMInterpretation.from_learner(learn)
        by_hand = CAMInterpretation(learn, interp.dl, interp.losses)
        assert (by_hand.confusion_matrix()==interp.confusion_matrix()).all() and passes.n==20
        by_hand.confusion_matrix()
    assert passes.n==20


def test_labels():
    learn = learner(lambda i: torch.tensor([1., float(i%2), 0.]), 3, BCEWithLogitsLossFlat(), ['a', 'b', 'c'])
    with learn.no_bar(): interp, (preds, targs) = CAMInterpretation.from_learner(learn), learn.get_preds()
    found = interp.answers
    assert torch.equal(found.predicted, preds >= .5) and torch.equal(found.actual, targs > .5) and torch.allclose(found.probability, preds, atol=1e-6)
    with pytest.raises(ValueError, match='does not put its items into one class each'): interp.confusion_matrix()


def test_masks_are_counted_and_let_go():
    "Pixels are counted as the confusion of all of them together says; what is kept does not grow with the pictures"
    logits, y = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0)), torch.randint(0, 4, (3, 6, 6), generator=torch.Generator().manual_seed(1))
    y[0, 0] = 255
    found = answers_of_batch(SingleLabel(list('abcd')), logits, y)
    predicted, expected = logits.argmax(1), np.zeros((4, 4), dtype=int)
    for p, t in zip(predicted.flatten().tolist(), y.flatten().tolist()):
        if t < 4: expected[t, p] += 1
    assert found['counts'][0].tolist()==expected.tolist() and sum(one.numel() for one in found.values()) < 70
    for i in range(3):
        known = y[i] < 4
        assert found['share_right'][i]==(predicted[i]==y[i])[known].float().mean()
        assert found['predicted'][i].nonzero().flatten().tolist()==predicted[i].unique().tolist()
        assert found['actual'][i].nonzero().flatten().tolist()==y[i][known].unique().tolist()
    assert found['largest_predicted'].tolist()==[row.flatten().bincount().argmax() for row in predicted]


def test_a_network_that_draws():
    learn = learner(lambda i: (torch.arange(256).reshape(16, 16)%2), 2, CrossEntropyLossFlat(axis=1), ['none', 'thing'], n=6, head=nn.Conv2d(3, 2, 3, padding=1))
    with learn.no_bar():
        interp = CAMInterpretation.from_learner(learn)
        preds, targs = learn.get_preds()
    matrix = interp.confusion_matrix()
    assert matrix.sum()==6*256 and matrix.tolist()==[[int(((targs==i) & (preds.argmax(1)==j)).sum()) for j in (0, 1)] for i in (0, 1)]
    df = interp.to_df()
    assert np.allclose(df.share_right, [float((p.argmax(0)==t).float().mean()) for p, t in zip(preds, targs)])


@pytest.mark.parametrize('model, message', [(lambda x: (x.mean((2, 3)), x), 'say which part is meant')])
def test_an_output_that_nothing_is_known_of(model, message):
    class Several(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
        def forward(self, x): return model(x*self.w)
    learn = learner(lambda i: i%3, 3, lambda out, y, reduction='mean': F.cross_entropy(out[0], y, reduction=reduction), list('abc'), head=Several())
    with learn.no_bar(): interp = CAMInterpretation.from_learner(learn)
    assert list(interp.to_df())==['index', 'item', 'loss'] and len(interp.select('loss > 0'))==10
    for _ in range(2):
        with pytest.raises(ValueError, match=message): interp.confusion_matrix()


def test_an_activation_of_the_loss_function():
    "The probability is the one in the titles"
    class Cold(CrossEntropyLossFlat):
        def activation(self, out): return F.softmax(out/10, dim=-1)
    learn = learner(lambda i: i%3, 3, Cold(), list('abc'))
    with learn.no_bar(): interp, (preds, _) = CAMInterpretation.from_learner(learn), learn.get_preds()
    assert np.allclose(interp.to_df().probability, preds.amax(1), atol=1e-6)


def test_thresholds_of_labels():
    out, y = torch.tensor([[0., 2., -2.]]), torch.tensor([[0., 1., 0.]])
    assert answers_of_batch(MultiLabel(list('abc'), thresh=.7), out, y)['predicted'].tolist()==[[False, True, False]]
    assert answers_of_batch(MultiLabel(list('abc'), thresh=.1), out, y)['predicted'].tolist()==[[True, True, True]]


def test_fastais_own_learners(dls, tmp_path):
    with vision_learner(dls, resnet18, pretrained=False).no_bar() as learn:
        interp, (preds, targs) = CAMInterpretation.from_learner(learn), learn.get_preds()
        assert torch.equal(interp.answers.predicted, preds.argmax(1)) and torch.equal(interp.answers.actual, targs)
        assert np.allclose(interp.to_df().label_probability, preds.gather(1, targs[:, None])[:, 0], atol=1e-6)
