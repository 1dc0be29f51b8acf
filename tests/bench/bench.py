"""What the methods cost, beside the plain forward pass and beside other libraries: `make bench`.

Every case runs its ways in turns in one process, on the same model, inputs and layer, after checking that they give the same maps.
Ratios are taken round by round; the table gives their median, minimum and maximum. Peak memory is taken in a process for each way.
Named cases only: `python tests/bench/bench.py scorecam eigencam`. The table of each case that ran is written into nbs/stories/benchmarks.ipynb."""
import gc
import inspect
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18, resnet50

import fastai_cam.data, fastai_cam.learner # add explain and get_cams to Learner
from fastai_cam.maps.pixels import normalize, upsample
from fastai_cam.methods.registry import as_method, facts_of, METHODS
from fastai_cam.methods.catalogue import eigencam, fullgrad, gradcam, segeigencam, tta
from fastai_cam.methods import masking
from fastai_cam.methods.masking import ablationcam, groupcam, opticam, rise, scorecam
from fastai_cam.trust.rescore import baseline_images, Rescorer
from fastai_cam.trust.metrics import curve_area, insertion_deletion
from fastai_cam.trust.impute import road
from fastai_cam.probe.watch import Probe
from fastai_cam.probe.guard import eval_mode
from fastai_cam.targets.kinds import AllClasses, ClassIndex, Predicted
from vit import ViT

ROOT = Path(__file__).resolve().parents[2]
ROWS = []


def body_head(build, n_out=1000):
    "A torchvision resnet as fastai builds them: `nn.Sequential(body, head)`"
    torch.manual_seed(0)
    net = build(num_classes=n_out)
    net.fc.weight.data[3].abs_() # the class that is explained has evidence: with random weights many have none anywhere
    return nn.Sequential(nn.Sequential(*list(net.children())[:-2]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)).eval()


def images(n): return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def in_turns(ways, rounds, warm_up=1, between=None):
    "Seconds of each way in each round, run one after the other; the first `warm_up` rounds are not counted, nor what is done `between`"
    times = {name: [] for name in ways}
    for i in range(rounds + warm_up):
        for name, way in ways.items():
            if between is not None: between()
            start = perf_counter()
            way()
            if i >= warm_up: times[name].append(perf_counter() - start)
    return times


def row(case, way, required, ratios, agreement, higher=False):
    "Add a line to the table, with what was required and whether the median keeps it"
    middle = median(ratios)
    kept = '' if required is None else ('yes' if (middle >= required if higher else middle <= required) else '**no**')
    ROWS.append((case, way, '' if required is None else f'{"≥" if higher else "≤"} {required:g} ×', f'**{middle:.2f} ×**', f'{min(ratios):.2f}–{max(ratios):.2f}', kept, agreement))
    print(' | '.join(ROWS[-1]), flush=True)


def ratios(times, way, base): return [a/b for a, b in zip(times[way], times[base])]


# -- ours, and theirs

def plain(model, x):
    with eval_mode(model), torch.no_grad(): return model(x)

def ours(model, x, method=gradcam, layer=None, target=None, **options):
    "Maps of `method`, scaled to 0–1 and enlarged to the images, as the others return them"
    with Probe(model, layer, grad=method.facts.grad) as p:
        cap = p(x)
        maps = method(cap, cap.score(target or ClassIndex(3)), **options)
    return upsample(normalize(maps), x.shape[-2:])[:, 0]

def ours_raw(model, x, method=gradcam, layer=None, target=None, **options):
    "Maps of `method` as the library keeps them: signed, at the resolution of the layer"
    with Probe(model, layer, grad=method.facts.grad, resumes=method.facts.resumes) as p:
        cap = p(x)
        return method(cap, cap.score(target or ClassIndex(3)), **options)

def grad_cam_lib(model, x, name='GradCAM', layer=None, **call):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    with getattr(pytorch_grad_cam, name)(model=model, target_layers=[] if name=='FullGrad' else [model.get_submodule(layer or '0')]) as peer:
        return torch.as_tensor(peer(input_tensor=x, targets=[ClassifierOutputTarget(3)]*len(x), **call))

def torchcam_lib(model, x, name='GradCAM', layer=None):
    import torchcam.methods
    with getattr(torchcam.methods, name)(model, layer or '0') as extractor:
        model.eval()
        with torch.inference_mode(name=='ScoreCAM'): out = model(x)
        maps = extractor(3, out if name=='GradCAM' else None)[0]
    return upsample(maps.detach(), x.shape[-2:])

def captum_lib(model, x):
    from captum.attr import LayerGradCam
    maps = LayerGradCam(model, model[0]).attribute(x, target=3).detach()[:, 0]
    return upsample(normalize(maps), x.shape[-2:])


def quantus_curves(model, x, base, maps, steps, bs=16):
    "Scores of class 3 while the pixels of `x` are replaced by those of `base`, most relevant first, from the first step on"
    import quantus
    if len(x) > bs: return torch.cat([quantus_curves(model, *part, steps, bs) for part in zip(x.split(bs), base.split(bs), maps.split(bs))])
    x, base, maps = x.numpy(), base.numpy(), maps[:, None].numpy()
    def replace(arr, indices, **kwargs):
        arr = arr.copy()
        np.put_along_axis(arr, indices, np.take_along_axis(base.reshape(len(x), -1), indices, 1), 1)
        return arr
    metric = quantus.PixelFlipping(features_in_step=x[0].size//steps, perturb_func=replace, normalise=False, abs=False, disable_warnings=True)
    return torch.tensor(metric(model=model, x_batch=x, y_batch=np.full(len(x), 3), a_batch=maps, softmax=True, device='cpu', batch_size=len(x)))


def by_hand(model, x, base, maps, steps):
    "The same in the loop that papers' code has"
    order, curve = maps.flatten(1).argsort(dim=1, descending=True), []
    now, n = x.flatten(2).clone(), maps[0].numel()
    with torch.no_grad():
        for k in range(steps + 1):
            if k: # the pixels of this step
                places = order[:, n*(k-1)//steps:n*k//steps][:, None].expand(-1, 3, -1)
                now.scatter_(2, places, base.flatten(2).gather(2, places))
            curve.append(model(now.view_as(x)).softmax(1)[:, 3])
    return torch.stack(curve, 1)


def correlation(a, b):
    "Of two maps; 1 for two that are empty"
    if a.std()==0 and b.std()==0: return 1.
    return float(np.corrcoef(a.flatten(), b.flatten())[0, 1]) if a.std() and b.std() else 0.

def agree(ours, theirs, at_least=.999):
    "Correlation of the maps, image by image: the smallest"
    assert any(a.std() > 0 for a in ours), 'every map is empty: nothing is compared'
    low = min(correlation(a, b) for a, b in zip(ours, theirs))
    assert low >= at_least, f'the maps do not agree: correlation {low:.4f}'
    return f'{low:.5f}'


# -- the cases

def case_gradcam():
    "Grad-CAM at the body beside the forward pass"
    for build, bs, rounds in ((resnet18, 16, 15), (resnet50, 8, 11)):
        model, x, name = body_head(build), images(bs), f'{build.__name__}, batch {bs}'
        reference = ours(model, x)
        found = {'pytorch-grad-cam': grad_cam_lib(model, x), 'torchcam': torchcam_lib(model, x), 'captum': captum_lib(model, x)}
        same = {peer: agree(reference, maps) for peer, maps in found.items()}
        times = in_turns({'forward': lambda: plain(model, x), 'ours': lambda: ours_raw(model, x), 'pytorch-grad-cam': lambda: grad_cam_lib(model, x),
                          'torchcam': lambda: torchcam_lib(model, x), 'captum': lambda: captum_lib(model, x)}, rounds)
        row(f'`gradcam` ÷ forward, {name}', 'fastai_cam', 1.05, ratios(times, 'ours', 'forward'), 'reference')
        for peer in found: row(f'`gradcam` ÷ forward, {name}', peer, None, ratios(times, peer, 'forward'), same[peer])


def case_classes():
    "All classes in one call beside the forward pass"
    from fastai.vision.learner import create_head
    model, x, target = body_head(resnet18, 10), images(16), AllClasses(range(10))
    with_fastai_head = nn.Sequential(model[0], create_head(512, 10)).eval()
    for net, head in ((model, 'GAP + linear'), (with_fastai_head, "fastai's head")):
        with Probe(net) as p: one_by_one = torch.cat([gradcam(cap, cap.score(ClassIndex(c))) for cap in [p(x)] for c in range(10)], 1)
        assert torch.allclose(ours_raw(net, x, target=target), one_by_one, atol=1e-5*one_by_one.abs().max()), 'ten maps at once are not ten maps'
        times = in_turns({'forward': lambda: plain(net, x), 'ours': lambda: ours_raw(net, x, target=target)}, 15)
        row(f'10 classes at once ÷ forward, resnet18 with {head}, batch 16', 'fastai_cam', 1.15, ratios(times, 'ours', 'forward'), 'each class by itself')


def case_elementwise():
    "The other methods of activation × gradient beside Grad-CAM"
    model, x = body_head(resnet18), images(16)
    names = ['hirescam', 'elementwise', 'layercam', 'xgradcam', 'gradcam_pp']
    times = in_turns({name: lambda name=name: ours_raw(model, x, METHODS[name]) for name in ['gradcam', *names]}, 15)
    for name in names: row(f'`{name}` ÷ `gradcam`, resnet18, batch 16', 'fastai_cam', 1.05, ratios(times, name, 'gradcam'), 'in the tests')


def case_several():
    "Several methods in one call beside one of them, through the learner"
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.learner import Learner
    samples = [(x, 0) for x in images(16)]
    dls = DataLoaders(*[TfmdDL(samples, bs=16, num_workers=0) for _ in range(2)])
    learn = Learner(dls, body_head(resnet18, 10), loss_func=nn.CrossEntropyLoss())
    methods = ['gradcam', 'layercam', 'hirescam', 'xgradcam', 'elementwise', 'gradcam_pp']
    with learn.no_bar():
        both = learn.get_cams(method=methods).maps
        for i, name in enumerate(methods): assert torch.allclose(both[:, i], learn.get_cams(method=name).maps, atol=1e-6*both[:, i].abs().max())
        times = in_turns({'one': lambda: learn.get_cams(), 'six': lambda: learn.get_cams(method=methods)}, 15)
    row('6 methods in one `learn.get_cams` ÷ one, resnet18, batch 16', 'fastai_cam', 1.10, ratios(times, 'six', 'one'), 'each method by itself')


def case_ablationcam():
    "Ablation-CAM at a layer inside the body; theirs takes two minutes, so it runs once"
    model, x, layer, kept = body_head(resnet50), images(1), '0.7.2', {}
    def run(name, way): kept[name] = way()
    ours(model, x, ablationcam, layer)
    times = in_turns({'theirs': lambda: run('theirs', lambda: grad_cam_lib(model, x, 'AblationCAM', layer)), 'ours': lambda: run('ours', lambda: ours(model, x, ablationcam, layer))}, 1, warm_up=0)
    row(f'pytorch-grad-cam ÷ `ablationcam`, resnet50 at `{layer}`, 1 image', 'fastai_cam', 50, ratios(times, 'theirs', 'ours'), agree(kept['ours'], kept['theirs'], .99), higher=True)


def case_eigencam():
    "EigenCAM's projection, of the same activations"
    from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
    for build, bs in ((resnet18, 16), (resnet50, 4)):
        model, x = body_head(build), images(bs)
        with Probe(model, grad=False) as p: cap = p(x)
        score, acts = cap.score(ClassIndex(3)), cap.acts[0].numpy()
        mine, theirs = eigencam(cap, score)[:, 0], torch.as_tensor(get_2d_projection(acts))
        same = agree(mine, theirs*(mine*theirs).sum((1, 2), keepdim=True).sign()) # their sign is arbitrary
        times = {'theirs': [], 'ours': []}
        for _ in range(5): # ours takes about a millisecond: the median of twenty calls, or the threads that numpy's SVD leaves spinning would be timed
            times['theirs'] += in_turns({'theirs': lambda: get_2d_projection(acts)}, 1, warm_up=0)['theirs']
            times['ours'].append(median(in_turns({'ours': lambda: eigencam(cap, score)}, 20, warm_up=0)['ours']))
        row(f'pytorch-grad-cam ÷ `eigencam` (projection), {build.__name__}, batch {bs}', 'fastai_cam', 50, ratios(times, 'theirs', 'ours'), same, higher=True)


def case_segeigencam():
    "Seg-Eigen-CAM, gradients and projection"
    model, x = body_head(resnet18), images(8)
    same = agree(ours(model, x, segeigencam), grad_cam_lib(model, x, 'SegEigenCAM'), .99) # theirs enlarges with aligned corners
    times = in_turns({'theirs': lambda: grad_cam_lib(model, x, 'SegEigenCAM'), 'ours': lambda: ours(model, x, segeigencam), 'forward': lambda: plain(model, x)}, 7)
    row('pytorch-grad-cam ÷ `segeigencam`, resnet18, batch 8', 'fastai_cam', None, ratios(times, 'theirs', 'ours'), same, higher=True)
    row('`segeigencam` ÷ forward, resnet18, batch 8', 'fastai_cam', None, ratios(times, 'ours', 'forward'), '')


def case_scorecam():
    "Score-CAM, exact, against both peers"
    model, x = body_head(resnet18), images(2)
    mine = ours(model, x, scorecam)
    same = {'pytorch-grad-cam': agree(mine, grad_cam_lib(model, x, 'ScoreCAM'), .99), 'torchcam': agree(mine, torchcam_lib(model, x, 'ScoreCAM'))} # the first enlarges with aligned corners
    times = in_turns({'forward': lambda: plain(model, x), 'ours': lambda: ours(model, x, scorecam), 'pytorch-grad-cam': lambda: grad_cam_lib(model, x, 'ScoreCAM'),
                      'torchcam': lambda: torchcam_lib(model, x, 'ScoreCAM')}, 3, warm_up=0)
    for peer in same: row(f'{peer} ÷ `scorecam` (exact), resnet18, batch 2', 'fastai_cam', 1.5, ratios(times, peer, 'ours'), same[peer], higher=True)
    row('`scorecam` (exact) ÷ forward, resnet18, batch 2', 'fastai_cam', None, ratios(times, 'ours', 'forward'), '')


def case_scorecam_photo():
    "Score-CAM, exact, on a photograph with real weights: channels that light nothing need no pass"
    from fastai_cam.examples.imagenet import imagenet_learner
    learn = imagenet_learner(bs=1)
    model, x = learn.model.eval(), learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    kept = {}
    def run(name, way): kept[name] = way()
    times = in_turns({'theirs': lambda: run('theirs', lambda: torchcam_lib(model, x, 'ScoreCAM')), 'ours': lambda: run('ours', lambda: ours(model, x, scorecam))}, 3, warm_up=0)
    row('torchcam ÷ `scorecam` (exact), EfficientNet-Lite0, 1 photograph', 'fastai_cam', 1.5, ratios(times, 'theirs', 'ours'), agree(kept['ours'], kept['theirs']), higher=True)


def case_scorecam_limit():
    "What bounds exact Score-CAM: the convolutions of one of its batches, in the model's faster twin, beside what a matrix product reaches"
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode
    model, x = body_head(resnet18), images(8)
    with Probe(model, grad=False) as p: cap = p(x)
    cap.prepare(1000)
    with FlopCounterMode(display=False) as counter: cap.run(x)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(5): cap.run(x)
    events = recorded.key_averages()
    convolving, everything = sum(e.self_cpu_time_total for e in events if 'convolution' in e.key), sum(e.self_cpu_time_total for e in events)
    side = torch.randn(2048, 2048)
    times = in_turns({'product': lambda: side @ side, 'batch': lambda: cap.run(x)}, 9)
    reached, possible = counter.get_total_flops()/median(times['batch'])/1e9, 2*2048**3/median(times['product'])/1e9
    ROWS.append(('share of the time that is spent in convolutions', 'fastai_cam', '', f'**{convolving/everything:.0%}**', '', '', ''))
    ROWS.append(('floating point operations a second, of what a matrix product reaches', 'fastai_cam', '', f'**{reached/possible:.0%}**', f'{reached:,.0f} of {possible:,.0f} GFLOP/s', '', ''))
    for line in ROWS: print(' | '.join(line), flush=True)


def case_pruned():
    "Score-CAM of the most active channels beside the exact one, on photographs with real weights"
    from fastai_cam.examples.imagenet import imagenet_learner
    learn = imagenet_learner(bs=10)
    x = torch.cat([batch[0] for batch in learn.dls.valid]).as_subclass(torch.Tensor)
    whole, part = ([ours_raw(learn.model, x[i:i+1], scorecam, target=Predicted(), top=top) for i in range(len(x))] for top in (None, 64))
    found = [correlation(a, b) for a, b in zip(whole, part)]
    print(f'correlation over {len(x)} photographs: mean {np.mean(found):.4f}, smallest {min(found):.4f}')
    assert np.mean(found) >= .95
    times = in_turns({'exact': lambda: ours_raw(learn.model, x[:3], scorecam, target=Predicted()), 'top': lambda: ours_raw(learn.model, x[:3], scorecam, target=Predicted(), top=64)}, 3)
    row('`scorecam` (exact) ÷ `scorecam(top=64)`, EfficientNet-Lite0, photographs', 'fastai_cam', 8, ratios(times, 'exact', 'top'), f'{np.mean(found):.3f} mean of {len(x)}, smallest {min(found):.3f}', higher=True)


def rise_by_hand(model, x, n):
    "The paper's sum over the same masks, all of which are in memory, as in the authors' code"
    lights = masking._cells_light(*masking._random_cells(n, 7, .5, 0, x.shape[2:]), x.shape[2:])
    with torch.no_grad(): return torch.stack([torch.einsum('n,nhw->hw', torch.cat([model(image*some[:, None])[:, 3] for some in lights.split(32)]), lights)/(n*.5) for image in x])

def groupcam_by_hand(model, x, groups=32):
    "Group by group, as in the authors' code"
    blurred, maps = masking._blurred(x), []
    for image, base in zip(x[:, None], blurred[:, None]):
        act = model[0](image).detach().requires_grad_()
        grad, = torch.autograd.grad(model[1](act)[0, 3], act)
        total = torch.zeros(x.shape[2:])
        with torch.no_grad():
            nothing = model(base)[0, 3]
            for group in (act*grad.mean((2, 3), keepdim=True)).chunk(groups, 1):
                mask = group.sum(1, keepdim=True).clamp(min=0)
                mask = upsample(mask*(mask > float(np.percentile(mask.numpy(), 70))), x.shape[2:])
                if mask.max()==mask.min(): continue
                mask = (mask - mask.min())/(mask.max() - mask.min())
                total += (model(image*mask + base*(1 - mask))[0, 3] - nothing)*mask[0, 0]
        maps.append(total)
    return torch.stack(maps)

def opticam_by_hand(model, x, n):
    "By autograd and PyTorch's Adam, as in the authors' code"
    with torch.no_grad(): acts = model[0](x).clamp(min=0)
    weights = torch.full((*acts.shape[:2], 1, 1), .5, requires_grad=True)
    def masks():
        light = upsample((weights.softmax(1)*acts).sum(1), x.shape[2:])
        low, high = light.amin((1, 2), keepdim=True), light.amax((1, 2), keepdim=True)
        return (light - low)/(high - low)
    adam = torch.optim.Adam([weights], lr=.1)
    for _ in range(n):
        adam.zero_grad()
        (-model(x*masks()[:, None])[:, 3].sum()).backward()
        adam.step()
    return masks().detach()

def case_masking():
    "Masks that are random, made of groups of channels, or fitted, beside the forward pass and beside loops as in their authors' code; other libraries here have none of the three"
    model, x = body_head(resnet18), images(2)
    for parameter in model.parameters(): parameter.requires_grad_(False) # or the loop by hand computes their gradients, too
    for method, options, peer in ((rise, dict(n=128), rise_by_hand), (groupcam, {}, groupcam_by_hand), (opticam, dict(n=10), opticam_by_hand)):
        mine = partial(ours_raw, model, x, method, **options)
        theirs = partial(peer, model, x, **options)
        compared = partial(mine, centre=False) if method is rise else mine
        same = agree(compared()[:, 0], theirs(), .99)
        times = in_turns({'forward': lambda: plain(model, x), 'ours': mine, 'theirs': theirs}, 3, warm_up=0)
        name = f'`{method.__name__}(n={options["n"]})`' if options else f'`{method.__name__}`'
        row(f'a loop by hand ÷ {name}, resnet18, batch 2', 'fastai_cam', None, ratios(times, 'theirs', 'ours'), same, higher=True)
        row(f'{name} ÷ forward, resnet18, batch 2', 'fastai_cam', None, ratios(times, 'ours', 'forward'), '')


def case_default():
    "The map that is made if none is named, and evidence that adds up, beside the forward pass: a convolutional network, and a transformer (ViT-S/14, 256 places), whose methods are beside them"
    for name, model, methods in (('resnet50', body_head(resnet50), ('objectcam', 'pathcam', 'gradcam', 'likenesscam')),
                                 ('ViT-S/14', ViT(1000).eval(), ('objectcam', 'pathcam', 'gradcam', 'likenesscam', 'grad_rollout', 'legrad', 'attention_value'))):
        x = images(2)
        ways = {method: partial(ours_raw, model, x, METHODS[method], layer=facts_of(METHODS[method]).layers) for method in methods}
        times = in_turns({'forward': lambda: plain(model, x), **ways}, 3)
        for method in methods:
            row(f'`{method}` ÷ forward, {name}, batch 2', 'fastai_cam', None, ratios(times, method, 'forward'), '')


def case_fullgrad():
    "FullGrad"
    model, x = body_head(resnet18), images(8)
    same = agree(ours(model, x, fullgrad), grad_cam_lib(model, x, 'FullGrad'), .99)
    times = in_turns({'theirs': lambda: grad_cam_lib(model, x, 'FullGrad'), 'ours': lambda: ours(model, x, fullgrad)}, 5)
    row('pytorch-grad-cam ÷ `fullgrad`, resnet18, batch 8', 'fastai_cam', 4, ratios(times, 'theirs', 'ours'), same, higher=True)


def case_tta():
    "Smoothing over augmented copies"
    model, x, method = body_head(resnet18), images(8), as_method('gradcam+tta')
    def as_theirs(cap, score): return upsample(normalize(gradcam(cap, score)), x.shape[-2:]) # each copy's map is cut at zero, scaled and enlarged before the mean; ours is the mean of the raw maps
    same = agree(ours(model, x, as_method(tta(as_theirs))), grad_cam_lib(model, x, aug_smooth=True))
    times = in_turns({'theirs': lambda: grad_cam_lib(model, x, aug_smooth=True), 'ours': lambda: ours(model, x, method), 'forward': lambda: plain(model, x)}, 7)
    row('pytorch-grad-cam ÷ `gradcam+tta`, resnet18, batch 8', 'fastai_cam', 3, ratios(times, 'theirs', 'ours'), same, higher=True)


def case_insertion_deletion():
    "Insertion and deletion curves of 16 images in 21 steps"
    # Quantus takes divisors of 3 × 224² only. It is no requirement, as it brings an OpenCV that overwrites grad-cam's: `pip install --no-deps quantus cachetools`
    model, x, steps = body_head(resnet18), images(16), 21
    blurred, black, maps = baseline_images(x, 'blur').contiguous(), torch.zeros_like(x), torch.rand(16, 224, 224, generator=torch.Generator().manual_seed(2))
    def mine(dtype=None):
        with Probe(model, grad=False) as p:
            cap = p(x)
            return insertion_deletion(maps, x, Rescorer(cap, cap.score(ClassIndex(3)), partial(torch.softmax, dim=1), n_images=16*2*steps, dtype=dtype), steps)
    def passes():
        with Probe(model, grad=False) as p:
            cap = p(x)
            cap.prepare(16*2*steps)
            for _ in range(4*steps): cap.run(x[:8])
    def both(curves, **kwargs): return lambda: (curves(model, blurred, x, maps, steps, **kwargs), curves(model, x, black, maps, steps, **kwargs))
    peers = {'a loop by hand': both(by_hand)}
    if find_spec('quantus'): peers.update({'Quantus': both(quantus_curves), 'Quantus, 8 images at a time,': both(quantus_curves, bs=8)})
    reference, low = torch.cat(mine()), torch.cat(mine(torch.bfloat16))
    same = {name: agree(reference[:, 1:], torch.cat([curve[:, -steps:] for curve in peer()]), .99) for name, peer in peers.items()}
    times = in_turns({'ours': mine, 'ours in bfloat16': lambda: mine(torch.bfloat16), **peers, 'passes': passes}, 5, warm_up=0) # all of them have run once
    row('`insertion_deletion` ÷ its forward passes alone, resnet18, batch 16, 21 steps', 'fastai_cam', None, ratios(times, 'ours', 'passes'), '')
    for name in peers: row(f'{name} ÷ `insertion_deletion`, resnet18, batch 16, 21 steps', 'fastai_cam', 2 if name=='Quantus' else None, ratios(times, name, 'ours'), same[name], higher=True)
    apart = (curve_area(low) - curve_area(reference)).abs().max()
    for name in peers: row(f'{name} ÷ `insertion_deletion` with `dtype=torch.bfloat16`', 'fastai_cam', 2, ratios(times, name, 'ours in bfloat16'), f'areas apart by {apart:.5f} at most', higher=True)


def case_road():
    "ROAD of 16 images, 20 to 80 percent of the pixels removed"
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
    model = body_head(resnet18)
    x = upsample(torch.randn(16, 3, 28, 28, generator=torch.Generator().manual_seed(1)), (224, 224)) + .1*images(16) # as smooth as photos are
    maps = torch.rand(16, 7, 7, generator=torch.Generator().manual_seed(2))
    large = upsample(maps, (224, 224)).numpy()
    def mine():
        with Probe(model, grad=False) as p:
            cap = p(x)
            return road(maps, x, Rescorer(cap, cap.score(ClassIndex(3)), partial(torch.softmax, dim=1)))
    def theirs(): return ROADCombined(percentiles=[20, 40, 60, 80])(x, large, [ClassifierOutputSoftmaxTarget(3)]*16, model)
    torch.manual_seed(0)
    same = f'{float(np.corrcoef(mine(), theirs())[0, 1]):.5f}'
    times = in_turns({'theirs': theirs, 'ours': mine}, 3, warm_up=0) # half a minute for theirs
    row('pytorch-grad-cam ÷ `road`, resnet18, batch 16', 'fastai_cam', 5, ratios(times, 'theirs', 'ours'), same, higher=True)


MEMORY = """
import sys, torch
sys.path.insert(0, {folder!r})
from bench import *
model, x = body_head({build}), images({bs})
with torch.no_grad(): model(x[:1])
kilobytes = lambda key: next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key))
{prepare}
before = kilobytes('VmRSS')
{way}
print((kilobytes('VmHWM') - before)/1024)
"""

def extra_memory(way, build='resnet50', bs=32, prepare=''):
    "Growth of the peak resident size in MB while `way` runs in a process of its own; large tensors get a mapping each, so that it is repeatable"
    script = MEMORY.format(folder=str(Path(__file__).parent), build=build, bs=bs, way=way, prepare=prepare)
    return float(subprocess.run([sys.executable, '-W', 'ignore', '-c', script], capture_output=True, text=True, check=True, env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '1000000'}).stdout.splitlines()[-1])

def case_memory():
    "Extra peak memory"
    ways = {'forward': 'plain(model, x)', 'fastai_cam': 'ours_raw(model, x)', 'pytorch-grad-cam': 'grad_cam_lib(model, x)', 'torchcam': 'torchcam_lib(model, x)', 'captum': 'captum_lib(model, x)'}
    imports = {'pytorch-grad-cam': 'import pytorch_grad_cam', 'torchcam': 'import torchcam.methods', 'captum': 'import captum.attr'}
    found = {way: [extra_memory(code, prepare=imports.get(way, '')) for _ in range(3)] for way, code in ways.items()}
    for way in list(ways)[1:]:
        row('extra peak memory of `gradcam` ÷ forward\'s, resnet50, batch 32', way, 1.05 if way=='fastai_cam' else None, [mb/median(found['forward']) for mb in found[way]], f'{median(found[way]):,.0f} MB')
    small, large = (median(extra_memory(f'ours_raw(model, x, scorecam, bs={bs}, top=64)', 'resnet18', 2) for _ in range(3)) for bs in (4, 16))
    print(f'scorecam, two images: {small:,.0f} MB with bs=4, {large:,.0f} MB with bs=16')
    ROWS.append(('extra peak memory of `scorecam`, resnet18, batch 2', 'fastai_cam', 'bounded by `bs`', f'{small:,.0f} MB with `bs=4`', f'{large:,.0f} MB with `bs=16`', 'yes' if small < large else '**no**', ''))


def case_files():
    "Overlays of twenty photographs as PNG files, beside encoding the same pictures: reading, colouring and writing come to it"
    from fastai_cam.examples.imagenet import imagenet_learner
    learn = imagenet_learner()
    with learn.no_bar(): cams = learn.get_cams(learn.dls.valid)
    images = [cam_map.overlay() for cam_map in cams]
    with tempfile.TemporaryDirectory() as folder:
        def encode():
            for image in images: image.save(io.BytesIO(), 'PNG')
        times = in_turns({'PNG': encode, 'save_all': lambda: cams.save_all(folder)}, 7)
        saved = [np.asarray(Image.open(file)) for file in sorted(Path(folder).iterdir())]
    assert all((np.asarray(image)==file).all() for image, file in zip(images, saved, strict=True))
    row('`cams.save_all(folder)` ÷ encoding its PNGs, 20 photographs, 224²', 'PNG', 3., ratios(times, 'save_all', 'PNG'), 'the same pixels')


def case_losses(n=9):
    "The largest losses with their maps, beside fastai's own plot of them: resnet18 with fastai's default head, files of 500 × 375, 224², drawn as a notebook does"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    from fastai.interpret import ClassificationInterpretation
    from fastai.vision.all import accuracy, ImageDataLoaders, Resize, vision_learner
    from fastai_cam.interpret import CAMInterpretation
    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0)
        for i in range(2*n): Image.fromarray(noise.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC).save(f'{folder}/{"ab"[i%2]}_{i}.jpg')
        files = sorted(Path(folder).iterdir())
        dls = ImageDataLoaders.from_name_func(folder, files, label_func=lambda name: name[0], valid_pct=.5, seed=0, item_tfms=Resize(224), bs=16, num_workers=0)
        learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy)
        with learn.no_bar():
            theirs, mine = (cls.from_learner(learn) for cls in (ClassificationInterpretation, CAMInterpretation))
            def drawn(plot):
                plot()
                plt.gcf().canvas.draw()
                plt.close('all')
            times = in_turns({'fastai': lambda: drawn(lambda: theirs.plot_top_losses(n)), 'gradcam': lambda: drawn(lambda: mine.plot_top_losses_cam(n, method='gradcam')),
                              'default': lambda: drawn(lambda: mine.plot_top_losses_cam(n)), 'forward': lambda: learn.get_preds(dl=learn.dls.test_dl(files[:n]))}, 11, between=gc.collect) # figures are circles: whose are collected when is chance
    same = f'of which the forward pass is {median(ratios(times, "forward", "fastai")):.2f}'
    for way, asked, required in (('gradcam', "method='gradcam'", 1.1), ('default', 'the default map', 1.2)):
        row(f'`interp.plot_top_losses_cam({n})` ÷ `plot_top_losses({n})`, {asked}', 'fastai', required, ratios(times, way, 'fastai'), same)


def case_trust():
    "A verdict on one map, in forward passes of one picture: EfficientNet-Lite0 with its weights, 20 photographs"
    from fastai_cam.examples.imagenet import imagenet_learner
    import fastai_cam.trust # adds cam_trust to Learner
    learn = imagenet_learner()
    files = list(learn.dls.valid.items)
    with learn.no_bar():
        times = in_turns({'trust': lambda: learn.cam_trust(files, method='gradcam'), 'forward': lambda: learn.get_preds(dl=learn.dls.test_dl(files, bs=10))}, 3)
    row('`learn.cam_trust` ÷ a forward pass with its loading, 20 photographs', 'fastai_cam', 60, ratios(times, 'trust', 'forward'), '')


def lite0_learner(n, bs):
    "EfficientNet-Lite0 with its weights on `n` photographs that are in memory"
    from fastai_cam.examples.imagenet import imagenet_learner
    learn = imagenet_learner(bs=bs)
    samples = [(x.as_subclass(torch.Tensor), int(y)) for batch in learn.dls.valid for x, y in zip(*batch)]
    return learner_of_samples([samples[i % len(samples)] for i in range(n)], learn.model, bs)

def learner_of_samples(samples, model, bs):
    "A learner whose validation set is in memory: what reading costs is the same for both ways, and would hide what maps cost"
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.learner import Learner
    return Learner(DataLoaders(*[TfmdDL(samples, bs=bs, num_workers=0) for _ in range(2)]), model, loss_func=nn.CrossEntropyLoss())

def case_dataset(n=192, bs=16):
    "A whole data set as a table on the disk, with predictions and losses, beside predictions and losses alone"
    for name, learn in (('resnet18', learner_of_samples([(x, 3) for x in images(n)], body_head(resnet18), bs)), ('EfficientNet-Lite0', lite0_learner(n, bs))):
        valid, folders = learn.dls.valid, tempfile.TemporaryDirectory()
        fresh = iter(range(1000))
        def table(method): return learn.explain(valid, Path(folders.name)/str(next(fresh)), method=method)
        with learn.no_bar(), folders:
            same = agree(table('gradcam')[:16].maps(), learn.get_cams(valid, method='gradcam', max_n=16).maps)
            times = in_turns({'preds': lambda: learn.get_preds(dl=valid, with_loss=True), 'gradcam': lambda: table('gradcam'), 'default': lambda: table(None)}, 5)
        for way, required in (('gradcam', 1.10), ('default', None)):
            asked = "method='gradcam'" if way=='gradcam' else 'the default map'
            row(f'`learn.explain` ÷ `get_preds(with_loss=True)`, {asked}, {name}, {n} images in batches of {bs}', 'fastai_cam', required, ratios(times, way, 'preds'), same if way=='gradcam' else '')


def report_memory(n):
    "MB of memory that writing a report of `n` pictures takes at most, beyond what was there before it"
    code = f"""
import resource, sys, tempfile, torch
sys.path.insert(0, {str(ROOT/'tests')!r})
from helpers.reports import interpretation, plain
class Samples:
    def __init__(self, n): self.n, self.items = n, range(n) # else the samples themselves would be kept, as what the items are called
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i >= self.n: raise IndexError
        return torch.linspace(0, 1, 96*96).view(1, 96, 96).repeat(3, 1, 1)*(i%7 + 1)/7, i%2
first, all = (interpretation(plain(Samples(n), 2, bs=32)) for n in (64, {n}))
with tempfile.TemporaryDirectory() as folder:
    first.report(folder + '/page.html', method='gradcam')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    all.report(folder + '/page.html', method='gradcam')
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True, env={name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')})
    return float(done.stdout.split()[-1])


def opened(browser, page):
    "Seconds until all pictures of the first view are there; while it is scrolled, milliseconds of a frame, and of the processor's time that the page takes for one"
    context = browser.new_context(offline=True, viewport=dict(width=1280, height=860))
    tab = context.new_page()
    start = perf_counter()
    tab.goto(page.as_uri(), wait_until='commit')
    def wait_for(condition): # its own waiting would evaluate a string in the page, which the page forbids
        while not tab.evaluate(condition): sleep(.01)
    wait_for("document.querySelector('.card') && document.querySelector('#grid li') && [...document.querySelectorAll('#grid li')].every(li => li.getBoundingClientRect().top > innerHeight || li.querySelector('.pic img'))")
    first = perf_counter() - start
    wait_for("document.readyState == 'complete'")
    client = context.new_cdp_session(tab)
    client.send('Performance.enable', dict(timeDomain='threadTicks'))
    def busy(): return next(one['value'] for one in client.send('Performance.getMetrics')['metrics'] if one['name']=='TaskDuration')
    before = busy()
    frames = tab.evaluate("""() => new Promise(done => { const times = []; let last = performance.now();
        const step = now => { times.push(now - last); last = now; scrollBy(0, 120); if (times.length < 150) requestAnimationFrame(step); else done(times); }; requestAnimationFrame(step); })""")
    each = 1000*(busy() - before)/len(frames)
    context.close()
    return first, frames[5:], each


def case_report():
    "A report of 9, 500 and 5,000 pictures in headless Chromium: parts of real photographs, two methods, two questions"
    import shutil
    from playwright.sync_api import sync_playwright
    sys.path.insert(0, str(ROOT/'tests'))
    from helpers.reports import many
    from fastai_cam.examples.imagenet import imagenet_photos
    photos = [Image.open(file).convert('RGB') for file in imagenet_photos()]
    def line(case, limit, middle, spread, kept, remark): ROWS.append((case, 'fastai_cam', limit, f'**{middle}**', spread, kept, remark))
    def kept(is_so): return 'yes' if is_so else '**no**'
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        for n in (9, 500, 5000):
            page = many(Path(folder)/f'{n}.html', n, photos)
            size = page.stat().st_size/1e6
            found = [opened(browser, page) for _ in range(5)]
            seconds, frames, each = [first for first, _, _ in found], np.concatenate([times for _, times, _ in found]), [each for _, _, each in found]
            line(f'size of the page, {n:,} pictures', '≤ 50 MB', f'{size:.1f} MB', '', kept(size <= 50), f'{1000*size/n:.0f} kB a picture')
            line(f'seconds to the first view, {n:,} pictures', '≤ 2 s', f'{median(seconds):.2f} s', f'{min(seconds):.2f}–{max(seconds):.2f}', kept(median(seconds) <= 2), '')
            if n > 9: line(f'processor time of a frame while scrolling 7,000 pixels a second, {n:,} pictures', '≤ 16 ms', f'{median(each):.1f} ms', f'{min(each):.1f}–{max(each):.1f}', kept(median(each) <= 16), f'frames by the clock: {median(frames):.0f} ms, 95% below {np.percentile(frames, 95):.0f} ms')
            print(ROWS[-3:], flush=True)
        browser.close()
    small, large = report_memory(200), report_memory(2000)
    line('extra peak memory of writing, 2,000 pictures', 'no more than 40 MB above 200', f'{large:,.0f} MB', '', kept(large <= small + 40), f'{small:,.0f} MB of 200')


CASES = {name.removeprefix('case_'): case for name, case in list(globals().items()) if name.startswith('case_')}


def machine():
    "What the figures were measured on"
    cpu = next((line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')), platform.processor())
    libraries = ', '.join(f'{name} {version(name)}' for name in ('torch', 'torchvision', 'fastai', 'grad-cam', 'torchcam', 'captum'))
    return f'{cpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}; {libraries}.'


def write(name):
    "Put the table of a case into the notebook"
    file = ROOT/'nbs'/'stories'/'benchmarks.ipynb'
    notebook = json.loads(file.read_text())
    def cell(key, before):
        found = next((cell for cell in notebook['cells'] if cell['id']==key), None)
        if found is None:
            found = dict(cell_type='markdown', id=key, metadata={}, source=[])
            notebook['cells'].insert(next(i for i, cell in enumerate(notebook['cells']) if cell['id']==before), found)
        return found
    table = '| case | of | required | median | least–most | kept | agreement (correlation) |\n|---|---|---|---|---|---|---|\n' + '\n'.join('| ' + ' | '.join(line) + ' |' for line in ROWS)
    cell('results', 'bench-why')['source'] = f'## Results\n\n{machine()}'.splitlines(keepends=True)
    cell(f'case-{name}', 'bench-why')['source'] = f'### {inspect.getdoc(CASES[name])}\n\n{table}'.splitlines(keepends=True)
    tables = [cell(f'case-{known}', 'bench-why') for known in CASES if any(c['id']==f'case-{known}' for c in notebook['cells'])]
    others = [c for c in notebook['cells'] if c not in tables]
    end = next(i for i, c in enumerate(others) if c['id']=='bench-why')
    notebook['cells'] = others[:end] + tables + others[end:] # in the order of the cases, whichever ran last
    file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
    ROWS.clear()


if __name__=='__main__':
    warnings.simplefilter('ignore')
    wrong = set(sys.argv[1:]) - set(CASES)
    if wrong: sys.exit(f'no case is named {", ".join(sorted(wrong))}: the cases are {", ".join(CASES)}')
    for name in sys.argv[1:] or CASES:
        print(f'# {name}: {inspect.getdoc(CASES[name])}', flush=True)
        CASES[name]()
        write(name)
