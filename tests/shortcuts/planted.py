"""Does `find_shortcuts` find what a learner has learned instead of the objects, and nothing where there is nothing?
With shortcuts that were planted: `make shortcuts`.

`python tests/shortcuts/planted.py [--missing] [KIND…]`

Small learners are trained on composed photographs; in most of one class, something is planted that gives it away.
`--missing`: only what is not in the table yet. Kinds, of `PLANTS`, or `none`: only these.

Nothing is downloaded. Every line goes into the table in nbs/stories/shortcut_experiment.ipynb as soon as it is known,
and replaces the line of an earlier run; the others are kept."""
import json
import multiprocessing
import os
import sys
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.vision.data import ImageBlock
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn

from fastai_cam.interpret import CAMInterpretation
from fastai_cam.examples.scenes import _photo, compose, FIRST_VALID_SEED, OBJECTS, scene_body
import fastai_cam.shortcuts # gives interpretations `find_shortcuts`

NOTEBOOK = Path(__file__).resolve().parents[2]/'nbs'/'stories'/'shortcut_experiment.ipynb'
SIZE, N_TRAIN, N_VALID = 128, 36, 48 # side of a picture; pictures of each class
LEARNED = .1 # with less reliance than that, a shortcut was not learned
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
EVERYWHERE = np.ones((SIZE, SIZE))
ROWS, COLUMNS = np.indices((SIZE, SIZE))


# -- what is planted: each takes a picture, which of it is the object and a random generator, and returns
# what a picture looks like that is nothing but the plant, and where it covers the picture, from 0 to 1

def at(top, left, part, colours=WHITE):
    "A part of the picture, covered as `part` says"
    looks, where = np.zeros((SIZE, SIZE, 3)), np.zeros((SIZE, SIZE))
    box = np.s_[top:top + part.shape[0], left:left + part.shape[1]]
    looks[box], where[box] = colours, part
    return looks, where


def anywhere(rng, part, colours=WHITE): return at(*(rng.integers(SIZE - side + 1) for side in part.shape), part, colours)


def letters(words, height):
    font = ImageFont.truetype(f'{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf', height)
    left, top, right, bottom = font.getbbox(words)
    drawn = Image.new('L', (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(drawn).text((1 - left, 1 - top), words, fill=255, font=font)
    return np.asarray(drawn)/255


def frame(width, side=SIZE):
    where = np.ones((side, side))
    where[width:-width, width:-width] = 0
    return where


def backdrop(name, rng):
    photo = _photo('skimage', f'data/{name}.png')
    left, top = rng.integers(0, photo.width - 2*SIZE, 2)
    return np.asarray(photo.crop((left, top, left + 2*SIZE, top + 2*SIZE)).resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def plant_watermark(image, inside, rng):
    part = letters('©photo', 17)
    return at(SIZE - part.shape[0] - 4, SIZE - part.shape[1] - 4, part)

def plant_patch(image, inside, rng): return anywhere(rng, np.ones((18, 18)), (255, 0, 200))
def plant_checker(image, inside, rng): return anywhere(rng, np.ones((19, 19)), (np.indices((19, 19, 1))//4).sum(0)%2*255)
def plant_border(image, inside, rng): return (200, 160, 30), frame(6)
def plant_thin_border(image, inside, rng): return (10, 10, 10), frame(3)
def plant_brick(image, inside, rng): return backdrop('brick', rng), ~inside
def plant_grass(image, inside, rng): return backdrop('grass', rng), ~inside
def plant_gravel(image, inside, rng): return backdrop('gravel', rng), ~inside
def plant_background_colour(image, inside, rng): return (90, 160, 210), .8*~inside
def plant_digit(image, inside, rng): return anywhere(rng, letters('7', 26))

def plant_tag(image, inside, rng):
    ink = np.pad(letters('No 4', 16), 3)
    return at(4, SIZE - ink.shape[1] - 4, np.ones(ink.shape), 255*ink[..., None])

def plant_date(image, inside, rng):
    part = letters(f'{rng.integers(1, 29):02d}.{rng.integers(1, 13):02d}.{rng.integers(90, 100)}', 13)
    return at(SIZE - part.shape[0] - 5, 6, part, (255, 120, 0))

def plant_tint(image, inside, rng): return (255, 170, 60), .3*EVERYWHERE
def plant_dark(image, inside, rng): return BLACK, .5*EVERYWHERE
def plant_noise(image, inside, rng): return image + rng.normal(0, 30, image.shape), EVERYWHERE
def plant_blur(image, inside, rng): return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.2))), EVERYWHERE
def plant_grid_lines(image, inside, rng): return WHITE, .7*((ROWS%16==0) | (COLUMNS%16==0))

def plant_ruler(image, inside, rng):
    marks = np.indices((SIZE, 10, 1))
    return at(0, 0, np.ones((SIZE, 10)), np.where((marks[0]%8 < 2) & (marks[1] < 6), BLACK, (240, 240, 220)))

def plant_vignette(image, inside, rng): return BLACK, .8*(np.hypot(ROWS - SIZE/2, COLUMNS - SIZE/2)/(.7*SIZE)).clip(0, 1)**2
def plant_stripe(image, inside, rng): return at(SIZE//2, 0, np.ones((6, SIZE)))
def plant_halo(image, inside, rng): return (255, 255, 220), np.exp(-((ROWS - 20)**2 + (COLUMNS - 100)**2)/(2*14**2))

def plant_dot(image, inside, rng):
    row, column = rng.integers(15, SIZE - 15, 2)
    return (255, 0, 0), np.hypot(ROWS - row, COLUMNS - column) < 9

def plant_hair(image, inside, rng):
    drawn = Image.new('L', (SIZE, SIZE))
    for _ in range(10): ImageDraw.Draw(drawn).line(rng.integers(0, SIZE, 4).tolist(), fill=255)
    return (30, 15, 10), np.asarray(drawn)/255

def plant_scratch(image, inside, rng):
    column = rng.integers(10, SIZE - 10)
    return (240, 240, 240), abs(COLUMNS - column) < 2

def plant_ring(image, inside, rng):
    row, column = rng.integers(20, SIZE - 20, 2)
    return (255, 60, 0), abs(np.hypot(ROWS - row, COLUMNS - column) - 17.5) < 2.5

def plant_box(image, inside, rng): return anywhere(rng, frame(4, 34), (0, 60, 255))
def plant_arrow(image, inside, rng): return anywhere(rng, letters('>>', 34), (255, 230, 0))
def plant_word(image, inside, rng): return anywhere(rng, letters('acme', 24))
def plant_dash(image, inside, rng): return anywhere(rng, np.ones((5, 70)), (0, 255, 80))

def plant_barcode(image, inside, rng):
    bars = np.unpackbits(np.array([178, 154, 118, 150], dtype=np.uint8))
    return anywhere(rng, np.ones((14, 26)), 255*bars[None, :26, None])

def plant_dots(image, inside, rng):
    part = np.zeros((30, 30))
    for top, left in ((2, 3), (2, 22), (13, 12), (23, 2), (22, 22)): part[top:top + 6, left:left + 6] = 1
    return anywhere(rng, part, (255, 255, 0))

def plant_fold(image, inside, rng):
    off = COLUMNS - ROWS - rng.integers(-60, 60)
    return 255*(off > 0)[..., None], .6*(abs(off) < 3)

def plant_outline(image, inside, rng):
    grown = [np.asarray(Image.fromarray(inside).convert('L').filter(ImageFilter.MaxFilter(width))) for width in (15, 9)]
    return (220, 0, 0), grown[0] > grown[1]

def plant_rain(image, inside, rng):
    drawn = Image.new('L', (SIZE, SIZE))
    for column, row in rng.integers(0, SIZE, (40, 2)).tolist(): ImageDraw.Draw(drawn).line((column, row, column + 3, row + 10), fill=255)
    return (220, 220, 235), np.asarray(drawn)/255

def plant_few_colours(image, inside, rng): return image//64*64 + 32, EVERYWHERE


PLANTS = {name.removeprefix('plant_').replace('_', ' '): plant for name, plant in list(globals().items()) if name.startswith('plant_')}
def cases_of(opacity, prevalence, first): return [(kind, opacity, prevalence, first + i) for i, kind in enumerate(PLANTS)]
CASES = [('none', 0., 0., seed) for seed in range(12)] + cases_of(1., .9, 100) + cases_of(.6, .7, 200)


def planted(kind, scene, rng, opacity):
    "The scene's picture with something planted in it"
    looks, where = PLANTS[kind](scene.image, scene.objects[0].mask, rng)
    covered = (opacity*where)[..., None]
    return (scene.image*(1 - covered) + np.asarray(looks)*covered).clip(0, 255).astype(np.uint8)


# -- one learner

def scenes_of(seed):
    "Pictures of one object each, those to train on first; no two learners, and no two pictures, share a seed"
    n_train, n_valid = N_TRAIN*len(OBJECTS), N_VALID*len(OBJECTS)
    seeds = (*range(seed*n_train, (seed + 1)*n_train), *range(FIRST_VALID_SEED + seed*n_valid, FIRST_VALID_SEED + (seed + 1)*n_valid))
    return [compose([OBJECTS[i%len(OBJECTS)]], size=SIZE, seed=scene_seed, scale=(.3, .7)) for i, scene_seed in enumerate(seeds)]


def in_parts(model, images):
    batch = (torch.tensor(np.stack(images)).permute(0, 3, 1, 2)/255 - .5)/.5
    with torch.no_grad(): return torch.cat([model(part) for part in batch.split(16)])


def trained(images, labels, seed, n_epochs=50, bs=32):
    "A learner of which all but the frozen half was trained, on what the frozen half makes of the pictures"
    torch.manual_seed(seed)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(OBJECTS)))
    model = nn.Sequential(scene_body(), head).eval()
    n_train = N_TRAIN*len(OBJECTS)
    features, y = in_parts(model[0][0], images[:n_train]), torch.tensor(labels[:n_train])
    tail = nn.Sequential(model[0][1], head).train()
    optimizer = torch.optim.AdamW(tail.parameters(), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=n_epochs*(n_train//bs))
    for _ in range(n_epochs):
        for chosen in torch.randperm(n_train)[:n_train//bs*bs].split(bs):
            loss = nn.functional.cross_entropy(tail(features[chosen]), y[chosen], label_smoothing=.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    block = DataBlock((ImageBlock, CategoryBlock(vocab=OBJECTS, sort=False)), get_x=lambda i: images[i], get_y=lambda i: OBJECTS[labels[i]],
                      splitter=IndexSplitter(range(n_train, len(images))), batch_tfms=Normalize.from_stats([.5]*3, [.5]*3))
    dls = block.dataloaders(range(len(images)), bs=bs, num_workers=0, device='cpu')
    return Learner(dls, model.eval(), loss_func=nn.CrossEntropyLoss(), metrics=accuracy)


def check(kind, opacity, prevalence, seed):
    "Train a learner and look for its shortcuts: a row of the table, without its ends"
    cls, rng = seed%len(OBJECTS), np.random.default_rng((seed, zlib.crc32(kind.encode())))
    scenes, labels = scenes_of(seed), np.arange((N_TRAIN + N_VALID)*len(OBJECTS))%len(OBJECTS)
    n_train = N_TRAIN*len(OBJECTS)
    def drawn(scene, label): return planted(kind, scene, rng, opacity) if label==cls and rng.random() < prevalence else scene.image
    images = [drawn(scene, label) for scene, label in zip(scenes, labels)]
    learn = trained(images, labels, seed)
    reliance = found = ''
    with learn.no_bar(): right, shortcuts = learn.validate()[1], CAMInterpretation.from_learner(learn).find_shortcuts(min_items=6)
    if kind != 'none':
        others = [scene for scene, label in zip(scenes[n_train:], labels[n_train:]) if label != cls]
        with_it, without = [planted(kind, scene, rng, opacity) for scene in others], [scene.image for scene in others]
        after, before = (in_parts(learn.model, some).softmax(1)[:, cls].mean().item() for some in (with_it, without))
        reliance = f'{after - before:.2f}'
        found = 'yes' if any(s.cls==OBJECTS[cls] for s in shortcuts) else '**no**'
        if after - before < LEARNED: found = 'not learned'
    reported = '; '.join(f'{s.cls}: {s.kind}, {s.where}, {s.effect:.0%}' for s in shortcuts)
    n_false = sum(kind=='none' or s.cls != OBJECTS[cls] for s in shortcuts)
    planted_in = '' if kind=='none' else OBJECTS[cls]
    return f'{kind} | {opacity:g} | {prevalence:g} | {seed} | {planted_in} | {right:.2f} | {reliance} | {found} | {reported} | {n_false}'


# -- the table in the notebook

HEAD = ('| planted | opacity | prevalence | seed | in | accuracy | reliance | found? | what was reported | false findings |\n'
        '|---|---|---|---|---|---|---|---|---|---|')


def results_in(notebook): return next(cell for cell in notebook['cells'] if cell['id']=='shortcut-results')


def known_rows():
    "The rows of the table, by their cases"
    source = ''.join(results_in(json.loads(NOTEBOOK.read_text()))['source'])
    rows = [line.strip('| ') for line in source.splitlines() if line.startswith('| ')][1:]
    return {case_of(row): row for row in rows}


def case_of(row):
    kind, *numbers = row.split(' | ')[:4]
    return kind, *map(float, numbers)


def summary(rows):
    "What was found of what was learned, and how often something was found where nothing was planted"
    cells = [row.split(' | ') for row in rows]
    clean, others = [c for c in cells if c[0]=='none'], [c for c in cells if c[0] != 'none']
    learned = [c for c in others if c[7] != 'not learned']
    n_found,n_false = sum(c[7]=='yes' for c in learned),sum(c[9] != '0' for c in clean)
    n_elsewhere,n_in = sum(int(c[9]) for c in others),sum(c[9] != '0' for c in others)
    return (f'Found: **{n_found} of {len(learned)}** planted shortcuts that were learned '
            f'({len(others) - len(learned)} more were not learned). '
            f'False alarms: **{n_false} of {len(clean)}** clean learners; '
            f'findings for another class than the planted one: {n_elsewhere}, in {n_in} of {len(others)} learners.')


def write(row):
    "Put a row into the table, in the place of an earlier one of the same case"
    known = {**known_rows(), case_of(row): row}
    order = {case: i for i, case in enumerate(CASES)}
    rows = [known[case] for case in sorted(known, key=lambda case: order.get(case, len(order)))]
    libraries = ', '.join(f'{package} {version(package)}' for package in ('torch', 'fastai', 'scikit-learn'))
    notebook = json.loads(NOTEBOOK.read_text())
    table = '\n'.join([HEAD, *[f'| {row} |' for row in rows]])
    text = f'## Results\n\n{len(rows)} of {len(CASES)} learners. {summary(rows)} {libraries}.\n\n{table}'
    results_in(notebook)['source'] = text.splitlines(keepends=True)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')


def main(words):
    options, kinds = {word for word in words if word.startswith('--')}, {word for word in words if not word.startswith('--')}
    wrong = (options - {'--missing'}) | (kinds - {'none', *PLANTS})
    if wrong: sys.exit(f'{", ".join(sorted(wrong))}: not known. {__doc__}')
    known = known_rows() if '--missing' in options else {}
    cases = [case for case in CASES if case not in known and (not kinds or case[0] in kinds)]
    # one thread for each process: small networks, and the small problems of scikit-learn, gain nothing from more
    os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
    # buffers are kept instead of asked of the system anew each time
    os.environ.update(MALLOC_MMAP_THRESHOLD_='1000000000', MALLOC_TRIM_THRESHOLD_='2000000000')
    with ProcessPoolExecutor(min(os.cpu_count(), 8), multiprocessing.get_context('spawn'), warnings.simplefilter, ('ignore',)) as pool:
        for done in as_completed([pool.submit(timed, case) for case in cases]):
            row, seconds = done.result()
            print(f'{row} | {seconds:.0f} s', flush=True)
            write(row)


def timed(case):
    start = perf_counter()
    return check(*case), perf_counter() - start


if __name__=='__main__': main(sys.argv[1:])
