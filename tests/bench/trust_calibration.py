"""How often is the verdict of `cam_trust` right? Pictures whose truth is known by construction, and maps of them that are planted: right, blurred, in the wrong place, noise, of another object

    python tests/bench/trust_calibration.py [--data FOLDER] [--n 100] [--out FILE]

Objects are cut out and laid on photographs that show none of them. So it is known what the model says of the same picture without the object, and of the
object on another ground: only pictures are taken whose object is what the answer rests on, for sure. FOLDER holds `images/CLASS/FILE` and `masks/CLASS/FILE`;
without it, objects are those of `fastai_cam.examples.scenes`. Two networks: EfficientNet-Lite0 with a linear head, which says which object it sees, and the first
half of it with a trained convolution and fastai's head, which says of two objects whether each is there. The chapter 79_trust.verdict shows what came out.
Half an hour on one core of a busy machine"""
import argparse
import json
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.fx.experimental.optimization import fuse
from fastai.vision.learner import create_head
from fastai_cam.examples.imagenet import efficientnet_lite0
from fastai_cam.examples.scenes import background, cut_out, n_variants, OBJECTS, pretrained_body
from fastai_cam.maps import CAMMap
from fastai_cam.methods import METHODS
from fastai_cam.probe import Probe
from fastai_cam.trust.places import altered_scores, map_ranks, place_ranks, shares_up_to
from fastai_cam.trust.survey import share_interval, WORDS
from fastai_cam.trust.verdict import _Examined, CAMTrust

SIZE, SHARE, N_PLACES, STEPS = 128, .3, 9, 2 # as `cam_trust` has them
FIRST_VALID = 20_000_000


# Pictures

class Scenes:
    "Objects of the package's scenes"
    names = OBJECTS
    def cut(self, name, rng, side, valid): return cut_out(name, int(rng.integers(n_variants(name))), side, bool(rng.random() < .5), float(rng.uniform(.75, 1.2)))


class Folder:
    "Objects of a folder: the first three fifths of each class are learned from, the others are asked about"
    def __init__(self, root):
        self.root, self.names = Path(root), sorted(part.name for part in (Path(root)/'images').iterdir())
        self.files = {name: sorted((self.root/'images'/name).iterdir()) for name in self.names}

    def cut(self, name, rng, side, valid):
        files = self.files[name]
        split = len(files)*3//5
        file = files[split + int(rng.integers(len(files) - split)) if valid else int(rng.integers(split))]
        photo, mask = Image.open(file).convert('RGB'), Image.open(next((self.root/'masks'/name).glob(f'{file.stem}.*'))).convert('L').point(lambda v: 255*(v > 127))
        box = mask.getbbox()
        size = tuple(max(1, round(length*side/max(box[2] - box[0], box[3] - box[1]))) for length in (box[2] - box[0], box[3] - box[1]))
        return np.asarray(photo.crop(box).resize(size)), np.asarray(mask.crop(box).resize(size)) > 127


def free_place(rng, boxes, height, width):
    for _ in range(60):
        left, top = int(rng.integers(SIZE - width + 1)), int(rng.integers(SIZE - height + 1))
        box = left, top, left + width, top + height
        if all(box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1] for other in boxes): return box


class Composed:
    "A picture of `n` objects, the same without the first, and the first alone on another ground"
    def __init__(self, source, seed, n, valid):
        rng = np.random.default_rng(seed)
        while True:
            grounds = [background(rng, SIZE) for _ in range(2)]
            names, self.pieces = [source.names[i] for i in rng.permutation(len(source.names))[:n]], []
            for name in names:
                pixels, inside = source.cut(name, rng, round(SIZE*rng.uniform(.3, .6)), valid)
                box = free_place(rng, [box for *_, box in self.pieces], *inside.shape)
                if box is not None: self.pieces.append((pixels, inside, box))
            if len(self.pieces)==n: break
        self.labels, every = [source.names.index(name) for name in names], range(n)
        self.image, self.without, self.alone = self.painted(grounds[0], every), self.painted(grounds[0], every[1:]), self.painted(grounds[1], [0])

    def painted(self, ground, which):
        ground = ground.copy()
        for pixels, inside, (left, top, right, bottom) in (self.pieces[k] for k in which): ground[top:bottom, left:right][inside] = pixels[inside]
        return ground

    def mask(self, k):
        _, inside, (left, top, right, bottom) = self.pieces[k]
        found = torch.zeros(SIZE, SIZE)
        found[top:bottom, left:right] = torch.as_tensor(inside.copy()).float()
        return found


def as_input(images): return (torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).float()/255 - .5)/.5


# Networks

class Network:
    "A frozen body, and what is trained on what it makes of some pictures"
    def __init__(self, name, source, n_objects, n_train=360, seed=0):
        torch.manual_seed(seed)
        self.name, self.n_objects = name, n_objects
        if n_objects==1: body, look, head, rate, epochs = efficientnet_lite0()[0], nn.Identity(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, len(source.names))), 2e-3, 60
        else:
            look = nn.Sequential(nn.BatchNorm2d(80), nn.Conv2d(80, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
            body, head, rate, epochs = pretrained_body(), create_head(128, len(source.names)), 3e-3, 14
        composed = [Composed(source, 10_000 + i, 1 + (i%2)*(n_objects > 1), False) for i in range(n_train)]
        wanted = torch.zeros(n_train, len(source.names))
        for row, one in zip(wanted, composed): row[one.labels] = 1
        body.eval()
        with torch.no_grad(): features = torch.cat([body(as_input([one.image for one in composed[i:i + 16]])) for i in range(0, n_train, 16)])
        trained = nn.Sequential(look, head).train()
        optimiser = torch.optim.AdamW(trained.parameters(), rate, weight_decay=.05)
        for rows in (rows for _ in range(epochs) for rows in torch.randperm(n_train).split(32)):
            out = trained(features[rows])
            loss = F.cross_entropy(out, wanted[rows].argmax(1)) if n_objects==1 else F.binary_cross_entropy_with_logits(out, wanted[rows])
            optimiser.zero_grad(), loss.backward(), optimiser.step()
        self.model = nn.Sequential(nn.Sequential(body, look), head).eval()
        self.fast = fuse(self.model).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def probabilities(self, images, c):
        out = torch.cat([self.fast(some.contiguous(memory_format=torch.channels_last)) for some in images.split(8)])
        return (out.softmax(1) if self.n_objects==1 else out.sigmoid())[:, c]

    def map_of(self, image, method, c):
        with Probe(self.model, METHODS[method].facts.layers, METHODS[method].facts.grad) as probe:
            cap = probe(image)
            return METHODS[method](cap, cap.score(lambda out: out[:, c]))[0].detach()

    def runner_up(self, image, c):
        "The class that is most probable after `c`"
        with torch.no_grad(): return int(self.fast(image)[0].index_fill(0, torch.tensor([c]), -torch.inf).argmax())


# Maps

def blurred(values, sigma):
    at = torch.arange(len(values)).float()
    weights = torch.exp(-(at[:, None] - at)**2/(2*sigma**2))
    weights /= weights.sum(1, keepdim=True)
    return weights@values@weights.T


def of_mask(mask, grid):
    "A map that lights an object at the resolution of the network's last layer"
    cells = F.adaptive_avg_pool2d(mask[None, None], grid)[0, 0]
    return cells + .2*F.avg_pool2d(cells[None, None], 3, 1, 1)[0, 0] + 1e-3*blurred(cells, grid/4)


def overlap(values, mask):
    "How much of the object is among the brightest fifth (how much of the fifth is the object, where that is larger)"
    large = F.interpolate(values[None, None], (SIZE, SIZE), mode='bilinear')[0, 0]
    top = large >= large.flatten().kthvalue(int(.8*SIZE**2)).values
    return float((top*mask).sum()/min(float(mask.sum()), .2*SIZE**2))


RIGHT, BETWEEN, WRONG = 'right', 'blurred by a tenth of the side', ['somewhere else', 'noise', 'smooth noise', 'of the other object']


def planted(one, grid, seed):
    "The maps of a picture, by name"
    generator, mask = torch.Generator().manual_seed(seed), one.mask(0)
    right = of_mask(mask, grid)
    moved = min((right.roll((down, along), (0, 1)) for down in range(grid) for along in range(grid)), key=lambda values: overlap(values, mask))
    found = {RIGHT: right, BETWEEN: blurred(right, grid/10), 'blurred by a quarter of the side': blurred(right, grid/4), 'somewhere else': moved,
             'noise': torch.rand(grid, grid, generator=generator), 'smooth noise': blurred(torch.randn(grid, grid, generator=generator), grid/7)}
    if len(one.pieces) > 1: found['of the other object'] = of_mask(one.mask(1), grid)
    return found


# Verdicts

def words_of(network, image, c, maps, seeds):
    "The verdict on each map for each seed: `[maps, seeds]`"
    shares, images = shares_up_to(SHARE, STEPS), image.expand(1, -1, -1, -1)
    def rescore(some, _): return network.probabilities(some, c)
    score = rescore(images, None)
    own = {name: altered_scores(map_ranks(values[None], images), images, rescore, shares) for name, values in maps.items()}
    words = {name: [] for name in maps}
    for seed in seeds:
        places = altered_scores(place_ranks(N_PLACES, (SIZE, SIZE), seed)[:, None], images, rescore, shares)
        for name, scores in own.items():
            examined = _Examined(score, torch.cat([scores.shown, places.shown], 1), torch.cat([scores.hidden, places.hidden], 1), torch.zeros(1)) # planted: the third question is no question
            numbers = examined.numbers(0)
            word = CAMTrust(CAMMap(maps[name] - maps[name].min() + 1e-6), 'it', numbers, SHARE).word
            words[name].append((word, {key: value for key, value in numbers.items() if isinstance(value, float)}))
    return words


def asked(network, source, n):
    "Pictures whose answer rests on the object: it is gone without the object, and there on another ground"
    seed = FIRST_VALID
    while n:
        one, seed = Composed(source, seed, network.n_objects, True), seed + 1
        whole, without, alone = network.probabilities(as_input([one.image, one.without, one.alone]), one.labels[0]).tolist()
        if whole > .5 and without < .2 and alone > .5:
            n -= 1
            yield one, seed


def measured(network, source, n):
    "Verdicts by kind of map: a list of one each, or two of every third picture, of another seed"
    found, start = {}, perf_counter()
    for k, (one, seed) in enumerate(asked(network, source, n)):
        image, c = as_input([one.image]), one.labels[0]
        maps = planted(one, SIZE//(32 if network.n_objects==1 else 16), seed)
        for method in ('gradcam', 'objectcam'): maps[f'{method} of it'] = network.map_of(image, method, c)
        maps['gradcam of another class'] = network.map_of(image, 'gradcam', network.runner_up(image, c) if network.n_objects==1 else one.labels[1])
        for name, words in words_of(network, image, c, maps, range(1 + (k%3==0))).items(): found.setdefault(name, []).append(words)
        if k%10==9: print(f'{network.name}: {k + 1} pictures, {perf_counter() - start:.0f} s', flush=True)
    return found


def row(name, verdicts):
    words = [first[0] for first, *_ in verdicts]
    cells = [f'{words.count(word)} ({low:.0%}–{high:.0%})' for word in WORDS for _, low, high in [share_interval(words.count(word), len(words))]]
    twice = [first==second for (first, _), (second, _) in (of_seeds for of_seeds in verdicts if len(of_seeds)==2)]
    return f'| {name} | {len(words)} | ' + ' | '.join(cells) + f' | {sum(twice)} of {len(twice)} |'


def table(found):
    names = sorted({name for one in found.values() for name in one}, key=lambda name: [*next(iter(found.values())), *WRONG, name].index(name))
    lines = ['| the map | n | believed | with care | not | same with another seed |', '|---|---|---|---|---|---|']
    lines += [row(name, [words for one in found.values() for words in one.get(name, [])]) for name in names]
    every = [words for one in found.values() for name in WRONG for words in one.get(name, [])]
    return '\n'.join([*lines, row('all that are wrong', every)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', help='folder of pictures and masks instead of scenes')
    parser.add_argument('--n', type=int, default=100, help='pictures for each network')
    parser.add_argument('--out', help='file for the verdicts, as JSON')
    args = parser.parse_args()
    source, found = Folder(args.data) if args.data else Scenes(), {}
    for n_objects, name in ((1, 'EfficientNet-Lite0, linear head, one object'), (2, "half of it, fastai's head, two objects")):
        found[name] = measured(Network(name, source, n_objects), source, args.n)
        print(f'{name}\n{table({name: found[name]})}\n', flush=True)
        if args.out: Path(args.out).write_text(json.dumps(found))
    print(f'both\n{table(found)}')


if __name__=='__main__': main()
