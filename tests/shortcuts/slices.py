"""Does the atlas of mistakes find a reason that is known, and none where there is none? With reasons that were planted: `make slices`.

`python tests/shortcuts/slices.py [FIRST LAST]`

Small learners are trained on composed photographs so that they fail on a part of the validation set, a *slice*, for a reason that is known;
a twentieth of the other labels is wrong besides. Groups are made of what the evidence is, of the features of the whole picture,
and of where the map lies (the heat map itself); how many of the ten mistakes nearest to the best group are of the slice is the precision.

Seeds FIRST to LAST - 1 (0 to 9, and 0 to 19 of learners in which nothing is planted); parameters were chosen on seeds from 100 on. Nothing is downloaded. Numbers go into slices.json,
the table of seeds 0 to 9 into nbs/89b_reasons.atlas.ipynb."""
import json
import os
import sys
import warnings
import zlib
from operator import itemgetter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1') # small networks gain nothing from more

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastai_cam.core import mean_interval
from fastai_cam.examples.scenes import compose, cut_out, FIRST_VALID_SEED, scene_body
from fastai_cam.methods import gradcam
from fastai_cam.probe import Probe
from fastai_cam.reasons import mistake_groups
from fastai_cam.similar import evidence_features
from fastai_cam.targets import Predicted
from planted import in_parts, PLANTS, SIZE

RESULTS = Path(__file__).with_suffix('.json')
NOTEBOOK = Path(__file__).resolve().parents[2]/'nbs'/'89b_reasons.atlas.ipynb'
CLASSES = ['cat', 'dog', 'cup', 'flower', 'car']
N_TRAIN, N_VALID = 30, 60 # pictures of each class
N_MISLED = dict(sticker=30, thing=30, tint=16, backdrop=16) # pictures to train on that are labelled by what is planted in them
SIZES = 10, 20, 40 # items of a slice
FEWEST = 5 # mistakes in a slice without which it was not learned
KINDS = {
    'sticker': 'a magenta square, which gives a class away in training, on pictures of other classes',
    'thing': 'a strawberry beside the object, in the same way',
    'tint': 'the object in blue, in the same way',
    'backdrop': 'a wall of bricks around the object, in the same way',
    'sub-kind': 'a kind of dog or car that was never trained on',
    'small': 'objects a third as large as those trained on',
    'wrong labels': 'a kind of dog or car that is labelled wrongly in the validation set'}
CLEAN = {'clean': .05, 'random labels': .15} # nothing is planted, and this part of the labels is wrong
CONTROLS = {'clean': '5% of the labels wrong at random, and what the learner itself gets wrong',
            'random labels': '15% of the labels wrong at random, and what the learner itself gets wrong',
            'dealt': 'as many mistakes as in these, dealt out at random'}
N_CLEAN = 20 # seeds of learners in which nothing is planted, two of each
VECTORS = {'evidence': 'what the evidence is', 'whole': 'features of the whole picture', 'layout': 'where the map lies'}


# -- pictures

def scenes(name, first, n, kinds=(0, 1, 2, 3), scale=(.4, .7)):
    "Pictures of one object, of these kinds of it"
    found, seed = [], first
    while len(found) < n:
        scene = compose([name], size=SIZE, seed=seed, scale=scale)
        if scene.objects[0].how['variant'] in kinds: found.append(scene)
        seed += 1
    return found


def blended(scene, looks, where):
    covered = np.asarray(where, dtype=float)[..., None]
    return (scene.image*(1 - covered) + np.asarray(looks)*covered).clip(0, 255).astype(np.uint8)


def with_strawberry(scene, rng):
    "A strawberry where least of the object is, of twenty places"
    pixels, inside = cut_out('strawberry', int(rng.integers(4)), 34)
    (height, width), image, outside = inside.shape, scene.image.copy(), ~scene.objects[0].mask
    corners = [(rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)) for _ in range(20)]
    top, left = max(corners, key=lambda at: outside[at[0]:at[0] + height, at[1]:at[1] + width].mean())
    image[top:top + height, left:left + width][inside] = pixels[inside]
    return image


def with_plant(kind, scene, rng):
    inside = scene.objects[0].mask
    if kind=='thing': return with_strawberry(scene, rng)
    if kind=='tint': return blended(scene, (30, 60, 230), .45*inside)
    return blended(scene, *PLANTS[dict(sticker='patch', backdrop='brick')[kind]](scene.image, inside, rng))


class World:
    "The pictures of a seed, and what the frozen half of the network makes of them"
    def __init__(self, seed):
        self.seed, self.body, first = seed, scene_body().eval()[0], 5000*seed
        self.scenes = [sum([scenes(name, start + 1000*k, n) for k, name in enumerate(CLASSES)], [])
                       for start, n in ((first, N_TRAIN), (FIRST_VALID_SEED + first, N_VALID))]
        self.features = [self.look([scene.image for scene in part]) for part in self.scenes]

    def look(self, images): return in_parts(self.body, images)


# -- a slice

class Case:
    "Features and labels of a learner that fails on a slice, for whatever size of it"
    def __init__(self, world, kind, draw=0):
        self.world, self.kind, self.draw = world, kind, draw
        self.rng = np.random.default_rng((world.seed, draw, zlib.crc32(kind.encode())))
        self.train, self.valid = (features.clone() for features in world.features)
        self.y_train, self.y_valid = (np.repeat(range(len(CLASSES)), n) for n in (N_TRAIN, N_VALID))
        self.chosen, self.changed, self.wrong_label = np.zeros(0, dtype=int), self.valid[:0], None # of the largest slice
        if kind in ('sub-kind', 'wrong labels'): self.of_a_kind()
        elif kind=='small': self.small()
        elif kind in KINDS: self.misled()

    def plant(self, part, items):
        "What pictures to train on (0) or to validate with (1) become"
        return self.world.look([with_plant(self.kind, self.world.scenes[part][i], self.rng) for i in items])

    def misled(self):
        "What is planted gives a class away in training, and others have it too"
        rng, cls = self.rng, self.rng.integers(len(CLASSES))
        def habit(y): return np.flatnonzero((y==cls) & (rng.random(len(y)) < .8))
        labelled_by_it = rng.choice(np.flatnonzero(self.y_train != cls), N_MISLED[self.kind], replace=False)
        for part, features, items in ((0, self.train, np.concatenate([habit(self.y_train), labelled_by_it])), (1, self.valid, habit(self.y_valid))):
            features[torch.as_tensor(items)] = self.plant(part, items)
        self.y_train[labelled_by_it] = cls
        self.chosen = rng.choice(np.flatnonzero(self.y_valid != cls), max(SIZES), replace=False)
        self.changed = self.plant(1, self.chosen)

    def of_a_kind(self):
        "Dogs and cars are of two kinds"
        name, first = str(self.rng.choice(['dog', 'car'])), 5000*self.world.seed + len(CLASSES)*1000
        cls = CLASSES.index(name)
        def look(first, n, kind): return self.world.look([scene.image for scene in scenes(name, first, n, [kind])])
        if self.kind=='sub-kind': self.train[torch.as_tensor(self.y_train==cls)] = look(first, N_TRAIN, 0)
        else: self.wrong_label = (cls + self.rng.integers(1, len(CLASSES)))%len(CLASSES)
        first, items = FIRST_VALID_SEED + first, np.flatnonzero(self.y_valid==cls)
        self.valid[torch.as_tensor(items)] = look(first + 500, N_VALID, 0)
        self.chosen, self.changed = items[:max(SIZES)], look(first, max(SIZES), 1)

    def small(self):
        self.chosen, first = self.rng.choice(len(self.valid), max(SIZES), replace=False), FIRST_VALID_SEED + 5000*self.world.seed
        shown = [compose([CLASSES[self.y_valid[i]]], size=SIZE, seed=first + int(i), scale=(.12, .2)) for i in self.chosen]
        self.changed = self.world.look([scene.image for scene in shown])

    def of_size(self, n):
        "Features and labels to validate with, and which items are of the slice"
        valid, y, rng, items = self.valid.clone(), self.y_valid.copy(), np.random.default_rng((self.world.seed, self.draw, n)), self.chosen[:n]
        valid[torch.as_tensor(items)] = self.changed[:n]
        if self.wrong_label is not None: y[items] = self.wrong_label
        in_slice = np.isin(np.arange(len(y)), items)
        flipped = np.flatnonzero((rng.random(len(y)) < CLEAN.get(self.kind, CLEAN['clean'])) & ~in_slice) # wrong labels without a reason
        y[flipped] = (y[flipped] + rng.integers(1, len(CLASSES), len(flipped)))%len(CLASSES)
        return valid, y, in_slice


# -- a learner, and its groups

def trained(case, n_epochs=10, bs=30):
    "The half of the network that is trained"
    torch.manual_seed(1000*case.world.seed + case.draw)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(CLASSES)))
    tail, y = nn.Sequential(scene_body()[1], head).train(), torch.tensor(case.y_train)
    optimizer = torch.optim.AdamW(tail.parameters(), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=n_epochs*(len(y)//bs))
    for _ in range(n_epochs):
        for chosen in torch.randperm(len(y))[:len(y)//bs*bs].split(bs):
            loss = F.cross_entropy(tail(case.train[chosen]), y[chosen], label_smoothing=.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return tail.eval()


def vectors_of(tail, features):
    "What is predicted, how surely, and three vectors of each item"
    with Probe(tail, '0') as probe:
        cap = probe(features)
        maps, acts = gradcam(cap, cap.score(Predicted())), cap.acts[-1]
        probability, predicted = cap.out.detach().softmax(1).max(1)
    vectors = dict(evidence=evidence_features(acts, maps)[:, 0], whole=acts.mean((2, 3)), layout=maps[:, 0].clamp(min=0).flatten(1))
    return predicted.numpy(), probability.numpy(), {name: part.detach().numpy() for name, part in vectors.items()}


def precision(groups, wrong, in_slice, k=10):
    "Of the k mistakes nearest to a group, the share that is of the slice (of its mistakes, where it has fewer); the best group counts"
    mistakes, most = np.flatnonzero(wrong), min(k, int((wrong & in_slice).sum()))
    nearest = [mistakes[np.argsort(group.reach[mistakes], kind='stable')][:k] for group in groups]
    return max([in_slice[items].sum()/most for items in nearest], default=0.)


def row_of(case, n, answers, wrong, in_slice, kind):
    "What is found of a slice"
    predicted, probability, vectors = answers
    row = dict(kind=kind, size=n, seed=case.world.seed, mistakes=int(wrong.sum()), in_slice=int((wrong & in_slice).sum()))
    for name, found in vectors.items():
        groups = mistake_groups(found, predicted, wrong, probability, n_deals=99)
        row[f'{name}_groups'] = len(groups)
        if row['in_slice'] >= FEWEST: row[name] = round(float(precision(groups, wrong, in_slice)), 3)
    return row


def rows_of(case, sizes):
    "A learner, and what is found of a slice of each size"
    tail = trained(case)
    for n in sizes:
        features, y, in_slice = case.of_size(n)
        answers = vectors_of(tail, features)
        wrong = answers[0] != y
        yield row_of(case, n, answers, wrong, in_slice, case.kind)
        if case.kind in CLEAN: yield row_of(case, n, answers, np.random.default_rng(case.draw).permutation(wrong), in_slice, 'dealt')


# -- the table

def spread(rows, value):
    "The mean, and its interval over learners, which have several sizes each"
    learners = {}
    for row in rows: learners.setdefault((row['kind'], row['seed']), []).append(value(row))
    return '{:.2f} ({:.2f}–{:.2f})'.format(*mean_interval(np.array([np.mean(values) for values in learners.values()]), 4000))


def line(name, rows, what):
    known = [row for row in rows if 'evidence' in row]
    if not known: return f'| {name} | {what} | 0 of {len(rows)} | – | – | – | – |'
    gain = spread(known, lambda row: row['evidence'] - row['whole'])
    return ' | '.join([f'| {name} | {what} | {len(known)} of {len(rows)}', *[spread(known, itemgetter(vector)) for vector in VECTORS], f'{gain} |'])


def table(rows):
    planted, clean = ([row for row in rows if (row['kind'] in KINDS)==is_planted] for is_planted in (True, False))
    heads = ['| slice | | learned | evidence | whole picture | layout of the map | evidence − whole picture |', '|---|---|---|---|---|---|---|']
    lines = [line(kind, [row for row in planted if row['kind']==kind], what) for kind, what in KINDS.items()]
    sizes = [line(f'{n} items', [row for row in planted if row['size']==n], 'of all kinds') for n in SIZES]
    alarms = []
    for kind, what in CONTROLS.items():
        some = [row for row in clean if row['kind']==kind]
        found = [f'{sum(row[f"{vector}_groups"] > 0 for row in some)} of {len(some)}' for vector in VECTORS]
        alarms.append(' | '.join([f'| {kind} | {what}', *found]) + ' |')
    heads_of_alarms = ['| learners in which a group was reported | | evidence | whole picture | layout of the map |', '|---|---|---|---|---|']
    return '\n'.join([*heads, *lines, *sizes, line('**all**', planted, ''), '', 'Where nothing was planted:', '', *heads_of_alarms, *alarms])


def write_table(rows):
    notebook = json.loads(NOTEBOOK.read_text())
    cell = next(cell for cell in notebook['cells'] if cell['id']=='slice-results')
    before = ''.join(cell['source']).split('| slice |')[0]
    cell['source'] = (before + table(rows)).splitlines(keepends=True)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')


def write_numbers(rows):
    columns = ['kind', 'size', 'seed', 'mistakes', 'in_slice', *[f'{name}_groups' for name in VECTORS], *VECTORS]
    lines = ',\n'.join(json.dumps([row.get(column) for column in columns], separators=(',', ':')) for row in rows)
    RESULTS.write_text(f'{{"columns": {json.dumps(columns)},\n"rows": [\n{lines}]}}\n')


def main(first=0, last=10):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    rows = []
    for seed in range(first, N_CLEAN if first==0 else last):
        world = World(seed)
        cases = [(kind, 0) for kind in KINDS if seed < last] + [(kind, draw) for kind in CLEAN for draw in (1, 2)]
        for kind, draw in cases:
            for row in rows_of(Case(world, kind, draw), SIZES if kind in KINDS else [0]):
                rows.append(row)
                print(row, flush=True)
        if first==0: write_numbers(rows)
    print(table(rows))
    if first==0: write_table(rows)


if __name__=='__main__': main(*map(int, sys.argv[1:]))
