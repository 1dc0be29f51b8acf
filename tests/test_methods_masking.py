"Methods that ask the model again with masked images: what is run and how much of it, options, items that do not know of each other, volumes."
import pytest
import torch
from torch import nn

from fastai_cam.methods.masking import groupcam, opticam, rise
from fastai_cam.methods.registry import METHODS
from fastai_cam.probe.scan import LayerScan
from fastai_cam.probe.watch import Probe

from helpers.oracles import all_classes, assert_same, each, EVERY, fitted_mask, images, in_groups, masked_at_random, odd, ours, plain, random_masks, stack

MASKING = ['ablationcam', 'reciprocam', 'scorecam', 'sscam', 'iscam', 'groupcam', 'opticam', 'rise']


def sizes_run(model, x, name, **options):
    "Maps, and how many images went into the model in each of its runs behind the first"
    sizes = []
    with Probe(model) as p:
        cap = p(x)
        score = cap.score(EVERY)
        hook = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        maps = METHODS[name](cap, score, **options)
        hook.remove()
    return maps, sizes


def against(oracle, model, layer, x, asks=None):
    asks = asks or all_classes(x)
    return stack({(i, c): oracle(model, layer, image, ask) for i, c, image, ask in each(x, asks)}, asks)


def test_every_method_of_the_room_is_here():
    assert {name for name, method in METHODS.items() if method.__module__=='fastai_cam.methods.masking'}==set(MASKING)


# --- RISE

@pytest.mark.parametrize('options', [dict(n=30, cells=3, p=.3, seed=4), dict(n=25, cells=11, p=.8), dict(n=12, centre=False), dict(n=40, cells=40)])
def test_rise_options(options):
    "Also with more cells than the image has pixels"
    model, x = odd(), images(2)
    assert_same(ours(model, x, 'rise', 'act', **options), against(masked_at_random(**options), model, 'act', x))


def test_rise_depends_on_its_seed_alone():
    model, x = plain(), images(2)
    torch.manual_seed(1)
    first, state = ours(model, x, 'rise', n=20), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(ours(model, x, 'rise', n=20), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (ours(model, x, 'rise', n=20, seed=1) - first).abs().max() > .1*first.abs().max()


def test_the_papers_sum_is_the_mean_score_above_it():
    model, x, n, p = plain(), images(2), 50, .4
    masks = torch.stack(random_masks(n, 7, p, 0, (20, 28)))
    with torch.no_grad(): mean = torch.stack([model(image*masks[:, None]).mean(0) for image in x])
    difference = ours(model, x, 'rise', n=n, p=p, centre=False) - ours(model, x, 'rise', n=n, p=p)
    assert_same(difference, mean[..., None, None]*masks.mean(0)/p)


def test_rise_finds_the_only_place_that_counts():
    class Corner(nn.Module):
        def forward(self, x): return x[:, :, 4:8, 20:24].mean((1, 2, 3))[:, None]
    model, x = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1)), nn.Sequential()), torch.ones(1, 3, 28, 28)
    model.forward = lambda x: Corner()(model[0](x))
    found = ours(model.eval(), x, 'rise', n=2000, score=lambda out: out[:, 0]*torch.sign(out[0, 0]))[0]
    at = divmod(int(found.abs().argmax()), 28)
    assert 2 <= at[0] <= 9 and 18 <= at[1] <= 25


@pytest.mark.parametrize('options,message', [
    (dict(n=1), "n=1 gives no mean to compare with: give at least 2 masks"), (dict(n=2.5), "n=2.5 gives no mean"), (dict(cells=0), 'cells=0 is no grid: give at least 1'),
    (dict(p=1), 'p is how likely a cell is to be lit, between 0 and 1, not 1'), (dict(p=0.), 'between 0 and 1, not 0.0')])
def test_what_rise_cannot_do_is_said(options, message):
    with pytest.raises(ValueError, match=message): ours(plain(), images(1), 'rise', **options)


# --- Group-CAM

@pytest.mark.parametrize('n_groups,percentile', [(3, 70), (1, 50), (4, 0), (32, 90), (5, 100)])
def test_groupcam_options(n_groups, percentile):
    "14 channels in groups of 5, of 14, of 4, of 1 and of 3; nothing is above the 100th percentile"
    model, x = odd(), images(2)
    found, expected = ours(model, x, 'groupcam', 'act', n_groups=n_groups, percentile=percentile), against(in_groups(n_groups, percentile), model, 'act', x)
    if percentile==100: assert not found.any() and not expected.any()
    else: assert_same(found, expected)


def test_groups_that_light_nothing_are_not_run():
    "Each other group's image runs once for each item and score, and the blurred image with them"
    model, x = plain(), images(2)
    with Probe(model) as p:
        cap = p(x)
        weighted = cap.grads(cap.score(EVERY))[0].mean((3, 4), keepdim=True)*cap.acts[0][:, None]
    light = int((weighted.flatten(3).amax(-1) > 0).sum())
    assert 0 < light < 2*4*5 and sum(sizes_run(model, x, 'groupcam', n_groups=6)[1])==light + 2*4 # of six channels, one is dead


def test_groupcam_refuses_no_group():
    with pytest.raises(ValueError, match='n_groups=0 leaves no group'): ours(plain(), images(1), 'groupcam', n_groups=0)


def test_an_item_without_evidence_has_an_empty_map():
    "All its channels are dead: no group lights anything, no weight changes a mask; the other items are what they were"
    model, x = plain(), images(3)
    scale = torch.tensor([0., 1., 1.])[:, None, None, None].double()
    for name in ('groupcam', 'opticam', 'segeigencam'):
        hook = model[0].register_forward_hook(lambda module, inputs, out: out*scale if len(out)==3 else out)
        with Probe(model) as p:
            cap = p(x)
            hook.remove()
            maps = METHODS[name](cap, cap.score(EVERY), **(dict(n=5) if name=='opticam' else {}))
        assert not maps[0].any() # NaN counts as something
        if name=='groupcam': assert_same(maps[1:], ours(model, x[1:], name))


# --- Opti-CAM

@pytest.mark.parametrize('n,lr', [(1, .1), (7, .5), (30, .02)])
def test_opticam_options(n, lr):
    model, x = odd(), images(2)
    assert_same(ours(model, x, 'opticam', 'act', n=n, lr=lr), against(fitted_mask(n, lr), model, 'act', x))


def test_items_and_scores_are_fitted_by_themselves():
    "In single precision, a batch of 1 and a batch of 4, all scores and one of them, one mask at a time and all together"
    model, x = plain(torch.float), images(4, torch.float)
    together = ours(model, x, 'opticam')
    alone = torch.cat([ours(model, x[i:i + 1], 'opticam', score=lambda out: out[:, [2]]) for i in range(4)])
    one_by_one = ours(model, x[:1], 'opticam', bs=1)
    assert (alone - together[:, 2:3]).abs().max() <= 1e-4 and (one_by_one - together[:1]).abs().max() <= 1e-4


def test_the_mask_is_better_than_the_one_it_started_from():
    model, x = plain(), images(4)
    start, end = (ours(model, x, 'opticam', n=n, lr=lr) for n, lr in ((1, 0.), (50, .1)))
    def scores(masks): return torch.stack([model(x*masks[:, c, None])[:, c] for c in range(4)], 1).detach()
    gained = scores(end) - scores(start)
    assert gained.mean() > 0 and (gained > 0).double().mean() > .8
    assert end.min() >= 0 and end.max() <= 1


# --- what is run

@pytest.mark.parametrize('name,bs,options,most', [('rise', 5, dict(n=12), 3*12), ('groupcam', 4, dict(n_groups=3), 3*4*(3 + 1)), ('opticam', 5, dict(n=2), 2*3*4)])
def test_bs_bounds_what_is_run_at_once(name, bs, options, most):
    "And no more images are run than the facts say; in how many runs does not matter"
    model, x = plain(), images(3)
    maps, sizes = sizes_run(model, x, name, bs=bs, **options)
    assert max(sizes)==bs and sum(sizes) <= most
    assert_same(sizes_run(model, x, name, bs=100, **options)[0], maps)
    assert_same(sizes_run(model, x, name, bs=1, **options)[0], maps)


@pytest.mark.parametrize('name,steps', [('rise', 3), ('groupcam', 8), ('opticam', 12)])
def test_progress_is_shown(name, steps):
    "In steps of the work: chunks of masks, items and scores, steps of Adam"
    model, x, shown = plain(), images(2), []
    with Probe(model) as p:
        cap = p(x)
        def bar(some): shown.append(len(some)); return some
        cap.bar = bar
        METHODS[name](cap, cap.score(EVERY), **dict(rise=dict(n=6, bs=2), groupcam={}, opticam=dict(n=12))[name])
    assert shown==[steps]


def test_a_model_whose_layout_is_in_doubt_is_looked_at_once(monkeypatch):
    "And not at every step: what one item has shown about the layer holds for all masked images"
    scans, init = [], LayerScan.__init__
    def counted(self, *args, **kwargs): scans.append(1); init(self, *args, **kwargs)
    monkeypatch.setattr(LayerScan, '__init__', counted)
    model, x = odd(), images(2)
    with Probe(model, 'act') as p:
        cap = p(x)
        before = len(scans)
        opticam(cap, cap.score(EVERY), n=6)
        assert before==1 and len(scans)==2


def test_a_score_computed_by_hand_cannot_be_asked_again():
    with Probe(plain()) as p:
        cap = p(images(1))
        for method in (rise, groupcam, opticam):
            with pytest.raises(ValueError, match='compute it with `cap.score'): method(cap, cap.out*2)


# --- other dimensions

def volumes(dim):
    "The same small net of two or three dimensions of space, whose kernels have no depth"
    torch.manual_seed(0)
    conv, pool = getattr(nn, f'Conv{dim}d'), getattr(nn, f'AdaptiveAvgPool{dim}d')
    kernel = {2: (3, 3), 3: (1, 3, 3)}[dim]
    return nn.Sequential(nn.Sequential(conv(3, 5, kernel), nn.ReLU(), conv(5, 6, kernel), nn.ReLU()), nn.Sequential(pool(1), nn.Flatten(), nn.Linear(6, 4))).double().eval()


@pytest.mark.parametrize('name', ['groupcam', 'opticam', 'segeigencam'])
def test_a_volume_of_one_slice_is_an_image(name):
    x, options = images(2)[..., :12, :16], dict(n=5) if name=='opticam' else {}
    flat = ours(volumes(2), x, name, **options)
    assert_same(ours(volumes(3), x[:, :, None], name, **options)[:, :, 0], flat)


def test_maps_of_volumes():
    x = torch.randn(2, 3, 6, 10, 12, dtype=torch.double)
    for name, options in (('rise', dict(n=10)), ('groupcam', {}), ('opticam', dict(n=2))):
        found = ours(volumes(3), x, name, **options)
        assert found.shape==(2, 4, 6, 10, 12) and found.isfinite().all() and found.abs().max() > 0


def test_the_table_of_methods_says_how_many_passes():
    from fastai_cam.methods import methods_table
    rows = {line.split("'")[1]: line for line in methods_table().splitlines()[2:]}
    assert 'n forward passes (n = 1000)' in rows['rise'] and '(n_groups = 32)' in rows['groupcam'] and '(n = ' not in rows['gradcam']
