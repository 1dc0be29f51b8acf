"Learners, loaders and what went into their models."
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from fastai.callback.core import Callback
from fastai.vision.all import (
    CategoryBlock, ColReader, CrossEntropyLossFlat, DataBlock, FuncSplitter, ImageBlock, IntToFloatTensor, ItemGetter, Learner,
    Normalize, PILImage, ProgressCallback, Resize, TensorImage, TransformBlock, get_image_files, imagenet_stats, parent_label, set_seed)

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in imagenet_stats)


def net(n_in=3, n_out=2):
    set_seed(0)
    return nn.Sequential(nn.Conv2d(n_in, 6, 3, 4, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, n_out))


def learner(dls, model=None, **kwargs):
    learn = Learner(dls, model or net(), loss_func=kwargs.pop('loss_func', CrossEntropyLossFlat()), **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn


def loaders(pictures, item_tfms=None, batch_tfms=None, bs=5, **kwargs):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=FuncSplitter(lambda f: int(f.stem) >= 12),
                      item_tfms=item_tfms or Resize(64), batch_tfms=[*(batch_tfms or []), Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(pictures, bs=bs, num_workers=0, **kwargs)


@pytest.fixture
def learn(dls): return learner(dls)


def inputs_of(learn, call):
    "What `call` gives, and the inputs that fastai's loop gave to the model in the meantime"
    seen = []
    class Watches(Callback):
        def before_batch(self): seen.append(self.xb[0].detach().as_subclass(Tensor).clone())
    watch = Watches()
    learn.add_cb(watch)
    found = call()
    learn.remove_cb(watch)
    return found, torch.cat(seen)


def pixels(x): return ((x*STD + MEAN)*255).round()


def same_pictures(cams, x, which=None):
    torch.rand(7), np.random.rand(3), random.random() # what happens in between does not matter
    which = range(len(x)) if which is None else which
    return [bool((torch.as_tensor(cams.images[i]).as_subclass(Tensor).float() - pixels(x[i])).abs().max() <= 1) for i in which]


def table_of(pictures):
    files = sorted(pictures.glob('*/*.png'), key=lambda f: f.stem)
    return pd.DataFrame(dict(name=[f'{f.parent.name}/{f.name}' for f in files], label=[f.parent.name for f in files]))


def own_readers(pictures, tmp_path):
    "Learners whose items are no pictures for PIL, by what their items are"
    files = sorted(pictures.glob('*/*.png'), key=lambda f: f.stem)
    arrays = {f: np.array(Image.open(f)) for f in files}
    for f, array in arrays.items():
        np.save(tmp_path/f'{f.stem}_{f.parent.name}.npy', array)
        folder = tmp_path/f'{f.stem}_{f.parent.name}_bands'
        folder.mkdir()
        for c in range(3): np.save(folder/f'{c}.npy', array[..., c])
    def tensor(array): return TensorImage(torch.from_numpy(array).permute(2, 0, 1))
    def npy(fn:Path): return tensor(np.load(fn))
    def stem(p): return p.stem.split('_')[1]
    def block(read): return TransformBlock(type_tfms=read, batch_tfms=IntToFloatTensor)
    npys = sorted(tmp_path.glob('*.npy')) # by number, as `files`
    by_id = {f.stem: array for f, array in arrays.items()}
    rows = table_of(pictures)
    rows['id'] = [f.stem for f in files]
    samples = [(arrays[f], f.parent.name) for f in files]
    made = dict(array_files=(block(npy), npys, None, stem), no_annotation=(block(lambda p: tensor(np.load(p))), npys, None, stem), endless=(block(lambda p: npy(p.with_suffix('.npy'))), [p.with_suffix('') for p in npys], None, stem),
                folders=(block(lambda p: tensor(np.stack([np.load(p/f'{c}.npy') for c in range(3)], -1))), sorted(tmp_path.glob('*_bands')), None, stem),
                ids=(block(lambda s: tensor(by_id[s])), list(by_id), None, lambda s: ('left', 'right')[int(s)%2]), pil=(block(lambda p: PILImage.create(np.load(p))), npys, None, stem),
                dicts=(block(lambda d: tensor(d['pixels'])), [dict(pixels=x, label=y) for x, y in samples], None, lambda d: d['label']), tuples=(ImageBlock, samples, ItemGetter(0), ItemGetter(1)),
                rows=(ImageBlock, rows, ColReader('name', pref=f'{pictures}/'), ColReader('label')), rows_read=(block(lambda row: tensor(by_id[row['id']])), rows, None, ColReader('label')), paths=(ImageBlock, files, lambda f: f, parent_label))
    for name, (block, items, get_x, get_y) in made.items():
        dls = DataBlock((block, CategoryBlock), get_items=None if isinstance(items, pd.DataFrame) else lambda _, items=items: items, get_x=get_x, get_y=get_y, splitter=lambda o: (list(range(12)), list(range(12, 24))),
                        batch_tfms=Normalize.from_stats(*imagenet_stats)).dataloaders(items, bs=5, num_workers=0)
        yield name, learner(dls), items
