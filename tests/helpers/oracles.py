"The nets, and every method a second time: as naive as can be, one item, one class, one channel at a time."
from functools import lru_cache

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

from fastai_cam.methods.registry import as_method, METHODS
from fastai_cam.probe.watch import Probe


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


@lru_cache
def random_masks(n, cells, p, seed, size):
    "RISE: which cells are lit and how far the grid is shifted, drawn in this order; pixel by pixel, the grid enlarged to one cell more than the image, and a window of it"
    random, masks = torch.Generator().manual_seed(seed), []
    lit = (torch.rand(n, cells, cells, generator=random) < p).double()
    sides = [-(-side//cells) for side in size]
    down, right = (torch.randint(side, (n,), generator=random).tolist() for side in sides)
    for grid, i, j in zip(lit, down, right):
        masks.append(large(grid, [(cells + 1)*side for side in sides])[i:i + size[0], j:j + size[1]])
    return masks


def masked_at_random(n=1000, cells=7, p=.5, seed=0, centre=True):
    @torch.no_grad()
    def one(model, layer, image, ask):
        masks = random_masks(n, cells, p, seed, tuple(image.shape[2:]))
        outs = torch.cat([model(torch.stack([image[0]*mask for mask in some])) for some in (masks[i:i + 250] for i in range(0, n, 250))])
        scores = [float(ask(outs[i:i + 1])) for i in range(n)]
        off = sum(scores)/n if centre else 0.
        return sum((s - off)*mask for s, mask in zip(scores, masks))/(n*p)
    return one


def blurred(image):
    "51 × 51 pixels and σ = 50 of 224 × 224, and in proportion; mirrored at the border"
    from scipy.ndimage import gaussian_filter1d
    found = image.numpy()
    for axis in (2, 3): found = gaussian_filter1d(found, 50*image.shape[axis]/224, axis=axis, radius=max(1, round(25*image.shape[axis]/224)), mode='mirror')
    return torch.from_numpy(found)


def in_groups(n_groups=32, percentile=70):
    "Zhang et al. 2021: groups of neighbouring channels, each worth what its strongest places add to the score of the blurred image; without the last ReLU"
    def one(model, layer, image, ask):
        A, g = slope(model, layer, image, ask)
        per_group, base, total = -(-len(A)//n_groups), blurred(image), torch.zeros(image.shape[2:], dtype=torch.double)
        with torch.no_grad():
            nothing = ask(model(base))
            for start in range(0, len(A), per_group):
                mask = sum(g[k].mean()*A[k] for k in range(start, min(start + per_group, len(A)))).clamp(min=0)
                mask = large(mask*(mask > float(np.percentile(mask.numpy(), percentile))), image.shape[2:])
                if mask.max()==mask.min(): continue
                mask = (mask - mask.min())/(mask.max() - mask.min())
                total += (ask(model(image*mask + base*(1 - mask))) - nothing)*mask
        return total
    return one


def fitted_mask(n=50, lr=.1):
    "Zhang et al. 2023, by PyTorch's autograd and Adam"
    def one(model, layer, image, ask):
        A = run(model, layer, image)[1].detach()[0].clamp(min=0)
        u = torch.full((len(A),), .5, dtype=torch.double, requires_grad=True)
        def mask():
            light = large(sum(share*channel for share, channel in zip(u.softmax(0), A)), image.shape[2:])
            return (light - light.min())/(light.max() - light.min())
        adam = torch.optim.Adam([u], lr=lr)
        for _ in range(n):
            adam.zero_grad()
            (-ask(model(image*mask()))).backward()
            adam.step()
        return mask()
    return one


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


def alike(act, seeds):
    "Cosine similarity of every place to the features at the seeds, both less the average place's, by loops"
    places = [(i, j) for i in range(act.shape[1]) for j in range(act.shape[2])]
    features = {(i, j): act[:, i, j]/max(act[:, i, j].norm(), 1e-12) for i, j in places}
    mean = sum(features.values())/len(places)
    prototype = torch.zeros(len(act), dtype=torch.double)
    for i, j in places:
        (top, bottom), (left, right) = ((k*n//m, -(-(k + 1)*n//m)) for k, n, m in zip((i, j), seeds.shape, act.shape[1:]))
        prototype += seeds[top:bottom, left:right].mean()*(features[i, j] - mean)
    found = torch.zeros(act.shape[1:], dtype=torch.double)
    for i, j in places: found[i, j] = prototype @ (features[i, j] - mean)
    return found[None, None]


def likeness_at(fine, last):
    "Cosine similarity of every place to the features where the finer layer has evidence that the last one speaks for, by loops, averaged over the two layers"
    def one(model, image, ask):
        (A, g), (B, h) = slope(model, fine, image, ask), slope(model, last, image, ask)
        speaks_for = large(sum(b*d for b, d in zip(B, h)), A.shape[1:])
        seeds = sum((a*d).abs() for a, d in zip(A, g))*(speaks_for > 0)
        return fused([alike(A, seeds), alike(B, seeds)], 'mean')[0, 0]
    return one


def likeness(model, layer, image, ask):
    "At the last two stages, whichever layer was watched"
    return likeness_at(*(('mix', 'last') if isinstance(model, Odd) else ('0.1', '0')))(model, image, ask)


def object_at(fine, last, share=.75):
    "Grad-CAM at the last layer and likeness to where the finer one decides, for and against"
    def one(model, image, ask):
        (A, g), (B, h) = slope(model, fine, image, ask), slope(model, last, image, ask)
        evidence, decides = (large(sum(b*d for b, d in zip(B, weights)), A.shape[1:]) for weights in ([d.mean() for d in h], h))
        strength, top = sum((a*d).abs() for a, d in zip(A, g)), float(evidence.abs().max())
        def side(sign):
            seeds = torch.where(sign*decides > 0, strength, 0)
            found = fused([alike(act, seeds) for act in ([A] if fine==last else [A, B])], 'mean')[0, 0].clamp(min=0)
            return top*(found/max(float(found.max()), 1e-300))**share*((sign*evidence).clamp(min=0)/top)**(1 - share)
        return side(1) - side(-1)
    return one


def the_object(model, layer, image, ask):
    "At the last two stages; a layer that is named is both"
    stages = ('mix', 'last') if isinstance(model, Odd) else ('0.1', '0')
    return object_at(*(stages if layer is None else (layer, layer)))(model, image, ask)


def along_the_way(model, layer, image, ask, tol=.01, most=64):
    "The activation times the mean gradient on the way to it from 0, by Gauss's rule with 1, 4, 8, 16, … points until it adds up"
    out, act = run(model, layer, image)
    act, points = act.detach(), 1
    gap = float(ask(out) - ask(run(model, layer, image, torch.zeros_like(act))[0]))
    while True:
        cells = torch.zeros(act.shape[2:], dtype=torch.double)
        for at, weight in zip(*np.polynomial.legendre.leggauss(points)):
            leaf = (act*(at + 1)/2).requires_grad_()
            grad, = torch.autograd.grad(ask(run(model, layer, image, leaf)[0]), leaf)
            cells += weight/2*(grad*act).sum((0, 1))
        if abs(float(cells.sum()) - gap) <= tol*abs(gap) or points >= most: return cells
        points = 4 if points==1 else 2*points


TERM_ORACLES = {**{name: terms_of(name) for name in TERMS}, 'shapleycam': shapley_terms, 'smooth_gradcam_pp': smooth_terms, 'fem': fem_terms, 'ablationcam': ablation_terms,
                'scorecam': lit_terms(lambda light: [light]), 'sscam': lit_terms(noisy_lights), 'iscam': lit_terms(rising_lights)}
ORACLES = {**{name: (lambda *args, terms=terms: terms(*args).sum(0)) for name, terms in {**TERM_ORACLES, 'finercam': finer_terms()}.items()},
           'reciprocam': recipro(True), 'fullgrad': full_gradient, 'guided_backprop': lambda model, layer, image, ask: guided_gradient(model, image, ask).abs().amax(0), 'guided_gradcam': guided_times_gradcam,
           'likenesscam': likeness, 'objectcam': the_object, 'pathcam': along_the_way, 'rise': masked_at_random(), 'groupcam': in_groups(), 'opticam': fitted_mask()}


def oracle(name, model, layer, x, asks=None):
    asks = asks or all_classes(x)
    return stack({(i, c): ORACLES[name](model, layer, image, ask) for i, c, image, ask in each(x, asks)}, asks)


# --- several layers, several copies

def fused(maps, how):
    "Each map divided by its largest magnitude, enlarged to the finest, averaged or multiplied"
    size, levels = max((m.shape[-2:] for m in maps), key=lambda s: s[0]*s[1]), []
    for m in maps:
        if how=='product': m = m.clamp(min=0)
        peak = m.abs().amax((2, 3), keepdim=True)
        levels.append(large((m/peak).where(peak > 0, 0), size))
    return sum(levels)/len(levels) if how=='mean' else torch.stack(levels).prod(0)


# --- every registered method: a new one is tested as soon as it is registered

WRAPPED = ['gradcam+tta', 'gradcam+stages', 'gradcam+pca', 'scorecam+stages', 'reciprocam+tta']
OF_ATTENTION = ['rollout', 'grad_rollout', 'legrad', 'attention_value'] # for models that have some: test_methods_attention.py
ON_ANY_NET = [name for name in [*METHODS, *WRAPPED] if name not in OF_ATTENTION]
