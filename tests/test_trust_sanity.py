"Sanity checks: verdicts on real weights and by hand, what is refused before any work, and a learner that is left as it was found."
import builtins

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL

from fastai_cam.all import CAMInterpretation, Probe
from fastai_cam.trust.sanity import randomization_similarity, SanityCheck, similarity_of_learners
from fastai_cam.trust.randomize import randomized
from fastai_cam.trust.similarity import spearman
from fastai_cam.examples.imagenet import imagenet_learner
from fastai_cam.methods.registry import METHODS

from helpers.sanity import changed, make_net, net, state, x


def make_learner(n=6):
    torch.manual_seed(1)
    samples = [(torch.randn(3, 14, 14), i%4) for i in range(n)]
    dls = DataLoaders(TfmdDL(samples, bs=4, num_workers=0), TfmdDL(samples, bs=4, num_workers=0))
    learn = Learner(dls, make_net(), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


@pytest.fixture
def learn(): return make_learner()


# -- verdicts

def maps_of(n=12, size=12): return torch.rand(n, size, size, generator=torch.Generator().manual_seed(3))


def test_kept_is_what_is_left_beyond_other_images():
    own = maps_of()
    check = SanityCheck(dict(same=torch.stack([own, own]), other=torch.stack([own, own.roll(1, 0)])), {'all': 1.})
    rows = check.table.set_index('method')
    chance = np.mean([np.mean([spearmanr(own[i].flatten(), own[(i - k) % 12].flatten())[0] for k in (1, 2, 3)]) for i in range(12)])
    assert rows.spearman_chance['same']==pytest.approx(chance)
    similar = np.array([spearmanr(own[i].flatten(), own[i-1].flatten())[0] for i in range(12)])
    assert rows.spearman['other']==pytest.approx(similar.mean()) and rows.spearman_kept['other']==pytest.approx((similar.mean() - chance)/(1 - chance))
    assert rows.spearman_kept['same']==1 and rows.spearman_low['other'] < similar.mean() < rows.spearman_high['other'] and rows.n['same']==12
    spread = similar.std()/12**.5
    assert rows.spearman_high['other'] - rows.spearman_low['other']==pytest.approx(2*1.96*spread, rel=.15)
    assert check.passed==dict(same=False, other=True) and 'same fails' in check.verdict and 'other passes' in check.verdict


def test_half_of_the_layers_and_all_of_them_count():
    own, another = maps_of(), maps_of().flip(0)
    steps = {'a': .1, 'b': .55, 'c': 1.}
    def passed(*maps, how='cascading'): return SanityCheck(dict(m=torch.stack([own, *maps])), steps, how).passed['m']
    assert passed(own, another, another) and not passed(another, own, another) and not passed(another, another, own)
    assert passed(own, another, another, how='independent') and not passed(own, own, another, how='independent')


def test_maps_that_are_the_same_for_all_images_fail():
    same = torch.rand(1, 8, 8).expand(6, 8, 8)
    assert not SanityCheck(dict(m=torch.stack([same, same])), {'all': 1.}).passed['m']


def test_maps_without_evidence_cannot_be_judged():
    check = SanityCheck(dict(m=-torch.rand(2, 4, 8, 8)), {'all': 1.})
    assert not check.passed['m'] and 'cannot be judged' in check.verdict and check.table.n[0]==0


def test_too_few_images_are_said_to_be_too_few():
    own = maps_of(3)
    mixed = torch.stack([own[0], own[0], own[1]])
    check = SanityCheck(dict(m=torch.stack([own, mixed])), {'all': 1.})
    assert not check.passed['m'] and 'take more than 3 images' in check.verdict


# -- a learner

def test_real_weights_gradcam_passes_and_guided_backprop_fails():
    learn = imagenet_learner(size=128, bs=6)
    with learn.no_bar(): check = learn.sanity_check(list(range(12)), ['gradcam', 'hirescam', 'guided_backprop', 'uniform_map', 'random_map'], n=12, n_steps=2)
    assert check.passed==dict(gradcam=True, hirescam=True, guided_backprop=False, uniform_map=False, random_map=False), check.verdict
    assert list(check.steps.values())[-1]==1 and check.table.n.eq(12).all() and len(check.table)==15
    first = check.table.groupby('method').first()
    assert first.spearman['guided_backprop'] > .95 and first.spearman['gradcam'] < .7
    assert np.allclose(first.spearman['gradcam'], first.spearman['hirescam'], atol=1e-4) # GAP and a linear layer: the same map


@pytest.mark.usefixtures('maps_by_gradcam')
def test_maps_are_those_of_the_copies_asked_about_the_models_own_class(learn):
    check = learn.sanity_check(list(range(6)), n_steps=2)
    x = torch.stack([item[0] for item in learn.dls.valid_ds])
    model = learn.model.eval()
    predicted = model(x).argmax(1)
    copies = [model, *(copy.eval() for _, copy in randomized(model, n_steps=2, args=(x,)))] # norms are settled on all of them, whatever the batch size
    for found, copy in zip(check.maps['gradcam'], copies, strict=True):
        act = copy[0](x)
        weights = copy[1][2].weight[predicted]/act[0, 0].numel()
        assert torch.allclose(found, torch.einsum('bc,bchw->bhw', weights, act), atol=1e-5)


def test_interpretation_uses_its_own_method_and_spreads_over_the_set(learn):
    interp = CAMInterpretation.from_learner(learn, method='hirescam')
    check = interp.sanity_check(n=3, n_steps=1)
    assert list(check.maps)==['hirescam'] and check.maps['hirescam'].shape==(3, 3, 10, 10)
    assert torch.allclose(check.maps['hirescam'][0], learn.get_cams([0, 2, 5], method='hirescam').maps, atol=1e-6)


@pytest.mark.parametrize('how', ['cascading', 'independent'])
def test_a_check_shows_itself(learn, how, tmp_path):
    check = learn.sanity_check(list(range(6)), ['gradcam', 'eigencam'], how=how, n_steps=2)
    axs = check.plot(save=tmp_path/'curves.png')
    assert len(axs)==2 and len(axs[0].lines)==3 and (tmp_path/'curves.png').stat().st_size > 5000
    assert len(check.show(1, over=False, save=tmp_path/'maps.png'))==2*4
    assert 'eigencam' in repr(check) and '<table' in check._repr_html_()
    with pytest.raises(IndexError, match='out of range'): check.show(6)


def test_learner_is_left_as_found_also_when_interrupted(learn):
    def interrupts(cap, score):
        if len(seen)==3: raise KeyboardInterrupt
        seen.append(1)
        return METHODS['gradcam'](cap, score)
    learn.model[0].train(); learn.model[1].eval()
    before, modes, callbacks, attributes = state(learn.model), [m.training for m in learn.model.modules()], list(learn.cbs), dict(vars(learn))
    rng, seen = torch.get_rng_state(), []
    with pytest.raises(KeyboardInterrupt): learn.sanity_check(list(range(6)), interrupts)
    learn.sanity_check(list(range(6)), n_steps=2)
    assert not changed(learn.model, before) and [m.training for m in learn.model.modules()]==modes and list(learn.cbs)==callbacks and vars(learn)==attributes
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled() and all(param.grad is None for param in learn.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in learn.model.modules())


def test_random_logit_test_asks_for_another_class(learn):
    found = learn.random_logit_test(list(range(6)), ['gradcam', 'eigencam']).set_index('method')
    assert found.spearman['eigencam']==1 and found.spearman['gradcam'] < 1 and found.n['eigencam']==6
    from fastai_cam.trust.sanity import RandomClass
    out = torch.randn(200, 4)
    drawn = RandomClass().classes(out)[:, 0]
    assert (drawn != out.argmax(1)).all() and len(drawn.unique())==4 and torch.equal(drawn, RandomClass().classes(out)[:, 0]) and not torch.equal(drawn, RandomClass(1).classes(out)[:, 0])


def test_similarity_of_learners(learn):
    other = make_learner()
    nn.init.normal_(other.model[1][2].weight)
    same, different = similarity_of_learners(learn, make_learner(), n=6), similarity_of_learners(learn, other, n=6)
    assert same.spearman[0]==1 and same.ssim[0]==1 and different.spearman[0] < .9
    assert similarity_of_learners(learn, other, method='eigencam', n=6).spearman[0]==1 # the head plays no part


@pytest.mark.usefixtures('maps_by_gradcam')
def test_randomization_similarity_is_spearman_with_one_copy(net, x):
    with Probe(net) as probe:
        cap = probe(x)
        score = cap.score(lambda out: out[:, :2])
        found = randomization_similarity(cap, score)
        assert found.shape==(5, 2) and torch.equal(randomization_similarity(cap, score, 'uniform_map'), torch.ones(5, 2, dtype=torch.float64))
        single = randomization_similarity(cap, cap.score(lambda out: out[:, 0]))
        own = METHODS['gradcam'](cap, score)
    assert torch.equal(single, found[:, 0])
    for i in range(5): # batch norms know the item alone
        _, copy = list(randomized(net, n_steps=4, args=(x[i:i+1],)))[-1]
        act = copy.eval()[0](x[i:i+1])
        for k in range(2):
            other = torch.einsum('c,bchw->bhw', copy[1][2].weight[k], act)
            assert torch.allclose(found[i:i+1, k], spearman(own[i:i+1, k], other), atol=1e-3, equal_nan=True)


@pytest.mark.usefixtures('maps_by_gradcam')
def test_the_similarity_of_an_item_does_not_depend_on_its_company(net, x):
    def similarity(images):
        with Probe(net) as probe:
            cap = probe(images)
            return randomization_similarity(cap, cap.score(lambda out: out[:, :2]), share=.5)
    together = similarity(x)
    assert torch.allclose(torch.cat([similarity(x[3:4]), similarity(x[[1, 3]])]), together[[3, 1, 3]], atol=1e-6, equal_nan=True) and together[:, 0].std() > .01


# -- what is refused, before any work

@pytest.fixture
def no_work(learn, monkeypatch):
    monkeypatch.setattr(nn.Conv2d, 'forward', lambda *args: pytest.fail('the model ran'))
    return learn


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(layer='0.9'), ValueError, "no layer named '0.9'"), (dict(n=0), ValueError, 'n=0 images'), (dict(n=1), ValueError, 'at least 2'), (dict(n=2.5), ValueError, 'n=2.5'),
    (dict(method='grad-cam'), ValueError, "did you mean 'gradcam'"), (dict(method=[]), ValueError, 'empty'), (dict(how='top'), ValueError, "'cascading'"), (dict(n_steps=0), ValueError, 'n_steps=0')])
def test_bad_input(no_work, kwargs, error, message):
    with pytest.raises(error, match=message): no_work.sanity_check(list(range(6)), **kwargs)


def test_a_single_image_is_refused(learn):
    with pytest.raises(ValueError, match='at least 2'): learn.sanity_check(0)


def test_bad_share_is_refused(net, x):
    with Probe(net) as probe:
        cap = probe(x)
        with pytest.raises(ValueError, match='share'): randomization_similarity(cap, cap.score(lambda out: out[:, 0]), share=0)


def test_missing_scikit_image_is_said_before_any_work(no_work, monkeypatch):
    found = builtins.__import__
    def without(name, *args, **kwargs):
        if name.startswith('skimage'): raise ImportError(name)
        return found(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=r"pip install 'fastai_cam\[audit\]'"): no_work.sanity_check(list(range(6)))
