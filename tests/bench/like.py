"""Are wrong labels found among the neighbours of the errors that they cause, and do the lines of `show_like` end on the same object?

    python tests/bench/like.py [--first SEED] [--n SEEDS] [--out FILE]

Small learners are trained on composed pictures: an object that is the class, and another that is none. A rare kind of one class has a wrong label wherever it is trained on:
pictures from one of two photographs of the object, pictures with a dot stuck on it, or pictures with another companion. So the learner gives such pictures the wrong class in validation,
and it is known which training pictures made it do so. Of the five neighbours of each such error, how many are these? And of the places that are joined, which are on the same object
(by exact masks)? Two networks: the first half of EfficientNet-Lite0 with a trained convolution and fastai's head, and all of it with a linear head. Intervals are of learners drawn
anew. About ten minutes on one core, no downloads; the chapter 88c_similar.show holds the table"""
import argparse
import json
import zlib
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.vision.data import ImageBlock
from fastai.vision.learner import create_head

import fastai_cam.similar # gives learners `get_like`
from fastai_cam.core import bootstrap_interval
from fastai_cam.examples.imagenet import efficientnet_lite0
from fastai_cam.examples.scenes import compose, pretrained_body
from fastai_cam.methods import METHODS
from fastai_cam.probe import Probe
from fastai_cam.similar import alike, evidence_features, match_cells, typical_evidence

CLASSES, OTHERS, SIZE = ['cat', 'dog', 'cup', 'car'], ['flower', 'strawberry'], 160
N_TRAIN, N_VALID, RARE, K = 40, 16, .2, 5 # pictures of each class; how much of a class is of the rare kind in training (in validation half)
KINDS, NETWORKS = ['photograph', 'dot', 'companion'], ['half', 'whole']


# -- pictures

class Composed:
    "A picture of an object of class `c` and a companion; is it of the rare kind?"
    def __init__(self, kind, c, is_rare, is_source, rng):
        companion = ('strawberry' if is_rare else 'flower') if kind=='companion' and is_source else str(rng.choice(OTHERS))
        while True:
            self.scene = compose([CLASSES[c], companion], size=SIZE, seed=int(rng.integers(1 << 30)), scale=(.3, .55))
            if kind != 'photograph' or not is_source or (self.scene.objects[0].how['variant']==1)==is_rare: break
        self.true, self.is_rare, self.image = c, is_rare, self.scene.image.copy()
        if kind=='dot' and is_rare:
            left, top, right, bottom = self.scene.objects[0].box
            row, column = rng.uniform(top + .3*(bottom - top), bottom - .3*(bottom - top)), rng.uniform(left + .3*(right - left), right - .3*(right - left))
            rows, columns = np.indices((SIZE, SIZE))
            self.image[np.hypot(rows - row, columns - column) < 7] = (255, 0, 200)

    def owners(self, grid):
        "The object in the middle of each cell; '' on the ground"
        rows, columns = (((np.arange(n) + .5)*SIZE/n).astype(int) for n in grid)
        found = np.full(grid, '', dtype=object)
        for one in self.scene.objects: found[one.mask[np.ix_(rows, columns)]] = one.name
        return found


def pictures(kind, seed):
    "Pictures to train on and to validate with, what they are labelled, and the class that the rare kind is given instead of its own"
    rng = np.random.default_rng((seed, zlib.crc32(kind.encode())))
    source = int(rng.choice([1, 3] if kind=='photograph' else range(4))) # dogs and cars are cut from two photographs each
    given = int(rng.choice([c for c in range(4) if c != source]))
    counts = [(c, RARE, n) for c in range(4) for n in range(N_TRAIN)] + [(c, .5, n) for c in range(4) for n in range(N_VALID)]
    found = [Composed(kind, c, c==source and rng.random() < share, c==source, rng) for c, share, _ in counts]
    labels = [given if one.is_rare and i < 4*N_TRAIN else one.true for i, one in enumerate(found)]
    return found, labels, given


# -- learners

def as_input(images): return (torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).float()/255 - .5)/.5


def trained(body, tail, x, y, n_epochs, rate, bs=32):
    "`tail`, trained on what the frozen body makes of the pictures"
    with torch.no_grad(): features = torch.cat([body(some) for some in x.split(16)])
    tail.train()
    optimizer = torch.optim.AdamW(tail.parameters(), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=n_epochs*(len(y)//bs))
    for rows in (rows for _ in range(n_epochs) for rows in torch.randperm(len(y))[:len(y)//bs*bs].split(bs)):
        loss = F.cross_entropy(tail(features[rows]), y[rows], label_smoothing=.05)
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return tail


def network(name, x, y, seed):
    torch.manual_seed(seed)
    if name=='whole':
        body = efficientnet_lite0()[0].eval()
        return nn.Sequential(nn.Sequential(body), trained(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 4)), x, y, 60, 1e-2)).eval()
    look = nn.Sequential(nn.BatchNorm2d(80), nn.Conv2d(80, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
    body = pretrained_body().eval()
    tail = trained(body, nn.Sequential(look, create_head(128, 4)), x, y, 40, 5e-3)
    return nn.Sequential(nn.Sequential(body, tail[0]), tail[1]).eval()


def learner(found, labels, name, seed):
    n = 4*N_TRAIN
    model = network(name, as_input([one.image for one in found[:n]]), torch.tensor(labels[:n]), seed)
    block = DataBlock((ImageBlock, CategoryBlock(vocab=CLASSES, sort=False)), get_x=lambda i: found[i].image, get_y=lambda i: CLASSES[labels[i]],
                      splitter=IndexSplitter(range(n, len(found))), batch_tfms=Normalize.from_stats([.5]*3, [.5]*3))
    return Learner(block.dataloaders(range(len(found)), bs=32, num_workers=0, device='cpu'), model, loss_func=nn.CrossEntropyLoss())


# -- what is measured

def captured(model, images, classes):
    "Activations, and maps for a class each"
    acts, maps, method = [], [], METHODS['objectcam']
    with Probe(model, method.facts.layers, method.facts.grad) as probe:
        for some, asked in zip(as_input(images).split(32), torch.as_tensor(classes).split(32)):
            cap = probe(some)
            maps.append(method(cap, cap.score(lambda out, asked=asked: out.gather(1, asked[:, None])[:, 0])).detach())
            acts.append(cap.acts[-1])
    return torch.cat(acts), torch.cat(maps)


SHIPPED, PLAIN = 'what speaks for the class, less what is typical of it (`show_like`)', 'mean of the picture'


def recalls(learn, index, found, given, errors):
    "Of the errors, how many of the wrong labels there could be are among the five neighbours: by name of the way to look"
    n = 4*N_TRAIN
    rows = (index.labels==given).nonzero()[:, 0]
    planted = torch.tensor([found[int(index.positions[row])].is_rare for row in rows])
    most = min(K, int(planted.sum()))
    table = learn.get_like([i - n for i in errors], k=K, cls=CLASSES[given], index=index).to_df()
    shares = {SHIPPED: table.groupby('item', sort=False)['position'].apply(lambda some: sum(found[i].is_rare for i in some)/most).mean()}
    with torch.no_grad(): acts = torch.cat([learn.model[0](some) for some in as_input([one.image for one in found]).split(32)])
    own, maps = captured(learn.model, [found[i].image for i in errors], [given]*len(errors))
    spoken = evidence_features(own, maps[:, None].clamp(min=0)**2)[:, 0]
    means, most_of = acts.mean((2, 3)), acts.amax((2, 3))
    def near(features, of_class, centre): return alike(features, of_class, centre).topk(K, dim=1).indices
    none = torch.zeros(acts.shape[1])
    of_class = index.positions[rows]
    ways = {'what speaks for the class': near(spoken, index.features[rows], none), PLAIN: near(means[errors], means[of_class], none),
            'mean of the picture, less what is typical': near(means[errors], means[of_class], typical_evidence(means[of_class], means[:n])),
            'maximum of the picture, less what is typical': near(most_of[errors], most_of[of_class], typical_evidence(most_of[of_class], most_of[:n]))}
    shares |= {name: (planted[places].sum(1)/most).mean().item() for name, places in ways.items()}
    shares['any of those labelled so'] = K*planted.float().mean().item()/most
    return shares


def plain_matches(acts, other, n):
    "Cells that are the best match for each other by the cosine of their activations alone"
    worth = F.normalize(acts.flatten(1), dim=0).T @ F.normalize(other.flatten(1), dim=0)
    best, cells = worth.argmax(1), torch.arange(len(worth))
    strength = torch.where(worth.argmax(0)[best]==cells, worth[cells, best], -1)
    chosen = strength.argsort(descending=True)[:n]
    return [(divmod(int(i), acts.shape[2]), divmod(int(best[i]), acts.shape[2])) for i in chosen]


LINES = ['what is alike where both speak for the class (`show_like`)', 'what is alike', 'any two places']


def on_object(learn, index, found, predicted, rng):
    "The share of joined places that are on the same object in both pictures, as many by each way, and how many were joined in a pair of pictures"
    n, shares, counts = 4*N_TRAIN, {name: [] for name in LINES}, []
    chosen = list(range(n, len(found), 3))
    table = learn.get_like([i - n for i in chosen], k=3, cls='predicted', index=index).to_df()
    pairs = [(chosen[at], int(i)) for at, (_, some) in enumerate(table.groupby('item', sort=False)) for i in some['position']]
    every = sorted({i for pair in pairs for i in pair})
    classes = [int(predicted[i]) if i >= n else int(index.labels[i]) for i in every]
    acts, maps = captured(learn.model, [found[i].image for i in every], classes)
    place = {i: at for at, i in enumerate(every)}
    for one, other in pairs:
        (a, a_map), (b, b_map), grid = *[(acts[place[i]], maps[place[i]]) for i in (one, other)], tuple(acts.shape[2:])
        owners, others = found[one].owners(grid), found[other].owners(grid)
        own = [tuple(map(tuple, cells)) for cells in match_cells(a, a_map, b, b_map).tolist()]
        anywhere = [tuple(map(tuple, cells)) for cells in rng.integers(0, grid[0], (len(own), 2, 2)).tolist()]
        counts.append(len(own))
        for name, cells in zip(LINES, (own, plain_matches(a, b, len(own)), anywhere)):
            shares[name] += [owners[i]==others[j] != '' for i, j in cells]
    return {name: float(np.mean(some)) for name, some in shares.items()}, float(np.mean(counts))


def measured(kind, name, seed):
    "One learner"
    found, labels, given = pictures(kind, seed)
    learn = learner(found, labels, name, seed)
    with learn.no_bar():
        index = learn.similar_index()
        with torch.no_grad(): predicted = torch.cat([learn.model(some) for some in as_input([one.image for one in found]).split(32)]).argmax(1)
        errors = [i for i in range(4*N_TRAIN, len(found)) if found[i].is_rare and predicted[i]==given]
        lines, n_lines = on_object(learn, index, found, predicted, np.random.default_rng(seed))
        return dict(kind=kind, network=name, seed=seed, errors=len(errors), lines=lines, n_lines=n_lines,
                    right=float(np.mean([found[i].true==predicted[i] for i in range(4*N_TRAIN, len(found))])),
                    recall=recalls(learn, index, found, given, errors) if errors else None)


# -- the table

def table_of(rows, what, first):
    "A line for each way: its mean over the learners, and how much more the first has, with 95% intervals"
    rows, lines = [row for row in rows if row[what]], []
    best = np.array([row[what][first] for row in rows])
    for name in rows[0][what]:
        values = np.array([row[what][name] for row in rows])
        share, more = (bootstrap_interval(lambda some: some.mean(-1), some) for some in (values, best - values))
        lines.append(f'| {name} | {share[0]:.2f} ({share[1]:.2f} to {share[2]:.2f}) | ' + ('' if name==first else f'{more[0]:+.2f} ({more[1]:+.2f} to {more[2]:+.2f})') + ' |')
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--first', type=int, default=0, help='first seed; those from 1000 on were for choosing')
    parser.add_argument('--n', type=int, default=3, help='learners of each kind and network')
    parser.add_argument('--out', type=Path, help='JSON of all learners')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, start = [], perf_counter()
    for i, (_, *case) in enumerate(product(range(args.n), KINDS, NETWORKS)):
        rows.append(measured(*case, args.first + i))
        print(f'{perf_counter() - start:4.0f} s', *case, args.first + i, f'{rows[-1]["errors"]} errors', rows[-1]['recall'] and f'{rows[-1]["recall"][SHIPPED]:.2f}', flush=True)
        if args.out: args.out.write_text(json.dumps(rows))
    n_errors = sum(row['errors'] for row in rows)
    print(f'\n| {n_errors} errors of {sum(row["recall"] is not None for row in rows)} learners: neighbours by | recall@5 of the wrong labels | `show_like` has more |\n|---|---|---|')
    print('\n'.join(table_of(rows, 'recall', SHIPPED)))
    for part in (KINDS, NETWORKS):
        for name in part:
            some = [row['recall'] for row in rows if row['recall'] and name in (row['kind'], row['network'])]
            print(f'{name}:', '; '.join(f'{way} {np.mean([one[way] for one in some]):.2f}' for way in some[0]))
    print(f'\n| {np.mean([row["n_lines"] for row in rows]):.1f} places in a pair: joined by | on the same object | `show_like` has more |\n|---|---|---|')
    print('\n'.join(table_of(rows, 'lines', LINES[0])))


if __name__=='__main__': main()
