"Every method against a naive second implementation: loops, whole-model autograd item by item, the model run again for every change."
import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from fastai_cam.methods.registry import METHODS
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import Predicted

from helpers.oracles import (
    all_classes, assert_same, each, EVERY, finer_terms, gap, images, lit_terms, noisy_lights, odd, OF_ATTENTION, oracle, ORACLES, ours, plain,
    recipro, run, slope, smooth_terms, stack, TERM_ORACLES, terms_of)


# --- the oracles' tools; `asks[i][c]` maps the output for item i to a number

def first_component(terms):
    "Scores of the places `[h, w]` on the first principal component of the channels `[C, h, w]`, by singular values; the sign is arbitrary"
    table = terms.detach().flatten(1).T.numpy() # [places, channels]
    u, s, _ = np.linalg.svd(table - table.mean(0, keepdims=True), full_matrices=False)
    return torch.tensor(u[:, 0]*s[0]).reshape(terms.shape[1:])


# --- gradient methods: term(A, g) of one channel

def test_xgradcam_of_channels_that_add_up_to_0():
    "They have no weight, though in floating point they add up to 1e-15: behind an instance norm every channel does"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.InstanceNorm2d(6)), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))).double().eval()
    assert ours(model, images(), 'xgradcam', '0.1').abs().max() <= 1e-6*ours(model, images(), 'gradcam', '0.1').abs().max()


# --- methods that run the model again

ELSEWHERE = {'cam', 'eigencam', 'eigengradcam', 'segeigencam', 'kpca_cam', 'refinecam', 'uniform_map', 'random_map', *OF_ATTENTION, 'gaussian_map', 'edge_map'} # have a test of their own below, in test_methods_attention.py or in test_methods_baselines.py
CASES = {'body': (plain, None, '0'), 'overwritten': (plain, '0.1', '0.1'), 'deep-overwritten': (odd, 'down', 'down'), 'reused': (odd, 'act', 'act'), 'last': (odd, None, 'last'), 'inner': (odd, 'mix', 'mix')}
in_each_case = pytest.mark.parametrize('case', CASES)


def setting(case):
    build, asked, layer = CASES[case]
    return build(), asked, layer


def test_every_method_has_an_oracle(): assert set(METHODS)==set(ORACLES) | ELSEWHERE


LONG = {'shapleycam', 'iscam', 'sscam', 'reciprocam'} # at 9×13 places the oracle's Hessian, or its run for every place, takes seconds
WITHOUT_LAYER = {'fullgrad', 'guided_backprop', 'rise'} # one case for each net is all there is
PAIRS = [(name, case) for name in ORACLES for case in CASES if not (name in LONG and case in ('overwritten', 'inner')) and not (name in WITHOUT_LAYER and case not in ('body', 'reused'))]

@pytest.mark.parametrize('name,case', PAIRS)
def test_against_the_oracle(name, case):
    (model, asked, layer), x = setting(case), images(2)
    if name=='objectcam': layer = asked # it looks at two stages unless it is told where
    assert_same(ours(model, x, name, asked), oracle(name, model, layer, x))


@pytest.mark.parametrize('name', ['gradcam', 'gradcam_pp', 'shapleycam', 'finercam', 'scorecam', 'ablationcam', 'reciprocam', 'guided_gradcam', 'smooth_gradcam_pp', 'likenesscam'])
def test_the_predicted_class_item_by_item(name):
    model, x = odd(), images(5)
    with torch.no_grad(): classes = model(x).argmax(1)
    assert len(set(classes.tolist())) > 1
    asks = [[lambda out, c=int(c): out[0, c]] for c in classes]
    assert_same(ours(model, x, name, 'act', Predicted()), oracle(name, model, 'act', x, asks))


@pytest.mark.parametrize('n_similar,gamma', [(1, .6), (2, 1.), (3, .3)])
def test_finercam_compares_with_the_nearest(n_similar, gamma):
    model, x = odd(), images()
    asks = all_classes(x)
    expected = stack({(i, c): finer_terms(n_similar, gamma)(model, 'down', image, ask).sum(0) for i, c, image, ask in each(x, asks)}, asks)
    assert_same(ours(model, x, 'finercam', 'down', n_similar=n_similar, gamma=gamma), expected)


@pytest.mark.parametrize('case', ['body', 'reused'])
def test_reciprocam_without_neighbours(case):
    (model, asked, layer), x = setting(case), images(2)
    asks = all_classes(x)
    assert_same(ours(model, x, 'reciprocam', asked, gaussian=False), stack({(i, c): recipro(False)(model, layer, image, ask) for i, c, image, ask in each(x, asks)}, asks))


@pytest.mark.parametrize('n,sigma,seed', [(3, .4, 7)])
def test_noise_options(n, sigma, seed):
    model, x = plain(), images(2)
    asks = all_classes(x)
    expected = stack({(i, c): smooth_terms(model, '0', image, ask, n, sigma, seed).sum(0) for i, c, image, ask in each(x, asks)}, asks)
    assert_same(ours(model, x, 'smooth_gradcam_pp', n=n, sigma=sigma, seed=seed), expected)
    lit = lit_terms(lambda light: noisy_lights(light, n, sigma, seed))
    assert_same(ours(model, x, 'sscam', n=n, sigma=sigma, seed=seed), stack({(i, c): lit(model, '0', image, ask).sum(0) for i, c, image, ask in each(x, asks)}, asks))


def test_cam_against_loops():
    model, x = gap(), images()
    act, weight = model[0](x).detach(), model[1][2].weight.detach()
    expected = torch.zeros(3, 4, *act.shape[2:], dtype=torch.double)
    for i in range(3):
        for c in range(4):
            for k in range(8): expected[i, c] += weight[c, k]*act[i, k]
    assert_same(ours(model, x, 'cam'), expected, 1e-12)
    assert (expected.mean((2, 3)) + model[1][2].bias - model(x)).abs().max() < 1e-12 # its mean plus the bias is the logit


# --- eigen methods: up to the sign, and the sign

def assert_same_but_for_sign(found, expected, evidence, tolerance=1e-6):
    for i in range(len(found)):
        for c in range(found.shape[1]):
            a, b = found[i, c], expected[i, c]
            assert min((a - b).abs().max(), (a + b).abs().max()) <= tolerance*b.abs().max() > 0, (i, c)
            assert (a*evidence[i, c]).sum() > 0, (i, c)


@in_each_case
def test_eigencam(case):
    (model, asked, layer), x = setting(case), images()
    act = run(model, layer, x)[1].detach()
    expected = torch.stack([first_component(a) for a in act])[:, None].expand(-1, 4, -1, -1)
    assert_same_but_for_sign(ours(model, x, 'eigencam', asked), expected, act.abs().sum(1, keepdim=True).expand(-1, 4, -1, -1))


@in_each_case
def test_eigengradcam(case):
    (model, asked, layer), x = setting(case), images()
    asks = all_classes(x)
    terms = {(i, c): terms_of('hirescam')(model, layer, image, ask) for i, c, image, ask in each(x, asks)}
    assert_same_but_for_sign(ours(model, x, 'eigengradcam', asked), stack({key: first_component(t) for key, t in terms.items()}, asks), stack({key: t.sum(0) for key, t in terms.items()}, asks))


@in_each_case
def test_segeigencam(case):
    "Of the gradients' sizes, whose largest magnitude is positive, whatever the score is for"
    (model, asked, layer), x = setting(case), images()
    expected = {}
    for i, c, image, ask in each(x, all_classes(x)):
        A, g = slope(model, layer, image, ask)
        found = first_component(torch.stack([g[k].abs()*A[k] for k in range(len(A))]))
        expected[i, c] = -found if abs(float(found.min())) > abs(float(found.max())) else found
    found = ours(model, x, 'segeigencam', asked)
    assert_same(found, stack(expected, all_classes(x)), 1e-6)
    assert_same(ours(model, x, 'segeigencam', asked, lambda out: -out), found)


@pytest.mark.parametrize('kernel,gamma', [('sigmoid', None), ('sigmoid', .5), ('rbf', None), ('rbf', 2.), ('cosine', None), ('linear', None)])
@pytest.mark.parametrize('case', ['body', 'reused', 'deep-overwritten'])
def test_kpca_cam(case, kernel, gamma):
    "scikit-learn's, on activations whose mean over the places is taken off (the sigmoid and the cosine kernel depend on it)"
    from sklearn.decomposition import KernelPCA
    (model, asked, layer), x = setting(case), images()
    act = run(model, layer, x)[1].detach()
    expected = []
    for a in act:
        points = a.flatten(1).T.numpy()
        points = points - points.mean(0)
        found = KernelPCA(1, kernel=kernel, gamma=gamma, eigen_solver='dense').fit_transform(points)
        expected.append(torch.tensor(found[:, 0]).reshape(a.shape[1:]))
    evidence = act.abs().sum(1, keepdim=True).expand(-1, 4, -1, -1)
    assert_same_but_for_sign(ours(model, x, 'kpca_cam', asked, kernel=kernel, gamma=gamma), torch.stack(expected)[:, None].expand(-1, 4, -1, -1), evidence)


@pytest.mark.parametrize('name', TERM_ORACLES)
@pytest.mark.parametrize('case', ['body', 'reused'])
def test_pca_of_weighted_channels(name, case):
    "'+pca': the first principal component of the weighted channels, with the sign of their sum"
    (model, asked, layer), x = setting(case), images(2)
    asks = all_classes(x)
    terms = {(i, c): TERM_ORACLES[name](model, layer, image, ask) for i, c, image, ask in each(x, asks)}
    assert_same_but_for_sign(ours(model, x, name + '+pca', asked), stack({key: first_component(t) for key, t in terms.items()}, asks), stack({key: t.sum(0) for key, t in terms.items()}, asks))


@pytest.mark.parametrize('name', ['reciprocam', 'guided_gradcam', 'finercam'])
def test_pca_of_methods_without_weights(name):
    "'+pca' elsewhere: of the activations times the map (shrunk to the layer's grid where it is finer)"
    model, x = odd(), images(2)
    asks, act, maps = all_classes(x), run(model, 'act', x)[1].detach(), oracle(name, model, 'act', x)
    if maps.shape[2:] != act.shape[2:]: maps = F.adaptive_avg_pool2d(maps, act.shape[2:])
    terms = {(i, c): act[i]*maps[i, c] for i, c, _, _ in each(x, asks)}
    assert_same_but_for_sign(ours(model, x, name + '+pca', 'act'), stack({key: first_component(t) for key, t in terms.items()}, asks), stack({key: t.sum(0) for key, t in terms.items()}, asks))


# --- modules called twice, results ignored

class Twice(nn.Module):
    "One convolution called twice, with a bias; in-place ReLUs whose results nobody looks at"
    def __init__(self, in_place=False):
        super().__init__()
        self.in_place, self.stem, self.again, self.fc = in_place, nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
    def forward(self, x):
        for layer in (self.stem, self.again, self.again):
            x = layer(x)
            if self.in_place: x.relu_()
            else: x = F.relu(x)
        return self.fc(x.mean((2, 3)))


def twice(in_place=False):
    torch.manual_seed(3)
    return Twice(in_place).double().eval()


def test_fullgrad_refuses_a_convolution_called_twice():
    "Each call has a bias gradient; without one of them, the gradients do not add up to the score"
    with pytest.raises(ValueError, match="layer 'stem' runs more than once|layer 'again' runs more than once"): ours(twice(), images(2), 'fullgrad', 'stem')


@pytest.mark.parametrize('name', ['gradcam', 'guided_backprop', 'guided_gradcam', 'shapleycam', 'ablationcam', 'scorecam'])
def test_in_place_relus_whose_result_is_ignored(name):
    "`x.relu_()` on a line of its own is a ReLU like any other"
    x = images(2)
    for layer in ('stem', 'again'): assert_same(ours(twice(True), x, name, layer), ours(twice(), x, name, layer))


# --- scorecam(top=…)

@pytest.mark.parametrize('build', [odd, plain])
def test_scorecam_top_of_all_channels_is_exact(build):
    "Also where a channel is dead, as one of the plain net's is: it has its share of the softmax"
    model, x = build(), images()
    n_channels = {odd: 14, plain: 6}[build]
    assert_same(ours(model, x, 'scorecam', top=n_channels), ours(model, x, 'scorecam'))


@pytest.mark.parametrize('name,n_changes', [('scorecam', 1), ('sscam', 2), ('iscam', 2)])
def test_top_bounds_what_is_run(name, n_changes):
    "No more images than asked for, no batch larger than bs"
    model, x, exact = plain(), images(), None
    for top, bs in ((6, 5), (1, 8), (2, 4), (3, 2)):
        sizes = []
        with Probe(model) as p:
            cap = p(x)
            score = cap.score(EVERY)
            hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
            maps = METHODS[name](cap, score, top=top, bs=bs, **({} if n_changes==1 else {'n': n_changes}))
            hook.remove()
        assert 0 < max(sizes) <= bs and 3*n_changes <= sum(sizes) <= 3*n_changes*(top + 1) # one more, should the dead channel's black image be run
        assert bool(torch.isfinite(maps).all())
        exact = maps if exact is None else exact
        if top < 5: assert (maps - exact).abs().max() > 0


@pytest.mark.parametrize('name', ['scorecam', 'sscam', 'iscam'])
@pytest.mark.parametrize('top', [None, 3])
def test_an_item_whose_channels_are_all_dead(name, top):
    "Its map is empty, not NaN, and the other items' maps are what they were"
    model, x = plain(), images()
    scale = torch.tensor([0., 1., 1.])[:, None, None, None].double()
    hook = model[0].register_forward_hook(lambda module, inputs, out: out*scale[:len(out)] if len(out)==3 else out)
    with Probe(model) as p:
        cap = p(x)
        hook.remove()
        maps = METHODS[name](cap, cap.score(EVERY), top=top)
    assert_same(maps[1:], ours(model, x[1:], name, top=top))
    assert not maps[0].any() # NaN counts as something


# --- baselines

def test_baselines():
    model, x = plain(), images()
    assert (ours(model, x, 'uniform_map')==1).all()
    noise = ours(model, x, 'random_map')
    assert noise.shape==(3, 4, 4, 6) and noise.min() >= 0 and noise.max() <= 1 and abs(noise.mean() - .5) < .06
    assert all((noise[i] - noise[j]).abs().max() > .1 for i in range(3) for j in range(i))
    torch.manual_seed(123)
    assert torch.equal(noise, ours(model, x, 'random_map')) # it is the image's, not the random state's
