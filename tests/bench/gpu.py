"""What maps cost on a CUDA device, as ratios in one run: `python tests/bench/gpu.py` (under five minutes on one GPU; without one it says so and claims nothing).

Grad-CAM beside the plain forward pass for three networks, in single precision, under bfloat16 autocast and with channels last, for one image and for 64;
pytorch-grad-cam and torchcam beside it where they are installed; `get_cams` beside `get_preds`, and how often each waits for the device; the largest memory;
and how far the maps are from the CPU's. Ways run in turns, and each ratio is the median of the rounds'."""
import argparse
import sys
import time
import warnings
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
import torchvision.models as models
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

import fastai_cam.learner # gives learners get_cams
from fastai_cam.methods import gradcam
from fastai_cam.probe import Probe
from fastai_cam.targets import ClassIndex

NETWORKS = dict(resnet50=models.resnet50, convnext_tiny=models.convnext_tiny, vit_b_16=models.vit_b_16)
SETTINGS = ('float32', 'bfloat16', 'channels_last')


class Device:
    "Where it runs: how to wait for it, and its memory"
    def __init__(self, kind): self.kind, self.is_cuda = kind, kind=='cuda'
    def wait(self): torch.cuda.synchronize() if self.is_cuda else None
    def peak(self, work):
        "Bytes beyond what was held before"
        if not self.is_cuda: return float('nan')
        self.wait(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(), self.wait()
        return torch.cuda.max_memory_allocated() - before


def in_turns(device, ways, rounds):
    "Seconds of each way in each round, one after the other; the first round is not counted"
    times = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            device.wait()
            start = time.perf_counter()
            way(), device.wait()
            if i: times[name].append(time.perf_counter() - start)
    return times


def ratio(times, name, base): return median(a/b for a, b in zip(times[name], times[base]))


def peers_of(model, name, x):
    "Grad-CAM of other libraries at the layer that ours found, where they can look there"
    found = {}
    with Probe(model) as probe: layer = probe(x[:2]).names[0]
    module, tokens = model.get_submodule(layer), name.startswith('vit')
    if find_spec('pytorch_grad_cam'):
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        def grid(out): return out[:, 1:].transpose(1, 2).unflatten(-1, (14, 14))
        peer = GradCAM(model, [module], reshape_transform=grid if tokens else None)
        found['pytorch-grad-cam'] = lambda: peer(input_tensor=x, targets=[ClassifierOutputTarget(3)]*len(x))
    if find_spec('torchcam') and not tokens:
        from torchcam.methods import GradCAM as Extractor
        def theirs():
            with Extractor(model, layer) as extractor: return extractor(3, model(x))
        found['torchcam'] = theirs
    return found


def network_rows(device, name, setting, bs, side, rounds):
    "Grad-CAM and peers beside the forward pass of one network"
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval().to(device.kind), torch.randn(bs, 3, side, side).to(device.kind)
    if setting=='channels_last': model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    precise = partial(torch.autocast, device.kind, torch.bfloat16) if setting=='bfloat16' else nullcontext
    def forward():
        with torch.no_grad(), precise(): return model(x)
    with Probe(model) as probe: # one probe for many batches, as a loop over a loader has it
        def ours():
            with precise(): cap = probe(x)
            return gradcam(cap, cap.score(ClassIndex(3)))
        times = in_turns(device, dict(forward=forward, ours=ours), rounds)
        found = {'fastai_cam': ratio(times, 'ours', 'forward')}
        memory = device.peak(ours)/max(device.peak(forward), 1)
    for peer, way in (peers_of(model, name, x) if setting=='float32' else {}).items():
        try: times = in_turns(device, dict(forward=forward, peer=way), max(3, rounds//3))
        except Exception as e: found[peer] = f'{type(e).__name__}'
        else: found[peer] = ratio(times, 'peer', 'forward')
    return found, memory


def apart_from_cpu(device, name, side):
    "The largest difference of two maps from the CPU's, as a share of their range"
    torch.manual_seed(0)
    model, x, maps = NETWORKS[name]().eval(), torch.randn(2, 3, side, side), []
    for kind in ('cpu', device.kind):
        with Probe(model.to(kind)) as probe:
            cap = probe(x.to(kind))
            maps.append(gradcam(cap, cap.score(ClassIndex(3))).float().cpu())
    return float((maps[0] - maps[1]).abs().max()/maps[0].abs().max())


def small_learner(device, n, side):
    "A learner over pictures that are on the device already, so that reading them does not hide anything"
    images, labels = torch.randn(n, 3, side, side, device=device.kind), torch.randint(10, (n,), device=device.kind)
    net = models.resnet50(num_classes=10)
    model = nn.Sequential(nn.Sequential(*list(net.children())[:-2]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc))
    loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=64) for _ in range(2)]
    return Learner(DataLoaders(*loaders, device=torch.device(device.kind)), model.to(device.kind), CrossEntropyLossFlat())


def waits(work):
    "How often some work makes the host wait for the device"
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            work()
    finally: torch.cuda.set_sync_debug_mode('default')
    return sum('synchroniz' in str(one.message) for one in found)


def learner_rows(device, n, side, rounds):
    "`get_cams` of a whole set beside `get_preds` of it"
    learn = small_learner(device, n, side)
    def preds(): return learn.get_preds(dl=learn.dls.valid, with_loss=True)
    ways = dict(preds=preds, **{method: partial(learn.get_cams, learn.dls.valid, method=method) for method in ('gradcam', 'objectcam')})
    with learn.no_bar(), learn.no_logging():
        times = in_turns(device, ways, rounds)
        n_waits = {name: waits(way) for name, way in ways.items()} if device.is_cuda else {}
    return {name: ratio(times, name, 'preds') for name in ways if name != 'preds'}, n_waits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--smoke', action='store_true', help='run every line once, small, wherever it is: to see that the script works, not to measure')
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        print('There is no CUDA device here, so nothing was measured and nothing is claimed.')
        return
    device = Device('cuda' if torch.cuda.is_available() else 'cpu')
    side, batches, rounds, n = (224, (1, 2), 1, 4) if args.smoke else (224, (1, 64), 15, 512)
    kind = torch.cuda.get_device_name() if device.is_cuda else 'a CPU: a trial run, no measurement'
    print(f'{kind}; torch {torch.__version__}\n\n| Grad-CAM ÷ forward | batch | fastai_cam | peak memory | others |\n|---|---|---|---|---|')
    for name in list(NETWORKS)[:1] if args.smoke else NETWORKS:
        for setting in SETTINGS:
            for bs in batches:
                found, memory = network_rows(device, name, setting, bs, side, rounds)
                others = ', '.join(f'{peer} {value if isinstance(value, str) else f"{value:.2f}"}' for peer, value in found.items() if peer != 'fastai_cam')
                print(f'| {name}, {setting} | {bs} | {found["fastai_cam"]:.2f} × | {memory:.2f} × | {others} |', flush=True)
        print(f'| {name}: maps are apart from the CPU\'s by | 2 | {apart_from_cpu(device, name, side):.1e} of their range | | |', flush=True)
    ratios, n_waits = learner_rows(device, n, side, 1 if args.smoke else 7)
    for name, value in ratios.items(): print(f'| `get_cams(method={name!r})` ÷ `get_preds(with_loss=True)`, resnet50, {n} pictures | 64 | {value:.2f} × | | waits for the device: {n_waits.get(name, "?")}, `get_preds` {n_waits.get("preds", "?")} |')


if __name__=='__main__': sys.exit(main())
