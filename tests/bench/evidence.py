"""Which map is right for which network: trained networks of every kind of head, pictures with exact masks, measures of place and of faithfulness

    python tests/bench/evidence.py [--data FOLDER] [--vit FILE] [--n 48] [--kinds pooled fastai class mean ask dense] [--out FILE]

FOLDER holds `images/CLASS/NAME_OBJECT.jpg` and `masks/CLASS/…` (pictures of one object are never in both sets); without it, scenes are put
together from the photographs of packages. The story *which map* shows what `--out` wrote. Best run on a GPU: minutes there, hours elsewhere."""
import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from fastai.vision.learner import create_head
from fastai_cam.core import mean_interval
from fastai_cam.methods import as_method, enlarge, facts_of, METHODS
from fastai_cam.examples.imagenet import imagenet_photos
from fastai_cam.maps import CAMs
from fastai_cam.probe import Probe
from fastai_cam.trust import BASELINE_IMAGES, METRICS

HERE, BASE = Path(__file__).parent, 'objectcam'
MEASURES = dict(pointing=True, energy=True, iou=True, insertion=True, deletion=False, average_drop=False, cell=True, patch=True, which=True)
KNOW_NOTHING = ['gaussian_map', 'uniform_map', 'edge_map', 'random_map']
CURVE = {f'objectcam, likeness {share}': partial(METHODS['objectcam'], likeness=share) for share in (0, .5, 1)}


# Pictures

def read_folder(root):
    "Pictures, masks, classes and objects of a folder"
    pictures, masks, labels, objects = [], [], [], []
    names = sorted(part.name for part in (root/'images').iterdir())
    for label, name in enumerate(names):
        for file in sorted((root/'images'/name).iterdir()):
            mask = next((root/'masks'/name).glob(f'{file.stem}.*'))
            pictures.append(np.asarray(Image.open(file).convert('RGB').resize((224, 224))))
            masks.append(np.asarray(Image.open(mask).convert('L').resize((224, 224))) > 127)
            labels.append(label)
            objects.append(f'{name}/{file.stem.partition("_")[2]}')
    return np.stack(pictures), np.stack(masks), labels, objects


def read_scenes(n=60):
    "The same of scenes with one object each, from photographs of packages; scenes of one variant of an object are never in both sets"
    from fastai_cam.examples.scenes import compose, OBJECTS
    pictures, masks, labels, objects = [], [], [], []
    for label, name in enumerate(OBJECTS):
        for i in range(n):
            scene = compose([name], 224, seed=n*label + i)
            found = scene.objects[0]
            pictures.append(scene.image), masks.append(found.mask), labels.append(label), objects.append(f'{name}/{found.how["variant"]}{i%10}')
    return np.stack(pictures), np.stack(masks), labels, objects


class Pictures:
    "All pictures, where the model is"
    def __init__(self, root, device):
        pictures, masks, labels, self.objects = read_folder(root) if root else read_scenes()
        self.pixels = torch.tensor(pictures).permute(0, 3, 1, 2).to(device)/255
        self.masks, self.labels = torch.tensor(masks).to(device), torch.tensor(labels).to(device)

    def split(self, seed, share=.4):
        "Numbers of the pictures to learn from and of those to look at, by object"
        objects = sorted(set(self.objects))
        np.random.default_rng(seed).shuffle(objects)
        kept = set(objects[:int(len(objects)*share)])
        is_kept = torch.tensor([one in kept for one in self.objects])
        return (~is_kept).nonzero()[:,0], is_kept.nonzero()[:,0]


# Networks

class Body(nn.Module):
    "EfficientNet-Lite0 up to its last activation, or its last two resolutions"
    def __init__(self, weights=None):
        super().__init__()
        if weights:
            from efficientnet_lite_pytorch import EfficientNet
            self.net = EfficientNet.from_name('efficientnet-lite0')
            self.net.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in torch.load(weights).items()})
        else:
            from fastai_cam.examples.imagenet import efficientnet_lite0
            self.net = efficientnet_lite0()[0].net
        self.net._fc = nn.Identity()

    def forward(self, image): return self.net.extract_features(image)


class Drawer(nn.Module):
    "A class for every pixel: the last activation, classified place by place and enlarged"
    def __init__(self, body, n_out):
        super().__init__()
        self.body, self.look, self.classify = body, nn.Sequential(nn.Conv2d(1280, 128, 1), nn.BatchNorm2d(128), nn.ReLU()), nn.Conv2d(128, n_out, 3, padding=1)

    def forward(self, image):
        return F.interpolate(self.classify(self.look(self.body(image))), size=image.shape[-2:], mode='bilinear', align_corners=False)


class Kind:
    "One kind of head: how a network is made, what its pictures are scaled by, and which methods are measured"
    def __init__(self, make, mean, std, rates, tokens=False, dense=False):
        self.make, self.rates, self.tokens, self.dense = make, rates, tokens, dense
        self.mean, self.std = (torch.tensor(values)[:,None,None] for values in (mean, std))

    def images(self, pixels): return (pixels - self.mean.to(pixels))/self.std.to(pixels)

    @property
    def rows(self):
        "Name → method and layer"
        rows = {name: (as_method(name), None) for name in
                (BASE, 'gradcam', 'hirescam', 'layercam', 'eigencam', 'likenesscam', 'pathcam', *KNOW_NOTHING)}
        rows.update({name: (method, None) for name, method in CURVE.items()})
        if not self.tokens: return rows
        rows.update({name: (as_method(name), None) for name in ('grad_rollout', 'legrad', 'attention_value')})
        for back in (2, 3, 5): # the block that ends so many before the last
            for name in ('objectcam', 'gradcam', 'pathcam'): rows[f'{name}, {back} blocks from the end'] = (as_method(name), f'blocks.{12 - back}')
        return rows


def kinds(args):
    "All kinds of heads, by name"
    half, imagenet = ((.5,)*3, (.5,)*3), ((.485, .456, .406), (.229, .224, .225))
    def lite(head): return lambda n_out: nn.Sequential(Body(args.lite), head(n_out))
    def pooled(n_out): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, n_out))
    def vit(pool):
        from vit import real_vit
        return lambda n_out: real_vit(n_out, pool, args.vit)
    return dict(
        pooled=Kind(lite(pooled), *half, (2e-4, 2e-3)), fastai=Kind(lite(lambda n_out: create_head(1280, n_out)), *half, (2e-4, 2e-3)),
        **{pool: Kind(vit(pool), *imagenet, (3e-5, 1e-3), tokens=True) for pool in ('class', 'mean', 'ask') if args.kinds.count(pool)},
        dense=Kind(lambda n_out: Drawer(Body(args.lite), n_out + 1), *half, (2e-4, 2e-3), dense=True))


NEW = ('1.', 'head', 'ask', 'look', 'classify') # what is not of the body


def with_new_head(kind, pictures, which, seed, epochs=60):
    "A network whose body is as its package has it: only what reads it is trained, on what the body makes of the pictures once"
    torch.manual_seed(seed)
    model = kind.make(int(pictures.labels.max()) + 1).to(pictures.pixels.device).eval()
    body, read = (model.tokens, model.read) if kind.tokens else (model[0], model[1])
    optimiser = torch.optim.AdamW([p for name, p in model.named_parameters() if name.startswith(NEW)], lr=kind.rates[1], weight_decay=.05)
    with torch.no_grad(): features = torch.cat([body(kind.images(pictures.pixels[batch])) for batch in which.split(32)])
    if not kind.tokens: read.train() # fastai's head has batch norms
    for _ in range(epochs):
        for rows in torch.randperm(len(which)).split(32)[:max(1, len(which)//32)]:
            loss = F.cross_entropy(read(features[rows]), pictures.labels[which[rows]], label_smoothing=.1)
            optimiser.zero_grad(), loss.backward(), optimiser.step()
    return model.eval()


def trained(kind, pictures, which, seed, epochs=14):
    "A network of this kind, trained whole on some of the pictures"
    torch.manual_seed(seed)
    device = pictures.pixels.device
    model = kind.make(int(pictures.labels.max()) + 1).to(device).train()
    parts = [[p for name, p in model.named_parameters() if name.startswith(NEW)==is_new] for is_new in (False, True)]
    optimiser = torch.optim.AdamW([dict(params=part) for part in parts], weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, kind.rates, total_steps=epochs*(len(which)//32))
    targets = (pictures.masks*(pictures.labels + 1)[:,None,None]) if kind.dense else pictures.labels
    for _ in range(epochs):
        for batch in which[torch.randperm(len(which))].to(device).split(32)[:len(which)//32]:
            images, wanted = kind.images(pictures.pixels[batch]), targets[batch]
            if torch.rand(()) < .5: images, wanted = images.flip(-1), wanted.flip(-1) if kind.dense else wanted
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type=='cuda'): loss = F.cross_entropy(model(images), wanted)
            optimiser.zero_grad(), loss.backward(), optimiser.step(), schedule.step()
    return model.eval()


# Measures

class Asked:
    "Some pictures, what is asked of them, and how other versions of them are scored"
    def __init__(self, kind, model, pixels, labels, masks=None):
        self.kind, self.model, self.labels, self.masks = kind, model, labels, masks
        self.images = kind.images(pixels)

    def score(self, out, items):
        "The class's logit; of a drawing, its mean over the object (over everything, where there is no mask)"
        labels = self.labels[items.to(out.device)]
        if not self.kind.dense: return out.gather(1, labels[:,None])[:,0]
        drawn = out[torch.arange(len(out), device=out.device), labels + 1]
        if self.masks is None: return drawn.mean((1, 2))
        inside = self.masks[items.to(out.device)]
        return (drawn*inside).sum((1, 2))/inside.sum((1, 2))

    @torch.no_grad()
    def rescore(self, images, items):
        "Probability of the class (of its pixels)"
        with torch.autocast(images.device.type, dtype=torch.bfloat16): out = self.model(images).float()
        return self.score(out.softmax(1), items)

    def maps(self, method, layer, bs=24):
        "Maps of all pictures by a method, `[B, h, w]`"
        found = []
        for items in torch.arange(len(self.images)).split(bs):
            def score(out, rows): return self.score(out, items[rows.cpu()])
            with Probe(self.model, facts_of(method).layers if layer is None else layer, facts_of(method).grad) as probe:
                cap = probe(self.images[items.to(self.images.device)])
                found.append(method(cap, cap.score_by(score)).detach().float())
        return torch.cat(found)


def cell_drops(asked, grid, wide=1):
    "By how much the probability falls when a square of `wide` × `wide` cells is blurred, `[B, grid, grid]`"
    images, size = asked.images, asked.images.shape[-1]//grid
    blurred, items, around = BASELINE_IMAGES['blur'](images), torch.arange(len(images)), (wide - 1)*size//2
    whole, found = asked.rescore(images, items), []
    for place in range(grid*grid):
        changed = images.clone()
        rows, cols = (slice(max(0, at - around), at + size + around) for at in (place//grid*size, place%grid*size))
        changed[:,:,rows,cols] = blurred[:,:,rows,cols]
        found.append(whole - asked.rescore(changed, items))
    return torch.stack(found, 1).view(-1, grid, grid)


def mosaics(kind, model, pictures, which, n, seed):
    "Four pictures of different classes in one, asked about one of them, and in which quarter that is"
    rng, labels = np.random.default_rng(seed), pictures.labels[which].cpu().numpy()
    small = F.interpolate(pictures.pixels[which], size=(112, 112), mode='bilinear', antialias=True)
    made, asked, quarters = [], [], rng.integers(4, size=n)
    for quarter in quarters:
        chosen = [rng.choice(np.flatnonzero(labels==label)) for label in rng.choice(np.unique(labels), 4, replace=False)]
        parts = [small[i] for i in chosen]
        made.append(torch.cat([torch.cat(parts[:2], 2), torch.cat(parts[2:], 2)], 1)), asked.append(labels[chosen[quarter]])
    return Asked(kind, model, torch.stack(made), torch.tensor(asked, device=small.device)), torch.tensor(quarters, device=small.device)


def in_quarter(maps, quarters):
    "Share of the positive evidence that is in the quarter asked about"
    evidence = F.adaptive_avg_pool2d(enlarge(maps, (224, 224)).clamp(min=0), 2).flatten(1)
    return evidence.gather(1, quarters[:,None])[:,0]/evidence.sum(1).clamp(min=torch.finfo(evidence.dtype).tiny)


def rank_agreement(a, b):
    "Rank correlation of each map with its counterpart, `[B]`"
    ranks = [one.flatten(1).argsort(1).argsort(1).double() for one in (a, b)]
    return F.cosine_similarity(*[one - one.mean(1, keepdim=True) for one in ranks])


def measured(asked, maps, drops, steps):
    "Numbers `[B]` of each measure of the maps, but for those of mosaics"
    images, masks, rescore = asked.images, asked.masks, asked.rescore
    found = {name: METRICS[metric](maps, masks) for name, metric in
             dict(pointing='pointing_game', energy='energy_in_mask', iou='iou').items()}
    for name in ('insertion', 'deletion', 'average_drop'):
        options = {} if name=='average_drop' else dict(steps=steps, baseline=dict(insertion='blur', deletion='mean')[name])
        found[name] = METRICS[name](maps, images, rescore, bs=384 if images.is_cuda else 16, **options)
    for name, drop in drops.items(): found[name] = rank_agreement(F.interpolate(maps[:,None], size=drop.shape[1:], mode='area')[:,0], drop)
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def seconds(asked, method, layer):
    "Time of the maps of eight pictures, and of a plain pass of them: the least of three"
    few = Asked(asked.kind, asked.model, asked.images[:0], asked.labels[:8], asked.masks[:8])
    few.images = asked.images[:8]
    def once(work):
        start = time.perf_counter()
        work()
        if few.images.is_cuda: torch.cuda.synchronize()
        return time.perf_counter() - start
    with torch.inference_mode(): plain = min(once(lambda: asked.model(few.images)) for _ in range(3))
    return min(once(lambda: few.maps(method, layer)) for _ in range(3))/plain


def look_into(kind, pictures, seed, n, frozen=False, only=(), steps=10):
    "All rows of one trained network: row → measure → numbers of items"
    learn_from, look_at = pictures.split(seed)
    model = (with_new_head if frozen else trained)(kind, pictures, learn_from, seed)
    which = look_at[torch.linspace(0, len(look_at) - 1, min(n, len(look_at))).long()].to(pictures.pixels.device)
    asked = Asked(kind, model, pictures.pixels[which], pictures.labels[which], pictures.masks[which])
    accuracy = None
    if not kind.dense:
        with torch.inference_mode(): accuracy = (model(asked.images).argmax(1)==asked.labels).double().mean().item()
    drops = dict(patch=cell_drops(asked, 7)) | ({} if only else dict(cell=cell_drops(asked, 14)))
    mosaic, quarters = mosaics(kind, model, pictures, look_at.to(which.device), len(which), seed)
    found = {}
    for name, (method, layer) in kind.rows.items():
        if only and name not in only: continue
        found[name] = measured(asked, asked.maps(method, layer), drops, steps)
        found[name]['which'] = in_quarter(mosaic.maps(method, layer), quarters).double().cpu().numpy()
        if name not in (*KNOW_NOTHING, *only): found[name]['cost'] = np.array([seconds(asked, method, layer)])
    found['the mask itself'] = measured(asked, F.interpolate(asked.masks[:,None].float(), size=(14, 14), mode='area')[:,0], drops, steps)
    return found, accuracy


def summary(networks):
    "Row → measure → mean, and its difference from the default's with a paired interval, over the items of all networks"
    rows = {}
    for name in networks[0]:
        rows[name] = {}
        for measure in (*MEASURES, 'cost'):
            if measure not in networks[0][name]: continue
            values = np.concatenate([found[name][measure] for found in networks])
            rows[name][measure] = dict(mean=float(np.nanmean(values)))
            if measure=='cost' or measure not in networks[0][BASE] or name==BASE: continue
            gain = np.concatenate([found[BASE][measure] for found in networks]) - values
            rows[name][measure].update(zip(('gain', 'low', 'high'), map(float, mean_interval(gain))))
    return rows


def draw(args, pictures, known, file):
    "Photographs of packages, and the maps by Grad-CAM and by default, of two networks: fastai's default head, and a class token"
    photos = [photo for photo in imagenet_photos() if photo.stem.split('_')[1] in ('04', '06', '15')]
    pixels = [np.asarray(Image.open(photo).convert('RGB').resize((224, 224))) for photo in photos]
    names, strips = sorted(part.name for part in (args.data/'images').iterdir()), []
    for kind in (known['fastai'], known['class']):
        model = with_new_head(kind, pictures, torch.arange(len(pictures.labels)), 0)
        images = kind.images(torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).to(pictures.pixels.device)/255)
        with torch.no_grad(): found = model(images).softmax(1)
        asked = Asked(kind, model, images, found.argmax(1))
        asked.images, methods = images, ('gradcam', BASE)
        maps = torch.stack([enlarge(asked.maps(as_method(method), None).cpu(), (14, 14)) for method in methods], 1)
        cams = CAMs(maps, pixels, found.argmax(1)[:,None].expand(-1, 2).cpu(), [f'{method}: predicted' for method in methods],
                    found.cpu(), vocab=names, task='single', method=list(methods))
        cams.show(None, nrows=1, photo=True, scale='own', save=file, dpi=60)
        strips.append(np.asarray(Image.open(file).convert('RGB')))
    Image.fromarray(np.concatenate(strips)).quantize(64).save(file, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path)
    parser.add_argument('--vit', type=Path), parser.add_argument('--lite', type=Path)
    parser.add_argument('--n', type=int, default=48)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--kinds', nargs='+', default=['pooled', 'fastai', 'class', 'mean', 'ask', 'dense'])
    parser.add_argument('--frozen', action='store_true', help='train heads only; not for dense ones')
    parser.add_argument('--only', nargs='+', default=(), help='these rows, and no single cells')
    parser.add_argument('--steps', type=int, default=10, help='of insertion and deletion')
    parser.add_argument('--pictures', type=Path, help='draw maps before and after to this file, and measure nothing (with --data)')
    parser.add_argument('--seconds', type=float, default=math.inf, help='begin no network after so many')
    parser.add_argument('--out', type=Path, default=HERE/'evidence.json')
    args = parser.parse_args()
    device, known, start = torch.device('cuda' if torch.cuda.is_available() else 'cpu'), kinds(args), time.time()
    pictures, networks, results = Pictures(args.data, device), {}, {}
    if args.pictures: return draw(args, pictures, known, args.pictures)
    name = torch.cuda.get_device_name() if device.type=='cuda' else 'a CPU'
    for seed in range(args.seeds):
        for kind in args.kinds:
            if time.time() - start > args.seconds: continue
            found, accuracy = look_into(known[kind], pictures, seed, args.n, args.frozen, args.only, args.steps)
            networks.setdefault(kind, []).append((found, accuracy))
            results[kind] = dict(rows=summary([one for one, _ in networks[kind]]), accuracy=[accuracy for _, accuracy in networks[kind]],
                                 networks=len(networks[kind]), items=args.n*len(networks[kind]))
            print(f'{kind} {seed}: accuracy {accuracy}, {time.time() - start:.0f} s', flush=True)
            args.out.write_text(json.dumps(dict(device=name, data='scenes' if args.data is None else 'composites', kinds=results), indent=1) + '\n')


if __name__=='__main__': main()
