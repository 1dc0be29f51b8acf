"Every method, measure, check and plot on learners as fastai makes them: a classifier, masks, points and numbers."
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, IndexSplitter, MaskBlock, MSELossFlat, Normalize, PILMask, PointBlock, RegressionBlock, TensorPoint,
                               imagenet_stats, resnet18, set_seed, unet_learner, vision_learner)

from fastai_cam.all import CAMInterpretation, Probe
from fastai_cam.trust.sanity import similarity_of_learners
from fastai_cam.methods.registry import as_method, METHODS
from fastai_cam.methods.baselines import BASELINES
from fastai_cam.trust.rescore import cam_metric, METRICS

PICTURES = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8) for i in range(10)]
LABELS = dict(category=(CategoryBlock, lambda i: 'ab'[i%2]), masks=(MaskBlock(codes=['x', 'y']), lambda i: PILMask.create((PICTURES[i][..., 0] > 127).astype(np.uint8))),
              points=(PointBlock, lambda i: TensorPoint.create([[10. + i, 20.], [30., 40. + i]])), numbers=(RegressionBlock(n_out=2), lambda i: [i, -i]))
MAKE = dict(category=vision_learner, masks=unet_learner, points=partial(vision_learner, n_out=4, y_range=(-1, 1), loss_func=MSELossFlat()), numbers=partial(vision_learner, y_range=(-8, 8)))
QUICK = dict(scorecam=dict(top=2), sscam=dict(top=1, n=2), iscam=dict(top=1, n=2), smooth_gradcam_pp=dict(n=2),
             rise=dict(n=4), groupcam=dict(n_groups=2), opticam=dict(n=2))
WRAPPED = ['gradcam+tta', 'gradcam+pca', 'gradcam+stages', 'eigencam+pca']
REFUSED = dict(cam='CAM needs layer', rollout='relates all places', grad_rollout='relates all places', legrad='attended to each other', attention_value='attended to each other', finercam='finercam compares classes') # the last of masks only
STEPPED = {name: dict(steps=2) for name in ('insertion', 'deletion', 'pixel_flipping')} | {name: dict(percentiles=(50,)) for name in ('road', 'road_morf', 'road_lerf', 'arcc')} | dict(max_sensitivity=dict(n=1))


@pytest.fixture(scope='session')
def learners():
    made = {}
    def make(kind):
        if kind in made: return made[kind]
        set_seed(0)
        block, label = LABELS[kind]
        dls = DataBlock((ImageBlock, block), get_x=lambda i: PICTURES[i], get_y=label, splitter=IndexSplitter([4, 5, 6, 7, 8, 9]),
                        batch_tfms=Normalize.from_stats(*imagenet_stats)).dataloaders(list(range(10)), bs=4, num_workers=0)
        made[kind] = MAKE[kind](dls, resnet18, pretrained=False, normalize=False)
        made[kind].remove_cb(made[kind].progress)
        return made[kind]
    return make


@pytest.fixture(scope='session', params=LABELS)
def kind(request): return request.param


@pytest.fixture
def learn(kind, learners): return learners(kind)


def test_the_map_without_a_method(learn, kind):
    "By `objectcam`, where a pass shows that evidence is, whatever the learner predicts"
    found = learn.get_cams([0, 1])
    assert found.method==['objectcam'] and torch.isfinite(found.maps).all() and found.maps.flatten(1).abs().amax(1).gt(0).all()
    layers = learn.cam_layers()
    assert layers[layers.used_by.str.contains('the default map')].layer.tolist()==found.layers and len(found.layers)==(1 if kind=='masks' else 2)
    named = learn.get_cams([0, 1], method='objectcam', layer=found.layers)
    assert torch.allclose(named.maps, found.maps, atol=1e-6*found.maps.abs().max())
    with_grad = learn.get_cams([0, 1], method='gradcam', layer=found.layers[-1:]).maps # where there is a map, its evidence has its sign
    evidence = torch.nn.functional.interpolate(with_grad.flatten(0, -3)[:, None], size=found.maps.shape[-2:], mode='bilinear')[:, 0].view_as(found.maps)
    assert ((found.maps*evidence >= 0) | (found.maps==0)).all()


def test_every_method_and_wrapper_makes_a_map_or_says_why_not(learn, kind):
    "All in one pass; what each gives is what it gives alone"
    refused = {name for name in REFUSED if kind=='masks' or name!='finercam'}
    for name in refused:
        with pytest.raises(ValueError, match=REFUSED[name]): learn.get_cams(0, method=name)
    names = [name for name in [*METHODS, *WRAPPED] if name not in refused | {'ablationcam'}] # which has hundreds of channels to run: below
    methods = [partial(METHODS[name], **QUICK[name]) if name in QUICK else as_method(name) for name in names]
    found = learn.get_cams([0], method=methods).maps
    n = found.shape[1]//len(names)
    assert found.shape[1]==n*len(names) and torch.isfinite(found).all() and type(found) is Tensor
    of = dict(zip(names, found.split(n, dim=1)))
    assert (of['uniform_map']==1).all() and of['random_map'].std() > .01 and of['eigencam'].std() > 0
    for name in 'gradcam', 'edge_map': assert torch.allclose(learn.get_cams([0], method=[name, 'fullgrad']).maps[:, :n], of[name], atol=1e-5*of[name].abs().max())


def test_ablation_of_a_layer_with_few_channels(learn, kind):
    first = next(name for name, module in learn.model.named_modules() if isinstance(module, torch.nn.Conv2d))
    for method, layer in ('ablationcam', first), ('reciprocam', None): assert torch.isfinite(learn.get_cams([1], method=method, layer=layer).maps).all()


def test_the_tail_of_a_real_model_gives_each_item_its_own_output(learn):
    "Items in another order and number than in the pass: the skips of a U-Net are theirs"
    x, items = learn.dls.valid.one_batch()[0].as_subclass(Tensor), torch.tensor([2, 0, 2, 1, 1])
    with Probe(learn.model) as p:
        cap = p(x)
        found, again = cap.run_from(cap.acts[0][items], items=items), cap.run_from(cap.acts[0])
        assert torch.allclose(again.as_subclass(Tensor), cap.out.detach().as_subclass(Tensor), atol=1e-5) and torch.allclose(found.as_subclass(Tensor), cap.out.detach().as_subclass(Tensor)[items], atol=1e-5)
    assert not any('forward' in vars(module) for module in learn.model.modules())


def mask_of(item): return np.pad(np.ones((20, 20), dtype=bool), 22)


def test_every_measure_and_its_plot(learn, kind):
    interp = CAMInterpretation.from_learner(learn)
    metrics = [partial(METRICS[name], **STEPPED[name]) if name in STEPPED else METRICS[name] for name in METRICS]
    table = interp.compare_cams('gradcam', metrics=metrics, n=1, masks=mask_of, baselines=kind!='masks')
    assert list(table['method'])==['gradcam', *(BASELINES if kind!='masks' else [])] and len(table.metrics)==len(metrics)
    if kind!='masks': assert table['complexity'][1]==1 and table['energy_in_mask'][1]==pytest.approx(400/4096) # of the uniform map
    assert len(table.plot().axes)==len(metrics) and 'gradcam' in table._repr_html_()


def test_verdicts_do_not_depend_on_the_company(learn, kind):
    quick = dict(n_random=2, steps=1)
    together, alone = learn.cam_trust([0, 2], **quick), learn.cam_trust(2, **quick)
    for key, value in alone.numbers.items():
        one, other = (list(number.values()) if isinstance(number, dict) else number for number in (value, together[1].numbers[key]))
        assert np.allclose(one, other, atol=5e-4), key # a map with places of the same strength lets rounding decide which pixels go first
    assert together[0].numbers['score']!=together[1].numbers['score'] and str(alone) and len(alone.show().axes)==4
    assert 'takes  from' not in alone.verdict


def test_sanity_and_its_figures(learn, kind):
    interp = CAMInterpretation.from_learner(learn)
    check = interp.sanity_check('gradcam', n=2, n_steps=1)
    assert len(check.table)==2 and len(check.plot())==2 and len(check.show())==3 and check.verdict
    if kind in ('points', 'numbers'):
        with pytest.raises(ValueError, match='predicts values'): learn.random_logit_test([0, 1])
    else: assert len(learn.random_logit_test([0, 1]))==1 and similarity_of_learners(learn, learn, [0, 1]).spearman[0] in (1, pytest.approx(np.nan, nan_ok=True))


def test_sanity_does_not_depend_on_the_batch_size(learners):
    learn, found = learners('category'), []
    for bs in (2, 4):
        dl = learn.dls.valid.new(bs=bs)
        found.append(learn.sanity_check(dl, n=4, n_steps=1).maps['objectcam'])
    assert torch.allclose(*found, atol=1e-4*found[0].abs().max())


def test_shortcuts_or_why_not(learn, kind):
    interp = CAMInterpretation.from_learner(learn)
    if kind=='category':
        found = interp.find_shortcuts(n=None, min_items=6)
        assert len(found)==0 and 'class' in found.table and found.plot().axes[0].texts[0].get_text()==repr(found)
    else:
        with pytest.raises(ValueError, match='does not classify pictures' if kind=='masks' else 'predicts values'): interp.find_shortcuts(n=None, min_items=6)


# -- an item is what it is, whatever it is with

@pytest.mark.parametrize('method', ['random_map', 'gradcam+tta', partial(METHODS['smooth_gradcam_pp'], n=2), partial(METHODS['sscam'], n=1, top=1)], ids=['random_map', 'tta', 'smooth_gradcam_pp', 'sscam'])
def test_what_is_drawn_belongs_to_the_item(learners, method):
    learn = learners('numbers')
    together, alone = learn.get_cams([0, 3, 5, 1, 2], method=method).maps, learn.get_cams(5, method=method).maps
    assert torch.allclose(together[2:3], alone, atol=1e-4*alone.abs().max()) and not torch.allclose(together[0], together[2])


def test_measures_belong_to_the_item(learners):
    learn, name = learners('points'), ['insertion', 'road', 'max_sensitivity']
    metrics = [partial(METRICS[one], **STEPPED[one]) for one in name]
    interp = CAMInterpretation.from_learner(learn)
    every, few = (interp.compare_cams('random_map', metrics=metrics, n=n, baselines=False).per_item['random_map', '–'] for n in (6, 2))
    assert np.allclose(few, every.loc[few.index], atol=1e-4)


def test_a_random_class_belongs_to_the_item():
    from fastai_cam.trust.sanity import RandomClass
    from fastai_cam.tasks import SingleLabel
    out, target = torch.randn(8, 5), RandomClass()
    target.task = SingleLabel()
    drawn = target.classes(out)[:, 0]
    assert (drawn!=out.argmax(1)).all() and all(target.classes(out[i:i+1])[0, 0]==drawn[i] for i in range(8))


# -- what a user's function raises arrives as it was raised

class Raised(Exception): pass


def raising(*args, **kwargs): raise Raised


def test_exceptions_without_arguments_arrive(learners):
    learn = learners('category')
    interp = CAMInterpretation.from_learner(learn)
    try:
        @cam_metric('maps', higher=True)
        def failing(maps): raise Raised
        calls = dict(metric=lambda: interp.compare_cams('gradcam', metrics='failing', n=2), method=lambda: interp.compare_cams(raising, n=2), masks=lambda: interp.compare_cams('gradcam', metrics='iou', masks=raising, n=2),
                     trust=lambda: learn.cam_trust(0, method=raising), sanity=lambda: interp.sanity_check(raising, n=2), shortcuts=lambda: interp.find_shortcuts(method=raising, min_items=6, n=None))
        for what, call in calls.items():
            with pytest.raises(Raised) as caught: call()
            assert caught.value.args==(), what
    finally: METRICS.pop('failing', None)
    assert not any(module._forward_hooks for module in learn.model.modules())


def test_a_broken_model_is_said(learners):
    learn = learners('category')
    weight = learn.model[1][-1].weight
    kept = weight.detach().clone()
    try:
        weight.data[:] = torch.nan
        trust = learn.cam_trust(0, n_random=2, steps=1)
        assert not trust.believed and 'is not finite' in trust.verdict and trust.show()
        interp = CAMInterpretation.from_learner(learn)
        assert interp.compare_cams('gradcam', metrics=['gini', 'complexity'], n=2)[['gini', 'complexity']].isna().all(None)
        with pytest.raises(ValueError, match='not finite'): interp.find_shortcuts(n=None, min_items=6)
    finally: weight.data.copy_(kept)
