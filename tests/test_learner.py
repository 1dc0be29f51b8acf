"Inside fastai's loop: one forward pass per batch, training undisturbed, hooks gone whatever the user's own loop does."
import copy
import random
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from fastcore.foundation import L
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.callback.tracker import SaveModelCallback
from fastai.vision.all import ImageDataLoaders, PILImage, Resize, RocAucBinary, accuracy, resnet18, vision_learner

from fastai_cam.all import CAMCallback, CAMInterpretation, Versus, METHODS, Probe, WhyNot, cam_head, cam_learner
from fastai_cam.probe.capture import Scores
from fastai_cam.maps.cams import Images
from fastai_cam.methods.registry import as_method
from fastai_cam.maps.pixels import upsample

from helpers.oracles import OF_ATTENTION


def small_learner(dls, **kwargs):
    set_seed(1)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
    return Learner(dls, nn.Sequential(body, cam_head(8, dls.c, ps=.2)), metrics=accuracy, **kwargs)


def n_hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_one_forward_pass_a_batch(dls):
    learn = small_learner(dls)
    calls = []
    handle = learn.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    cams = learn.get_cams(dls.valid, cls=['predicted', 'actual', 0], method=['cam', 'gradcam'])
    handle.remove()
    assert calls==[5, 5, 2] and cams.maps.shape==(12, 6, 8, 8) # 12 items, 6 maps each, one pass: predictions and losses are from it too
    assert cams.preds.shape==(12, 2) and cams.losses.shape==(12,)


def test_results_hold_no_graph_and_no_pixels(dls):
    cams = small_learner(dls).get_cams(dls.valid, cls='all')
    assert not any(t.requires_grad for t in (cams.maps, cams.preds, cams.losses))
    assert isinstance(cams.images, Images) and not any(isinstance(v, torch.Tensor) for v in vars(cams.images).values())


def test_training_is_undisturbed_by_the_callback(dls):
    "Weights after an epoch with the callback in the loop are those without it, to the last bit"
    def trained(cbs):
        learn = small_learner(dls)
        set_seed(3, reproducible=True)
        dls.train.rng = random.Random(0) # a loader shuffles with a generator of its own
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=cbs)
        return learn
    callback = CAMCallback(method='cam')
    plain, watched = trained(None), trained(callback)
    for a, b in zip(plain.model.state_dict().values(), watched.model.state_dict().values()): assert torch.equal(a, b)
    assert n_hooks(watched.model)==0 and callback.cams.maps.shape==(12, 8, 8)
    assert torch.allclose(callback.cams.maps, watched.get_cams(dls.valid, method='cam').maps, atol=1e-5)


def test_validate_gives_the_same_numbers_with_the_callback(dls):
    learn = small_learner(dls)
    with learn.no_bar():
        without = list(learn.validate())
        callback = CAMCallback('actual')
        assert list(learn.validate(cbs=callback))==without
    assert callback.cams.maps.shape==(12, 16, 16)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_users_own_loop_leaves_no_hook(dls, error):
    class Fails(Callback):
        order = 20
        def after_loss(self): raise error('stop')
    learn = small_learner(dls)
    with learn.no_bar(), pytest.raises(error): learn.get_preds(cbs=[CAMCallback(), Fails()])
    assert n_hooks(learn.model)==0 and torch.is_grad_enabled()


def test_a_failing_clean_up_of_another_callback_leaves_no_hook(dls):
    "fastai skips the events after one that raised; ours does not depend on them"
    class FailsLate(Callback):
        def after_epoch(self): raise RuntimeError('late')
    learn = small_learner(dls, cbs=FailsLate())
    before = n_hooks(learn.model)
    handle = learn.model[1].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(RuntimeError('forward')))
    with pytest.raises(RuntimeError): learn.get_cams(0)
    handle.remove()
    assert n_hooks(learn.model)==before==0


def test_nothing_behind_the_forward_pass_is_recorded(dls):
    class Looks(Callback):
        "Sees `learn.pred` and `learn.loss` as any callback of the user's would"
        order, graphs = 30, []
        def after_loss(self): self.graphs += [self.learn.pred.requires_grad, self.learn.loss.requires_grad, torch.is_grad_enabled()]
    learn = small_learner(dls)
    with learn.no_bar(): learn.get_preds(cbs=[CAMCallback(), Looks()])
    assert Looks.graphs==[False]*9
    small_learner(dls, cbs=Looks()).get_cams(dls.valid) # a pass of ours is none of its business
    assert Looks.graphs==[False]*9


def test_mixed_precision_learner(dls):
    learn = small_learner(dls)
    expected = learn.get_cams([0, 1]).maps
    learn.add_cb(MixedPrecision())
    state = dict(vars(learn.mixed_precision))
    assert torch.allclose(learn.get_cams([0, 1]).maps, expected, atol=1e-3)
    assert vars(learn.mixed_precision)==state


def test_metrics_that_need_all_classes_do_not_stop_a_single_item(dls):
    learn = Learner(dls, small_learner(dls).model, metrics=RocAucBinary()) # undefined on one item
    assert len(learn.get_cams(0))==1
    assert len(CAMInterpretation.from_learner(learn, dl=learn.dls.test_dl(dls.valid.items[:1], with_labels=True)).losses)==1


def test_a_callback_that_saves_models_saves_none(dls, tmp_path):
    "It is part of the learner, wants the recorder's metrics by name, and must do nothing"
    learn = small_learner(dls, cbs=SaveModelCallback(monitor='accuracy'), path=tmp_path)
    assert len(learn.get_cams([0, 1]))==2
    CAMInterpretation.from_learner(learn).plot_top_losses_cam(2)
    assert list(tmp_path.rglob('*'))==[]


def test_learner_whose_items_are_rows(pictures):
    files = sorted(pictures.glob('*/*.png'))
    table = pd.DataFrame(dict(name=[f'{f.parent.name}/{f.name}' for f in files], label=[f.parent.name for f in files]))
    dls = ImageDataLoaders.from_df(table, pictures, valid_pct=.5, seed=0, item_tfms=Resize(64), bs=4, num_workers=0)
    learn = small_learner(dls)
    row = dls.valid.items.iloc[3]
    by_index, by_file = learn.get_cams(3), learn.get_cams(pictures/row['name'])
    assert torch.allclose(by_index.maps, by_file.maps, atol=1e-6) and dls.vocab[by_index.targs[0]]==row['label']
    mixed = learn.get_cams([pictures/row['name'], 3, PILImage.create(pictures/row['name'])])
    assert torch.allclose(mixed.maps, by_index.maps.expand(3, -1, -1), atol=1e-6)
    assert len(CAMInterpretation.from_learner(learn).top_losses_cams(4))==4


def test_the_recorder_survives(dls):
    learn = small_learner(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    losses, values = list(learn.recorder.losses), list(learn.recorder.values)
    assert len(losses) > 0 and len(values)==2
    learn.show_cam(0)
    interp = CAMInterpretation.from_learner(learn)
    interp.plot_top_losses_cam(2)
    assert list(learn.recorder.losses)==losses and list(learn.recorder.values)==values


def test_worker_processes(pictures, dls):
    several = dls.valid.new(num_workers=2)
    learn = small_learner(dls)
    assert torch.allclose(learn.get_cams(several).maps, learn.get_cams(dls.valid).maps, atol=1e-6)


def test_frozen_body_of_vision_learner(dls):
    learn = vision_learner(dls, resnet18, pretrained=False)
    learn.freeze()
    flags = [p.requires_grad for p in learn.model.parameters()]
    assert not all(flags)
    cams = learn.get_cams([0, 1], cls='all')
    assert cams.maps.abs().amax((2, 3)).min() > 0 and [p.requires_grad for p in learn.model.parameters()]==flags
    assert all(p.grad is None for p in learn.model.parameters())


def test_user_supplied_loader_is_not_used_up_or_changed(dls):
    learn, shuffled = small_learner(dls), dls.valid.new(shuffle=True, drop_last=True)
    before = copy.copy(shuffled.rng.getstate())
    cams = learn.get_cams(shuffled) # in the order of its dataset, although it shuffles
    assert len(cams.images.load())==12 # all of them, although it drops the last batch
    assert cams.items==list(dls.valid.items) and shuffled.rng.getstate()==before and shuffled.shuffle
    assert torch.allclose(cams.maps, learn.get_cams(dls.valid).maps, atol=1e-6)


def test_images_are_those_the_maps_are_of(dls):
    "Fetched later, out of order, each decoded image is the one whose map it carries"
    learn = small_learner(dls)
    cams = learn.get_cams([7, 2, 7])[[2, 1]]
    for cam_map, i in zip(cams, (7, 2)):
        x = dls.valid.dataset[i][0]
        assert (torch.as_tensor(cam_map.image).permute(1, 2, 0) - torch.tensor(np.array(x).astype(int))).abs().max() <= 1


def test_max_n_runs_no_more_than_it_shows(dls):
    learn, seen = small_learner(dls), []
    handle = learn.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    learn.show_cam(dls.valid, max_n=3, method='gradcam') # without a method, one more item shows where to look
    learn.show_cam(max_n=2, method='gradcam')
    learn.show_cam(method='gradcam') # a validation batch: 5 items
    handle.remove()
    assert seen==[3, 2, 5]


def test_cam_learner_has_the_exact_head(dls):
    learn = cam_learner(dls, resnet18, pretrained=False, ps=.3)
    pool, flatten, dropout, linear = learn.model[1]
    assert isinstance(pool, nn.AdaptiveAvgPool2d) and isinstance(dropout, nn.Dropout) and dropout.p==.3 and linear.in_features==512 and linear.bias is not None
    cams = learn.get_cams([0, 3], cls='all', method=['cam', 'gradcam'])
    h, w = cams.maps.shape[-2:]
    assert (cams.maps[:, 2:]*h*w - cams.maps[:, :2]).abs().max() <= 1e-6*cams.maps.abs().max()


# -- every method by name

def learner_state(learn):
    model = learn.model
    return dict(modes=[m.training for m in model.modules()], hooks=n_hooks(model), own=[sorted(set(vars(m)) & {'forward'}) for m in model.modules()],
                grads=[p.grad is None for p in model.parameters()], flags=[p.requires_grad for p in model.parameters()], buffers=[b.clone() for b in model.buffers()],
                callbacks=list(learn.cbs), random=torch.get_rng_state(), grad_mode=torch.is_grad_enabled())


def same(a, b): return all(all(torch.equal(x, y) for x, y in zip(a[key], b[key])) if key=='buffers' else torch.equal(a[key], b[key]) if key=='random' else a[key]==b[key] for key in a)


class Attends(nn.Module):
    "Two transformer blocks over 8 × 8 patches, read from the mean"
    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), nn.Linear(16, 2)
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(2)])
    def forward(self, x): return self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT)).mean(1))


@pytest.mark.parametrize('name', OF_ATTENTION)
def test_a_method_of_attention_is_refused_without_attention(dls, name):
    learn = small_learner(dls)
    before = learner_state(learn)
    with pytest.raises(ValueError, match='use a method that needs only the layer'): learn.get_cams([0], method=name)
    assert same(before, learner_state(learn))


@pytest.mark.parametrize('name', [*METHODS, 'gradcam+tta', 'layercam+stages', 'gradcam+pca', 'scorecam+tta'])
def test_every_method_by_name(dls, name):
    "In the learner's loop the maps are those of a probe, items in order over batches, and the learner is as it was"
    learn = small_learner(dls)
    if name in OF_ATTENTION: learn.model = Attends()
    learn.model.train()
    before = learner_state(learn)
    cams = learn.get_cams(dls.valid, cls=['right', 'left'], method=name)
    assert same(before, learner_state(learn))
    assert cams.maps.shape[:2]==(12, 2) and cams.labels==['right', 'left']
    x = torch.cat([batch[0] for batch in dls.valid]).as_subclass(torch.Tensor)
    with Probe(learn.model) as p:
        cap = p(x)
        expected = as_method(name)(cap, cap.score(lambda out: out[:, [1, 0]]))
    assert expected.abs().amax((1, 2, 3)).min() > 0
    assert (cams.maps - expected).abs().max() <= 1e-5*expected.abs().max()


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('name', ['scorecam', 'gradcam+tta', 'fullgrad', 'smooth_gradcam_pp'])
def test_interrupted_while_the_model_runs_again(dls, name, error):
    learn, calls = small_learner(dls), []
    def stop(module, inputs):
        calls.append(1)
        if len(calls)==3: raise error('stop')
    hook = learn.model[0][0].register_forward_pre_hook(stop)
    before = learner_state(learn)
    with pytest.raises(error): learn.get_cams(dls.valid, method=name)
    assert len(calls)==3 and same(before, learner_state(learn))
    hook.remove()
    assert learn.get_cams(dls.valid, method=name).maps.abs().max() > 0 # and it works again


def test_methods_of_different_resolution_side_by_side(dls):
    "The coarser map is enlarged to the finer one's grid"
    learn = small_learner(dls)
    both = learn.get_cams([0, 1], method=['gradcam', 'fullgrad'])
    assert both.maps.shape==(2, 2, 64, 64) and both.labels==['gradcam: predicted', 'fullgrad: predicted']
    assert torch.allclose(both.maps[:, 0], upsample(learn.get_cams([0, 1], method='gradcam').maps, (64, 64)), atol=1e-6)
    assert torch.allclose(both.maps[:, 1], learn.get_cams([0, 1], method='fullgrad').maps)


def test_options_and_names_of_methods(dls):
    learn = small_learner(dls)
    cams = learn.get_cams([0], method=[partial(METHODS['scorecam'], top=3), lambda cap, score: METHODS['gradcam'](cap, score)*2, 'gradcam'])
    assert cams.labels==['scorecam(top=3): predicted', '<lambda>: predicted', 'gradcam: predicted']
    assert torch.allclose(cams.maps[:, 1], 2*cams.maps[:, 2])
    with pytest.raises(ValueError, match=r"method 'flat' returned maps of shape \[1, 8\] for scores of shape \[1, 1\]"):
        def flat(cap, score): return torch.zeros(1, 8)
        learn.get_cams([0], method=flat)


def test_contrasts(dls):
    "Grad-CAM of a contrast is the difference of the Grad-CAMs; the title says what was asked"
    learn = small_learner(dls)
    left, right, contrast = learn.get_cams(dls.valid, cls=['left', 'right', Versus('left', 'right')], method='gradcam').maps.unbind(1)
    assert torch.allclose(contrast, left - right, atol=1e-6) and contrast.abs().max() > 0
    odds = learn.get_cams(dls.valid).preds.log()
    learn.model[1][-1].bias.data[0] -= (odds[:, 0] - odds[:, 1]).median() # untrained, it says left to everything
    why_not = learn.get_cams(dls.valid, cls=WhyNot('left'), method='gradcam')
    is_left = why_not.preds.argmax(1)==0
    assert not why_not.maps[is_left].any() and is_left.any() and (~is_left).any()
    assert torch.allclose(why_not.maps[~is_left], (right - left)[~is_left], atol=1e-6)
    assert why_not[0].title.endswith('map: why not left')
    with pytest.raises(ValueError, match="no class is named 'middle'"): learn.get_cams(dls.valid, cls=Versus('left', 'middle'))


def test_many_classes_fit_in_memory_piece_by_piece(dls, monkeypatch):
    "Gradients are taken for as many classes at a time as fit; the maps are those of all at once, for methods that ask again too"
    learn = small_learner(dls)
    asked = dict(cls=[0, 1, 'predicted', lambda out: out.sum(1)], method=['gradcam', 'layercam', 'ablationcam', 'shapleycam'])
    whole, pieces, chunks = learn.get_cams(dls.valid, **asked).maps, [], Scores.chunks
    def small(self): found = chunks(self, 1); pieces.append(len(found)); return found
    monkeypatch.setattr(Scores, 'chunks', small)
    assert torch.allclose(learn.get_cams(dls.valid, **asked).maps, whole, atol=1e-6) and set(pieces)=={4}


def test_long_work_shows_a_bar_and_no_bar_hides_it(dls, monkeypatch):
    import fastai_cam.state as room
    shown = []
    monkeypatch.setattr(room, 'progress_bar', lambda steps, leave: shown.append(len(steps)) or steps)
    learn = small_learner(dls)
    learn.get_cams([0, 1], method=partial(METHODS['scorecam'], bs=1))
    assert len(shown)==1 and shown[0] > 8
    with learn.no_bar(): learn.get_cams([0, 1], method=partial(METHODS['scorecam'], bs=1))
    learn.get_cams([0, 1])
    assert len(shown)==1


def test_every_stage(dls):
    "As a layer and as a wrapper: the end of each resolution, fused"
    learn = small_learner(dls)
    as_layer = learn.get_cams([0, 1, 2], layer='stages', method='gradcam').maps
    with Probe(learn.model, 'stages') as p: assert p(dls.valid.one_batch()[0]).names==['0.1', '0']
    assert torch.allclose(as_layer, learn.get_cams([0, 1, 2], layer=['0.1', '0'], method='gradcam').maps)
    assert torch.allclose(as_layer, learn.get_cams([0, 1, 2], method='gradcam+stages').maps, atol=1e-6) and as_layer.shape==(3, 16, 16)


def n_drawn(learn, item, **kwargs):
    plt.close('all')
    learn.show_cam(item, photo=False, colorbar=False, **kwargs)
    return sum(ax.has_data() for ax in plt.gcf().axes)


def test_listed_items_are_all_shown(dls, monkeypatch):
    "Items that somebody lists are drawn, in whatever form they are listed; a loader or a batch shows nine"
    learn, mask = small_learner(dls), np.arange(12) > 0
    files, batch = list(dls.valid.items), dls.valid.new(bs=12).one_batch()
    for item, n in ((list(range(12)), 12), (range(11), 11), (files, 12), (tuple(files[:10]), 10), (L(files), 12), (pd.Series(files), 12), (np.arange(12), 12), (torch.arange(12)[:,None], 12), (mask, 11),
                    (mask.tolist(), 11), (iter(files), 12), ([x for x in batch[0]], 12), (0, 1), (dls.valid, 9), (batch, 9), (batch[0], 9), (None, 5)):
        assert n_drawn(learn, item)==n, item
    assert n_drawn(learn, list(range(12)), max_n=3)==3 and n_drawn(learn, dls.valid, max_n=None)==12
    monkeypatch.setattr('fastai_cam.source.items._most_listed', 4)
    with pytest.warns(UserWarning, match='the first 4 of these 6 items are shown: max_n=None shows all'): assert n_drawn(learn, list(range(6)))==4
    with pytest.raises(IndexError, match='item 12 is out of range'): learn.show_cam(list(range(13)))


# --- by hand: what a query calls its maps, what is joined, what fastai is kept from collecting

def test_what_a_query_calls_its_maps_and_which_are_joined():
    from fastai_cam.learner.cams import join_maps
    from fastai_cam.learner.query import Query
    from fastai_cam.methods import as_methods
    from fastai_cam.targets.lookup import as_target
    from fastai_cam.tasks import NOT_ASKED, SingleLabel
    target = as_target([0, 1, 2], list('abc'), 3, SingleLabel(list('abc')))
    query = Query(target, as_methods(['gradcam']), is_list=True)
    assert query.labels==['a', 'b', 'c'] # one method has not to be named
    batch = dict(maps=torch.arange(12.).view(1, 3, 2, 2), classes=torch.tensor([[0, NOT_ASKED, 2]]), regions=None, task=SingleLabel(), layer=['body'])
    found = join_maps([batch], query)
    assert (found['method'], found['layers'])==(['gradcam'], ['body'])
    assert found['labels']==['a', 'c'] and found['classes'].tolist()==[[0, 2]] and torch.equal(found['maps'], batch['maps'][:, [0, 2]])


@pytest.mark.parametrize('keep, dims, kept', [(True, 2, True), (True, 4, False), (False, 2, False)])
def test_what_fastai_collects(keep, dims, kept):
    from types import SimpleNamespace
    from fastai.callback.core import GatherPredsCallback
    from fastai_cam.learner.query import CaptureCallback
    callback, collects = CaptureCallback(None, None, keep), GatherPredsCallback()
    callback.learn = SimpleNamespace(cbs=[collects], yb=(torch.zeros(2),))
    callback._let_go(torch.zeros(2, *[3]*(dims - 1)))
    assert (collects.with_preds, collects.with_targs)==(kept, keep)


def test_a_misspelt_argument_is_recognised(dls):
    learn = small_learner(dls)
    for call in learn.show_cam, learn.get_cams:
        with pytest.raises(TypeError, match="there is no argument 'methd' here: did you mean 'method'[?]"): call(0, methd='cam')
        for wrong in 'a', 1.5, True:
            with pytest.raises(TypeError, match=f'max_n is a whole number, at least 1, and not {wrong!r}'): call(0, max_n=wrong)
        with pytest.raises(ValueError, match='max_n=0 leaves nothing to'): call(0, max_n=0)
        with pytest.raises(ValueError, match="no layer named 'nope': its layers are '0'"): call(0, layer='nope')
    assert len(learn.get_cams(dls.valid, max_n=np.int64(2)))==2


def test_a_figure_without_room_is_refused_before_any_pass(dls):
    learn = small_learner(dls)
    learn.model.register_forward_pre_hook(lambda *args: pytest.fail('the model ran'))
    for size in (0, 3), (4, -1), (4, "a"):
        with pytest.raises(ValueError, match='figsize is [(]width, height[)] in inches'): learn.show_cam(0, figsize=size)


def test_the_table_of_layers_fits_and_holds_all(dls):
    learn = vision_learner(dls, resnet18, pretrained=False)
    table = learn.cam_layers()
    lines = repr(table).splitlines()
    assert len(table) > 50 and len(lines) < 16 and max(map(len, lines)) <= 100
    assert lines[-1].startswith(f'{len(table)} layers in all') and 'the last of their grid' in table._repr_html_()
    shown = [line.split()[0] for line in lines[1:-1]]
    assert set(table[table.used_by != ''].layer) <= set(shown) and len(set(table[table.layer.isin(shown)].grid))==table.grid.nunique()
    assert len(table.to_string().splitlines())==len(table) + 1
    assert len(repr(table[:3]).splitlines())==4 and 'layers in all' not in repr(table[['layer', 'kind']])
