"Whatever a user calls an item: what is named was read, and what cannot be said is said so."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from fastcore.foundation import L
from fastai.vision.all import (
    DataBlock, ImageBlock, ImageDataLoaders, MaskBlock, Normalize, PILImage, ProgressCallback, Resize, imagenet_stats)

from fastai_cam.all import CAMInterpretation

from helpers.source import learn, learner, loaders, own_readers, table_of


# ---- items that the learner reads itself

def test_items_that_the_learner_reads_itself(pictures, tmp_path):
    reference = learner(loaders(pictures)).get_cams(sorted(pictures.glob('*/*.png'), key=lambda f: f.stem)[12:]).maps
    for name, learn, items in own_readers(pictures, tmp_path):
        one = items.iloc[15] if isinstance(items, pd.DataFrame) else items[15]
        forms = {'it': (one, [3]), 'in a list': ([one], [3]), 'with an index': ([one, 4, one], [3, 4, 3]), 'an index': (3, [3])}
        if isinstance(one, Path): forms.update({'a string': (str(one), [3]), 'strings and paths': ([str(one), one], [3, 3])})
        if isinstance(items, pd.DataFrame): forms['rows'] = (items.iloc[[15, 13]], [3, 1])
        for form, (item, which) in forms.items():
            cams = learn.get_cams(item)
            assert torch.allclose(cams.maps, reference[which], atol=1e-6), (name, form)
            assert len(cams.images.load())==len(which) and torch.as_tensor(np.array(cams.images[0])).shape==(3, 64, 64), (name, form)
        learn.show_cam(one)


# ---- forms that users type

def test_forms_that_mean_validation_items(dls, learn):
    _, idxs = CAMInterpretation.from_learner(learn).top_losses(3)
    reference, expected = learn.get_cams(dls.valid).maps, idxs.tolist()
    mask = torch.zeros(12, dtype=torch.bool); mask[[2, 7]] = True
    forms = {'top losses': (idxs, expected), 'one of them': (idxs[0], expected[:1]), 'a list of them': (list(idxs), expected), 'int32': (torch.tensor([3, -1], dtype=torch.int32), [3, 11]), 'bytes': (torch.tensor([3, 1], dtype=torch.uint8), [3, 1]),
             'array': (np.array([4, 2]), [4, 2]), 'np.int64': (np.int64(5), [5]), '0-d array': (np.array(5), [5]), 'Index': (pd.Index([1, 0]), [1, 0]), 'Series': (pd.Series([6, 1], index=[40, 3]), [6, 1]), 'L': (L(2, 3), [2, 3]),
             'range': (range(2, 5), [2, 3, 4]), 'generator': ((i for i in (1, 8)), [1, 8]), 'map': (map(int, '25'), [2, 5]), 'keys': ({4: 0, 1: 0}.keys(), [4, 1]), 'mask': (mask, [2, 7]), 'np mask': (mask.numpy(), [2, 7]),
             'Series mask': (pd.Series(mask.numpy()), [2, 7]), 'tuple': ((3, 1), [3, 1]), 'mixed': ([np.int64(3), torch.tensor(1), np.array(2)], [3, 1, 2])}
    for form, (item, which) in forms.items():
        cams = learn.get_cams(item)
        assert torch.allclose(cams.maps, reference[which], atol=1e-6) and cams.items==[dls.valid.items[i] for i in which] and cams.targs is not None, form
    learn.show_cam(idxs)
    for item, error, message in ((torch.tensor([0, 12]), IndexError, 'item 12 is out of range: the validation set has 12 items'), (mask[:5], IndexError, 'one value for each of the 12 of the validation set, and this one has 5'),
                                 (torch.tensor([], dtype=torch.int64), ValueError, 'empty'), (iter([]), ValueError, 'empty'), (~mask & mask, ValueError, 'empty'), (torch.tensor([.5, 1]), ValueError, 'rank 1'), (np.array([.5]), ValueError, 'rank 1'),
                                 ({1, 2}, TypeError, 'not set'), (True, TypeError, 'not bool'), ([True, False], TypeError, 'not bool'), (3., TypeError, 'not float'), (1j, TypeError, 'not complex'), ([[0, 1]], TypeError, 'not list'), (torch.tensor(2.5), ValueError, 'rank 0')):
        with pytest.raises(error, match=message): learn.get_cams(item)


def test_batches_and_samples_with_their_labels(dls, learn):
    x, y = dls.valid.one_batch()
    reference, right = learn.get_cams(list(range(5)), cls='all'), learn.get_cams(list(range(5)), cls='actual')
    for form, batch in {'a batch': (x, y), 'plain': (x.as_subclass(Tensor), y.as_subclass(Tensor)), 'a list': [x, y]}.items():
        cams = learn.get_cams(batch, cls='actual')
        assert torch.allclose(cams.maps, right.maps, atol=1e-6) and torch.equal(cams.targs, right.targs) and torch.allclose(cams.losses, right.losses, atol=1e-5), form
        assert all((torch.as_tensor(a) - torch.as_tensor(b)).abs().max()==0 for a, b in zip(cams.images.load(), right.images.load()))
    assert len(learn.get_cams((x, y), max_n=2))==2 and learn.get_cams((x,)).targs is None and len(learn.get_cams(dls.train.one_batch()))==5
    for form, item, which in (('a sample', dls.valid_ds[3], [3]), ('samples', [dls.valid_ds[3], dls.valid_ds[1]], [3, 1]), ('with an index', [dls.valid_ds[3], 4, -12], [3, 4, 0]),
                              ('a subset', Subset(dls.valid_ds, [3, 1, 4]), [3, 1, 4])):
        cams = learn.get_cams(item, cls='actual')
        assert torch.allclose(cams.maps, right.maps[which], atol=1e-6) and torch.equal(cams.targs, right.targs[which]), form
    assert torch.allclose(learn.get_cams([x[0], x[1]]).maps, learn.get_cams([0, 1]).maps, atol=1e-6) # two inputs are no batch
    assert torch.allclose(learn.get_cams([x, x]).maps[5:], learn.get_cams(list(range(5))).maps, atol=1e-6) # nor are two batches
    learn.show_cam(dls.one_batch()), learn.show_cam(dls.valid_ds[0])


def test_samples_of_masks_and_of_random_crops(pictures):
    files = sorted(pictures.glob('*/*.png'))
    from fastai.vision.all import RandomResizedCrop, unet_learner, resnet18
    dls = DataBlock((ImageBlock, MaskBlock(codes=['no', 'yes'])), get_items=lambda _: files, get_y=lambda f: PILImage.create((np.array(Image.open(f))[..., 0] > 200).astype(np.uint8)).convert('L'), splitter=lambda o: (list(range(12)), list(range(12, 24))),
                    item_tfms=RandomResizedCrop(64), batch_tfms=Normalize.from_stats(*imagenet_stats)).dataloaders(pictures, bs=4, num_workers=0)
    learn = unet_learner(dls, resnet18, pretrained=False)
    learn.remove_cb(ProgressCallback)
    by_index, by_sample, by_batch = learn.get_cams([2, 3]), learn.get_cams([dls.valid_ds[2], dls.valid_ds[3]]), learn.get_cams(dls.valid.one_batch())
    assert torch.allclose(by_sample.maps, by_index.maps, atol=1e-5) and torch.allclose(by_batch.maps[2:], by_index.maps, atol=1e-4) # as validation crops: in the middle


# ---- workers that are started anew, ranks, containers

def test_rows_of_a_table_and_batches_without_a_validation_set(pictures, tmp_path):
    rows = table_of(pictures)
    dls = ImageDataLoaders.from_df(rows, pictures, item_tfms=Resize(64), num_workers=0, bs=4, valid_pct=.5, seed=1)
    learn = learner(dls)
    reference = learn.get_cams(pictures/rows['name'][2]).maps
    for row in (rows.iloc[2], rows.iloc[2].to_dict(), dict(name=rows['name'][2]), list(rows.itertuples())[2], [rows.iloc[2].to_dict()], rows.iloc[2:3]):
        assert torch.allclose(learn.get_cams(row).maps, reference, atol=1e-6)
    x, y = dls.valid.one_batch()
    learn.export(tmp_path/'learn.pkl')
    from fastai.vision.all import load_learner
    loaded = load_learner(tmp_path/'learn.pkl')
    cams = loaded.get_cams((x, y), cls='actual')
    assert torch.equal(cams.targs, y.as_subclass(Tensor)) and torch.allclose(cams.maps, learn.get_cams(list(range(4)), cls='actual').maps, atol=1e-6)
    assert torch.allclose(loaded.get_cams(x[0]).maps, learn.get_cams(0).maps, atol=1e-6)
    with pytest.raises(IndexError, match='no validation set'): loaded.get_cams(torch.tensor([0]))


# -- indices and masks, however they were found

def indices_of(mask):
    "The same choice of items, in the forms in which it is found"
    chosen = mask.nonzero()
    return [chosen, chosen.T, chosen.squeeze(1), chosen.numpy(), np.argwhere(mask.numpy()), np.argwhere(mask.numpy()).T, chosen.int(), list(chosen), list(chosen.numpy()),
            chosen.tolist(), np.where(mask.numpy()), mask.nonzero(as_tuple=True), L(chosen), mask, mask[:,None], mask[None], mask.numpy()[:,None], mask.tolist(), list(mask), tuple(mask.numpy())]


@pytest.mark.parametrize('chosen', [[1, 4, 5], [7]])
def test_indices_of_any_shape_are_indices(dls, chosen):
    learn, mask = learner(dls), torch.zeros(12, dtype=torch.bool)
    mask[chosen] = True
    plain = learn.get_cams(chosen)
    for form in indices_of(mask):
        found = learn.get_cams(form)
        assert found.items==plain.items and torch.equal(found.maps, plain.maps), form


@pytest.mark.parametrize('items', [False, True])
def test_top_losses_as_they_come(dls, items):
    learn = learner(dls)
    interp = CAMInterpretation.from_learner(learn)
    top = interp.top_losses(3, items=items)
    plain = learn.get_cams(top[1])
    for form in (top, list(top), (top[0].numpy(), top[1].numpy(), *top[2:])):
        assert learn.get_cams(form).items==plain.items and torch.equal(learn.get_cams(form).maps, plain.maps)


def test_one_row_of_a_batch(dls):
    learn = learner(dls)
    xb, yb = dls.valid.one_batch()
    batch, row = learn.get_cams((xb, yb), cls='actual'), learn.get_cams((xb[2], yb[2]), cls='actual')
    assert len(row)==1 and torch.allclose(row.maps[0], batch.maps[2], atol=1e-6) and torch.allclose(row.losses[0], batch.losses[2], atol=1e-6) and row.targs.tolist()==[yb[2].item()]
