"The parts of a class: what was put together is taken apart again, and shares add up to the logit."
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import MSELossFlat, resnet18, vision_learner

from fastai_cam.all import CAMInterpretation, cam_head
from fastai_cam.interpret import CAMConcepts
from fastai_cam.interpret.concepts import factorise


def interpreted(targets=lambda i: i%2, n_out=2, loss=None, vocab=('cat', 'dog'), body=None):
    set_seed(1)
    samples = [(torch.rand(3, 12, 12), targets(i)) for i in range(10)]
    dls = DataLoaders(*[TfmdDL(samples, bs=4, num_workers=0) for _ in range(2)])
    dls.vocab = list(vocab)
    learn = Learner(dls, nn.Sequential(body or nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), cam_head(8, n_out)), loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return CAMInterpretation.from_learner(learn)


@pytest.fixture(scope='module')
def interp(): return interpreted()


@pytest.mark.parametrize('body', [None, nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh())])
@pytest.mark.parametrize('k', [1, 3])
def test_shares_add_up_to_the_logit(body, k):
    "Whatever the factorisation leaves over, and though half of the activations are negative"
    interp = interpreted(body=body)
    found, model = interp.concepts('dog', k=k), interp.learn.model.eval()
    x = torch.stack([interp.dl.dataset[i][0] for i in found.index])
    linear = model[1][-1]
    logits = model(x)[:, 1].detach() - (0 if linear.bias is None else linear.bias[1].item())
    assert torch.allclose(found.contributions.sum(1) + found.rest, logits, atol=1e-4) and torch.allclose(found.evidence, logits, atol=1e-4)
    assert np.isclose(found.shares.sum().item() + found.rest_share, 1, atol=1e-4)
    acts, weight = model[0](x).detach(), linear.weight[1].detach()
    by_hand = found.maps.flatten(2).mean(-1)*(found.directions @ weight)
    assert torch.allclose(found.contributions, by_hand, atol=1e-4) and found.index==[1, 3, 5, 7, 9] and found.maps.shape==(5, k, 10, 10)
    assert (found.maps >= 0).all() and (found.directions >= 0).all() and torch.allclose(found.directions.norm(dim=1), torch.ones(k), atol=1e-4)
    assert found.shares.tolist()==sorted(found.shares.tolist(), reverse=found.evidence.sum().item() > 0)
    if k==3: assert (torch.einsum('nkhw,kc->nchw', found.maps, found.directions) - acts.clamp(min=0)).norm() < .5*acts.clamp(min=0).norm()


def test_planted_concepts():
    amounts, directions = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[1., 0, 0, 0], [0, .6, .8, 0]])
    amounts[:, 0, :2], amounts[:, 1, 2:] = 0, 0 # each in a half of its own
    maps, parts = factorise(torch.einsum('nkhw,kc->nchw', amounts, directions), 2)
    order = [int((parts @ one).argmax()) for one in directions]
    assert sorted(order)==[0, 1] and torch.allclose(parts[order], directions, atol=.02) and torch.allclose(maps[:, order], amounts, atol=.02)
    again = factorise(torch.einsum('nkhw,kc->nchw', amounts, directions), 2)
    assert torch.equal(again[0], maps)
    with pytest.raises(ValueError, match='the layer is silent on these pictures'): factorise(torch.zeros(1, 2, 2, 2), 1)


def test_more_concepts_than_channels():
    maps, parts = factorise(torch.rand(2, 3, 2, 2), 5)
    assert maps.shape==(2, 5, 2, 2) and parts.shape==(5, 3)


def test_best_pictures_and_the_page():
    maps = torch.zeros(3, 2, 2, 2)
    maps[2, 0, 0, 0], maps[0, 0], maps[1, 1, 1, 1] = 4, 1.5, 1
    found = CAMConcepts(maps, torch.eye(2), torch.einsum('nkhw,kc->nchw', maps, torch.eye(2)), torch.tensor([[1., 2]]*3), images=[torch.rand(3, 8, 8) for _ in range(3)], name='dog')
    assert found.best(0, 2)==[2, 0] and found.contributions.tolist()==[[6, 0], [0, 2], [4, 0]] and found.rest.tolist()==[0, 0, 0]
    assert torch.allclose(found.shares, torch.tensor([10/12, 2/12])) and repr(found)=='CAMConcepts: 2 of dog in 3 pictures, carrying 83%, 17% of its score'
    axs = found.plot(2, interpolation='nearest', style='heat')
    assert [axs[i].get_title(loc='left').strip() for i in (0, 2)]==['concept 1: 83% of the score', 'concept 2: 17% of the score']
    assert [float(np.asarray(ax.images[-1].get_array()).max()) for ax in axs[:3]]==[1, .375, 1] # a row has one scale
    assert axs[0].figure._suptitle.get_text()=='dog: 2 concepts in 3 pictures' and axs[0].figure._supxlabel.get_text()=='where the concept is   the rest carries 0%'
    with pytest.raises(ValueError, match='has 4 panels and needs as many axes, but 1 were given'): found.plot(2, ax=plt.subplots()[1])


def test_one_pass_over_the_pictures(interp):
    n = []
    handle = interp.learn.model.register_forward_pre_hook(lambda module, args: n.append(len(args[0])))
    found = interp.concepts('cat', k=2, n=3)
    handle.remove()
    assert sum(n) <= 3 + 1 and found.index==[0, 4, 8] and len(found)==2 and len(found.items)==3


def test_what_has_no_concepts(interp):
    values = interpreted(lambda i: float(i), 1, MSELossFlat(), ())
    handle = interp.learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    try:
        for call, error, message in ((lambda: values.concepts(0), ValueError, 'predicts no classes'), (lambda: interp.concepts('cow'), ValueError, 'no class is named'), (lambda: interp.concepts('cat', k=0), ValueError, 'k=0 leaves nothing'),
                                     (lambda: interp.concepts(['cat', 'dog']), ValueError, 'those of one class, not of 2'), (lambda: interp.concepts('cat', layer='stages'), ValueError, 'those of one layer'),
                                     (lambda: interp.concepts('cat', figsize=(3, 3)), TypeError, "concepts has no argument 'figsize'"), (lambda: interp.concepts('cat', target_layer='0'), TypeError, "it is called 'layer'")):
            with pytest.raises(error, match=message) as caught: call()
            assert '\n' not in str(caught.value)
    finally: handle.remove()


def test_of_a_label_among_others():
    interp = interpreted(lambda i: torch.tensor([1., float(i%2)]), 2, BCEWithLogitsLossFlat())
    found = interp.concepts('dog', k=2)
    assert found.index==[1, 3, 5, 7, 9] and np.isclose(found.shares.sum().item() + found.rest_share, 1, atol=1e-4)


@pytest.mark.slow
def test_on_fastais_own_learner(dls):
    with vision_learner(dls, resnet18, pretrained=False).no_bar() as learn:
        found = CAMInterpretation.from_learner(learn).concepts('left', k=2)
        assert found.maps.shape==(6, 2, 2, 2) and np.isclose(found.shares.sum().item() + found.rest_share, 1, atol=1e-4)
        assert len(found.plot(3))==6


def test_of_some_pictures(interp):
    "Those of the class among the items that are meant"
    assert interp.concepts('dog', k=2, where='index > 4').index==[5, 7, 9]
    with pytest.raises(ValueError, match="none is labelled 'dog'"): interp.concepts('dog', where=[0, 2])


def test_too_few_pictures_are_warned_of(interp):
    with pytest.warns(UserWarning, match="there is one picture of 'dog', and parts cannot be told from one"): interp.concepts('dog', k=2, where=[1])
    with pytest.warns(UserWarning, match="there are 2 pictures of 'dog' for 2 concepts: each can be one of the pictures"): interp.concepts('dog', k=2, where=[1, 3])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        interp.concepts('dog', k=2, where=[1, 3, 5])


def test_shares_below_nothing_are_explained():
    maps, directions = torch.rand(3, 2, 4, 4), torch.eye(2)
    for weights, words in (([1., -.5], 'less than 0% speaks against the class, so that others can have more than 100%'), ([1., .5], '')):
        found = CAMConcepts(maps, directions, maps.clone(), torch.tensor([weights]*3), name='dog')
        assert found.plot(1)[0].figure._supxlabel.get_text().split()==f'where the concept is   the rest carries 0% {words}'.split()
