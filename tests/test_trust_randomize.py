"Sanity checks: which weights were replaced, similarity against scipy and scikit-image, verdicts on real weights, and nothing left behind."
import builtins
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL

from fastai_cam.all import CAMInterpretation, Probe
from fastai_cam.trust.sanity import randomization_similarity, SanityCheck, similarity_of_learners
from fastai_cam.trust.randomize import randomization_steps, randomized
from fastai_cam.trust.similarity import spearman, ssim
from fastai_cam.examples.imagenet import imagenet_learner
from fastai_cam.methods.registry import METHODS


def make_net():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.ReLU())
    net = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    for param in net.parameters(): nn.init.normal_(param)
    return net


def make_learner(n=6):
    torch.manual_seed(1)
    samples = [(torch.randn(3, 14, 14), i%4) for i in range(n)]
    dls = DataLoaders(TfmdDL(samples, bs=4, num_workers=0), TfmdDL(samples, bs=4, num_workers=0))
    learn = Learner(dls, make_net(), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


@pytest.fixture
def net(): return make_net()


@pytest.fixture
def learn(): return make_learner()


@pytest.fixture
def x(): return torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(2)) + 3


def state(model): return {key: value.clone() for key, value in model.state_dict().items()}
def changed(model, before): return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


# -- randomised copies

OF_CONV, OF_NORM = {'0.0.weight', '0.0.bias'}, {'0.1.weight', '0.1.bias'}
OF_STATS = {'0.1.running_mean', '0.1.running_var'}
OF_LAST, OF_HEAD = {'0.3.weight'}, {'1.2.weight', '1.2.bias'}


def test_steps_go_from_the_output_to_the_input_and_the_output_layer_goes_alone(net):
    assert list(randomization_steps(net, n_steps=4).values())==[['1.2'], ['0.3'], ['0.1'], ['0.0']]
    assert randomization_steps(net, n_steps=2)=={'1.2': ['1.2'], '0.3': ['0.3'], '0.0 … 1': ['0.1', '0.0']}
    assert list(randomization_steps(net, n_steps=1).values())==[['1.2'], ['0.3', '0.1', '0.0']]
    assert randomization_steps(net, n_steps=99)==randomization_steps(net, n_steps=4)
    assert randomization_steps(net, layers=['0', '1'])=={'1': ['1.2'], '0': ['0.3', '0.1', '0.0']}


def test_cascading_keeps_what_was_randomised_before(net):
    before = state(net)
    found = [(step, changed(copy, before)) for step, copy in randomized(net, n_steps=4)]
    assert found==[('1.2', OF_HEAD), ('0.3', OF_HEAD | OF_LAST), ('0.1', OF_HEAD | OF_LAST | OF_NORM), ('0.0', OF_HEAD | OF_LAST | OF_NORM | OF_CONV)]


def test_independent_randomises_one_step_only(net):
    before = state(net)
    assert [changed(copy, before) for _, copy in randomized(net, how='independent', n_steps=4)]==[OF_HEAD, OF_LAST, OF_NORM, OF_CONV]


def test_original_modes_and_random_states_are_untouched(net, x):
    net[0].train(); net[1].eval()
    before, modes = state(net), [module.training for module in net.modules()]
    torch.manual_seed(7); np.random.seed(7)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(7); np.random.seed(7)
    copies = [copy for _, copy in randomized(net, args=(x,))]
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3)==expected[1]).all()
    assert not changed(net, before) and [module.training for module in net.modules()]==modes
    assert all([module.training for module in copy.modules()]==modes and torch.is_grad_enabled() for copy in copies)
    assert all('forward' not in vars(module) for copy in copies for module in copy.modules())
    assert len({param.data_ptr() for copy in [net, *copies] for param in copy.parameters()})==5*len(list(net.parameters()))


def test_new_weights_depend_on_name_and_seed_only(net):
    whole = [dict(randomized(net, n_steps=n))['0.0' if n==4 else '0.0 … 1'] for n in (4, 2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), whole[1].parameters()))
    alone = dict(randomized(net, how='independent', n_steps=4))['0.0']
    assert torch.equal(alone[0][0].weight, whole[0][0][0].weight)
    other = dict(randomized(net, seed=1, n_steps=4))['0.0']
    assert not torch.equal(other[0][0].weight, whole[0][0][0].weight)
    twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    *_, (_, copy) = randomized(twins)
    assert not torch.equal(copy[0].weight, copy[1].weight)
    bound = (3*9)**-.5 # of `nn.Conv2d.reset_parameters`
    assert whole[0][0][0].weight.abs().max() <= bound and net[0][0].weight.abs().max() > 2*bound


def test_batch_norms_take_their_statistics_from_what_reaches_them(net, x):
    before = state(net)
    steps = dict(randomized(net, n_steps=4, args=(x,)))
    assert not changed(steps['0.3'], before) & OF_STATS # it comes before what is random
    copy = steps['0.0']
    reached = copy[0][0](x).detach()
    assert torch.allclose(copy[0][1].running_mean, reached.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(copy[0][1].running_var, reached.var((0, 2, 3), correction=0), atol=1e-5)
    normalised = copy.eval()[0][1](reached)
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-5 and (normalised.var((0, 2, 3)) - 1).abs().max() < 1e-2
    alone = dict(randomized(net, how='independent', n_steps=4, args=(x,)))['0.0'] # a norm whose own weights are kept follows suit
    assert changed(alone, before)==OF_CONV | OF_STATS


class Own(nn.Module):
    "Parameters of its own and no `reset_parameters`"
    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Parameter(3 + 2*torch.randn(4000)), nn.Parameter(torch.tensor(5.))
    def forward(self, x): return x*self.scale + self.table.mean()


def test_parameters_that_no_function_resets_become_noise_like_themselves():
    torch.manual_seed(0)
    own = Own()
    (_, copy), = randomized(own)
    assert abs(copy.table.mean() - own.table.mean()) < .15 and abs(copy.table.std() - own.table.std()) < .1
    assert abs(np.corrcoef(copy.table.detach(), own.table.detach())[0, 1]) < .06 and copy.scale==5


def test_copies_are_not_watched_by_the_hooks_of_the_original(net, x):
    calls = []
    net[0].register_forward_hook(lambda *args: calls.append(1))
    for _, copy in randomized(net): copy(x)
    assert not calls


# -- similarity

def shown(maps): return (maps.clamp(min=0)/maps.clamp(min=0).amax((1, 2), keepdim=True)).double().numpy()


def test_similarity_against_scipy_and_skimage():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, 11, generator=rng), torch.randn(4, 9, 11, generator=rng)
    b = a + .5*b
    for measure, expected in ((spearman, [spearmanr(p.ravel(), q.ravel())[0] for p, q in zip(shown(a), shown(b))]),
                              (ssim, [structural_similarity(p, q, data_range=1.) for p, q in zip(shown(a), shown(b))])):
        assert np.allclose(measure(a, b).numpy(), expected, atol=1e-12) and .2 < np.mean(expected) < .98
        assert measure(a, b).dtype is torch.float64 and torch.allclose(measure(a, 7*a), torch.ones(4, dtype=torch.float64))


def test_spearman_by_hand():
    a = torch.tensor([[[1., 2], [3, 4]]])
    assert abs(spearman(a, torch.tensor([[[2., 1], [3, 4]]])).item() - .8) < 1e-12 # 1 - 6·(1 + 1)/(4·15)
    assert abs(spearman(a, torch.tensor([[[4., 3], [2, 1]]])).item() + 1) < 1e-12
    assert spearman(a, torch.tensor([[[-1., -9], [3, 4]]])).item()==pytest.approx(spearmanr([1, 2, 3, 4], [0, 0, 3, 4])[0])


@pytest.mark.parametrize('measure', [spearman, ssim])
def test_empty_constant_and_broken_maps(measure):
    some = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    empty, flat = -some, torch.ones(1, 8, 8)
    assert measure(some, empty)==0 and measure(empty, some).isnan() and measure(empty, empty).isnan()
    assert measure(flat, flat)==1 and measure(flat, 3*flat)==1 and abs(measure(some, flat)) < .2
    assert measure(some, torch.full_like(some, torch.nan))==0
    with pytest.raises(ValueError, match='one shape'): measure(some, torch.rand(1, 4, 4))


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


def test_the_similarity_of_an_item_does_not_depend_on_its_company(net, x):
    def similarity(images):
        with Probe(net) as probe:
            cap = probe(images)
            return randomization_similarity(cap, cap.score(lambda out: out[:, :2]), share=.5)
    together = similarity(x)
    assert torch.allclose(torch.cat([similarity(x[3:4]), similarity(x[[1, 3]])]), together[[3, 1, 3]], atol=1e-6, equal_nan=True) and together[:, 0].std() > .01


# -- weights that are computed from others, and hooks that are part of a model

def pruned(conv):
    prune.l1_unstructured(conv, 'weight', .3)
    return conv


def with_raw_weight(conv):
    "A weight that a hook of the user's makes of a parameter: it has no place in any library"
    raw = nn.Parameter(conv.weight.detach().clone())
    del conv.weight
    conv.weight, conv.weight_raw = raw.detach()*.5, raw
    conv.register_forward_pre_hook(lambda module, inputs: setattr(module, 'weight', .5*module.weight_raw))
    return conv


class Halved(nn.Module):
    def forward(self, weight): return weight/2


def halved(conv): return parametrize.register_parametrization(conv, 'weight', Halved()) or conv


WAYS = dict(pruned=pruned, twice_pruned=lambda conv: pruned(pruned(conv)), structured=lambda conv: prune.ln_structured(conv, 'weight', .3, n=2, dim=0) and conv,
            old_weight_norm=utils.weight_norm, old_spectral_norm=utils.spectral_norm, weight_norm=parametrizations.weight_norm, spectral_norm=parametrizations.spectral_norm,
            orthogonal=parametrizations.orthogonal, own_parametrization=halved, pruned_and_normed=lambda conv: prune.l1_unstructured(parametrizations.spectral_norm(conv), 'bias', 3) and conv, own_hook=with_raw_weight)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('training', [False, True])
def test_computed_weights_are_made_random(way, training, x):
    "What the layer computes with has nothing to do with what it was, and is as random as a plain layer's; the model is as it was"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), WAYS[way](nn.Conv2d(6, 8, 3))), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    net.train()(x)
    expected = net.train(training)[0][3].weight.detach().clone() # spectral norms in training mode go on when they are looked at
    before = state(net)
    assert set(sum(randomization_steps(net, n_steps=4).values(), []))=={'0.0', '0.1', '0.3', '1.2'}
    for given in ((), (x,)):
        copy = dict(randomized(net, n_steps=4, args=given))['0.3']
        copy.eval()(x)
        found = copy[0][3].weight.detach()
        assert abs(np.corrcoef(found.flatten(), expected.flatten())[0, 1]) < .2 and .02 < found.std() < .2
    assert not changed(net, before) and all(module.training is training for module in net.modules())
    assert training or torch.equal(net[0][3].weight, expected)


def test_a_weight_that_cannot_be_made_random_is_said(x):
    torch.manual_seed(0)
    net, fixed = make_net(), torch.randn(4, 8)
    weight = nn.Parameter(net[1][2].weight.detach())
    del net[1][2].weight
    net[1][2].weight_raw, net[1][2].weight = weight, fixed
    net[1][2].register_forward_pre_hook(lambda module, inputs: setattr(module, 'weight', fixed))
    with pytest.raises(ValueError, match="'weight' of layer '1.2' cannot be made random"): list(randomized(net, args=(x,)))


class Tokens(nn.Module):
    "Parameters that a module uses itself, one of them reset by nobody although it has a function for it"
    def __init__(self):
        super().__init__()
        self.positions, self.gamma, self.linear = nn.Parameter(torch.randn(1, 9, 5)), nn.Parameter(torch.rand(5)), nn.Linear(5, 5)
        self.linear.weight.requires_grad_(False) # frozen
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.linear.weight
    def reset_parameters(self): nn.init.trunc_normal_(self.positions, std=.02)
    def forward(self, x): return self.tied(self.linear(x + self.positions)*self.gamma)


def test_positions_gates_frozen_and_tied_weights_are_made_random():
    torch.manual_seed(0)
    model = Tokens()
    *_, (_, copy) = randomized(model, n_steps=9)
    for name, param in copy.named_parameters(): assert abs(np.corrcoef(param.detach().flatten(), model.get_parameter(name).detach().flatten())[0, 1]) < .9, name
    assert copy.positions.std() < .03 and copy.tied.weight is copy.linear.weight


def test_layers_without_weights_yet_are_said():
    with pytest.raises(ValueError, match="layer '1' has no weights yet.*run the model once"): randomization_steps(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3)))


def test_nobody_elses_random_numbers_change(net, x, monkeypatch):
    "Not even for a moment: another thread may draw just then"
    before, seen = torch.get_rng_state(), []
    own = nn.Conv2d.reset_parameters
    def reset(self):
        own(self)
        nn.init.orthogonal_(self.weight); self.weight.data += torch.rand_like(self.weight) + torch.randn(self.weight.shape)
        seen.append(torch.equal(torch.get_rng_state(), before))
    monkeypatch.setattr(nn.Conv2d, 'reset_parameters', reset)
    first, second = (list(randomized(net, args=(x,)))[-1][1] for _ in range(2))
    assert len(seen) > 2 and all(seen) and torch.equal(first[0][0].weight, second[0][0].weight)


def test_hooks_that_are_part_of_the_model_go_along(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.kept, self.head = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)), {}, nn.Linear(12, 4)
            self.body[0].register_forward_hook(self.keep)                                       # a skip
            self.body[1].register_forward_pre_hook(lambda module, inputs: (inputs[0]/self.scale,))
            self.body[1].register_forward_hook(lambda module, inputs, out: out.add_(1))         # returns something by chance
            self.scale = nn.Parameter(torch.tensor(2.))
        def keep(self, module, inputs, out): self.kept['skip'] = out
        def forward(self, x): return self.head(torch.cat([self.body(x).mean((2, 3)), self.kept['skip'].mean((2, 3))], 1))
    torch.manual_seed(0)
    net = Net()
    net(x) # what it keeps belongs to a graph now
    copy = dict(randomized(net, n_steps=9))['head']
    with torch.no_grad(): copy.head.weight.copy_(net.head.weight); copy.head.bias.copy_(net.head.bias)
    other = x.flip(0)
    assert torch.allclose(copy(other), net(other), atol=1e-6)
    with torch.no_grad(): copy.scale.fill_(3.)
    assert not torch.allclose(copy(other), net(other), atol=1e-3) # it is the copy's own


def test_a_copy_writes_to_nothing_of_ours(net, x):
    class Watch:
        def __init__(self): self.n, self.of = 0, {net[0][0]: []}
        def hook(self, module, inputs, out):
            self.n += 1
            self.of[module].append(out)
    watch, calls, count = Watch(), [], 0
    def counting(module, inputs, out, kept=[]):
        nonlocal count
        count += 1
        kept.append(1)
    net[0][0].register_forward_hook(watch.hook)
    net[0].register_forward_pre_hook(partial(lambda kept, *args: kept.append(1), calls))
    net.register_forward_hook(counting)
    for _, copy in randomized(net, args=(x,)): copy(x)
    assert watch.n==count==len(calls)==len(counting.__defaults__[0])==0 and watch.of[net[0][0]]==[]
    net(x)
    assert watch.n==count==len(calls)==len(watch.of[net[0][0]])==1


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


def test_bad_copies_are_refused_at_once(net):
    with pytest.raises(ValueError, match="no layer named '7'"): randomized(net, layers='7')
    with pytest.raises(ValueError, match='has no parameters to randomise'): randomized(net, layers='0.2')
    with pytest.raises(ValueError, match='nothing to randomise'): randomized(nn.ReLU())
    with pytest.raises(ValueError, match="'independent'"): randomized(net, how='both')


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
