"Learners whose reports are written: pictures with a mark, names that would break a page."
import numpy as np
import torch
from PIL import Image
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, PILImage, TfmdDL, ToTensor, IntToFloatTensor, Datasets, Categorize, CategoryMap

from fastai_cam.all import CAMInterpretation
from fastai_cam.report.facts import page_facts
from fastai_cam.report.page import block, render
from fastai_cam.report.pictures import encoded, packed, palettes, Room

HOSTILE = ['<script>document.title="run"</script>', '"><img src=x onerror=document.title="run">', "javascript:document.title='run'", 'abc \u202egpj.exe\u202c \u05d0\u05d1\u05d2', 'long ' + 'x'*10_000]


def body(n_out, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)))
    for parameter in net.parameters(): nn.init.normal_(parameter, std=.5)
    return net


def plain(samples, n_out, loss=None, vocab=None, bs=4, model=None):
    "A learner on samples in memory"
    dls = DataLoaders(*[TfmdDL(samples, bs=bs, num_workers=0) for _ in range(2)])
    if vocab is not None: dls.vocab = vocab
    learn = Learner(dls, model or body(n_out), loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def pictures(n, size=(24, 32), seed=0):
    return [torch.rand(3, *size, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]


def hostile_files(folder, n=10):
    "Files whose names would break a page"
    names = ['<b>bold', '"quoted" \'name\'', 'a&amp;b', 'javascript:alert(1)', '\u202egpj', 'né', '../up'.replace('/', '\u2215'), '`x`', '{{7*7}}', 'x'*200]
    rng = np.random.default_rng(0)
    files = []
    for i in range(n):
        pixels = rng.integers(40, 100, (48, 64, 3), dtype=np.uint8)
        pixels[10:34, 6 + 5*(i%5):26 + 5*(i%5)] = 60 + 40*(i%5)
        files.append(folder/f'{names[i%len(names)]} {i}.png')
        Image.fromarray(pixels).save(files[-1])
    return files


def hostile_learner(folder, n=10, names=HOSTILE, seed=0):
    "Files and classes with hostile names; class `i % 5` is how bright the mark is"
    files = [(file, i%len(names)) for i, file in enumerate(sorted(hostile_files(folder, n), key=lambda file: int(file.stem.split()[-1])))]
    label = {file: names[c] for file, c in files}
    paths = [file for file, _ in files]
    ds = Datasets(paths, [[PILImage.create], [label.get, Categorize(vocab=CategoryMap(names, sort=False))]], splits=[list(range(n))]*2)
    dls = ds.dataloaders(bs=4, num_workers=0, after_item=[ToTensor()], after_batch=[IntToFloatTensor()], shuffle=False, drop_last=False)
    learn = Learner(dls, body(len(names), seed), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def interpretation(learn): return CAMInterpretation.from_learner(learn)


# -- pages of as many pictures as one likes, without a model

def many_facts(n, n_classes=10, seed=0):
    "Answers by chance, three of four right"
    rng, items = np.random.default_rng(seed), []
    for i in range(n):
        label, is_right, sure = int(rng.integers(n_classes)), rng.random() < .75, float(np.round(rng.uniform(.3, 1), 6))
        pred = label if is_right else (label + 1)%n_classes
        answer = dict(prediction=pred, probability=sure, loss=float(np.round(-np.log(sure) if is_right else 1 + 3*sure, 6)), right=bool(pred==label), top=[[pred, sure], [(pred + 1)%n_classes, round((1 - sure)/2, 6)]])
        items.append(dict(key=f'class {label}/{i:05}.jpg', position=i, shown=True, label=label, answers=[answer]))
    items.sort(key=lambda item: -item['answers'][0]['loss'])
    return page_facts('classes', [f'class {c}' for c in range(n_classes)], items, ['this model'], made=[dict(methods=['gradcam', 'layercam'], layers=['0'])])


def many_blocks(n, photos, seed=0):
    "Random parts of photos, with smooth maps"
    rng, room, made = np.random.default_rng(seed), Room(n, 4), []
    for i in range(n):
        if i < 300: # then they come again
            photo = photos[i%len(photos)]
            side = int(min(photo.size)*rng.uniform(.5, 1))
            left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
            made.append(encoded(photo.crop((left, top, left + side, top + side)).resize((224, 224)), room.picture))
        picture, maps = made[i%300], []
        for method in ('gradcam', 'layercam'):
            for ask in range(2):
                values = torch.nn.functional.interpolate(torch.from_numpy(rng.normal(size=(1, 1, 4, 4))), size=(14, 14), mode='bicubic')[0, 0]
                maps.append(dict(ask=ask, method=method, text=f'class {ask}', map=packed(values, room.map_side), full=float(values.max())))
        text = block(i, dict(views=[dict(picture=picture, maps=maps)]))
        room.take(len(text))
        yield text


def many(path, n, photos):
    "A page of `n` pictures"
    shown = dict(asked=['predicted', 'actual'], palette='inferno', palettes=palettes(), signed=False)
    with open(path, 'w', encoding='utf-8') as out: out.writelines(render(many_facts(n), shown, many_blocks(n, photos)))
    return path


def waves(n=6, side=300):
    "Pictures that look like something"
    y, x = np.mgrid[:side, :side]/side
    return [Image.fromarray(np.stack([127 + 120*np.sin(9*(i + 2)*x + c + 7*y*(i%3)) for c in range(3)], -1).astype(np.uint8)) for i in range(n)]
