"Randomised copies: which weights were replaced and by what, whatever computes them, and nothing of the original that changes."
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

from fastai_cam.trust.randomize import randomization_steps, randomized

from helpers.sanity import changed, make_net, net, state, x


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

def test_bad_copies_are_refused_at_once(net):
    with pytest.raises(ValueError, match="no layer named '7'"): randomized(net, layers='7')
    with pytest.raises(ValueError, match='has no parameters to randomise'): randomized(net, layers='0.2')
    with pytest.raises(ValueError, match='nothing to randomise'): randomized(nn.ReLU())
    with pytest.raises(ValueError, match="'independent'"): randomized(net, how='both')
