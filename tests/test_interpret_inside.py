"Layers and channels: what is drawn is what a layer says, and shares are those of the sum."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import resnet18, vision_learner

from fastai_cam.all import CAMInterpretation, cam_head
from fastai_cam.interpret.inside import channel_terms, shares_of


def learner(loss=None, targets=lambda i: i%2, vocab=('cat', 'dog'), n_out=2):
    set_seed(1)
    samples = [(torch.rand(3, 24, 24), targets(i)) for i in range(6)]
    dls = DataLoaders(*[TfmdDL(samples, bs=4, num_workers=0) for _ in range(2)])
    dls.vocab = list(vocab)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU())
    learn = Learner(dls, nn.Sequential(body, cam_head(8, n_out)), loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


@pytest.fixture(scope='module')
def learn(): return learner()


def titles(axs): return [ax.get_title(loc='left') for ax in axs]


def test_channels_add_up_to_the_logit(learn):
    "Behind global average pooling and one linear layer: weight × mean of the channel"
    x = learn.dls.valid.dataset[2][0][None]
    act, linear = learn.model[0](x).detach(), learn.model[1][-1]
    parts = (linear.weight[1]*act.mean((2, 3))[0]).detach()
    logit = learn.model.eval()(x)[0, 1].item()
    assert np.isclose(parts.sum().item() + (0 if linear.bias is None else linear.bias[1].item()), logit, atol=1e-5)
    axs = learn.plot_channels(2, cls='dog', n=3, interpolation='nearest', style='heat')
    order = parts.argsort(descending=True)[:3].tolist()
    assert [title.split('\n')[-1] for title in titles(axs[2:])]==[f'channel {c}: {shares_of(parts[c:c + 1], parts.sum().item())[0]}' for c in order]
    terms = linear.weight[1].detach()[:, None, None]*act[0]
    full = float(terms[order].clamp(min=0).max())
    for ax, c in zip(axs[2:], order): assert np.allclose(np.asarray(ax.images[-1].get_array()), terms[c].clamp(min=0)/full, atol=1e-5)
    whole = learn.get_cams(2, cls='dog', method='gradcam').maps[0].clamp(min=0)
    if whole.max() > 0: assert np.allclose(np.asarray(axs[1].images[-1].get_array()), whole/whole.max(), atol=1e-5)


def test_terms_by_hand():
    act = torch.tensor([[[[1., 2]], [[3, 4]]]])
    terms, parts = channel_terms(act, torch.tensor([[[[1., 3]], [[0, -2]]]])) # weights 2 and −1
    assert terms.tolist()==[[[2, 4]], [[-3, -4]]] and parts.tolist()==[6, -7]
    assert shares_of(torch.tensor([1., 2.]), 8.)==['12%', '25%'] and shares_of(torch.tensor([1., -2.]), 0.)==['+1', '-2']


def test_channels_that_speak_against_it(learn):
    for largest in (True, False):
        axs = learn.plot_channels(0, cls='cat', n=8, largest=largest)
        shown = [int(title.split('channel ')[1].split(':')[0]) for title in titles(axs[2:])]
        assert sorted(shown)==list(range(8)) and (largest or shown==first[::-1])
        first = shown
    assert axs[0].figure._supxlabel.get_text().startswith('feature maps × weights   the 8 shown make up')


def test_layers(learn):
    "Each in its own grid, as the method says at that layer alone"
    axs = learn.plot_layers(1, cls='dog', layer=['0.1', '0.3'], interpolation='nearest', style='heat')
    assert [title.strip() for title in titles(axs[1:])]==['0.1\n11×11, 6 channels', '0.3\n5×5, 8 channels']
    for ax, layer in zip(axs[1:], ('0.1', '0.3')):
        expected = learn.get_cams(1, cls='dog', method='layercam', layer=layer).maps[0].clamp(min=0)
        assert np.allclose(np.asarray(ax.images[-1].get_array()), expected/expected.max().clamp(min=1e-12), atol=1e-5)


def test_an_item_of_the_set(learn):
    interp = CAMInterpretation.from_learner(learn)
    of_learner, of_set = learn.plot_layers(3), interp.plot_layers(3)
    assert titles(of_learner)==titles(of_set) and 'actual dog' in titles(of_set)[0]
    for a, b in zip(of_learner, of_set): assert np.allclose(np.asarray(a.images[-1].get_array()), np.asarray(b.images[-1].get_array()))
    assert titles(interp.plot_channels(3, n=2))==titles(learn.plot_channels(3, n=2))
    for wrong, error, message in ((6, ValueError, 'item 6 does not exist: there are 6, 0 to 5'), ([1], TypeError, 'item is an index into the set, not list')):
        with pytest.raises(error, match=message): interp.plot_layers(wrong)


def test_what_is_refused_before_any_work(learn):
    handle = learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    try:
        for call, error, message in ((lambda: learn.plot_layers([0, 1]), TypeError, 'one item is looked into at a time, not 2'), (lambda: learn.plot_layers(0, cls=['cat', 'dog']), ValueError, 'one question at a time'),
                                     (lambda: learn.plot_layers(0, method=['gradcam']), TypeError, 'takes one method'), (lambda: learn.plot_channels(0, layer=['0.1', '0.3']), ValueError, 'channels are those of one layer'),
                                     (lambda: learn.plot_channels(0, n=0), ValueError, 'n=0 leaves nothing'), (lambda: learn.plot_channels(0, method='layercam'), TypeError, "'method' is no option of this view"),
                                     (lambda: learn.plot_layers(0, layer='9'), ValueError, "no layer named '9'"), (lambda: learn.plot_layers(0, target='cat'), TypeError, "it is called 'cls'")):
            with pytest.raises(error, match=message) as caught: call()
            assert '\n' not in str(caught.value)
    finally: handle.remove()
    with pytest.raises(ValueError, match='panels and needs as many axes, but 1 were given'): learn.plot_channels(0, ax=plt.subplots()[1])


def test_the_most_probable_of_several_labels():
    learn = learner(BCEWithLogitsLossFlat(), lambda i: torch.tensor([1., float(i%2), 0.]), ('cat', 'dog', 'cow'), 3)
    with torch.no_grad(): learn.model[1][-1].weight.copy_(torch.eye(3, 8)*4)
    first = learn.get_cams(0, method='gradcam')
    axs = learn.plot_channels(0, n=2)
    assert f'▸ predicted' in titles(axs)[0] or 'predicted' in titles(axs)[0]
    whole = first.maps.reshape(-1, *first.maps.shape[-2:])[0].clamp(min=0)
    assert whole.max()==0 or np.isclose(float(np.asarray(axs[1].images[-1].get_array()).max()), 1)


def test_a_network_that_draws():
    set_seed(0)
    samples = [(torch.rand(3, 16, 16), torch.ones(16, 16, dtype=torch.long)) for i in range(4)]
    dls = DataLoaders(*[TfmdDL(samples, bs=4, num_workers=0) for _ in range(2)])
    dls.vocab = ['sky', 'ground']
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)), loss_func=CrossEntropyLossFlat(axis=1))
    with learn.no_bar():
        assert len(learn.plot_channels(0, n=4, layer='1'))==6 and len(learn.plot_layers(0, layer=['0', '1']))==3


@pytest.mark.slow
def test_on_fastais_own_learner(dls, pictures, tmp_path):
    with vision_learner(dls, resnet18, pretrained=False).no_bar() as learn:
        axs = learn.plot_layers(dls.valid.items[0], save=tmp_path/'layers.png')
        assert len(axs)==5 and (tmp_path/'layers.png').stat().st_size > 1000
        sides = [int(title.split('\n')[-1].split('×')[0]) for title in titles(axs[1:])]
        assert sides==sorted(sides, reverse=True) and len(set(sides))==4
        assert len(learn.plot_channels(0, n=8))==10
