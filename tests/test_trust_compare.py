"`compare_cams`: its numbers against the measures called by hand, masks that go where the image goes, and nothing left behind."
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from fastai.vision.all import (
    BBoxBlock, BBoxLblBlock, BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, ImageBlock, MaskBlock, MSELossFlat,
    MultiCategoryBlock, PILMask, RandomResizedCrop, RegressionBlock, Resize)

from fastai_cam.all import METHODS, METRICS, CAMInterpretation, Versus, Output, Probe
from fastai_cam.methods.baselines import BASELINES
from fastai_cam.trust.compare import CAMTable
from fastai_cam.trust.rescore import Explainer, Rescorer
from fastai_cam.trust.masks import boxes_to_masks
from fastai_cam.core import mean_interval
from fastai_cam.trust.compare import _masks_of_items
from fastai_cam.source.loaders import dl_source
from test_learner import learner_state, same
from helpers.compare import array_of, box_of, codes_of, Draws, images_of, learner_of, net, SIZE


def name_of(i): return ('a', 'b', 'c')[i%3]


@pytest.fixture(scope='module')
def learn(): return learner_of(ImageBlock, CategoryBlock, get_y=name_of)


@pytest.fixture(scope='module')
def interp(learn): return CAMInterpretation.from_learner(learn)


def measured(learn, method, metrics, score, masks=None, activation=None, layer=None):
    "The measures called by hand, batch by batch; `score(out)` is the question about a batch"
    found = {name: [] for name in metrics}
    for n, batch in enumerate(learn.dls.valid):
        x = batch[0].as_subclass(torch.Tensor)
        learn.model.eval()
        with Probe(learn.model, layer) as p:
            cap = p(x)
            asked = cap.score(score(cap.out))
            maps = METHODS[method](cap, asked)
            for name in metrics:
                rescore, kwargs = Rescorer(cap, asked, activation), {}
                if 'images' in METRICS[name].needs: kwargs['images'] = x
                if 'rescore' in METRICS[name].needs: kwargs['rescore'] = rescore
                if 'masks' in METRICS[name].needs: kwargs['masks'] = masks[n]
                if 'explain' in METRICS[name].needs: kwargs['explain'] = Explainer(cap, asked, method)
                found[name].append(METRICS[name](maps, **kwargs))
        learn.model.train()
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def of_each(classes): return lambda out: out.gather(1, classes[:, None])[:, 0]
SOFTMAX = partial(torch.softmax, dim=1)
FAITHFUL = ['insertion', 'deletion', 'average_drop', 'road', 'adcc', 'gini']


def assert_close(found, expected): np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def of_class(c): return lambda out: lambda out: out[:, c]


# --- the table's numbers

@pytest.mark.parametrize('method', ['gradcam', 'eigencam', 'random_map'])
def test_the_numbers_are_those_of_the_measures(learn, interp, method):
    "Of one class, as a probability; of all items, and of those that n takes"
    expected = measured(learn, method, FAITHFUL, of_class(1), activation=SOFTMAX)
    table = interp.compare_cams(method, metrics=FAITHFUL, n=None, cls='b', baselines=False)
    values = table.per_item[method, '–' if method in BASELINES else 'default']
    assert list(values.index)==list(range(7)) and list(values.columns)==FAITHFUL
    for name in FAITHFUL:
        assert_close(values[name], expected[name])
        row = table.iloc[0]
        assert row[name]==pytest.approx(np.nanmean(expected[name]), abs=1e-5) and row[f'{name}_n']==(~np.isnan(expected[name])).sum()
        assert row[f'{name}_low'] <= row[name] <= row[f'{name}_high']
    assert expected['insertion'].std() > 0
    some = interp.compare_cams(method, metrics='insertion', n=3, cls='b', baselines=False)
    assert list(some.per_item[method, some.loc[0, 'layer']].index)==[0, 3, 6] and some.loc[0, 'items']==3
    assert_close(some.per_item[method, some.loc[0, 'layer']]['insertion'], expected['insertion'][[0, 3, 6]])


def test_the_predicted_class_is_asked_where_none_is_named(learn, interp):
    table = interp.compare_cams('gradcam', metrics=['insertion', 'average_drop'], baselines=False)
    x = images_of(learn)
    with torch.no_grad(): classes = learn.model.eval()(x).argmax(1).tolist()
    by_class = [interp.compare_cams('gradcam', metrics=['insertion', 'average_drop'], cls=c, baselines=False).per_item['gradcam', 'default'] for c in range(3)]
    for name in ('insertion', 'average_drop'): assert_close(table.per_item['gradcam', 'default'][name], [by_class[c][name][i] for i, c in enumerate(classes)])


def test_the_interval_is_a_bootstrap_of_what_is_known():
    values = np.array([0., 1., np.nan, 2., 5., np.nan])
    from scipy.stats import bootstrap
    mean, low, high = mean_interval(values, 20000)
    theirs = bootstrap((values[~np.isnan(values)],), np.mean, method='percentile', n_resamples=20000).confidence_interval
    assert mean==2 and abs(low - theirs.low) < .1 and abs(high - theirs.high) < .1
    assert np.isnan(mean_interval(np.array([np.nan]))).all() and mean_interval(np.array([.3]))==(.3, .3, .3)


def test_lower_precision_changes_areas_a_little(interp, learn):
    exact, low = (interp.compare_cams('gradcam', metrics=['insertion', 'iou'], masks=array_of, n=None, cls='b', baselines=False, dtype=dtype).per_item['gradcam', 'default'] for dtype in (None, torch.bfloat16))
    assert 0 < (exact['insertion'] - low['insertion']).abs().max() < 5e-3 and exact['iou'].equals(low['iou']) # the maps are those of the learner
    for wrong in (torch.float32, torch.int8, 'bf16'):
        with pytest.raises(ValueError, match='torch.bfloat16'): interp.compare_cams('gradcam', dtype=wrong)


def test_values_are_measured_as_they_are():
    learn = learner_of(ImageBlock, RegressionBlock, get_y=lambda i: float(i), n_out=1, loss_func=MSELossFlat())
    expected = measured(learn, 'gradcam', ['insertion', 'deletion'], lambda out: lambda out: out[:, 0])
    found = CAMInterpretation.from_learner(learn).compare_cams('gradcam', metrics=['insertion', 'deletion'], n=None, baselines=False).per_item['gradcam', 'default']
    for name in found: assert_close(found[name], expected[name])


@pytest.mark.parametrize('bias', [-3., 3.])
def test_one_logit_is_a_probability_of_the_answer(bias):
    learn = learner_of(ImageBlock, RegressionBlock, get_y=lambda i: float(i%2), n_out=1, loss_func=BCEWithLogitsLossFlat())
    with torch.no_grad(): learn.model[1][2].bias.fill_(bias)
    sign = 1 if bias > 0 else -1 # why no is asked where the answer is no
    found = CAMInterpretation.from_learner(learn).compare_cams('gradcam', metrics='insertion', n=None, baselines=False).per_item['gradcam', 'default']['insertion']
    x = images_of(learn)
    with Probe(learn.model.eval()) as p:
        cap = p(x)
        maps = METHODS['gradcam'](cap, cap.score(lambda out: sign*out[:, 0]))
    with torch.no_grad(): expected = METRICS['insertion'](maps, x, lambda images, items: (sign*learn.model(images)[:, 0]).sigmoid())
    assert_close(found, expected)
    assert (found > .5).all()


def test_of_several_labels_the_most_probable_one():
    learn = learner_of(ImageBlock, MultiCategoryBlock(vocab=['a', 'b', 'c']), get_y=lambda i: [name_of(i)], loss_func=BCEWithLogitsLossFlat())
    interp = CAMInterpretation.from_learner(learn)
    table = interp.compare_cams('gradcam', metrics=['insertion'], n=None, baselines=False)
    x = images_of(learn)
    learn.model.eval()
    with torch.no_grad(): classes = learn.model(x).argmax(1)
    with Probe(learn.model) as p:
        cap = p(x)
        maps = METHODS['gradcam'](cap, cap.score(of_each(classes)))
    with torch.no_grad(): expected = METRICS['insertion'](maps, x, lambda images, items: learn.model(images).sigmoid().gather(1, classes[items][:, None])[:, 0])
    assert_close(table.per_item['gradcam', 'default']['insertion'], expected)


def test_a_contrast_is_measured_as_it_is(learn, interp):
    expected = measured(learn, 'gradcam', ['insertion'], lambda out: lambda out: out[:, 0] - out[:, 2])
    found = interp.compare_cams('gradcam', metrics='insertion', n=None, cls=Versus('a', 'c'), baselines=False)
    assert_close(found.per_item['gradcam', 'default']['insertion'], expected['insertion'])


# --- layers

def test_layers_one_by_one_and_together(learn, interp):
    table = interp.compare_cams(['gradcam', 'layercam'], layers=['0.0', '0', ['0.0', '0']], metrics='insertion', n=None, cls='a')
    names = ['0.0', '0', '0.0 + 0']
    assert list(zip(table['method'], table['layer']))[:2]==[('gradcam', '0.0'), ('layercam', '0.0')]
    assert list(table['method'])==['gradcam', 'layercam', *BASELINES, *['gradcam', 'layercam']*2] # the baselines once
    assert set(table['layer'])=={*names, '–'} and set(table.per_item)=={(m, l) for m in ('gradcam', 'layercam') for l in names} | {(b, '–') for b in BASELINES}
    for name in names:
        expected = measured(learn, 'layercam', ['insertion'], of_class(0), activation=SOFTMAX, layer=name.split(' + '))
        assert_close(table.per_item['layercam', name]['insertion'], expected['insertion'])
    assert 'layer' in repr(table) and 'gradcam' in repr(table)
    assert 'layer' not in repr(interp.compare_cams('gradcam', metrics='insertion', n=2))


def test_layers_of_one_type_have_names_of_their_own(learn, interp):
    body = learn.model[0]
    table = interp.compare_cams('gradcam', layers=[body[0], body[2], 1], metrics='insertion', n=2, baselines=False)
    assert list(table['layer'])==['0.0', '0.2', '0.1'] and len(table.per_item)==3


def test_the_interpretations_own_layer(learn):
    interp = CAMInterpretation.from_learner(learn, layer='0.0')
    assert interp.compare_cams('gradcam', metrics='insertion', n=2, baselines=False).loc[0, 'layer']=='0.0'


# --- masks

def as_file(i, folder):
    file = folder/f'{i}.png'
    Image.fromarray(array_of(i).astype(np.uint8)*255).save(file)
    return file


MASKS = {'array': lambda folder: array_of, 'numbers': lambda folder: lambda i: array_of(i).astype(int)*7, 'tensor': lambda folder: lambda i: torch.from_numpy(array_of(i)),
         'image': lambda folder: lambda i: Image.fromarray(array_of(i)), 'fastai mask': lambda folder: lambda i: PILMask.create(array_of(i).astype(np.uint8)),
         'file': lambda folder: lambda i: as_file(i, folder), 'name of a file': lambda folder: lambda i: str(as_file(i, folder)),
         'boxes': lambda folder: lambda i: [box_of(i)], 'one box': lambda folder: box_of, 'array of boxes': lambda folder: lambda i: np.array([box_of(i)])}
TRANSFORMS = {'crop': [Resize(48)], 'squish': [Resize(48, method='squish')], 'pad': [Resize(48, method='pad', pad_mode='zeros')], 'random crop': [RandomResizedCrop(48)]}


@pytest.mark.parametrize('kind,how', [*[(kind, 'crop') for kind in MASKS], *[('array', how) for how in TRANSFORMS if how != 'crop']])
def test_masks_go_where_the_image_goes(kind, how, tmp_path):
    "The marker of each image is where its mask is: the same crop, also where it would be random in training"
    learn = learner_of(ImageBlock, CategoryBlock, get_y=name_of, item_tfms=TRANSFORMS[how])
    interp, get_mask = CAMInterpretation.from_learner(learn), MASKS[kind](tmp_path)
    before = [len(getattr(learn.dls.valid, name).fs) for name in ('after_item', 'after_batch')]
    for _ in range(2):
        source = dl_source(learn, interp.dl, [0, 2, 3, 6])
        masks = _masks_of_items(learn, source, get_mask)
        assert [len(mask) for mask in masks]==[3, 1]
        for mask, batch in zip(masks, source.dl):
            lit = learn.dls.valid.decode(batch)[0].as_subclass(torch.Tensor)[:, 0] > 150
            assert mask.shape==lit.shape and mask.dtype is torch.bool and mask.any(-1).any(-1).all()
            assert (mask != lit).float().mean() < .02 and (mask & lit).sum() > .9*(mask | lit).sum() # an image is interpolated at the edges, a mask is not
    assert [len(getattr(learn.dls.valid, name).fs) for name in ('after_item', 'after_batch')]==before # the learner's transforms are still there


def test_measures_of_masks(learn, interp):
    names, items = ['pointing_game', 'energy_in_mask', 'iou'], list(range(8, 15))
    masks = [torch.from_numpy(np.stack([np.asarray(Resize(48)(PILMask.create(array_of(i).astype(np.uint8)), split_idx=1)) for i in some])) > 0 for some in (items[:3], items[3:6], items[6:])]
    expected = measured(learn, 'layercam', names, of_class(2), masks)
    table = interp.compare_cams('layercam', n=None, cls='c', masks=array_of, baselines=False)
    assert list(table.metrics)==['insertion', 'deletion', *names]
    for name in names: assert_close(table.per_item['layercam', 'default'][name], expected[name])
    assert list(interp.compare_cams('layercam', n=2, baselines=False).metrics)==['insertion', 'deletion'] # no masks: these are left out


@pytest.mark.parametrize('nothing', [[], np.zeros((0, 4)), np.zeros(SIZE, dtype=bool)])
def test_an_empty_mask_is_missing(interp, nothing):
    table = interp.compare_cams(['gradcam'], metrics=['energy_in_mask', 'gini'], masks=lambda i: nothing if i%3 else box_of(i), n=None)
    known = [i for i in range(7) if (i + 8)%3==0]
    assert (table['energy_in_mask_n']==len(known)).all() and (table['items']==7).all()
    values = table.per_item['gradcam', 'default']['energy_in_mask']
    assert list(values[values.notna()].index)==known and table.loc[0, 'energy_in_mask']==pytest.approx(values[known].mean())
    none = interp.compare_cams(['gradcam'], metrics=['energy_in_mask'], masks=lambda i: nothing, n=2)
    assert none['energy_in_mask'].isna().all() and (none['energy_in_mask_n']==0).all() and '–' in repr(none)
    none.plot()


@pytest.mark.usefixtures('maps_by_gradcam')
def test_the_masks_of_a_segmentation_are_those_of_the_class_that_is_asked_about():
    learn = learner_of(ImageBlock, MaskBlock(['nothing', 'even', 'odd']), get_y=codes_of, model=Draws(), loss_func=CrossEntropyLossFlat(axis=1))
    interp = CAMInterpretation.from_learner(learn)
    table = interp.compare_cams('gradcam', n=None, cls='odd')
    names = ['pointing_game', 'energy_in_mask', 'iou']
    assert list(table.metrics)==['insertion', 'deletion', *names] # the masks were found
    cams = learn.get_cams(learn.dls.valid, 'odd')
    masks = torch.cat([batch[1] for batch in learn.dls.valid]).as_subclass(torch.Tensor)==2
    for name in names: assert_close(table.per_item['gradcam', 'default'][name], METRICS[name](cams.maps, masks))
    assert table.loc[0, 'iou_n']==3 # 9, 11 and 13: the others have none of that class
    mine = interp.compare_cams('gradcam', metrics='iou', n=None, cls='odd', masks=lambda i: array_of(8), baselines=False)
    assert mine.loc[0, 'iou_n']==7 # what is passed goes before what the labels hold


class Boxes(nn.Module):
    "Loss of the classes of the first box"
    def forward(self, out, boxes, labels): return nn.functional.cross_entropy(out, labels[:, 0].long()) # floats, where an item has none


def boxes_of(i): return [] if i==9 else [box_of(i), (0, 0, 89, 8)] if i%2 else [box_of(i)]
def labels_of(i): return [] if i==9 else ['marker', 'edge'] if i%2 else ['marker']


@pytest.mark.usefixtures('maps_by_gradcam')
def test_boxes_in_the_labels():
    "Those of the class that is asked about; of an item that has none of it, all"
    learn = learner_of(ImageBlock, BBoxBlock, BBoxLblBlock, get_y=[boxes_of, labels_of], n_inp=1, loss_func=Boxes(), item_tfms=[Resize(48, method='squish')], n_out=3)
    vocab = list(learn.dls.vocab)
    interp = CAMInterpretation(learn, learn.dls.valid, torch.zeros(7))
    interp.layer = None
    size = [48/SIZE[1], 48/SIZE[0]]*2
    def masks_of(which): return torch.cat([_as_tensor([tuple(n*k for n, k in zip(box, size)) for box in which(i)]) for i in range(8, 15)])
    cams = learn.get_cams(learn.dls.valid, vocab.index('marker'))
    table = interp.compare_cams('gradcam', metrics='energy_in_mask', n=None, cls=vocab.index('marker'), baselines=False)
    expected = METRICS['energy_in_mask'](cams.maps, masks_of(lambda i: boxes_of(i)[:1]))
    assert_close(table.per_item['gradcam', 'default']['energy_in_mask'], expected)
    assert table.loc[0, 'energy_in_mask_n']==6
    edge = interp.compare_cams('gradcam', metrics='energy_in_mask', n=None, cls=vocab.index('edge'), baselines=False)
    cams = learn.get_cams(learn.dls.valid, vocab.index('edge'))
    assert_close(edge.per_item['gradcam', 'default']['energy_in_mask'], METRICS['energy_in_mask'](cams.maps, masks_of(lambda i: boxes_of(i)[-1:])))
    assert 'iou' in interp.compare_cams('gradcam', n=2, baselines=False).metrics


def _as_tensor(boxes): return boxes_to_masks([boxes], (48, 48))


# --- wrong input, and what is left behind

@pytest.mark.parametrize('options,error,says', [
    (dict(methods='gradcamm'), ValueError, "did you mean 'gradcam'"), (dict(methods=[]), ValueError, 'empty'), (dict(metrics='insertions'), ValueError, "did you mean 'insertion'"),
    (dict(metrics=[]), ValueError, 'empty'), (dict(metrics=len), TypeError, 'cam_metric'), (dict(n=0), ValueError, 'n=0'), (dict(n=True), ValueError, 'n=True'), (dict(n=2.5), ValueError, 'n=2.5'),
    (dict(masks=[1, 2]), TypeError, 'a function of an item'), (dict(layers='1.9'), ValueError, "no layer named '1.9'"), (dict(layers=['0', '0.7']), ValueError, "no layer named '0.7'"),
    (dict(layers=[]), ValueError, 'list of layers is empty'), (dict(cls='d'), ValueError, "no class is named 'd'"), (dict(cls=['a', 'b']), ValueError, 'one question at a time'), (dict(cls='all'), ValueError, 'one question at a time'),
    (dict(masks=lambda i: None), ValueError, r'masks must give .*not NoneType'), (dict(masks=lambda i: np.zeros((4, 5, 3))), ValueError, r'of shape \[4, 5, 3\]')])
def test_wrong_input_is_refused_before_any_work(learn, interp, options, error, says):
    runs, before = [], learner_state(learn)
    hook = learn.model.register_forward_hook(lambda *args: runs.append(1))
    with pytest.raises(error, match=says): interp.compare_cams(**options)
    hook.remove()
    assert runs==[] and same(before, learner_state(learn))


def test_masks_that_are_missing_are_asked_for(learn, interp):
    before = learner_state(learn)
    with pytest.raises(ValueError, match='^iou, energy_in_mask compare maps with masks, and the labels hold none .* pass masks=a function'): interp.compare_cams(metrics=['iou', 'insertion', 'energy_in_mask'])
    assert same(before, learner_state(learn))


class Unlucky(Exception): pass


@pytest.mark.parametrize('where', ['nowhere', 'model', 'masks', 'method'])
def test_the_learner_is_left_as_found(learn, interp, where):
    "Also where something fails on the way"
    learn.model[0][1].train(False) # a mode of its own
    def fail(*args): raise Unlucky('no luck')
    def method(cap, score): return METHODS['gradcam'](cap, score) if where != 'method' else fail()
    hook = learn.model[1][2].register_forward_hook(fail) if where=='model' else None
    before, attributes, transforms = learner_state(learn), dict(learn.__dict__), list(learn.dls.valid.after_item.fs)
    def run_both():
        interp.compare_cams([method], metrics=['insertion', 'iou', 'max_sensitivity'], masks=fail if where=='masks' else array_of, n=4)
    if where=='nowhere': run_both()
    else:
        with pytest.raises(Unlucky, match='^no luck$'): run_both()
    if where in ('model', 'method'):
        with pytest.raises(Unlucky, match='^no luck$'): learn.cam_trust(0, method=method)
    elif where=='nowhere': learn.cam_trust([0, 1], method=method, n_random=2, steps=2)
    assert same(before, learner_state(learn)) and learn.__dict__==attributes and list(learn.dls.valid.after_item.fs)==transforms
    if hook: hook.remove()
    learn.model[0][1].train()


# --- the table

def test_a_sorted_table_is_a_table(interp):
    table = interp.compare_cams(['gradcam', 'layercam'], metrics=['insertion', 'deletion', 'gini'], n=4)
    for part in (table.sort_values('insertion'), table[table['method'] != 'random_map'], table.head(2), table.copy()):
        assert isinstance(part, CAMTable) and part.metrics=={'insertion': True, 'deletion': False, 'gini': True} and part.per_item is not None
        assert 'insertion ↑' in repr(part) and 'deletion ↓' in part._repr_html_() and 'insertion_low' not in repr(part)
        assert [line.split()[0] for line in repr(part).splitlines()[1:len(part) + 1]]==list(part['method'])
        fig = part.plot()
        assert [text.get_text() for text in fig.axes[0].get_yticklabels()]==list(part['method']) and len(fig.axes)==3
        for ax, name in zip(fig.axes, part.metrics):
            shown = {round(line.get_ydata()[0]): line.get_xdata()[0] for line in ax.lines if line.get_marker()=='o'}
            np.testing.assert_allclose([shown[len(part) - 1 - i] for i in range(len(part))], part[name])
            assert ax.xaxis_inverted()==(name=='deletion') # better is to the right
    mean, low, high = (table.loc[0, f'insertion{end}'] for end in ('', '_low', '_high'))
    assert f'{mean:.3f} ({low:.3f}–{high:.3f})' in repr(table)
    for part in (table[['method', 'insertion']], table.drop(columns='gini_low'), table['method'], pd.DataFrame(table)): assert 'gradcam' in repr(part) # what is not a whole table is shown as pandas does


def test_a_plot_is_saved_and_refuses_what_it_does_not_know(interp, tmp_path):
    table = interp.compare_cams('gradcam', layers=['0.0', '0'], metrics=['insertion'], n=2)
    fig = table.plot(figsize=(5, 3), save=tmp_path/'plot.png')
    assert (tmp_path/'plot.png').stat().st_size > 3000 and tuple(fig.get_size_inches())==(5, 3)
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()]==['gradcam · 0.0', *BASELINES, 'gradcam · 0']


def test_a_measure_with_options_and_one_of_ones_own(learn, interp):
    table = interp.compare_cams('gradcam', metrics=[partial(METRICS['insertion'], steps=4, baseline='zero'), 'gini'], n=None, cls='a', baselines=False)
    name = next(iter(table.metrics))
    x = images_of(learn)
    with Probe(learn.model.eval()) as p:
        cap = p(x)
        score = cap.score(lambda out: out[:, 0])
        expected = METRICS['insertion'](METHODS['gradcam'](cap, score), x, Rescorer(cap, score, SOFTMAX), steps=4, baseline='zero')
    learn.model.train()
    assert_close(table.per_item['gradcam', 'default'][name], expected)


class Two(nn.Module):
    "Answers with a dictionary"
    def __init__(self):
        super().__init__()
        self.net = net(3)
    def forward(self, x):
        out = self.net(x)
        return dict(logits=out, spread=out.std())


def test_a_dictionary_of_outputs():
    learn = learner_of(ImageBlock, CategoryBlock, get_y=name_of, model=Two(), loss_func=lambda out, y: nn.functional.cross_entropy(out['logits'], y))
    interp = CAMInterpretation(learn, learn.dls.valid, torch.zeros(7))
    interp.layer = None
    plain = learner_of(ImageBlock, CategoryBlock, get_y=name_of)
    found = interp.compare_cams('gradcam', metrics='insertion', n=None, cls=Output('logits', 1), baselines=False)
    expected = measured(plain, 'gradcam', ['insertion'], of_class(1), activation=SOFTMAX)
    assert_close(found.per_item['gradcam', 'default']['insertion'], expected['insertion'])


# --- what follows

def table_of(**values):
    "A table of methods whose numbers are given, item by item; a measure is better the higher it is"
    items = {(name, '–' if name in BASELINES else 'default'): pd.DataFrame({'insertion': numbers, 'deletion': [-value for value in numbers]}) for name, numbers in values.items()}
    rows = []
    for (method, layer), frame in items.items():
        found = {key: value for name in frame for key, value in zip((name, f'{name}_low', f'{name}_high'), mean_interval(frame[name].to_numpy()))}
        rows.append(dict(method=method, layer=layer, **found))
    table = CAMTable(rows)
    table.metrics, table.per_item = dict(insertion=True, deletion=False), items
    return table


GOOD, BLIND = [.8, .7, .9, .8, .75, .85]*3, [.4, .3, .6, .5, .45, .35]*3


@pytest.mark.parametrize('values, says', [
    (dict(gradcam=GOOD, cam=BLIND, gaussian_map=BLIND), 'Take gradcam: by insertion and deletion it is the best on these 18 pictures, and surely better than gaussian_map, the best of the maps that know nothing.'),
    (dict(cam=[value + .01*(-1)**i - .0001 for i, value in enumerate(GOOD)], gradcam=GOOD, uniform_map=BLIND), 'gradcam: by insertion and deletion it is the best on these 18 pictures; cam cannot be told from it, and surely'),
    (dict(gradcam=BLIND, edge_map=GOOD), 'No method is surely better than edge_map, which knows nothing of the model, by insertion and deletion on these 18 pictures (gradcam comes nearest)'),
    (dict(gradcam=GOOD, cam=BLIND), 'Take gradcam: by insertion and deletion it is the best on these 18 pictures.'), (dict(gradcam=GOOD), ''), (dict(uniform_map=GOOD, edge_map=BLIND), '')])
def test_a_table_says_what_follows(values, says):
    table = table_of(**values)
    assert says in table.verdict and bool(says)==bool(table.verdict) and repr(table).endswith(table.verdict) and table.verdict in table._repr_html_().replace('<br>', '\n')
    assert table.sort_values('deletion').verdict==table.verdict


def test_of_measures_of_the_maps_alone_nothing_follows(interp):
    assert interp.compare_cams('gradcam', metrics='gini', n=2).verdict=='' and 'gradcam' in interp.compare_cams('gradcam', metrics=['gini', 'insertion'], n=2).verdict


def test_nothing_follows_where_nothing_is_known():
    table = table_of(gradcam=[np.nan]*4, gaussian_map=[np.nan]*4)
    assert table.verdict=='' and 'gradcam' in repr(table) and CAMTable(dict(method=['a'])).verdict==''


def test_the_sentence_stands_over_the_plot():
    fig = table_of(gradcam=GOOD, gaussian_map=BLIND).plot()
    assert fig.get_suptitle().replace('\n', ' ').startswith('Take gradcam: by insertion and deletion')
