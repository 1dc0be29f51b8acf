"Every method against a naive second implementation: loops, whole-model autograd item by item, the model run again for every change."
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F
import torchvision
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL

import fastai_cam.all # adds get_cams to Learner, and every method to METHODS
from fastai_cam.methods.registry import as_method, METHODS
from fastai_cam.probe.layers import LAST_TWO_STAGES
from fastai_cam.probe.capture import Capture
from fastai_cam.probe.watch import Probe
from fastai_cam.probe.scan import LayerScan
from fastai_cam.targets.kinds import ClassIndex, Predicted

# --- the nets

def randomised(model):
    "Batch norms as after training: means, variances, weights and biases of their own; logits that differ from item to item"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.running_mean, -.5, .5), (module.running_var, .5, 2), (module.weight.data, .5, 1.5), (module.bias.data, -.3, .5)): values.uniform_(low, high)
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        last.weight *= 5
        last.bias -= model.eval()(images(64, dtype=torch.float)).mean(0)
    return model


def plain(dtype=torch.double):
    "Body and head: in-place ReLUs, a curved head, one channel that is dead"
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.Softplus(), nn.Linear(8, 4))
    model = randomised(nn.Sequential(body, head))
    model[0][4].bias.data[1] = -50
    return model.to(dtype)


class Odd(nn.Module):
    "A forward of its own: a residual sum, one ReLU called twice, a functional one in place, a curved tail; more channels than places at the end"
    relu = staticmethod(lambda x: F.relu(x, inplace=True))
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act, self.mix = nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.down, self.last, self.hidden, self.fc = nn.Conv2d(5, 14, 3, stride=3), nn.Conv2d(14, 14, 1), nn.Linear(14, 8), nn.Linear(8, 4)
    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.relu(self.down(x + self.mix(x)))
        x = self.act(x + self.last(x))
        return self.fc(torch.tanh(self.hidden(x.mean((2, 3))*2)))


def odd(dtype=torch.double):
    torch.manual_seed(1)
    return randomised(Odd()).to(dtype)


def gap(dtype=torch.double):
    "The head for which CAM is exact"
    torch.manual_seed(2)
    body = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    return randomised(nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))).to(dtype)


def images(n=3, dtype=torch.double):
    return torch.randn(n, 3, 20, 28, dtype=torch.double, generator=torch.Generator().manual_seed(5)).to(dtype)


EVERY = lambda out: out # a score for each of the classes

def ours(model, x, name, layer=None, score=EVERY, **options):
    with Probe(model, layer) as p:
        cap = p(x)
        return as_method(name)(cap, cap.score(score), **options)


def assert_same(found, expected, tolerance=1e-9):
    assert found.shape==expected.shape
    assert expected.abs().max() > 0 and (found - expected).abs().max() <= tolerance*expected.abs().max()


# --- the oracles' tools; `asks[i][c]` maps the output for item i to a number

def run(model, layer, x, instead=None):
    "Output of the whole model, and what the layer's last call returned; `instead` takes its place"
    module, calls, kept = model.get_submodule(layer), [], []
    hook = module.register_forward_hook(lambda module, inputs, out: calls.append(1))
    with torch.no_grad(): model(x)
    hook.remove()
    def keep(module, inputs, out):
        kept.append(out)
        return out.clone() if instead is None or len(kept) < len(calls) else instead.clone()
    hook = module.register_forward_hook(keep)
    out = model(x)
    hook.remove()
    return out, kept[-1]


def all_classes(x): return [[lambda out, c=c: out[0, c] for c in range(4)] for _ in x]


def each(x, asks): return ((i, c, x[i:i+1], ask) for i in range(len(x)) for c, ask in enumerate(asks[i]))


def stack(maps, asks):
    "A dict of maps by item and score as a tensor"
    return torch.stack([torch.stack([torch.as_tensor(maps[i, c]) for c in range(len(asks[i]))]) for i in range(len(asks))]).detach()


def slope(model, layer, image, ask):
    "Activation and gradient `[C, h, w]` of one item and one score, by autograd through the whole model"
    out, act = run(model, layer, image)
    grad, = torch.autograd.grad(ask(out), act)
    return act.detach()[0], grad[0]


def linear(n_in, n_out):
    "Linear interpolation of n_in numbers to n_out as a matrix, pixels being squares with a centre"
    matrix = torch.zeros(n_out, n_in, dtype=torch.double)
    for i in range(n_out):
        at = min(max((i + .5)*n_in/n_out - .5, 0), n_in - 1)
        low = int(at)
        matrix[i, low] += 1 - (at - low)
        if at > low: matrix[i, low + 1] += at - low
    return matrix


def large(m, size): return linear(m.shape[-2], size[0]) @ m @ linear(m.shape[-1], size[1]).T


def first_component(terms):
    "Scores of the places `[h, w]` on the first principal component of the channels `[C, h, w]`, by singular values; the sign is arbitrary"
    table = terms.detach().flatten(1).T.numpy() # [places, channels]
    u, s, _ = np.linalg.svd(table - table.mean(0, keepdims=True), full_matrices=False)
    return torch.tensor(u[:, 0]*s[0]).reshape(terms.shape[1:])


def signed(m, evidence): return -m if (m*evidence).sum() < 0 else m


# --- gradient methods: term(A, g) of one channel

def plus_plus(A, g):
    "Chattopadhay et al., equations 10 and 19, place by place"
    total, weight = float(A.sum()), 0.
    for slope_ij in g.flatten().tolist():
        if slope_ij != 0: weight += slope_ij**2/(2*slope_ij**2 + total*slope_ij**3)*max(slope_ij, 0)
    return weight*A


TERMS = dict(
    gradcam=lambda A, g: g.mean()*A, hirescam=lambda A, g: g*A, elementwise=lambda A, g: (g*A).clamp(min=0), layercam=lambda A, g: g.clamp(min=0)*A,
    xgradcam=lambda A, g: ((g*A).sum()/A.sum() if A.sum() != 0 else 0.)*A, gradcam_pp=plus_plus)


def terms_of(name):
    "Oracle of the weighted channels of a gradient method"
    def terms(model, layer, image, ask):
        A, g = slope(model, layer, image, ask)
        return torch.stack([TERMS[name](A[k], g[k]) for k in range(len(A))])
    return terms


def shapley_terms(model, layer, image, ask):
    "Weights from the whole Hessian of what follows the layer"
    A, g = slope(model, layer, image, ask)
    tail = lambda act: ask(run(model, layer, image, act.reshape(1, *A.shape))[0])
    bend = (torch.autograd.functional.hessian(tail, A.flatten()) @ A.flatten()).reshape(A.shape)
    return torch.stack([(g[k] - bend[k]/2).mean()*A[k] for k in range(len(A))])


def smooth_terms(model, layer, image, ask, n=8, sigma=.15, seed=0):
    "Omeiza et al.: the derivatives of Grad-CAM++ are means over noisy copies, the activations are the image's"
    random, A = torch.Generator().manual_seed(seed), slope(model, layer, image, ask)[0]
    grads = []
    for _ in range(n):
        noise = torch.randn(image.shape[1:], generator=random).double()
        grads.append(slope(model, layer, image + sigma*(image.max() - image.min())*noise, ask)[1])
    terms = torch.zeros_like(A)
    for k in range(len(A)):
        first, second, third = (sum(g[k]**power for g in grads)/n for power in (1, 2, 3))
        alpha = second/(2*second + A[k].sum()*third)
        terms[k] = alpha.where(second != 0, 0).mul(first.clamp(min=0)).sum()*A[k]
    return terms


def finer_asks(model, image, ask, c, n_similar=3, gamma=.6):
    "The score less gamma times the mean of the classes whose logits are nearest"
    with torch.no_grad(): out = model(image)[0]
    near = sorted((abs(float(out[d] - out[c])), d) for d in range(4) if d != c)[:n_similar]
    return lambda out: out[0, c] - gamma*sum(out[0, d] for _, d in near)/n_similar


def finer_terms(n_similar=3, gamma=.6):
    def terms(model, layer, image, ask):
        c = int(torch.stack([ask(row[None]) for row in torch.eye(4)]).argmax()) # the class that is asked about
        return terms_of('gradcam')(model, layer, image, finer_asks(model, image, ask, c, n_similar, gamma))
    return terms


def fem_terms(model, layer, image, ask):
    "Fuad et al. 2020: the mean of each channel times its binary map of where it fires (pytorch-grad-cam weighs the channel by the share of places that fire)"
    A, terms = run(model, layer, image)[1].detach()[0], []
    for channel in A:
        values = channel.flatten().tolist()
        mean = sum(values)/len(values)
        limit = mean + 2*(sum((v - mean)**2 for v in values)/len(values))**.5
        terms.append(mean*(channel >= limit).to(channel.dtype))
    return torch.stack(terms)


def test_xgradcam_of_channels_that_add_up_to_0():
    "They have no weight, though in floating point they add up to 1e-15: behind an instance norm every channel does"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.InstanceNorm2d(6)), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))).double().eval()
    assert ours(model, images(), 'xgradcam', '0.1').abs().max() <= 1e-6*ours(model, images(), 'gradcam', '0.1').abs().max()


# --- methods that run the model again

def lit_terms(changes):
    "Score-CAM and its kin: softmax of the mean score of the image under each channel's light, changed"
    def terms(model, layer, image, ask):
        with torch.no_grad():
            A, scores = run(model, layer, image)[1][0], []
            for channel in A:
                light = large(channel, image.shape[2:])
                light = (light - light.min())/(light.max() - light.min()) if channel.max() > channel.min() else torch.zeros_like(light)
                seen = [float(ask(model(image*changed))) for changed in changes(light)]
                scores.append(sum(seen)/len(seen))
            powers = [np.exp(s - max(scores)) for s in scores]
            return torch.stack([power/sum(powers)*channel for power, channel in zip(powers, A)])
    return terms


def noisy_lights(light, n=10, sigma=2., seed=0):
    random = torch.Generator().manual_seed(seed)
    return [light + sigma*torch.randn(light.shape, generator=random).double() for _ in range(n)]


def rising_lights(light, n=10): return [light*sum(j/n for j in range(1, i + 1)) for i in range(1, n + 1)]


@torch.no_grad()
def ablation_terms(model, layer, image, ask):
    out, act = run(model, layer, image)
    terms = []
    for k in range(act.shape[1]):
        without = act.clone()
        without[0, k] = 0
        terms.append((ask(out) - ask(run(model, layer, image, without)[0]))*act[0, k])
    return torch.stack(terms)


def recipro(gaussian):
    "The score with one place (and its neighbours, with the weights of the paper's 3×3 kernel) kept, less the score of nothing"
    kernel = [[1/16, 1/8, 1/16], [1/8, 1/4, 1/8], [1/16, 1/8, 1/16]]
    @torch.no_grad()
    def one(model, layer, image, ask):
        act = run(model, layer, image)[1]
        h, w = act.shape[2:]
        found, nothing = torch.zeros(h, w, dtype=torch.double), ask(run(model, layer, image, torch.zeros_like(act))[0])
        for i in range(h):
            for j in range(w):
                mask = torch.zeros(h, w, dtype=torch.double)
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < h and 0 <= j + dj < w: mask[i + di, j + dj] = kernel[di + 1][dj + 1] if gaussian else float(di==dj==0)
                found[i, j] = ask(run(model, layer, image, act*mask)[0]) - nothing
        return found
    return one


def full_gradient(model, layer, image, ask):
    "Srinivas & Fleuret, equation 7, every channel rescaled by itself"
    image, kept, hooks = image.clone().requires_grad_(), [], []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d): bias = module.bias - module.weight*module.running_mean/torch.sqrt(module.running_var + module.eps)
        elif isinstance(module, nn.Conv2d) and module.bias is not None: bias = module.bias
        else: continue
        def keep(module, inputs, out, bias=bias): kept.append((bias.detach(), out)); return out.clone()
        hooks.append(module.register_forward_hook(keep))
    score = ask(model(image))
    for hook in hooks: hook.remove()
    of_image, *of_layers = torch.autograd.grad(score, [image] + [out for _, out in kept])
    def psi(part):
        part = part.abs()
        return large((part - part.min())/(part.max() - part.min()), image.shape[2:]) if part.max() > part.min() else 0
    channels = list((of_image*image.detach())[0]) + [b*g for (bias, _), grad in zip(kept, of_layers) for b, g in zip(bias, grad[0])]
    return sum(psi(part) for part in channels)


class Guided(torch.autograd.Function):
    "ReLU whose backward pass asks both that the input and that the gradient be positive"
    @staticmethod
    def forward(ctx, x): ctx.save_for_backward(x); return x*(x > 0)
    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return grad*(x > 0)*(grad > 0)


class GuidedModule(nn.Module):
    def forward(self, x): return Guided.apply(x)


def guided_gradient(model, image, ask):
    "Gradient of the image in a twin whose ReLUs were replaced"
    twin, image = {nn.Sequential: plain, Odd: odd}[type(model)](), image.clone().requires_grad_()
    twin.load_state_dict(model.state_dict())
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU): setattr(parent, name, GuidedModule())
    if isinstance(twin, Odd): twin.relu = Guided.apply
    return torch.autograd.grad(ask(twin(image)), image)[0][0]


def guided_times_gradcam(model, layer, image, ask):
    heat = large(terms_of('gradcam')(model, layer, image, ask).sum(0).clamp(min=0), image.shape[2:])
    return torch.stack([(colour*heat).abs() for colour in guided_gradient(model, image, ask)]).amax(0)


def likeness_at(fine, last):
    "Cosine similarity of every place to the features where the finer layer has evidence that the last one speaks for, by loops, averaged over the two layers"
    def one(model, image, ask):
        (A, g), (B, h) = slope(model, fine, image, ask), slope(model, last, image, ask)
        speaks_for = large(sum(b*d for b, d in zip(B, h)), A.shape[1:])
        seeds = sum((a*d).abs() for a, d in zip(A, g))*(speaks_for > 0)
        maps = []
        for act in (A, B):
            places = [(i, j) for i in range(act.shape[1]) for j in range(act.shape[2])]
            features = {(i, j): act[:, i, j]/max(act[:, i, j].norm(), 1e-12) for i, j in places}
            mean = sum(features.values())/len(places)
            prototype = torch.zeros(len(act), dtype=torch.double)
            for i, j in places:
                (top, bottom), (left, right) = ((k*n//m, -(-(k + 1)*n//m)) for k, n, m in zip((i, j), seeds.shape, act.shape[1:]))
                prototype += seeds[top:bottom, left:right].mean()*(features[i, j] - mean)
            found = torch.zeros(act.shape[1:], dtype=torch.double)
            for i, j in places: found[i, j] = prototype @ (features[i, j] - mean)
            maps.append(found[None, None])
        return fused(maps, 'mean')[0, 0]
    return one


def likeness(model, layer, image, ask):
    "At the last two stages, whichever layer was watched"
    return likeness_at(*(('mix', 'last') if isinstance(model, Odd) else ('0.1', '0')))(model, image, ask)


TERM_ORACLES = {**{name: terms_of(name) for name in TERMS}, 'shapleycam': shapley_terms, 'smooth_gradcam_pp': smooth_terms, 'fem': fem_terms, 'ablationcam': ablation_terms,
                'scorecam': lit_terms(lambda light: [light]), 'sscam': lit_terms(noisy_lights), 'iscam': lit_terms(rising_lights)}
ORACLES = {**{name: (lambda *args, terms=terms: terms(*args).sum(0)) for name, terms in {**TERM_ORACLES, 'finercam': finer_terms()}.items()},
           'reciprocam': recipro(True), 'fullgrad': full_gradient, 'guided_backprop': lambda model, layer, image, ask: guided_gradient(model, image, ask).abs().amax(0), 'guided_gradcam': guided_times_gradcam,
           'likenesscam': likeness}
ELSEWHERE = {'cam', 'eigencam', 'eigengradcam', 'kpca_cam', 'refinecam', 'uniform_map', 'random_map', 'rollout', 'grad_rollout', 'gaussian_map', 'edge_map'} # have a test of their own below, in test_transformers.py or in test_metrics.py
CASES = {'body': (plain, None, '0'), 'overwritten': (plain, '0.1', '0.1'), 'deep-overwritten': (odd, 'down', 'down'), 'reused': (odd, 'act', 'act'), 'last': (odd, None, 'last'), 'inner': (odd, 'mix', 'mix')}
in_each_case = pytest.mark.parametrize('case', CASES)


def oracle(name, model, layer, x, asks=None):
    asks = asks or all_classes(x)
    return stack({(i, c): ORACLES[name](model, layer, image, ask) for i, c, image, ask in each(x, asks)}, asks)


def setting(case):
    build, asked, layer = CASES[case]
    return build(), asked, layer


def test_every_method_has_an_oracle(): assert set(METHODS)==set(ORACLES) | ELSEWHERE


LONG = {'shapleycam', 'iscam', 'sscam', 'reciprocam'} # at 9×13 places the oracle's Hessian, or its run for every place, takes seconds
WITHOUT_LAYER = {'fullgrad', 'guided_backprop'} # one case for each net is all there is
PAIRS = [(name, case) for name in ORACLES for case in CASES if not (name in LONG and case in ('overwritten', 'inner')) and not (name in WITHOUT_LAYER and case not in ('body', 'reused'))]

@pytest.mark.parametrize('name,case', PAIRS)
def test_against_the_oracle(name, case):
    (model, asked, layer), x = setting(case), images(2)
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


# --- several layers, several copies

def fused(maps, how):
    "Each map divided by its largest magnitude, enlarged to the finest, averaged or multiplied"
    size, levels = max((m.shape[-2:] for m in maps), key=lambda s: s[0]*s[1]), []
    for m in maps:
        if how=='product': m = m.clamp(min=0)
        peak = m.abs().amax((2, 3), keepdim=True)
        levels.append(large((m/peak).where(peak > 0, 0), size))
    return sum(levels)/len(levels) if how=='mean' else torch.stack(levels).prod(0)


@pytest.mark.parametrize('build,names', [(plain, ['0.1', '0']), (odd, ['mix', 'last'])])
@pytest.mark.parametrize('name', ['gradcam', 'layercam', 'scorecam', 'ablationcam', 'finercam', 'smooth_gradcam_pp'])
def test_stages(name, build, names):
    "'+stages' finds the last layer with parameters at each resolution"
    model, x = build(), images(2)
    assert_same(ours(model, x, name + '+stages'), fused([oracle(name, model, layer, x) for layer in names], 'mean'))


@pytest.mark.parametrize('base', ['gradcam_pp', 'layercam', 'hirescam'])
def test_refinecam(base):
    for build, names in ((plain, ['0.1', '0']), (odd, ['mix', 'last'])):
        model, x = build(), images(2)
        expected = fused([oracle(base, model, layer, x) for layer in names], 'product')
        assert_same(ours(model, x, 'refinecam', base=base), expected)
        assert_same(ours(model, x, 'refinecam', names[::-1], base=base), expected) # the layers may be listed


@pytest.mark.parametrize('build,names', [(plain, ['0.1', '0']), (plain, ['0.0', '0.3']), (odd, ['mix', 'last']), (odd, ['stem', 'down'])])
def test_likenesscam_at_two_layers(build, names):
    "In one pass, the finer one named first; of more than two, the last two"
    model, x = build(), images(2)
    asks, layers = all_classes(x), names if build is odd else ['0.0', *names] if names[0] != '0.0' else names
    expected = stack({(i, c): likeness_at(*names)(model, image, ask) for i, c, image, ask in each(x, asks)}, asks)
    for asked in (names, layers): assert_same(ours(model, x, 'likenesscam', asked), expected)


def test_likenesscam_asks_for_the_last_two_stages_itself():
    "The same map whether they are watched from the start, which needs no second pass, or from one layer"
    for build in (plain, odd):
        model, x, passes = build(), images(2), []
        expected = ours(model, x, 'likenesscam')
        hook = model.register_forward_hook(lambda module, inputs, out: passes.append(len(out)))
        with Probe(model, LAST_TWO_STAGES) as p:
            cap = p(x)
            passes.clear()
            assert cap.names==(['mix', 'last'] if build is odd else ['0.1', '0'])
            assert_same(as_method('likenesscam')(cap, cap.score(EVERY)), expected)
        hook.remove()
        assert passes==[]


def test_likenesscam_at_one_resolution():
    "Where all layers have one size there is one layer, which stands for both"
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Softplus(), nn.Conv2d(5, 6, 3, padding=1), nn.Softplus())
    model, x = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))).double().eval(), images(2)[:, :, :7, :9]
    asks = all_classes(x)
    with Probe(model, LAST_TWO_STAGES) as p: assert p(x).names==['0']
    assert_same(ours(model, x, 'likenesscam'), stack({(i, c): likeness_at('0', '0')(model, image, ask) for i, c, image, ask in each(x, asks)}, asks))


def of_torchvision(name, **kwargs):
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(num_classes=4, **kwargs).eval()


@pytest.mark.parametrize('name,expected', [('resnet18', ['layer3', 'layer4']), ('resnet50', ['layer3', 'layer4']), ('vgg11', ['features.18', 'features'])])
def test_the_last_two_stages_of_known_networks(name, expected):
    "The last block at the finer resolution, not a layer inside the block that makes it coarser"
    survey = LayerScan(of_torchvision(name), [torch.randn(1, 3, 64, 64)], {})
    found = survey.last_two()
    assert [seen.name for seen in found]==expected
    assert found[-1] is survey.last and found[0].layout.grid==tuple(2*n for n in found[1].layout.grid)


def learner_of(model, n=5):
    samples = [(image, i%4) for i, image in enumerate(images(n, torch.float))]
    learn = Learner(DataLoaders(*[TfmdDL(samples, bs=3, num_workers=0) for _ in range(2)]), model, loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def test_likenesscam_through_get_cams():
    "Both layers are watched in the pass that predicts; layers that are named are respected, and so are methods beside it"
    learn, x, sizes = learner_of(odd(torch.float)), images(5, torch.float), []
    predicted = learn.model(x).argmax(1)
    def of(layers, name='likenesscam'): return torch.stack([ours(learn.model, x[i:i+1], name, layers, ClassIndex(int(c)))[0, 0] for i, c in enumerate(predicted)])
    learn.model.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    def run_of(**kwargs):
        sizes.clear()
        return learn.get_cams(learn.dls.valid, **kwargs).maps
    default = run_of(method='likenesscam')
    assert [n for n in sizes if n > 1]==[3, 2] and len(sizes) <= 4 and default.shape==(5, 9, 13) # beside the batches, one item shows which layers these are
    assert_same(default, of(None), 1e-5)
    named = run_of(method='likenesscam', layer=['stem', 'down'])
    assert sizes==[3, 2]
    assert_same(named, of(['stem', 'down']), 1e-5)
    assert (named - default).abs().max() > .1
    mixed = run_of(method=['gradcam', 'likenesscam'])
    assert_same(mixed[:, 1], default, 1e-5)
    assert_same(mixed[:, 0], large(of(None, 'gradcam').double(), (9, 13)).float(), 1e-5)
    assert run_of(method='gradcam').shape==(5, 3, 4) # who asks for another method alone gets the last layer


def undecided(model, n=3):
    "Items whose predicted class is not that of all their copies"
    pool, looks = images(200), [lambda x, f=f, flip=flip: (x.flip(-1) if flip else x)*f for f in (.9, 1., 1.1) for flip in (False, True)]
    with torch.no_grad(): classes = torch.stack([model(look(pool)).argmax(1) for look in looks])
    found = pool[(classes != classes[1]).any(0) | (classes != classes[0]).any(0)][:n]
    assert len(found)==n
    return found


@pytest.mark.parametrize('name', ['gradcam', 'gradcam_pp', 'hirescam', 'scorecam', 'ablationcam', 'reciprocam', 'guided_backprop', 'finercam'])
def test_tta(name):
    "'+tta': the mean over six copies, each flipped back, of the map for the class of the image itself"
    model = odd()
    x = undecided(model)
    with torch.no_grad(): classes = model(x).argmax(1)
    for asks, score in ((all_classes(x[:1]), EVERY), ([[lambda out, c=int(c): out[0, c]] for c in classes], Predicted())):
        some, total = x[:len(asks)], 0
        for factor in (.9, 1., 1.1):
            total = total + oracle(name, model, 'down', some*factor, asks) + oracle(name, model, 'down', some.flip(-1)*factor, asks).flip(-1)
        assert_same(ours(model, some, name + '+tta', 'down', score), total/6)


def test_stages_and_tta_together():
    model, x = plain(), images(2)
    one = lambda x: fused([oracle('gradcam', model, layer, x) for layer in ('0.1', '0')], 'mean')
    expected = sum(one(x*f) + one(x.flip(-1)*f).flip(-1) for f in (.9, 1., 1.1))/6
    assert_same(ours(model, x, 'gradcam+stages+tta'), expected)


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


# --- every registered method: a new one is tested as soon as it is registered

WRAPPED = ['gradcam+tta', 'gradcam+stages', 'gradcam+pca', 'scorecam+stages', 'reciprocam+tta']
OF_ATTENTION = {'rollout', 'grad_rollout'} # for models that have some: test_transformers.py
ON_ANY_NET = [name for name in [*METHODS, *WRAPPED] if name not in OF_ATTENTION]
every_method = pytest.mark.parametrize('name', ON_ANY_NET)

def net_for(name, dtype=torch.double):
    "Each net and layer to try a method on; CAM is defined for one head only"
    return [(gap(dtype), None)] if name=='cam' else [(plain(dtype), None), (odd(dtype), 'act')]


@every_method
def test_order_and_batch_size(name):
    for model, layer in net_for(name):
        x, order = images(4), [2, 0, 3, 1]
        together = ours(model, x, name, layer)
        assert_same(ours(model, x[order], name, layer), together[order])
        assert_same(torch.cat([ours(model, x[i:i+1], name, layer) for i in range(4)]), together)


@every_method
def test_one_score_is_a_column_of_several(name):
    column = 0 if name=='random_map' else 2 # noise for each of K columns; one score has the noise of the first
    for model, layer in net_for(name):
        x = images()
        several = ours(model, x, name, layer)
        one = ours(model, x, name, layer, lambda out: out[:, column])
        assert one.dim()==several.dim() - 1
        assert_same(one, several[:, column])
        assert_same(ours(model, x, name, layer, ClassIndex(column)), several[:, column:column+1])


@every_method
def test_no_graph_remains(name):
    for model, layer in net_for(name):
        for score in (EVERY, lambda out: out[:, 1]): assert not ours(model, images(), name, layer, score).requires_grad


def normalised(maps):
    "Divided by the largest magnitude; a map that is empty stays so"
    peak = maps.abs().amax((-2, -1), keepdim=True)
    return torch.where(peak > 0, maps/peak, maps)


DEPENDS_ON_SCALE = dict( # whose formula is not homogeneous in the score
    gradcam_pp='alpha has g in its denominator next to a constant: the score is to be a logit', smooth_gradcam_pp='as gradcam_pp', refinecam='its base is gradcam_pp: see below for another',
    scorecam='softmax of the score', sscam='softmax of the score', iscam='softmax of the score', finercam='logits are taken from the score: see below for a scaled model', **{'scorecam+stages': 'softmax of the score'})

@pytest.mark.parametrize('name', [name for name in ON_ANY_NET if name not in DEPENDS_ON_SCALE])
@pytest.mark.parametrize('scale', [1e-8, 1e-15]) # guided_gradcam is a product of two gradients: smaller ones are too little for float32
def test_scale_of_the_score(name, scale):
    for model, layer in net_for(name, torch.float):
        x = images(dtype=torch.float)
        at_1, tiny = ours(model, x, name, layer), ours(model, x, name, layer, lambda out: out*scale)
        assert (normalised(at_1) - normalised(tiny)).abs().max() <= 1e-4


@pytest.mark.parametrize('name,options', [('finercam', {}), ('refinecam', dict(base='layercam')), ('refinecam', dict(base='gradcam')), ('gradcam', {}), ('ablationcam', {}), ('fullgrad', {})])
def test_scale_of_the_logits(name, options):
    "A model whose logits are all 1e-8 of what they were"
    for build, layer, last in ((plain, None, lambda model: model[1][4]), (odd, 'act', lambda model: model.fc)):
        model, x = build(torch.float), images(dtype=torch.float)
        at_1 = ours(model, x, name, layer, **options)
        with torch.no_grad():
            for parameter in last(model).parameters(): parameter *= 1e-8
        assert (normalised(at_1) - normalised(ours(model, x, name, layer, **options))).abs().max() <= 1e-4


class Times(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
    def forward(self, x): return x*self.by


# Grad-CAM++'s alpha is 1/(2 + g ΣA), so a tiny score changes its maps by right; but g ΣA has no unit of the layer's, so another unit for the activations must change nothing,
# whether the gradients or the activations get tiny: an underflow of g² or g³ would show. And at a tiny score the map has to be the formula's, computed in float64.
@pytest.mark.parametrize('name', ['gradcam_pp', 'smooth_gradcam_pp'])
@pytest.mark.parametrize('unit', [1e8, 1e-8, 1e12])
def test_unit_of_the_layer(name, unit):
    model, x = plain(torch.float), images(dtype=torch.float)
    at_1 = ours(model, x, name, '0')
    scaled = nn.Sequential(nn.Sequential(model[0], Times(unit)), nn.Sequential(Times(1/unit), model[1])).eval()
    assert (normalised(at_1) - normalised(ours(scaled, x, name, '0'))).abs().max() <= 1e-4


@pytest.mark.parametrize('scale', [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize('name', ['gradcam_pp', 'smooth_gradcam_pp', 'scorecam', 'sscam', 'iscam', 'finercam'])
def test_tiny_scores_have_the_map_of_the_formula(name, scale):
    x, asks = images(2), [[lambda out, c=c: out[0, c]*scale for c in range(4)] for _ in range(2)]
    found = ours(plain(torch.float), x.float(), name, '0', lambda out: out*scale)
    if name=='finercam': # which classes are near s·scale, and how far its logits outweigh it, is read off the same docstring
        expected, model = {}, plain()
        for i, c, image, ask in each(x, asks):
            out = model(image)[0].tolist()
            near = sorted((d for d in range(4) if d != c), key=lambda d: abs(out[d] - out[c]*scale))[:3]
            expected[i, c] = terms_of('gradcam')(model, '0', image, lambda out: out[0, c]*scale - .6*sum(out[0, d] for d in near)/3).sum(0)
        expected = stack(expected, asks)
    else: expected = oracle(name, plain(), '0', x, asks)
    assert bool(torch.isfinite(found).all())
    assert (normalised(found) - normalised(expected)).abs().max() <= 1e-4


# --- the model is left as it was

def state(model):
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks', '_forward_hooks_always_called', '_forward_hooks_with_kwargs')
    return dict(training=[m.training for m in model.modules()], hooks=[len(getattr(m, kind)) for m in model.modules() for kind in hooks], own_forward=['forward' in m.__dict__ for m in model.modules()],
                types=[type(m) for m in model.modules()], requires_grad=[p.requires_grad for p in model.parameters()], grad_ids=[id(p.grad) for p in model.parameters()],
                modes=(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'), torch._C._len_torch_function_stack()))


def tensors(model): return [t.detach().clone() for p in model.parameters() for t in (p, p.grad) if t is not None] + [b.clone() for b in model.buffers()] + [torch.get_rng_state()]


class as_it_was:
    "Some modules in train mode, one parameter frozen, one with a gradient: all of it, and the random state, is the same after the block"
    def __init__(self, model):
        self.model, self.modules = model, list(model.modules())
        for module in self.modules[1::2]: module.training = True
        parameters = list(model.parameters())
        parameters[0].requires_grad_(False)
        parameters[-1].grad = torch.ones_like(parameters[-1])
    def __enter__(self):
        torch.manual_seed(99) # another state than an earlier call may have left behind
        self.state, self.tensors = state(self.model), tensors(self.model)
    def __exit__(self, kind, *exc):
        if kind is AssertionError: return False
        assert state(self.model)==self.state
        assert all(torch.equal(a, b) for a, b in zip(tensors(self.model), self.tensors, strict=True))


@every_method
@pytest.mark.parametrize('grad_mode', [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_model_is_as_it_was(name, grad_mode):
    for model, layer in net_for(name):
        x = images()
        copy, expected = x.clone(), ours(model, x, name, layer)
        with grad_mode(), as_it_was(model): found = ours(model, x, name, layer)
        assert torch.equal(x, copy)
        assert_same(found, expected) # and it ran in eval mode


def last_linear(model): return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


FEW = dict(sscam=dict(n=2), iscam=dict(n=2), smooth_gradcam_pp=dict(n=3)) # from 64 images on, a copy of the model runs, which cannot be interrupted from here

@every_method
@pytest.mark.parametrize('error,grad_mode', [(RuntimeError, torch.no_grad), (KeyboardInterrupt, torch.enable_grad), (KeyboardInterrupt, torch.inference_mode)])
def test_the_model_is_as_it_was_after_an_interruption(name, error, grad_mode):
    "The first, second or third time that the model (or its tail) runs, its last layer raises"
    for model, layer in net_for(name):
        x, calls, stop, options = images(2), [], 0, FEW.get(name, {})
        def count(module, inputs):
            calls.append(1)
            if len(calls)==stop: raise error('stopped')
        hook = last_linear(model).register_forward_pre_hook(count)
        expected = ours(model, x, name, layer, **options)
        for stop in range(1, min(3, len(calls)) + 1):
            calls.clear()
            with grad_mode(), as_it_was(model):
                with pytest.raises(error, match='stopped'): ours(model, x, name, layer, **options)
            stop = 0
            assert_same(ours(model, x, name, layer, **options), expected) # it can go on
        hook.remove()


@pytest.mark.parametrize('error', [RuntimeError]) # no hook is told of a KeyboardInterrupt: see the docstring of `attach`
@pytest.mark.parametrize('place', [0, 4])
def test_an_attached_probe_gives_the_grad_mode_back_when_the_model_is_interrupted(error, place):
    "Before the layer and behind it; whoever runs the model may have autograd on or off"
    model = plain()
    probe = Probe(model, '0.2').attach()
    def stop(module, inputs): raise error('stopped')
    hook = model[0][place].register_forward_pre_hook(stop)
    try:
        for grad_mode in (True, False):
            with torch.set_grad_enabled(grad_mode):
                with pytest.raises(error, match='stopped'): model(images(1))
                assert torch.is_grad_enabled()==grad_mode
    finally:
        hook.remove()
        probe.detach()


# --- identities

def test_identities_on_gap_and_a_linear_layer():
    model, x = gap(), images(4)
    act, weight = model[0](x).detach(), model[1][2].weight.detach()
    hw, by_cam = act[0, 0].numel(), ours(model, x, 'cam')
    assert (act.sum((2, 3)) != 0).all()
    for name, options in (('gradcam', {}), ('hirescam', {}), ('xgradcam', {}), ('shapleycam', {}), ('reciprocam', dict(gaussian=False))):
        assert_same(ours(model, x, name, **options)*hw, by_cam)
    expected = torch.stack([torch.stack([sum(weight[c, k]*act[i, k].mean()*act[i, k] for k in range(8)) for c in range(4)]) for i in range(4)])
    assert_same(ours(model, x, 'ablationcam'), expected)
    assert_same(ours(model, x, 'cam', score=lambda out: 2*out[:, 1] - out[:, 3]), 2*by_cam[:, 1] - by_cam[:, 3])


def test_shapleycam_is_gradcam_where_the_tail_is_piecewise_linear():
    torch.manual_seed(0)
    model = nn.Sequential(plain()[0], nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))).double().eval()
    assert_same(ours(model, images(), 'shapleycam'), ours(model, images(), 'gradcam'), 1e-12)


def test_full_gradients_add_up_to_the_score():
    "What is stretched and added up in FullGrad is complete: gradient × image and gradients × biases are the score, for a network of ReLUs"
    from fastai_cam.probe.scan import bias_layers, effective_bias
    model, x = gap(), images().requires_grad_()
    layers, kept = bias_layers(model, x), []
    def keep(module, inputs, out): kept.append(out); return out.clone()
    hooks = [module.register_forward_hook(keep) for _, module in layers]
    out = model(x)
    for hook in hooks: hook.remove()
    of_image, *of_layers = torch.autograd.grad(out[:, 1].sum(), [x, *kept])
    total = (of_image*x).sum((1, 2, 3)) + sum((grad.sum((2, 3))*effective_bias(module)).sum(1) for (_, module), grad in zip(layers, of_layers))
    assert len(layers)==4 and (total + model[1][2].bias[1] - out[:, 1]).abs().max() < 1e-12


@pytest.mark.parametrize('name', ['ablationcam', 'reciprocam', 'gradcam', 'shapleycam', 'scorecam', 'iscam'])
def test_a_constant_in_the_score_changes_nothing(name):
    "The weights do not flip where a constant makes the score negative"
    for model, layer in net_for(name):
        x = images()
        assert ours(model, x, name, layer).abs().max() > 0 and (model(x) - 100).max() < 0
        assert_same(ours(model, x, name, layer, lambda out: out - 100), ours(model, x, name, layer))


# --- precision, memory format

GRADIENT_METHODS = [name for name, method in METHODS.items() if method.needs_grad]

def correlation(a, b):
    "The least over items and scores; maps that are empty on both sides agree"
    pairs = zip(a.double().flatten(0, 1).flatten(1).numpy(), b.double().flatten(0, 1).flatten(1).numpy(), strict=True)
    return min(1. if not one.any() and not other.any() else float(np.corrcoef(one, other)[0, 1]) for one, other in pairs)


@pytest.mark.parametrize('name', GRADIENT_METHODS)
@pytest.mark.parametrize('how', ['float16', 'bfloat16', 'autocast', 'autocast around the pass', 'autocast around the method', 'channels last'])
def test_precision_and_memory_format(name, how, record_property):
    least = 1.
    for build, layer in ((plain, None), (odd, 'act'), (gap, None)):
        model, x = build(torch.float), images(dtype=torch.float)
        expected = ours(model, x, name, layer)
        if how in ('float16', 'bfloat16'): model, x = model.to(getattr(torch, how)), x.to(getattr(torch, how))
        if how=='channels last': model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        mixed = lambda on: torch.autocast('cpu', dtype=torch.bfloat16) if on else nullcontext()
        with Probe(model, layer) as p:
            with mixed(how in ('autocast', 'autocast around the pass')):
                cap = p(x)
                score = cap.score(EVERY)
            with mixed(how in ('autocast', 'autocast around the method')): found = METHODS[name](cap, score)
        assert found.dtype==torch.float32 and bool(torch.isfinite(found).all())
        least = min(least, correlation(found, expected))
    record_property('correlation', least)
    coarse = .95 if name=='likenesscam' else .99 # where its evidence is about 0, a place may fall on the other side: 1 in 100 does here
    assert least > (.99999 if how in ('channels last', 'autocast around the method') else coarse)


# --- several layers

AT_THE_LAST_LAYER = {'cam', 'likenesscam', 'uniform_map', 'random_map'} # CAM belongs to the layer before the head, which is to be listed last, and likenesscam's evidence to the last; the baselines have that layer's size

@pytest.mark.parametrize('name', [name for name in ON_ANY_NET if name not in AT_THE_LAST_LAYER])
def test_order_of_the_layers(name):
    for build, names in ((plain, ['0.1', '0', '0.3']), (odd, ['mix', 'act', 'down'])):
        model, x = build(), images(2)
        first = ours(model, x, name, names)
        for other in (names[::-1], names[1:] + names[:1]): assert_same(ours(model, x, name, other), first)


@pytest.mark.parametrize('name', [*TERM_ORACLES, 'finercam', 'reciprocam'])
def test_several_layers_are_fused(name):
    model, x, names = odd(), images(2), ['last', 'act', 'down'] if name=='shapleycam' else ['mix', 'act', 'down']
    assert_same(ours(model, x, name, names), fused([oracle(name, model, layer, x) for layer in names], 'mean'))


@every_method
def test_scores_in_pieces(name, monkeypatch):
    "Gradients of many scores are computed in pieces: the maps are the same, and so is what a piece asks"
    for model, layer in net_for(name):
        x = images(2)
        expected = ours(model, x, name, layer)
        with monkeypatch.context() as patch:
            patch.setattr(Capture._most, '__defaults__', (1,))
            assert_same(ours(model, x, name, layer), expected, 1e-12)
            with Probe(model, layer) as p:
                cap = p(x)
                pieces = cap.score(EVERY).chunks(1)
        assert [piece.shape for piece in pieces]==[(2, 1)]*4
        for c, piece in enumerate(pieces): assert torch.equal(piece.of(model(x.flip(0))), model(x.flip(0))[:, c:c+1])


def test_a_reused_module_is_captured_at_its_last_call():
    model, x, seen = odd(), images(), []
    hook = model.act.register_forward_hook(lambda module, inputs, out: seen.append(out.detach().clone()))
    with torch.no_grad(): model(x)
    hook.remove()
    with Probe(model, 'act') as p: cap = p(x)
    assert len(seen)==2 and seen[0].shape != seen[1].shape and torch.equal(cap.acts[0], seen[1])
    with Probe(model, 'act', grad=False) as p: assert torch.equal(p(x).acts[0], seen[1])
