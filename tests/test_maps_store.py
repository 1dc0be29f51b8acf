"Maps, boxes, titles and files: against values worked out by hand, and implementations that share nothing with ours."
import base64
import copy
import errno
import io
import json
import os
import pickle
import signal
import stat
import threading
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from fastai.vision.all import CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, Resize, get_image_files, resnet18, vision_learner

import fastai_cam.learner
from fastai_cam.trust.sanity import SanityCheck
from fastai_cam.trust.compare import CAMTable
from fastai_cam.trust.verdict import CAMTrust
from fastai_cam.tasks import NOT_ASKED, Task, TASKS, Values
from fastai_cam.maps.boxes import Box, Peak
from fastai_cam.maps.draw import CAMMap, check_style, wrapped_title
from fastai_cam.maps.cams import CAMs, Images, ItemMaps
from fastai_cam.maps.pixels import normalize, to_pixels, to_slices
from fastai_cam.maps.words import plain_html, plain_legend, plain_text
from fastai_cam.shortcuts import Measurement, Shortcut, Shortcuts

VOCAB = ['cat', 'dog', 'car']


def bumps(size, *peaks):
    "A map of Gaussian bumps: (row, column, height, width)"
    y, x = torch.meshgrid(torch.arange(float(size[0])), torch.arange(float(size[1])), indexing='ij')
    return torch.stack([height*torch.exp(-((y - row)**2 + (x - column)**2)/(2*width**2)) for row, column, height, width in peaks]).amax(0)


def everything(n=4, k=2):
    "`CAMs` with every attribute set, no two alike"
    torch.manual_seed(0)
    return CAMs(torch.randn(n, k, 5, 6), [torch.full((3, 20, 30), i/10) for i in range(n)], torch.arange(n*k).reshape(n, k)%3, ['one', 'two'], torch.rand(n, 3),
                torch.randint(2, (n, 3)), torch.rand(n), [f'{i}.png' for i in range(n)], VOCAB, 2, 'multi', torch.rand(n, k, 20, 30) > .5, True, .3, ['a', None, 'c', 'd'][:n])


# -- one map

def test_a_volume_has_one_scale():
    maps = torch.arange(8.).reshape(1, 2, 2, 2) - 2
    assert torch.equal(normalize(maps, n_space=3), maps.clamp(min=0)/5)
    assert torch.equal(normalize(maps, True, 3), maps/5)
    assert torch.equal(normalize(maps)[0, 0], torch.tensor([[0., 0.], [0., 1.]]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_float_type_are_shown_and_searched(dtype):
    m = torch.tensor([[0., 1.], [2., 4.]], dtype=dtype, requires_grad=True)
    assert CAMMap(m).show().images[0].get_array().tolist()==[[0., .25], [.5, 1.]]
    assert CAMMap(m).boxes()==[Box(0, 1, 2, 2, 1., 1, 1)]
    assert CAMMap(m).peaks()==[Peak(1, 1, 1.)]


def test_signed_is_a_default_that_show_can_overrule():
    cam_map = CAMMap(torch.tensor([[-2., 1.]]), signed=True)
    assert cam_map.show().images[0].get_clim()==(-1, 1) and cam_map.show().images[0].get_array().tolist()==[[-1., .5]]
    assert cam_map.show(signed=False).images[0].get_clim()==(0, 1)
    cams = CAMs(torch.tensor([[[-2., 1.]]]), signed=True)
    assert cams.show()[0].images[0].get_clim()==(-1, 1) and cams.show(signed=False)[0].images[0].get_clim()==(0, 1)
    assert cams[0].signed and cams[[0]].signed


def outline(ax):
    "Extent of the white contour line: left, top, right, bottom"
    white = [c for c in ax.collections if np.allclose(c.get_edgecolor()[0], to_rgba('white'))]
    assert len(white)==1
    points = np.concatenate([path.vertices for path in white[0].get_paths()])
    return [*points.min(0), *points.max(0)]


def test_region_is_outlined_where_it_is_whatever_its_resolution():
    region = torch.zeros(4, 8, dtype=torch.bool)
    region[1:3, 2:6] = True # of a picture 16 times as large: rows 16 to 48, columns 32 to 96
    ax = CAMMap(torch.ones(2, 2), torch.zeros(3, 64, 128), region=region).show()
    assert np.allclose(outline(ax), [31.5, 15.5, 95.5, 47.5])
    assert (ax.get_xlim(), ax.get_ylim())==((-.5, 127.5), (63.5, -.5))
    whole = CAMMap(torch.ones(2, 2), torch.zeros(3, 64, 128), region=torch.ones(64, 128, dtype=torch.bool)).show()
    assert np.allclose(outline(whole), [-.5, -.5, 127.5, 63.5]) and whole.get_xlim()==(-.5, 127.5)


def test_region_has_a_dark_casing_under_the_white_line():
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[20:40, 20:40] = True
    dark, white = CAMMap(torch.ones(2, 2), torch.ones(3, 64, 64), region=region).show().collections
    assert np.allclose(dark.get_edgecolor()[0], to_rgba('black')) and dark.get_linewidth()[0] > white.get_linewidth()[0]
    assert len(CAMMap(torch.ones(2, 2), torch.ones(3, 64, 64), region=~region & region).show().collections)==0


def test_points_are_drawn_where_fastai_draws_them():
    points = dict(predicted=torch.tensor([[-1., -1.], [0., .5]]), actual=torch.tensor([[1., 1.]]))
    predicted, actual = CAMMap(torch.ones(2, 2), torch.zeros(3, 40, 80), points=points).show().collections
    assert predicted.get_offsets().tolist()==[[0, 0], [40, 30]] and actual.get_offsets().tolist()==[[80, 40]]
    assert (predicted.get_label(), actual.get_label())==('predicted', 'actual')
    assert not np.array_equal(predicted.get_paths()[0].vertices, actual.get_paths()[0].vertices)


@pytest.mark.parametrize('make, message', [
    (lambda: CAMMap(torch.zeros(1, 1, 2, 2)), r'not \[1, 1, 2, 2\]'),
    (lambda: CAMMap(torch.zeros(2, 2), region=torch.zeros(2, 2, 2, dtype=torch.bool)), 'has as many'),
    (lambda: CAMMap(torch.ones(2, 2)).show(boxes=3), 'boxes is True or a list'),
    (lambda: CAMMap(torch.ones(2, 2)).show(peaks='yes'), 'peaks is True or a list'),
    (lambda: CAMMap(torch.ones(2, 2)).show(slice=0), 'this map is flat'),
    (lambda: CAMMap(torch.ones(2, 2)).show_slices(), 'has no slices'),
    (lambda: CAMMap(torch.ones(2, 2, 2)).show(slice=2), 'the volume has 2, 0 to 1'),
    (lambda: CAMMap(torch.ones(2, 2, 2)).show(slice='middle'), 'index of one slice'),
    (lambda: CAMMap(torch.ones(2, 2, 2)).show(boxes=[(0, 0, 1, 1)]), 'is a volume'),
    (lambda: CAMMap(torch.ones(2, 2, 2)).peaks(), 'is a volume'),
    (lambda: CAMMap(torch.ones(2, 2, 2)).show_slices(0), 'slices=0 leaves nothing'),
    (lambda: CAMMap(torch.ones(2, 2, 2)).show_slices(2, plt.gca()), '2 slices need 2 axes'),
    (lambda: CAMMap(torch.ones(2, 2, 2), torch.zeros(5, 5)).show(), r'not \[5, 5\]'),
    (lambda: CAMMap(torch.ones(2, 2)).boxes(threshold=0), 'threshold=0'),
    (lambda: CAMMap(torch.ones(2, 2)).boxes(threshold=True), 'threshold is a share'),
    (lambda: CAMMap(torch.ones(2, 2)).boxes(split=-.1), 'split is a share from 0 to 1, not -0.1'),
    (lambda: CAMMap(torch.ones(2, 2)).boxes(size=5), 'size is'),
    (lambda: CAMMap(torch.ones(2, 2)).boxes(max_n=0), 'max_n=0'),
    (lambda: CAMMap(torch.ones(2, 2)).peaks(min_distance=3), 'min_distance is a share'),
])
def test_errors_say_what_to_do(make, message):
    with pytest.raises((ValueError, TypeError), match=message): make()


# -- volumes

def test_slices_are_enlarged_in_depth_and_comparable():
    volume = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) - .3
    cam_map = CAMMap(volume, torch.rand(1, 9, 20, 20))
    deep = F.interpolate(volume[None, None], size=(9, 4, 5), mode='trilinear', align_corners=False)[0, 0].clamp(min=0)
    drawn = [ax.images[1].get_array().data for ax in cam_map.show_slices(9)]
    assert np.allclose(np.stack(drawn), deep/deep.max(), atol=1e-6)
    strongest = int(deep.amax((1, 2)).argmax())
    assert np.allclose(cam_map.show().images[1].get_array(), deep[strongest]/deep.max(), atol=1e-6)
    assert np.allclose(cam_map.show(slice=2).images[1].get_array(), deep[2]/deep.max(), atol=1e-6)


def test_signed_volumes_find_what_speaks_against():
    volume = torch.zeros(5, 2, 2)
    volume[1, 0, 0], volume[3, 0, 0] = 1., -2.
    assert CAMMap(volume).show().get_title()=='slice 1 of 5'
    ax = CAMMap(volume).show(signed=True)
    assert ax.get_title()=='slice 3 of 5' and ax.images[0].get_array()[0, 0]==-1


def test_volume_images_in_any_layout():
    volume = torch.arange(24., dtype=torch.float32).reshape(2, 3, 4)
    assert np.allclose(to_slices(volume), volume/23)
    assert np.allclose(to_slices(volume[None]), volume/23) and np.allclose(to_slices(volume.numpy()), volume/23)
    colour = torch.rand(3, 5, 6, 7)
    assert np.array_equal(to_slices(colour)[4], colour[:, 4].permute(1, 2, 0)) and np.array_equal(to_slices(colour.permute(1, 2, 3, 0).numpy()), to_slices(colour))
    assert to_slices((colour*255).byte()).dtype==np.uint8


def test_slices_of_an_image_share_their_greys():
    image = torch.stack([torch.full((4, 4), value) for value in (.25, .5, 1.)])
    assert [ax.images[0].get_clim() for ax in CAMMap(torch.ones(1, 2, 2), image).show_slices()]==[(.25, 1.)]*3


def test_region_of_a_volume_follows_the_slice():
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[1] = True
    axs = CAMMap(torch.ones(1, 2, 2), torch.zeros(4, 8, 8), region=region).show_slices(4)
    assert [len(ax.collections) for ax in axs]==[0, 0, 2, 2]


def test_volumes_are_shown_a_row_each():
    volumes = CAMs(torch.rand(2, 2, 3, 4, 4), [torch.rand(1, 8, 10, 10), torch.rand(1, 2, 10, 10)], torch.tensor([[0, 1], [1, NOT_ASKED]]), ['one', 'two'], vocab=VOCAB, n_space=3)
    axs = volumes.show(slices=3, cmap='viridis')
    assert [ax.get_title(loc='left').split('\n')[-1] for ax in axs]==['slice 1 of 8', 'slice 4 of 8', 'slice 6 of 8']*2 + ['slice 0 of 2', 'slice 1 of 2']
    assert [axs[i].get_title(loc='left').split('\n')[0] for i in (0, 3, 6)]==['▸ cat', '▸ dog', '▸ dog']
    assert axs[0].images[1].get_cmap().name=='viridis'
    rows = axs[0].figure.axes
    assert len(rows)==9 and not rows[8].images # the shallow volume has no third slice
    assert volumes.n_questions==2 and len(volumes[1])==1 and volumes[0, 1].map.shape==(3, 4, 4) and volumes[:, 0].n_questions==1
    assert repr(volumes)=='CAMs: 2 items × 2 (one, two), maps 3×4×4'
    assert len(volumes.show(slice=0))==3 and volumes.show(slice=-1)[0].get_title(loc='left')=='\n▸ cat\nslice 7 of 8'
    given = plt.subplots(2, 4)[1]
    assert volumes.show(slices=3, ax=given)==list(given.ravel())
    with pytest.raises(ValueError, match='8 slices need 8 axes, but 3'): volumes.show(slices=3, ax=given[0, :3])
    with pytest.raises(ValueError, match='a row of its own'): volumes.show(ncols=3)
    with pytest.raises(ValueError, match='are volumes'): volumes.peaks()
    with pytest.raises(ValueError, match=r'\[n, d, h, w\] or \[n, K, d, h, w\], not \[2, 4, 4\]'): CAMs(torch.zeros(2, 4, 4), n_space=3)


# -- boxes and peaks

def test_boxes_by_hand():
    m = torch.zeros(8, 10)
    m[1:3, 2:5] = 4.; m[2, 3] = 5.; m[6, 8] = 2.5; m[7, 9] = 3.; m[0, 9] = 2.4
    assert CAMMap(m).boxes()==[Box(2, 1, 5, 3, 1., 3, 2), Box(8, 6, 10, 8, .6, 9, 7)] # 2.4 is below half of 5; the corners touch
    assert CAMMap(m).boxes(threshold=.4)[2]==Box(9, 0, 10, 1, .48, 9, 0)
    assert CAMMap(m).boxes(threshold=.9)==[Box(3, 2, 4, 3, 1., 3, 2)]
    assert CAMMap(m).boxes(min_share=2/80)==CAMMap(m).boxes() and len(CAMMap(m).boxes(min_share=3/80))==1
    assert CAMMap(m).boxes(max_n=1)==CAMMap(m).boxes()[:1]
    assert CAMMap(m*1e-30).boxes()==CAMMap(m).boxes()
    assert CAMMap(m - 100).boxes()==[] and CAMMap(m/0).boxes()==[] and CAMMap(m*0).peaks()==[]


def test_boxes_are_in_pixels_of_the_size_asked_for():
    m = torch.zeros(4, 4)
    m[1, 2] = 1.
    assert CAMMap(m).boxes(size=(8, 40))[0][:4]==CAMMap(m, torch.zeros(3, 8, 40)).boxes()[0][:4]==CAMMap(m, np.zeros((8, 40))).boxes()[0][:4]
    enlarged = F.interpolate(m[None, None], size=(8, 40), mode='bilinear', align_corners=False)[0, 0]
    rows, cols = (enlarged >= .5*enlarged.max()).nonzero().T
    assert CAMMap(m).boxes(size=(8, 40))[0][:4]==(cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
    assert all(isinstance(edge, int) for edge in CAMMap(m).boxes(size=(8, 40))[0][:4])


@pytest.mark.parametrize('other, expected', [((0, 0, 10, 10), 1.), ((5, 0, 15, 10), 50/150), ((10, 0, 20, 10), 0.), ((30, 30, 31, 31), 0.), ((2, 2, 4, 7), .1), (Box(0, 5, 10, 15), 50/150)])
def test_iou(other, expected):
    assert Box(0, 0, 10, 10).iou(other)==pytest.approx(expected)
    assert Box(*other[:4]).iou(Box(0, 0, 10, 10))==pytest.approx(expected)
    assert Box(3, 3, 3, 3).iou((3, 3, 3, 3))==0.


def parted_peaks(values, threshold, split):
    "Places of the peaks that stay apart, pixel by pixel from the highest down: exact, where ours goes in steps"
    h, w = values.shape
    group, kept = {}, {}
    def find(p):
        while group[p] != p: p = group[p]
        return p
    for flat in np.argsort(-values, axis=None, kind='stable'):
        p = divmod(int(flat), w)
        if values[p] < threshold: break
        group[p], kept[p] = p, [p]
        for q in [(p[0] + i, p[1] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
            if q not in group or find(q)==find(p): continue
            a, b = find(p), find(q)
            both = sorted(kept[a] + kept[b], key=lambda peak: values[peak])
            group[b], kept[a] = a, [peak for peak in both[:-1] if values[p] < split*values[peak]] + both[-1:]
    return sorted(peak for p in group if find(p)==p for peak in kept[p])


@pytest.mark.parametrize('seed', range(6))
def test_splitting_against_an_exact_flood(seed):
    rng = np.random.default_rng(seed)
    peaks = [(*rng.uniform(5, 35, 2), rng.uniform(.5, 1), rng.uniform(2, 5)) for _ in range(7)]
    m = bumps((40, 40), *peaks).double()
    values = (m/m.max()).numpy().round(6)
    boxes = CAMMap(m).boxes(threshold=.3, split=.75, min_share=0)
    ours = sorted((box.y, box.x) for box in boxes)
    lower, upper = parted_peaks(values, .3, .735), parted_peaks(values, .3, .765) # ours finds the dip to within a hundredth
    assert set(lower) <= set(ours) <= set(upper) and len(ours) > 1
    whole = CAMMap(m).boxes(threshold=.3, split=0, min_share=0)
    assert min(b.left for b in boxes)==min(b.left for b in whole) and max(b.bottom for b in boxes)==max(b.bottom for b in whole)


@pytest.mark.parametrize('distance, n', [(14, 1), (17, 1), (20, 1), (24, 2), (30, 2)])
def test_touching_objects_are_parted_by_the_depth_of_the_dip(distance, n):
    "The sum of two equal bumps of width 8 is 2·exp(−(distance/2)²/128) halfway between them: .92 at 20, .65 at 24"
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(96.), indexing='ij')
    bump = lambda column: torch.exp(-((x - column)**2 + (y - 32)**2)/128)
    m = bump(32) + bump(32 + distance)
    dip = 2*np.exp(-(distance/2)**2/128)/float(m.max())
    assert (dip < .75)==(n==2)
    assert len(CAMMap(m).boxes(threshold=.3))==n and len(CAMMap(m).boxes(threshold=.3, split=0))==1


def test_a_neighbour_does_not_take_what_is_not_connected_to_it():
    "Three objects: two that touch, and a thin one close to them; each box stays with its own"
    m = bumps((60, 120), (30, 30, 1., 9), (30, 52, 1., 9))
    m[2:58, 70:72] = .8 # a wall, not connected at .2: the second bump falls below that after column 68
    boxes = {box.x: box for box in CAMMap(m).boxes(threshold=.2)}
    assert len(boxes)==3 and boxes[52].right==69 # its rim is nearer to the wall than to its own middle
    wall = next(box for x, box in boxes.items() if x >= 70)
    assert wall[:4]==(70, 2, 72, 58)


def test_peaks_by_hand():
    m = torch.zeros(9, 20)
    m[2, 3], m[2, 5], m[7, 15], m[0, 19] = 10., 9., 5., 2.9
    assert CAMMap(m).peaks(min_distance=0)==[Peak(3, 2, 1.), Peak(5, 2, .9), Peak(15, 7, .5)] # .29 is below the threshold
    assert CAMMap(m).peaks(min_distance=.1)==[Peak(3, 2, 1.), Peak(5, 2, .9), Peak(15, 7, .5)] # two pixels of twenty apart: just far enough
    assert CAMMap(m).peaks(min_distance=.11)==[Peak(3, 2, 1.), Peak(15, 7, .5)]
    assert CAMMap(m).peaks(threshold=.2, max_n=2)==[Peak(3, 2, 1.), Peak(5, 2, .9)]
    assert len(CAMMap(m).peaks(threshold=.2))==4


def test_a_step_of_a_slope_is_no_peak():
    m = torch.tensor([1., 2., 2., 2., 2., 3., 1., 1., 2., 2., 0.]).repeat(3, 1)
    assert CAMMap(m).peaks(min_distance=0)==[Peak(5, 1, 1.), Peak(8, 1, round(2/3, 6))]


def test_peaks_of_an_enlarged_map_are_in_the_middle_of_their_cell():
    m = torch.zeros(7, 7)
    m[2, 4], m[6, 0] = 1., .5
    first, second = CAMMap(m).peaks(size=(70, 140))
    assert abs(first.x - (4.5*20 - .5)) <= .5 and abs(first.y - (2.5*10 - .5)) <= .5
    assert second.x < 10 and second.y >= 65 and second.score==pytest.approx(.5/(.975*.95), abs=1e-6) # in the corner cell; no pixel is on the centre of the highest one, which is reached to (1 − ½/20)·(1 − ½/10)


def test_boxes_and_peaks_of_a_batch():
    maps = torch.zeros(3, 2, 4, 4)
    maps[0, 0, 1, 1] = maps[0, 1, 2, 3] = maps[1, 0, 0, 0] = 1.
    cams = CAMs(maps, classes=torch.tensor([[0, 1], [0, NOT_ASKED], [0, 1]]))
    one, two, three = [Box(1, 1, 2, 2, 1., 1, 1)], [Box(3, 2, 4, 3, 1., 3, 2)], [Box(0, 0, 1, 1, 1., 0, 0)]
    assert cams.boxes()==[[one, two], [three], [[], []]]
    assert cams[:, 0].boxes()==[one, three, []] and cams.peaks()[0]==[[Peak(1, 1, 1.)], [Peak(3, 2, 1.)]]
    assert cams.boxes(size=(8, 8))[0][0]==cams[0, 0].boxes(size=(8, 8))
    axs = cams.show(boxes=cams.boxes(), peaks=True)
    assert [len(ax.patches) for ax in axs]==[2, 2, 2, 0, 0] # two patches a box: a line and its casing
    assert [patch.get_bbox().bounds for patch in axs[1].patches]==[(2.5, 1.5, 1., 1.)]*2
    assert [len(ax.collections) for ax in axs]==[1, 1, 1, 0, 0]


def test_boxes_of_many_items_read_each_image_once():
    read = []
    def fetch(idxs): read.extend(idxs); return [torch.zeros(3, 8, 8) for _ in idxs]
    maps = torch.zeros(100, 2, 2)
    maps[:, 0, 0] = 1.
    assert len(CAMs(maps, Images(fetch, range(100))).boxes())==100 and read==list(range(100))
    read.clear()
    CAMs(maps, Images(fetch, range(100))).peaks(size=(4, 4))
    assert read==[] # the size is known


# -- a batch

def test_every_attribute_survives_indexing():
    cams, order = everything(), [2, 0]
    some = cams[order]
    for name in ('maps', 'classes', 'preds', 'targs', 'losses', 'regions'): assert torch.equal(getattr(some, name), getattr(cams, name)[order]), name
    assert (some.items, some.texts)==(['2.png', '0.png'], ['c', 'a']) and torch.equal(some.images[0], cams.images[2])
    assert (some.labels, some.vocab, some.n_space, some.task.name, some.signed, some.thresh)==(cams.labels, VOCAB, 2, 'multi', True, .3)
    second = cams[:, 1]
    assert torch.equal(second.regions, cams.regions[:, 1]) and torch.equal(second.maps, cams.maps[:, 1]) and second.labels==['two'] and second.task.name=='multi' and second.texts==cams.texts
    assert torch.equal(cams[3, 1].region, cams.regions[3, 1]) and torch.equal(cams[3][0].region, cams.regions[3, 0])


def test_a_region_can_belong_to_all_questions():
    shared = CAMs(torch.zeros(2, 3, 4, 4), regions=torch.rand(2, 8, 8) > .5)
    assert torch.equal(shared[1, 2].region, shared.regions[1]) and torch.equal(shared[:, 1].regions, shared.regions) and torch.equal(shared[1:].regions, shared.regions[1:])


def test_several_outputs_are_sliced_item_by_item():
    cams = CAMs(torch.zeros(3, 4, 4), preds=(torch.arange(3), torch.rand(3, 2)), targs=(torch.arange(3.), torch.arange(3)), items=(torch.zeros(1), torch.ones(1), torch.ones(2)))
    some = cams[[2, 1]]
    assert some.preds[0].tolist()==[2, 1] and torch.equal(some.preds[1], cams.preds[1][[2, 1]]) and some.targs[1].tolist()==[2, 1]
    assert [len(item) for item in some.items]==[2, 1] and some[0].title==''


@pytest.mark.parametrize('kwargs, message', [
    (dict(n_space=4), 'n_space is 2'), (dict(task='regression'), "task 'regression' is not known"), (dict(thresh=2), 'thresh is a probability'),
    (dict(texts='why?'), 'one for each of the 2 items'), (dict(texts=['a']), 'one for each of the 2 items'),
    (dict(regions=torch.zeros(2, 8, 8)), r'not torch.float32 \[2, 8, 8\]'), (dict(regions=torch.zeros(3, 8, 8, dtype=torch.bool)), 'n = 2'), (dict(regions=[1, 2]), 'not a list'),
])
def test_what_makes_no_sense_is_said_at_once(kwargs, message):
    with pytest.raises(ValueError, match=message): CAMs(torch.zeros(2, 4, 4), **kwargs)


def test_a_question_that_was_not_asked_is_left_out():
    classes = torch.tensor([[0, 1, NOT_ASKED], [NOT_ASKED, 2, -1], [NOT_ASKED]*3])
    cams = CAMs(torch.rand(3, 3, 4, 4), [torch.rand(3, 8, 8) for _ in range(3)], classes, ['one', 'two', 'score'], torch.tensor([[.9, .8, .1], [.1, .2, .7], [0., 0., 0.]]), vocab=VOCAB, task='multi')
    assert [len(maps) for maps in cams]==[2, 2, 0] and all(isinstance(maps, ItemMaps) for maps in cams)
    assert torch.equal(cams[1][0].map, cams.maps[1, 1]) and torch.equal(cams[1, -1].map, cams.maps[1, 2])
    assert [ax.get_title(loc='left') for ax in cams.show()]==['cat;dog\n▸ cat 0.90', '\n▸ dog 0.80', 'car\n▸ car 0.70', '\n▸ score']
    grid = plt.gcf().axes
    assert [len(ax.images) for ax in grid]==[2, 2, 0, 0, 2, 2, 0, 0, 0] and grid[6].get_title(loc='left').strip()=='–' # nothing was predicted: the title says so
    given = plt.subplots(1, 4)[1]
    assert cams.show(ax=given)==list(given) # blanks need no axes
    with pytest.raises(ValueError, match='4 maps need 4 axes'): cams.show(ax=given[:3])
    with pytest.raises(IndexError, match='question 0 was not asked about item 1'): cams[1, 0]
    with pytest.raises(IndexError, match='question 3 is out of range'): cams[0, 3]
    with pytest.raises(ValueError, match='no question was asked about this item'): cams[2].show()
    flat = cams[:, 0]
    assert len(flat.show())==1 and flat.boxes()[1:]==[[], []] and flat[1].title=='car'


def title(task, pred, targ=None, **kwargs):
    cams = CAMs(torch.zeros(1, 2, 2), preds=None if pred is None else torch.tensor([pred]), targs=None if targ is None else torch.tensor([targ]), losses=torch.tensor([.1234]), task=task, **kwargs)
    return cams.item_title(0, loss=True), cams.legend(loss=True), cams.item_title(0)


@pytest.mark.parametrize('task, pred, targ, kwargs, expected', [
    ('', [.2, .7, .1], 2, dict(vocab=VOCAB), ('dog/car / 0.12 / 0.70', 'Prediction/Actual/Loss/Probability', 'dog/car / 0.70')),
    ('single', [.2, .7, .1], None, dict(vocab=VOCAB), ('dog / 0.12 / 0.70', 'Prediction/Loss/Probability', 'dog / 0.70')),
    ('', [.2, .7, .9], 2, dict(vocab=VOCAB), ('', '', '')),
    ('binary', [.7], 1, dict(vocab=['ham', 'spam']), ('spam/spam / 0.12 / 0.70', 'Prediction/Actual/Loss/Probability', 'spam/spam / 0.70')),
    ('binary', .1, [1.], dict(vocab=['ham', 'spam']), ('ham/spam / 0.12 / 0.90', 'Prediction/Actual/Loss/Probability', 'ham/spam / 0.90')),
    ('binary', .1, None, dict(), ('negative / 0.12 / 0.90', 'Prediction/Loss/Probability', 'negative / 0.90')),
    ('binary', .4, 0, dict(vocab=['spam'], thresh=.3), ('positive/negative / 0.12 / 0.40', 'Prediction/Actual/Loss/Probability', 'positive/negative / 0.40')),
    ('multi', [.5, .49, .9], [0, 1, 1], dict(vocab=VOCAB), ('cat;car/dog;car / 0.12', 'Prediction/Actual/Loss', 'cat;car/dog;car')),
    ('multi', [.5, .49, .9], None, dict(vocab=VOCAB, thresh=.6), ('car / 0.12', 'Prediction/Loss', 'car')),
    ('multi', [.5, .35, .9], [0., .4, 1.], dict(vocab=VOCAB, thresh=.3), ('cat;dog;car/car / 0.12', 'Prediction/Actual/Loss', 'cat;dog;car/car')), # thresh is about predictions
    ('multi', [.1, .1, .1], [0., 0., 0.], dict(vocab=VOCAB), ('–/– / 0.12', 'Prediction/Actual/Loss', '–/–')),
    ('segmentation', [[[.1, .9]]], [[[0, 1]]], dict(vocab=VOCAB), ('0.12', 'Loss', '')),
    ('values', [1234.5, -.00012345], [1., 2.], dict(), ('1230;-0.000123/1;2 / 0.123', 'Prediction/Actual/Loss', '1230;-0.000123/1;2')),
    ('values', [3.14159], 3., dict(), ('3.14/3 / 0.123', 'Prediction/Actual/Loss', '3.14/3')),
    ('values', [99949., 999999., 2., 3., 4., 5., 6.], None, dict(), ('99900;1e+06;2;3;4;+2 / 0.123', 'Prediction/Loss', '99900;1e+06;2;3;4;+2')),
    ('points', [.1, .2], [[.1, .2]], dict(), ('0.12', '● Predicted / ✚ Actual / Loss', '')),
    ('points', [.1, .2], None, dict(), ('0.12', '● Predicted / Loss', '')),
    ('values', None, [1.], dict(), ('', '', '')),
    ('', [.2, .7, .1], 2, dict(vocab=VOCAB, texts=['What is it?']), ('What is it? · dog/car / 0.12 / 0.70', 'Prediction/Actual/Loss/Probability', 'What is it? · dog/car / 0.70')),
])
def test_titles(task, pred, targ, kwargs, expected): assert title(task, pred, targ, **kwargs)==expected


def question(task, pred, c, **kwargs): return CAMs(torch.zeros(1, 2, 2), preds=torch.tensor([pred]), classes=torch.tensor([c]), task=task, **kwargs).question(0)


@pytest.mark.parametrize('task, pred, c, kwargs, expected', [
    ('multi', [.5, .49, .9], 1, dict(vocab=VOCAB), 'dog 0.49'),
    ('binary', [.7], 1, dict(vocab=['ham', 'spam']), 'spam 0.70'),
    ('binary', [.7], 0, dict(vocab=['ham', 'spam']), 'ham 0.30'),
    ('binary', .7, 0, dict(), 'negative 0.30'),
    ('segmentation', [[[.1, .9]]], 2, dict(vocab=VOCAB, labels=['predicted']), 'car'),
    ('values', [1., 2.], 1, dict(labels=['weight'], vocab=VOCAB), 'weight'),
    ('points', [.1, .2], -1, dict(labels=['gradcam: nose']), 'gradcam: nose'),
    ('multi', [.5, .49, .9], -1, dict(labels=['gradcam: score'], vocab=VOCAB), 'gradcam: score'),
    ('multi', [.5, .49, .9], 1, dict(labels=['gradcam: dog'], vocab=VOCAB), 'gradcam: dog 0.49'),
])
def test_questions(task, pred, c, kwargs, expected): assert question(task, pred, c, **kwargs)==expected


OF_TASKS = {'': ([.2, .7, .1], 2), 'single': ([.2, .7, .1], 2), 'binary': ([.4], 1), 'multi': ([.7, .2, .9], [0, 1, 1]), 'segmentation': ([[[.1, .9]]], [[[0, 1]]]),
            'values': ([1234.5, .5], [1200., .25]), 'points': ([.1, .2], [[.1, .3]])}


@pytest.mark.parametrize('task, vocab, has_label, item, item_and_loss, legend, legend_and_loss, asked, drawn', [
    ('', '', False, 'class 1 / 0.70', 'class 1 / 0.12 / 0.70', 'Prediction/Probability', 'Prediction/Loss/Probability', 'gradcam: class 0 0.20', None),
    ('', '', True, 'class 1/class 2 / 0.70', 'class 1/class 2 / 0.12 / 0.70', 'Prediction/Actual/Probability', 'Prediction/Actual/Loss/Probability', 'gradcam: class 0 0.20', None),
    ('', 'names', False, 'dog / 0.70', 'dog / 0.12 / 0.70', 'Prediction/Probability', 'Prediction/Loss/Probability', 'gradcam: cat 0.20', None),
    ('', 'names', True, 'dog/car / 0.70', 'dog/car / 0.12 / 0.70', 'Prediction/Actual/Probability', 'Prediction/Actual/Loss/Probability', 'gradcam: cat 0.20', None),
    ('single', '', False, 'class 1 / 0.70', 'class 1 / 0.12 / 0.70', 'Prediction/Probability', 'Prediction/Loss/Probability', 'gradcam: class 0 0.20', None),
    ('single', '', True, 'class 1/class 2 / 0.70', 'class 1/class 2 / 0.12 / 0.70', 'Prediction/Actual/Probability', 'Prediction/Actual/Loss/Probability', 'gradcam: class 0 0.20', None),
    ('single', 'names', False, 'dog / 0.70', 'dog / 0.12 / 0.70', 'Prediction/Probability', 'Prediction/Loss/Probability', 'gradcam: cat 0.20', None),
    ('single', 'names', True, 'dog/car / 0.70', 'dog/car / 0.12 / 0.70', 'Prediction/Actual/Probability', 'Prediction/Actual/Loss/Probability', 'gradcam: cat 0.20', None),
    ('binary', '', False, 'negative / 0.60', 'negative / 0.12 / 0.60', 'Prediction/Probability', 'Prediction/Loss/Probability', 'gradcam: negative 0.60', None),
    ('binary', '', True, 'negative/positive / 0.60', 'negative/positive / 0.12 / 0.60', 'Prediction/Actual/Probability', 'Prediction/Actual/Loss/Probability', 'gradcam: negative 0.60', None),
    ('binary', 'names', False, 'cat / 0.60', 'cat / 0.12 / 0.60', 'Prediction/Probability', 'Prediction/Loss/Probability', 'gradcam: cat 0.60', None),
    ('binary', 'names', True, 'cat/dog / 0.60', 'cat/dog / 0.12 / 0.60', 'Prediction/Actual/Probability', 'Prediction/Actual/Loss/Probability', 'gradcam: cat 0.60', None),
    ('multi', '', False, 'class 0;class 2', 'class 0;class 2 / 0.12', 'Prediction', 'Prediction/Loss', 'gradcam: class 0 0.70', None),
    ('multi', '', True, 'class 0;class 2/class 1;class 2', 'class 0;class 2/class 1;class 2 / 0.12', 'Prediction/Actual', 'Prediction/Actual/Loss', 'gradcam: class 0 0.70', None),
    ('multi', 'names', False, 'cat;car', 'cat;car / 0.12', 'Prediction', 'Prediction/Loss', 'gradcam: cat 0.70', None),
    ('multi', 'names', True, 'cat;car/dog;car', 'cat;car/dog;car / 0.12', 'Prediction/Actual', 'Prediction/Actual/Loss', 'gradcam: cat 0.70', None),
    ('segmentation', '', False, '', '0.12', '', 'Loss', 'gradcam: class 0', None),
    ('segmentation', '', True, '', '0.12', '', 'Loss', 'gradcam: class 0', None),
    ('segmentation', 'names', False, '', '0.12', '', 'Loss', 'gradcam: cat', None),
    ('segmentation', 'names', True, '', '0.12', '', 'Loss', 'gradcam: cat', None),
    ('values', '', False, '1230;0.5', '1230;0.5 / 0.123', 'Prediction', 'Prediction/Loss', 'gradcam: asked', None),
    ('values', '', True, '1230;0.5/1200;0.25', '1230;0.5/1200;0.25 / 0.123', 'Prediction/Actual', 'Prediction/Actual/Loss', 'gradcam: asked', None),
    ('values', 'names', False, '1230;0.5', '1230;0.5 / 0.123', 'Prediction', 'Prediction/Loss', 'gradcam: asked', None),
    ('values', 'names', True, '1230;0.5/1200;0.25', '1230;0.5/1200;0.25 / 0.123', 'Prediction/Actual', 'Prediction/Actual/Loss', 'gradcam: asked', None),
    ('points', '', False, '', '0.12', '● Predicted', '● Predicted / Loss', 'gradcam: asked', ['predicted']),
    ('points', '', True, '', '0.12', '● Predicted / ✚ Actual', '● Predicted / ✚ Actual / Loss', 'gradcam: asked', ['predicted', 'actual']),
    ('points', 'names', False, '', '0.12', '● Predicted', '● Predicted / Loss', 'gradcam: asked', ['predicted']),
    ('points', 'names', True, '', '0.12', '● Predicted / ✚ Actual', '● Predicted / ✚ Actual / Loss', 'gradcam: asked', ['predicted', 'actual']),
])
def test_what_each_task_says(task, vocab, has_label, item, item_and_loss, legend, legend_and_loss, asked, drawn):
    "Item, legend, question and points; by the name of the task, and by the task itself"
    pred, targ = OF_TASKS[task]
    vocab = (VOCAB[:2] if task=='binary' else VOCAB) if vocab else None
    for what in (task, TASKS[task]()):
        cams = CAMs(torch.ones(1, 2, 2), preds=torch.tensor([pred]), targs=torch.tensor([targ]) if has_label else None, losses=torch.tensor([.1234]), classes=torch.tensor([0]),
                    labels=['gradcam: asked'], vocab=vocab, task=what)
        assert (cams.item_title(0), cams.item_title(0, loss=True), cams.legend(), cams.legend(loss=True), cams.question(0))==(item, item_and_loss, legend, legend_and_loss, asked)
        assert cams.title(0)==(item if task=='binary' else f'{item} · map: {asked}' if item else asked) # 'negative' is what was predicted
        points = cams[0].points
        assert (points if points is None else list(points))==drawn and (not drawn or torch.equal(points['predicted'], torch.tensor([[.1, .2]])))


def test_the_task_says_what_the_maps_do_not():
    own = Values()
    assert CAMs(torch.zeros(1, 2, 2), task=own).task is own and CAMs(torch.zeros(1, 2, 2), task=own).signed
    some = CAMs(torch.zeros(2, 2, 2), task=own, signed=False)[1:]
    assert not some.signed and own.signed and type(some.task) is Values
    some.signed, some.thresh = True, .25
    assert some.task.signed and some.task.thresh==.25 and own.thresh==.5 # other maps may be of the same task
    some.task = 'multi'
    assert type(some.task) is TASKS['multi'] and type(some[:1].task) is TASKS['multi']
    with pytest.raises(ValueError, match="task 'x' is not known"): some.task = 'x'
    with pytest.raises(ValueError, match="task 'x' is not known: use one of '', 'single', 'binary', 'multi', 'segmentation', 'values', 'points'"): CAMs(torch.zeros(1, 2, 2), task='x')
    with pytest.raises(ValueError, match='is not known'): CAMs(torch.zeros(1, 2, 2), task=Values)


def test_maps_that_were_pickled_with_the_name_of_their_task():
    cams = CAMs(torch.zeros(1, 2, 2), task='multi', thresh=.3)
    state = {name: value for name, value in vars(cams).items() if name != '_task'} | dict(task='multi', signed=True, thresh=.3)
    old = CAMs.__new__(CAMs)
    old.__setstate__(state)
    assert (old.task.name, old.signed, old.thresh, type(old.task))==('multi', True, .3, TASKS['multi'])


def test_a_task_that_is_not_known_where_its_file_is_read(tmp_path):
    class Rank(Task):
        "A rank"
        name = 'rank'
        def answers(self, row): return [f'rank {int(row.pred.argmax())}']
    cams = CAMs(torch.ones(1, 2, 2), preds=torch.tensor([[.2, .7, .1]]), targs=torch.tensor([2]), vocab=VOCAB, task=Rank(), thresh=.25)
    file = cams.save(tmp_path/'cams.npz')
    assert cams.item_title(0)==CAMs.load(file).item_title(0)=='rank 1 / 0.70' and type(CAMs.load(file).task) is Rank
    del TASKS['rank']
    back = CAMs.load(file)
    assert (type(back.task), back.task.name, back.thresh, back.signed)==(Task, 'rank', .25, False)
    assert back.item_title(0)==CAMs(cams.maps, preds=cams.preds, targs=cams.targs, vocab=VOCAB).item_title(0)=='dog/car / 0.70'
    assert CAMs.load(back.save(tmp_path/'again.npz')).task.name=='rank'


def test_binary_map_of_the_predicted_class_needs_no_second_title():
    cams = CAMs(torch.zeros(2, 2, 2), preds=torch.tensor([[.9], [.1]]), classes=torch.tensor([1, 1]), vocab=['ham', 'spam'], task='binary')
    assert [m.title for m in cams]==['spam / 0.90', 'ham / 0.90 · map: spam 0.10']


def test_long_lists_and_long_texts_are_shortened():
    many = CAMs(torch.ones(1, 2, 2, 2), preds=torch.ones(1, 30), targs=torch.ones(1, 30), vocab=[f'label number {i}' for i in range(30)], task='multi', texts=['why ' + 'so '*100 + 'long?'])
    assert many.item_title(0).count(';+25')==2 and many.item_title(0, width=22).endswith('label number 0;+29/label number 0;+29')
    text = many.item_title(0).split(' · ')[0]
    assert len(text) <= 120 and text.endswith(' …')
    assert len(many.show()[0].get_title(loc='left').split('\n')[0]) < 120


def test_points_of_a_batch():
    preds, targs = torch.tensor([[0., 0., .5, .5], [-1., -1., 1., 1.]]), torch.zeros(2, 2, 2)
    cams = CAMs(torch.ones(2, 2, 2), [torch.zeros(3, 10, 20)]*2, preds=preds, targs=targs, labels=['nose'], task='points')
    axs = cams.show()
    assert [ax.collections[0].get_offsets().tolist() for ax in axs]==[[[10, 5], [15, 7.5]], [[0, 0], [20, 10]]] and axs[0].collections[1].get_offsets().tolist()==[[10, 5]]*2
    assert cams[:1].show()[0].figure.get_suptitle()=='● Predicted / ✚ Actual' # what the marks mean is said for a single picture too
    assert torch.equal(cams[1].points['predicted'], preds[1].reshape(2, 2))


def test_options_are_checked_before_images_are_read():
    def fetch(idxs): raise AssertionError('read')
    cams = CAMs(torch.ones(2, 2, 2), Images(fetch, range(2)))
    for wrong, message in ((dict(boxes=[[]]), '1 entries for 2'), (dict(peaks=2), 'peaks is True'), (dict(slices=0), 'slices=0'), (dict(slice=1.), 'index of one slice')):
        with pytest.raises((ValueError, TypeError), match=message): cams.show(**wrong)
    check_style(boxes=True, peaks=[], slice=3, slices=2)


# -- words from users

STRANGE = ['$0-$50', '$\\frac{$', 'a\\b_c^d $', '50% {x} %s', '_hidden', '猫と犬', 'قطة', '🐱', '\uf8ff']
EVERYTHING = '_<b>$1-$2 猫' # in one word, where figures take long


def check_drawn(fig, word, capfd):
    "Is `word` drawn, nowhere read as a formula, and nothing complained about?"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig.savefig(io.BytesIO(), dpi=20)
    holding = [text for text in fig.findobj(Text) if word in text.get_text() and text.get_visible()]
    assert holding and not any('$' in text.get_text() and text.get_parse_math() for text in holding) and not any(text.get_usetex() for text in holding)
    assert capfd.readouterr().err==''


@pytest.mark.parametrize('word', STRANGE)
def test_words_are_drawn_as_they_are(word, capfd):
    two = dict(vocab=[word, 'b'], preds=torch.tensor([[.9, .1]]), targs=torch.tensor([0]), classes=torch.tensor([0]))
    check_drawn(CAMMap(torch.ones(2, 2), title=word).show().figure, word, capfd)
    flat = CAMs(torch.ones(1, 2, 2), **two).show()
    assert flat[0].get_title()==f'{word}/{word} / 0.90'
    check_drawn(flat[0].figure, word, capfd)


def test_words_are_drawn_as_they_are_in_every_title(capfd):
    word = EVERYTHING
    two = dict(vocab=[word, 'b'], preds=torch.tensor([[.9, .1]]), targs=torch.tensor([0]), classes=torch.tensor([0]))
    several = CAMs(torch.ones(2, 2, 2), labels=[word], vocab=[word, 'b'], preds=torch.eye(2), texts=[word, None], classes=torch.tensor([1, 0])).show(title=word)
    assert several[0].get_title()==f'{word}\n{word} / 1.00\n▸ b 0.00' and several[0].figure.get_suptitle()==word
    check_drawn(several[0].figure, word, capfd)
    columns = CAMs(torch.ones(1, 2, 2, 2), labels=[word, 'b'], vocab=[word, 'b'], preds=torch.tensor([[.9, .1]]), classes=torch.tensor([[0, -1]])).show()
    assert columns[0].get_title(loc='left')==f'{word} / 0.90\n▸ {word} 0.90'
    check_drawn(columns[0].figure, word, capfd)
    assert not columns[0].title.get_parse_math()
    check_drawn(CAMs(torch.ones(1, 2, 2, 2), n_space=3, **two).show()[0].figure, word, capfd)
    check_drawn(CAMs(torch.ones(1, 1, 2, 2), **{**two, 'classes': torch.tensor([[0]])})[0].show()[0].figure, word, capfd)


def test_words_are_drawn_as_they_are_in_every_figure(capfd):
    word = EVERYTHING
    maps = torch.rand(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    for how in ('cascading', 'independent'):
        check = SanityCheck({word: maps}, {word: 1.}, how)
        axs = check.plot()
        assert [text.get_text() for text in axs[-1].get_legend().get_texts()]==[word]
        check_drawn(axs[0].figure, word, capfd)
        check_drawn(check.show()[0].figure, word, capfd)
        assert check._repr_html_().count('mathjax_ignore')==1 and '<b>' not in check._repr_html_()
    columns = {'score_$a$': [1., 2.], 'score_$a$_low': [.5, 1.], 'score_$a$_high': [1.5, 3.]}
    table = CAMTable({'method': [word, 'gradcam'], 'layer': ['', ''], **columns})
    table.metrics = {'score_$a$': True}
    check_drawn(table.plot(), word, capfd)
    numbers = dict(score=.9, drop=.5, drop_elsewhere=.1, random_drops=[.1, .2], n_random=2, n_beaten=2, chance_p=.05, faithfulness=.4, baselines=dict(edge_map=.1), randomized_similarity=.1)
    trust = CAMTrust(CAMMap(torch.ones(2, 2), title=word), word, numbers, .2)
    check_drawn(trust.show(), word, capfd)
    assert 'mathjax_ignore' in trust._repr_html_() and '<b>' not in trust._repr_html_()
    measured = Measurement('mean', .9, (.8, 1.), .1, .9, (.5, .4, .6))
    found = Shortcut(word, 'place', 'top', [0], 3, 1, measured, torch.ones(8, 8) > 0, None, (torch.rand(3, 8, 8), torch.rand(3, 8, 8)))
    shortcuts = Shortcuts([found], {word: 3}, [torch.rand(3, 8, 8)], torch.rand(1, 4, 4))
    check_drawn(shortcuts.plot(n=1), word, capfd)
    assert 'mathjax_ignore' in shortcuts._repr_html_() and '<b>' not in shortcuts._repr_html_()


@pytest.mark.parametrize('name, drawn', [
    ('two\nlines\tand a tab', 'two lines and a tab'), ('', "''"), ('  ', "'  '"), (b'caf\xc3\xa9 $5', 'café $5'), (7, '7'), (2.5, '2.5'),
    (None, 'None'), (np.str_('np'), 'np'),
    ('nul\x00l', 'nul\ufffdl'), ('\udcff.png', '\ufffd.png'), ('\u202eabc', '\ufffdabc'), ('y'*300, 'y'*199 + '…'),
    ('Alien: Romulus', 'Alien: Romulus'),
])
def test_names_that_are_no_line_of_text(name, drawn):
    cams = CAMs(torch.ones(1, 1, 2, 2), vocab=[name, 'b'], preds=torch.tensor([[.75, .25]]), classes=torch.tensor([[0]]), labels=[str(name)])
    assert cams.item_title(0)==f'{drawn} / 0.75' and cams.question(0)==f'{drawn} 0.75'
    ax = cams.show()[0]
    assert ''.join(ax.get_title().split())==''.join(f'{drawn}/0.75'.split())
    ax.figure.savefig(io.BytesIO())


def test_a_method_before_a_name_with_a_colon():
    cams = CAMs(torch.ones(1, 2, 2, 2), vocab=['Alien: Romulus', 'b'], preds=torch.tensor([[.75, .25]]), classes=torch.tensor([[0, 0]]), labels=['layercam: Alien: Romulus', 'gradcam: predicted'])
    assert [cams.question(0, k) for k in (0, 1)]==['layercam: Alien: Romulus 0.75', 'gradcam: Alien: Romulus 0.75']


def test_a_class_that_the_vocab_does_not_have_is_called_by_its_number():
    assert CAMs(torch.ones(1, 2, 2), preds=torch.tensor([[.1, .9]]), targs=torch.tensor([7]), classes=torch.tensor([7]), vocab=['a', 'b'])[0].title=='b/class 7 / 0.90 · map: class 7'


def test_letters_come_from_a_font_that_has_them():
    "Computer Modern has no Cyrillic; DejaVu, which comes with matplotlib, has; the font asked for comes first"
    text = plt.figure().text(0, 0, 'aж', fontfamily='cmr10')
    plain_text(text)
    assert text.get_fontfamily()[0]=='cmr10' and len(text.get_fontfamily())==2 and text.get_fontfamily()[1] != 'Last Resort High-Efficiency' and text.get_text()=='aж'
    ordinary = plt.figure().text(0, 0, 'ordinary ä')
    before = ordinary.get_fontfamily()
    plain_text(ordinary)
    assert ordinary.get_fontfamily()==before


def test_a_formula_that_is_written_later_is_one():
    ax = CAMMap(torch.ones(2, 2), title='cat').show()
    assert ax.set_title('$x^2$').get_parse_math()


def test_words_are_drawn_without_tex():
    with plt.rc_context({'text.usetex': True}): axs = CAMs(torch.ones(2, 2, 2), vocab=['a_b', '50%'], preds=torch.eye(2), targs=torch.arange(2)).show()
    assert not any(text.get_usetex() for text in [*(ax.title for ax in axs), axs[0].figure._suptitle])


def test_the_maps_of_an_item_are_saved_together(tmp_path):
    ItemMaps([CAMMap(torch.ones(2, 2)), CAMMap(torch.ones(2, 2))]).show(save=tmp_path/'two.png')
    width, height = Image.open(tmp_path/'two.png').size
    assert width > 1.5*height
    with pytest.raises(ValueError, match='saved as .xyz'): ItemMaps([CAMMap(torch.ones(2, 2))]).show(save='a.xyz')


def test_legends_have_every_name():
    lines = plt.plot([0, 1], [[0, 1, 2], [1, 2, 3]])
    assert [text.get_text() for text in plain_legend(plt.gca(), lines, ['_mine', '$a$', '']).get_texts()]==['_mine', '$a$', "''"]


def test_html_shows_text_as_it_is():
    assert plain_html('a < b & $c$\nd', '<table>')=='<div class="tex2jax_ignore mathjax_ignore"><p>a &lt; b &amp; $c$<br>d</p><table></div>'


# -- maps that are none

@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('signed', [False, True])
def test_a_map_that_is_not_finite_is_said_and_not_drawn(value, signed):
    bad = torch.ones(3, 3)
    bad[1, 1] = value
    one = CAMMap(bad, torch.rand(3, 9, 9), 'cat')
    with pytest.warns(UserWarning, match='not finite .*: cat; look for NaN in the weights'): ax = one.show(signed=signed, boxes=True, peaks=True)
    assert len(ax.images)==1 and ax.get_title()=='cat · not finite' and ax.texts[0].get_text()=='map is not finite (NaN or inf)' and not ax.patches
    for find in (one.boxes, one.peaks):
        with pytest.warns(UserWarning, match='not finite'): assert find()==[]
    assert repr(one)=='CAMMap 3×3 «cat» (not finite)' and not one.is_finite
    assert normalize(torch.stack([bad, torch.ones(3, 3)]), signed).isnan().flatten(1).all(1).tolist()==[True, False]
    assert normalize(torch.stack([bad, torch.ones(3, 3)])[None], signed, 3).isnan().all()


def test_one_bad_map_among_many(recwarn):
    maps = torch.rand(4, 3, 3) + .1
    maps[1, 0, 0], maps[3] = float('nan'), float('inf')
    cams = CAMs(maps, [torch.rand(3, 9, 9)]*4, items=['a.png', Path('far/b.png'), 'c.png', torch.zeros(3)])
    axs = cams.show()
    assert [len(ax.images) for ax in axs]==[2, 1, 2, 1] and [ax.get_title() for ax in axs]==['', 'not finite', '', 'not finite']
    assert [str(w.message).split('; ')[0] for w in recwarn if w.category is UserWarning]==['not finite (NaN or infinite values in the map or its score), so neither drawn nor searched: item 1 (b.png), item 3']
    recwarn.clear()
    for find in (cams.boxes, cams.peaks):
        with pytest.warns(UserWarning, match=r'item 1 \(b.png\), item 3;') as said: assert [len(found) > 0 for found in find()]==[True, False, True, False]
        assert len(said)==1
    assert cams.is_finite.tolist()==[True, False, True, False] and repr(cams)=='CAMs: 4 items, maps 3×3, 2 not finite'
    recwarn.clear()
    assert len(cams[[0, 2]].show())==2 and cams[0].show() and not [w for w in recwarn if 'not finite' in str(w.message)]


def test_volumes_and_questions_that_are_not_finite(recwarn, tmp_path):
    maps = torch.rand(2, 2, 2, 3, 3)
    maps[0, 1, 1, 1, 1] = float('nan')
    maps[1, 1] = float('nan') # not asked: nothing is missing
    cams = CAMs(maps, [torch.rand(1, 2, 9, 9)]*2, torch.tensor([[0, 1], [1, NOT_ASKED]]), n_space=3, vocab=VOCAB)
    assert cams.is_finite.tolist()==[[True, False], [True, True]]
    axs = cams.show()
    assert [ax.get_title(loc='left').split('\n')[-1] for ax in axs]==['slice 0 of 2', 'slice 1 of 2', 'slice 0 of 2 · not finite', 'slice 1 of 2 · not finite', 'slice 0 of 2', 'slice 1 of 2']
    assert [len(ax.images) for ax in axs]==[2, 2, 1, 1, 2, 2] and len([w for w in recwarn if 'item 0;' in str(w.message)])==1
    with pytest.warns(UserWarning, match='not finite'): cams[0, 1].show_slices()
    with pytest.warns(UserWarning, match='saved as they are: item 0'): cams.save(tmp_path/'cams.npz')


@pytest.mark.parametrize('task, preds', [('single', [[float('nan')]*3]), ('multi', [[.9, float('nan'), .1]]), ('binary', [[float('nan')]]), ('', [[float('inf'), 0., 0.]]), ('points', [[float('nan'), 0.]])])
def test_an_output_that_is_not_finite_names_no_class(task, preds):
    cams = CAMs(torch.ones(1, 2, 2), preds=torch.tensor(preds), targs=None if task=='points' else torch.tensor([1]), losses=torch.tensor([.5]), vocab=VOCAB[:len(preds[0])], task=task)
    assert cams.item_title(0, loss=True).startswith('output not finite') and 'cat' not in cams.item_title(0) and 'output not finite' in cams.show()[0].get_title()


@pytest.mark.parametrize('preds, classes, finite', [
    ([[float('nan'), .5], [.1, .9]], [0, 1], [False, True]), ([[float('nan'), .5], [.1, .9]], [1, 0], [True, True]), ([[float('nan')]*2, [.1, .9]], [-1, -1], [False, True]),
    ([[float('inf'), 0.], [.1, .9]], [-1, 0], [True, True]), ([[float('nan')], [.5]], [1, 1], [False, True]), ([float('nan'), .5], [0, 0], [False, True]), ([[float('nan')]*2, [.1, .9]], None, [False, True]),
])
@pytest.mark.parametrize('single', [True, False])
def test_a_map_of_a_score_that_is_not_finite_is_none(preds, classes, finite, single, recwarn):
    "The map itself may be: a ReLU that was off lets zeros through for NaN"
    maps = torch.rand(2, 3, 3) + .1
    classes = None if classes is None else torch.tensor(classes)
    cams = CAMs(maps if single else maps[:, None].repeat(1, 2, 1, 1), [torch.rand(3, 9, 9)]*2, classes if single or classes is None else classes[:, None].repeat(1, 2), preds=torch.tensor(preds))
    assert cams.is_finite.tolist()==(finite if single else [[one]*2 for one in finite])
    drawn = [len(ax.images)==2 for ax in cams.show()]
    assert drawn==(finite if single else np.repeat(finite, 2).tolist()) and torch.equal(cams.maps[:, 0] if not single else cams.maps, maps)
    assert any('not finite' in str(w.message) for w in recwarn)==(not all(finite))


def test_the_legend_is_of_an_item_whose_output_is_finite():
    cams = CAMs(torch.ones(2, 2, 2), preds=torch.tensor([[float('nan')]*2, [.1, .9]]), targs=torch.tensor([1, 1]), vocab=VOCAB[:2])
    assert cams.legend()=='Prediction/Actual/Probability' and [m.title for m in cams]==['output not finite', 'dog/dog / 0.90']


def test_pictures_with_values_that_are_no_numbers():
    picture = torch.tensor([[0., float('nan')], [2., float('inf')]])
    assert to_pixels(picture).tolist()==[[0., 0.], [1., 0.]] and to_pixels(picture*float('nan')).tolist()==[[0., 0.], [0., 0.]]


# -- maps of one row or column

@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic'])
@pytest.mark.parametrize('upright', [False, True])
def test_a_map_of_one_row_covers_the_picture(interpolation, upright):
    m = torch.zeros(1, 8)
    m[0, 2], m[0, 6] = 1., .6
    m, picture = (m.T, torch.zeros(3, 80, 20)) if upright else (m, torch.zeros(3, 20, 80))
    fig = plt.figure(figsize=(2, 8) if upright else (8, 2), dpi=50)
    ax = fig.add_axes([0, 0, 1, 1])
    cam_map = CAMMap(m, picture)
    cam_map.show(ax=ax, interpolation=interpolation, alpha=1, title='')
    fig.canvas.draw()
    light = np.asarray(fig.canvas.buffer_rgba())[..., :3].sum(-1).astype(int)
    light = light.T if upright else light
    assert np.abs(light - light[:1]).max() <= 9 and light[0].reshape(8, 50).mean(1).argmax()==2 # alike from top to bottom
    cells = light[0].reshape(8, 50)
    assert max(cells[4].max(), cells[0, :20].max()) <= (60 if interpolation=="bicubic" else 0) # nothing where the map is zero
    if interpolation=='nearest': assert (cells==cells[:, :1]).all()
    first, second = cam_map.boxes()
    low, high = (1, 3) if upright else (0, 2)
    assert (first[low], first[high])==(20, 30) and (first[1-low], first[5-high-low])==(0, 20)
    peak, = cam_map.peaks(max_n=1)
    place = peak.y if upright else peak.x
    assert abs(place - 24.5) <= .5 and len(cam_map.peaks())==2
    assert second.score==pytest.approx(.6, abs=.02)


def test_a_map_of_one_row_without_a_picture():
    ax = CAMMap(torch.tensor([[0., 1., .5]])).show(interpolation='nearest')
    assert ax.images[0].get_extent()==[-.5, 2.5, .5, -.5] and ax.images[0].get_array().tolist()==[[0., 1., .5]]
    assert CAMMap(torch.tensor([[0., 1., .2]])).boxes()==[Box(1, 0, 2, 1, 1., 1, 0)]


# -- frames

def frames(n, c=3): return torch.stack([torch.full((c, 6, 5), (i + 1)/n) for i in range(n)])*torch.tensor([1., .5, .25, .75])[:c, None, None]


def test_frames_are_shown_as_frames():
    "The picture of each panel is a frame in its colours, and the map over it is its own"
    stack, maps = frames(8), torch.arange(8.)[:, None, None].expand(8, 2, 2)
    axs = CAMMap(maps, stack).show_slices(8)
    for i, ax in enumerate(axs):
        assert np.allclose(ax.images[0].get_array(), stack[i].permute(1, 2, 0))
        assert i==0 or np.allclose(ax.images[-1].get_array(), i/7)
    assert [ax.get_title(loc='left') for ax in axs]==[f'slice {i} of 8' for i in range(8)]
    cams = CAMs(maps[None].repeat(2, 1, 1, 1), [stack, stack.flip(0)], n_space=3)
    assert np.allclose(cams.show(slices=8)[8].images[0].get_array(), stack[7].permute(1, 2, 0))


@pytest.mark.parametrize('depth, n, c, is_frames', [
    (8, 8, 3, True), (2, 8, 3, True), (3, 8, 3, False), (4, 4, 3, True), (3, 4, 3, False), (2, 2, 3, True), (3, 2, 3, False),
    (16, 16, 1, True), (1, 16, 1, True), (16, 16, 4, True), (4, 16, 4, False),
    (3, 3, 3, False), (2, 3, 4, False), (3, 3, 4, True),
])
def test_what_tells_frames_from_channels(depth, n, c, is_frames):
    "`[n, c, H, W]`: n frames, or c slices of n channels"
    assert len(to_slices(frames(n, c), depth))==(n if is_frames else c)


def test_frames_in_other_containers():
    stack = frames(5)
    expected = to_slices(stack)
    assert expected.shape==(5, 6, 5, 3) and np.array_equal(to_slices(stack.movedim(1, 0)), expected) and np.array_equal(to_slices(stack.numpy()), expected)
    assert np.array_equal(to_slices(stack.permute(0, 2, 3, 1).numpy()), expected) and np.array_equal(to_slices(list(stack)), expected)
    pictures = [Image.fromarray(np.uint8(frame.permute(1, 2, 0)*255)) for frame in stack]
    assert np.allclose(to_slices(pictures)/255, expected, atol=1/255)
    with pytest.raises(ValueError, match=r'a picture is \[C, H, W\] or \[H, W\], not \[5, 3, 6, 5\]'): CAMMap(torch.ones(2, 2), stack).show()


def test_frames_are_saved_as_frames(tmp_path):
    back = CAMs.load(CAMs(torch.ones(1, 4, 2, 2), [frames(4)], n_space=3).save(tmp_path/'cams.npz', images=True))
    assert back[0].image.shape==(4, 6, 5, 3)


# -- files

def same(a, b):
    for name in ('maps', 'classes', 'preds', 'targs', 'losses', 'regions'):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None)==(right is None), name
        if left is not None: assert left.dtype==right.dtype and left.shape==right.shape and torch.equal(left, right), name
    for name in ('labels', 'items', 'vocab', 'texts', 'n_space', 'signed', 'thresh'): assert getattr(a, name)==getattr(b, name), name
    assert (type(a.task), a.task.name)==(type(b.task), b.task.name)


def test_round_trip_of_everything(tmp_path):
    cams = everything()
    assert cams.save(tmp_path/'cams.npz')==tmp_path/'cams.npz'
    same(CAMs.load(tmp_path/'cams.npz'), cams)
    assert CAMs.load(str(tmp_path/'cams.npz')).images is None
    back = CAMs.load(tmp_path/'cams.npz', images=cams.images)
    assert [m.title for maps in back for m in maps]==[m.title for maps in cams for m in maps] and len(back.show(max_n=2))==4


def test_round_trip_of_almost_nothing(tmp_path):
    for cams in (CAMs(torch.zeros(0, 7, 7)), CAMs(torch.rand(1, 2, 3, 4, 5), n_space=3)):
        cams.save(tmp_path/'cams.npz')
        same(CAMs.load(tmp_path/'cams.npz'), cams)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip_is_exact(dtype, tmp_path):
    maps = torch.tensor([[[1/3, -1e-5, float('inf')], [-0., 2., float('nan')]]]).to(dtype).requires_grad_().transpose(1, 2)
    CAMs(maps, classes=torch.tensor([NOT_ASKED], dtype=torch.int32)).save(tmp_path/'cams.npz')
    back = CAMs.load(tmp_path/'cams.npz')
    assert back.maps.dtype==dtype and back.maps.shape==(1, 3, 2) and torch.equal(back.maps.nan_to_num(7), maps.nan_to_num(7)) and torch.equal(back.maps.signbit(), maps.signbit())
    assert back.classes.dtype==torch.int32 and not back.maps.requires_grad


def test_names_that_are_no_text(tmp_path):
    cams = CAMs(torch.zeros(3, 2, 2), items=[tmp_path/'a.png', 7, torch.zeros(3, 4, 4)], vocab=[1, True, np.str_('c'), None], labels=['ü'])
    odd = CAMs(torch.zeros(2, 2, 2), items=torch.arange(2), vocab=np.array(['a', 'b']), labels=(b'caf\xc3\xa9',), signed=1)
    odd = CAMs.load(odd.save(tmp_path/'odd.npz'))
    assert (odd.items, odd.vocab, odd.labels, odd.signed)==(['0', '1'], ['a', 'b'], ['café'], True)
    back = CAMs.load(cams.save(tmp_path/'cams.npz'))
    assert back.items==[str(tmp_path/'a.png'), '7', 'tensor [3, 4, 4]'] and back.vocab==[1, True, 'c', None] and back.labels==['ü']


def test_images_are_kept_as_bytes_if_asked(tmp_path):
    images = [torch.rand(3, 8, 9), (torch.rand(6, 7)*255).byte(), np.uint8(np.random.rand(4, 5, 3)*255)]
    back = CAMs.load(CAMs(torch.ones(3, 2, 2), images).save(tmp_path/'cams.npz', images=True))
    assert np.array_equal(back[0].image, (images[0]*255).round().byte().permute(1, 2, 0)) and np.array_equal(back[1].image, images[1]) and np.array_equal(back[2].image, images[2])
    assert len(back.show())==3 and len(back[[2]].images)==1
    volumes = [torch.rand(1, 4, 6, 6), torch.rand(3, 4, 6, 6)]
    back = CAMs.load(CAMs(torch.ones(2, 2, 2, 2), volumes, n_space=3).save(tmp_path/'cams.npz', images=True))
    assert np.array_equal(to_slices(back[1].image), (to_slices(volumes[1])*255).round().astype(np.uint8)) and back[0].image.shape==(4, 6, 6)


def test_nothing_in_the_file_is_pickled(tmp_path):
    everything().save(tmp_path/'cams.npz', images=True)
    with np.load(tmp_path/'cams.npz', allow_pickle=False) as found: assert all(found[name].dtype != object for name in found.files) and json.loads(str(found['header']))['format']==1


def test_a_half_written_file_replaces_nothing(tmp_path, monkeypatch):
    cams = everything()
    file = cams.save(tmp_path/'cams.npz')
    def breaks(out, **arrays): out.write(b'half'); raise OSError('the disk is full')
    monkeypatch.setattr(np, 'savez_compressed', breaks)
    with pytest.raises(OSError, match='the disk is full'): cams[:1].save(file)
    same(CAMs.load(file), cams)
    assert [f.name for f in tmp_path.iterdir()]==['cams.npz']


def test_a_file_is_replaced_whole(tmp_path):
    "Who has the old file open still reads the old one, from its beginning to its end"
    cams, file = everything(), tmp_path/'cams.npz'
    before = cams.save(file).read_bytes()
    with open(file, 'rb') as opened:
        cams[:1].save(file)
        assert opened.read()==before and file.read_bytes() != before


def test_a_damaged_byte_is_no_riddle(tmp_path):
    "Wherever a byte is wrong, the error names the file (or the byte did not matter)"
    cams, file = everything(2), tmp_path/'cams.npz'
    whole = cams.save(file).read_bytes()
    refused = 0
    for place in range(0, len(whole), 13):
        file.write_bytes(whole[:place] + bytes([whole[place]^255]) + whole[place+1:])
        try: CAMs.load(file)
        except ValueError as e:
            assert 'cams.npz' in str(e) and 'CAMs.save' in str(e)
            refused += 1
    assert refused > len(whole)/13/2


def test_wrong_files_are_named(tmp_path):
    cams, file = everything(), tmp_path/'cams.npz'
    with pytest.raises(FileNotFoundError, match='there is no file'): CAMs.load(file)
    with pytest.raises(FileNotFoundError, match='there is no folder .*make it first'): cams.save(tmp_path/'no'/'cams.npz')
    with pytest.raises(ValueError, match='is a folder'): cams.save(tmp_path)
    whole = cams.save(file).read_bytes()
    damaged = bytearray(whole)
    damaged[200:400] = bytes(200)
    np.save(tmp_path/'array.npy', np.zeros(3))
    np.savez(tmp_path/'other.npz', maps=np.zeros(3))
    pickled = pickle.dumps(cams.maps)
    for name, content in {'cut.npz': whole[:len(whole)//2], 'damaged.npz': bytes(damaged), 'empty.npz': b'', 'text.npz': b'hello', 'pickled.npz': pickled, 'array.npy': None, 'other.npz': None}.items():
        if content is not None: (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name}.* is not a file that CAMs.save wrote'): CAMs.load(tmp_path/name)
    with pytest.raises(ValueError, match='3 images do not fit the 4 items'): CAMs.load(file, images=[None]*3)
    with pytest.raises(ValueError, match='no images to save'): CAMs.load(file).save(file, images=True)
    cams.preds = (cams.preds, cams.preds)
    with pytest.raises(TypeError, match='set cams.preds = None first'): cams.save(file)


def test_a_newer_format_is_refused(tmp_path):
    everything().save(tmp_path/'cams.npz')
    with np.load(tmp_path/'cams.npz') as found: arrays = {name: found[name] for name in found.files}
    arrays['header'] = np.array(json.dumps({**json.loads(str(arrays['header'])), 'format': 99}))
    np.savez(tmp_path/'new.npz', **arrays)
    with pytest.raises(ValueError, match='has format 99, and this version of fastai_cam reads up to 1: update fastai_cam'): CAMs.load(tmp_path/'new.npz')


def test_pickle_keeps_what_is_held_and_leaves_what_must_be_read():
    cams = everything()
    back = pickle.loads(pickle.dumps(cams[[3, 1]]))
    same(back, cams[[3, 1]])
    assert torch.equal(back.images[0], cams.images[3]) and len(back.images)==2 and len(back.show(max_n=1))==2
    def fetch(idxs): raise AssertionError('read')
    needed = CAMs(cams.maps, Images(fetch, range(4)), items=cams.items)
    back = pickle.loads(pickle.dumps(needed))
    assert back.images is None and torch.equal(back.maps, cams.maps) and back[0][0].image is None
    assert torch.equal(pickle.loads(pickle.dumps(cams[0, 1])).map, cams.maps[0, 1])


def test_copies_keep_their_images():
    needed = CAMs(torch.zeros(2, 2, 2), Images(lambda idxs: [torch.full((3, 4, 4), float(i)) for i in idxs], range(2)))
    for same_again in (copy.copy(needed), copy.deepcopy(needed)): assert same_again[1].image.max()==1
    assert copy.copy(needed.images)[1].max()==1 and pickle.loads(pickle.dumps(needed.images)) is None


# -- what stays as it was when a file is replaced

def write_maps(file): everything().save(file)
def write_figure(file): CAMMap(torch.ones(2, 2)).show(save=file)
def names(folder): return sorted(f.name for f in folder.iterdir())


@pytest.fixture(params=['files without a name', 'named files', 'no links'])
def any_system(request, monkeypatch):
    "Systems that know files without a name, and others"
    def refuses(*args, src_dir_fd=None, **kwargs):
        if src_dir_fd is not None: raise PermissionError(errno.EPERM, 'no links here')
        return link(*args, **kwargs)
    link = os.link
    if request.param=='named files': monkeypatch.delattr(os, 'O_TMPFILE', raising=False)
    if request.param=='no links': monkeypatch.setattr(os, 'link', refuses)


@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_permissions_and_links_are_kept(write, tmp_path, any_system):
    for name, mode in (('a.png', 0o600), ('b.png', 0o664), ('c.png', 0o755)):
        (tmp_path/name).write_bytes(b'old')
        (tmp_path/name).chmod(mode)
        write(tmp_path/name)
        assert stat.S_IMODE((tmp_path/name).stat().st_mode)==mode and (tmp_path/name).stat().st_size > 500
    (tmp_path/'far').mkdir()
    for link, target in (('link.png', tmp_path/'a.png'), ('relative.png', Path('far/new.png')), ('chain.png', Path('relative.png'))):
        (tmp_path/link).symlink_to(target)
        write(tmp_path/link)
        assert (tmp_path/link).is_symlink() and os.readlink(tmp_path/link)==str(target) and (tmp_path/target).stat().st_size > 500
    os.link(tmp_path/'b.png', tmp_path/'other name.png')
    (tmp_path/'b.png').write_bytes(b'old'*10000)
    write(tmp_path/'b.png')
    assert (tmp_path/'b.png').samefile(tmp_path/'other name.png') and (tmp_path/'b.png').stat().st_nlink==2
    assert 500 < (tmp_path/'b.png').stat().st_size < 30000
    assert names(tmp_path)==['a.png', 'b.png', 'c.png', 'chain.png', 'far', 'link.png', 'other name.png', 'relative.png'] and names(tmp_path/'far')==['new.png']


def test_what_was_written_into_a_file_of_two_names_is_read(tmp_path):
    cams = everything()
    (tmp_path/'a.npz').write_bytes(b'old'*100000)
    os.link(tmp_path/'a.npz', tmp_path/'b.npz')
    cams.save(tmp_path/'a.npz')
    same(CAMs.load(tmp_path/'b.npz'), cams)


def test_a_new_file_has_the_permissions_of_new_files(tmp_path, any_system):
    before = os.umask(0o027)
    try: write_maps(tmp_path/'a.npz')
    finally: os.umask(before)
    assert stat.S_IMODE((tmp_path/'a.npz').stat().st_mode)==0o640


@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_pipes_and_devices_are_written_to(write, tmp_path, monkeypatch):
    os.mkfifo(tmp_path/'pipe')
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path/'pipe').read_bytes()))
    reader.start()
    write(tmp_path/'pipe')
    reader.join(20)
    assert (tmp_path/'pipe').is_fifo() and got[0][:4] in (b'PK\x03\x04', b'\x89PNG') and names(tmp_path)==['pipe']
    write(Path('/dev/null'))
    assert Path('/dev/null').is_char_device()
    if Path('/dev/full').exists():
        with pytest.raises(OSError, match='No space left'): write(Path('/dev/full'))
    monkeypatch.setattr('fastai_cam.files._pour.__defaults__', (0,))
    with pytest.raises(OSError, match='nobody reads from the pipe .*start its reader first'): write(tmp_path/'pipe')


@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_what_cannot_be_written_is_said(write, tmp_path, any_system):
    (tmp_path/'kept.png').write_bytes(b'old')
    (tmp_path/'kept.png').chmod(0o444)
    with pytest.raises(PermissionError, match='kept.png.* may only be read'): write(tmp_path/'kept.png')
    assert (tmp_path/'kept.png').read_bytes()==b'old'
    (tmp_path/'lost.png').symlink_to(tmp_path/'no'/'where.png')
    with pytest.raises(FileNotFoundError, match='a link into a folder that does not exist'): write(tmp_path/'lost.png')
    for folder in (tmp_path, f'{tmp_path}/new/', str(tmp_path/'kept.png'/'a.png')):
        with pytest.raises((ValueError, FileNotFoundError), match='folder'): write(folder)
    with pytest.raises(ValueError, match='home folder .* not known'): write('~nobody-of-that-name/a.png')
    for wrong in (3, b'a.png', [tmp_path]):
        with pytest.raises(TypeError, match='not'): write(wrong)
    assert names(tmp_path)==['kept.png', 'lost.png']


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch, any_system):
    def fails(error):
        def write(out, *args, **kwargs): out.write(b'half'); raise error
        monkeypatch.setattr(np, 'savez_compressed', write)
        monkeypatch.setattr(plt.Figure, 'savefig', lambda self, out, **kwargs: write(out))
        for write_one in (write_maps, write_figure):
            for name in ('new.png', 'old.png', 'two.png'):
                with pytest.raises(type(error)): write_one(tmp_path/name)
    for name in ('old.png', 'two.png'): (tmp_path/name).write_bytes(b'old')
    os.link(tmp_path/'two.png', tmp_path/'twin.png')
    for error in (OSError(errno.ENOSPC, 'full'), KeyboardInterrupt(), MemoryError()): fails(error)
    assert names(tmp_path)==['old.png', 'twin.png', 'two.png'] and {f.read_bytes() for f in tmp_path.iterdir()}=={b'old'}


def test_a_full_disk_costs_nothing_that_was_there(tmp_path, monkeypatch):
    "The file has two names, so it is overwritten, once there is room for all of it"
    (tmp_path/'a.npz').write_bytes(b'old')
    os.link(tmp_path/'a.npz', tmp_path/'b.npz')
    def full(descriptor, start, length): os.ftruncate(descriptor, 100); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    with pytest.raises(OSError, match='No space left'): write_maps(tmp_path/'a.npz')
    assert (tmp_path/'b.npz').read_bytes()==b'old'


def test_long_names_and_strange_names(tmp_path, any_system):
    for name in ('n'*251 + '.png', '猫'*80 + '.png', '$a$ 50%.png', '.hidden.png'):
        for write in (write_maps, write_figure): write(tmp_path/name)
        assert names(tmp_path)==[name] and (tmp_path/name).unlink() is None


@pytest.mark.parametrize('is_named', [False, True])
def test_a_killed_process_leaves_nothing_unfinished(is_named, tmp_path, monkeypatch):
    "Where files need no name, what was not finished vanishes; elsewhere its name says what it is, and the next save is not disturbed"
    if is_named: monkeypatch.delattr(os, 'O_TMPFILE', raising=False)
    elif not hasattr(os, 'O_TMPFILE'): pytest.skip('this system has no files without a name')
    cams, (reader, writer) = everything(), os.pipe()
    child = os.fork()
    if child==0:
        def slow(out, **arrays): out.write(b'half'*10000); out.flush(); os.write(writer, b'!'); signal.pause()
        np.savez_compressed = slow
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try: cams.save(tmp_path/'cams.npz')
        finally: os._exit(1)
    assert os.read(reader, 1)==b'!'
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1])==signal.SIGTERM
    left = names(tmp_path)
    assert len(left)==1 and left[0].startswith('.cams.npz.') and left[0].endswith('.unfinished') if is_named else left==[]
    cams.save(tmp_path/'cams.npz')
    same(CAMs.load(tmp_path/'cams.npz'), cams)
    assert names(tmp_path)==left + ['cams.npz']


# -- figures in files

def test_endings_of_figures(tmp_path):
    for name, begin in (('a.png', b'\x89PNG'), ('A.PNG', b'\x89PNG'), ('b.pdf', b'%PDF'), ('c.svg', b'<?xml'), ('d.jpg', b'\xff\xd8'), ('e.svgz', b'\x1f\x8b')):
        CAMMap(torch.ones(2, 2)).show(save=str(tmp_path/name))
        assert (tmp_path/name).read_bytes().startswith(begin), name
    CAMMap(torch.ones(2, 2)).show(save=tmp_path/'none')
    assert (tmp_path/'none.png').read_bytes().startswith(b'\x89PNG') and not (tmp_path/'none').exists()
    out = io.BytesIO()
    CAMs(torch.ones(1, 2, 2)).show(save=out)
    assert out.getvalue().startswith(b'\x89PNG')
    with open(tmp_path/'opened', 'wb') as opened: CAMMap(torch.ones(2, 2, 2)).show_slices(save=opened)
    assert (tmp_path/'opened').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('wrong, message', [
    ('map.xyz', r"saved as \.xyz \('map.xyz'\): use one of the endings .*pdf, .*png"), ('v1.2', r'saved as \.2'),
    ('no/such/map.png', 'a folder that exists'), ('.', 'is a folder: add a name'),
    ('new/', 'folder'), (3, 'not int'), (b'map.png', 'not bytes'), (True, 'not bool'), ('~nobody-of-that-name/a.png', 'home folder'),
])
def test_a_place_that_a_figure_cannot_go_is_said_before_any_work(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def fetch(idxs): raise AssertionError('read')
    cams = CAMs(torch.ones(2, 2, 2), Images(fetch, range(2)))
    for show in (check_style, cams.show, CAMMap(torch.ones(2, 2)).show, CAMMap(torch.ones(2, 2, 2)).show_slices):
        with pytest.raises((ValueError, TypeError), match=message): show(save=wrong)
    assert names(tmp_path)==[] and not plt.get_fignums()


def test_a_learner_is_not_asked_where_the_figure_cannot_be_saved(dls, tmp_path):
    class Asked(torch.nn.Module):
        def forward(self, x): raise AssertionError('asked')
    learn = Learner(dls, Asked(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match=r'saved as \.xyz'): learn.show_cam(0, save=tmp_path/'map.xyz')
    with pytest.raises(TypeError, match='did you mean cmap'): learn.show_cam(0, colormap='jet')


def test_a_real_learner_with_strange_names(pictures, tmp_path, capfd):
    "From the data block to the file: nothing between them reads the names"
    names = {'left': '$0-$50', 'right': '_$50-$100 猫'}
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda f: names[f.parent.name], item_tfms=Resize(32))
    learn = vision_learner(block.dataloaders(pictures, bs=4, num_workers=0), resnet18, pretrained=False)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', category=UserWarning)
        learn.show_cam([0, 1], cls=list(names.values()), save=tmp_path/'$a$.png')
    titles = [ax.get_title(loc='left').split('▸ ')[1].rpartition(' ')[0] for ax in plt.gcf().axes]
    assert titles==list(names.values())*2 and (tmp_path/'$a$.png').stat().st_size > 5000 and 'lyph' not in capfd.readouterr().err
    learn.model[-1][-1].weight.data[0, 0] = float('nan') # of a unit that is off: the map knows nothing of it, the score does
    with pytest.warns(UserWarning, match='not finite'): learn.show_cam([0, 1])
    assert all('not finite' in ax.get_title() and len(ax.images)==1 for ax in plt.gcf().axes)


@pytest.mark.parametrize('wrong, near', [('colormap', 'cmap'), ('box', 'boxes'), ('figsiz', 'figsize'), ('transparency', None), ('Alpha', 'alpha')])
def test_unknown_options_have_a_hint(wrong, near):
    with pytest.raises(TypeError, match=f"'{wrong}' is no option of show: the options are alpha, .*, title" + (f'; did you mean {near}\\?$' if near else '$')): check_style(**{wrong: 1})


# -- what comes back from a file

OLD = """
UEsDBC0AAAAIAAAAIQD80iVk//////////8KABQAaGVhZGVyLm5weQEAEAAoBgAAAAAAAHcBAAAAAAAArVTBSgMxEI1Xv2LpZRUW0VZ7KII3b4qXHkSkpLvp7uK2uySxKqVf4Q87oS80
pElh1cKDTTIz773JNN+P04en5xO2Zpu0ECqX6SRJb6ej8TDNknTRSi35atbKQpiTe94oQfuq4p2g9dl5lmyTP/xON4yxAWFBaAmSsCRwgsbZhJAQrggZvs3+ijAj1E5OSRAE5eUOvdwC
9b8IXSTHarO1u0DMAHWs9pxQES4Ic/hqcG49GR9j5LqacsRy8KiIrmOcNfqiwXEd4OmQJ9CHPvVDfkbor8+jESNxL//tw+r4ba/6eLH9KqGthb6+89ACDWK3AU8csQJrn+Mlco81+LSz
Z+JePY7aiVkeqc+hu4PXMtCXeSTG51zDd+74C3Hacx3gKlAjxmE9feI75MtofEdfGy//A3dl3oS7CId9cxQ8c2gWHpf/3tj/gsl7Y4czo9h+5ktoszWzQFyJWPeebT3DJeFTBHRUbD83
Cms3/5Lt7tR4uGG7Gf0BUEsDBC0AAAAIAAAAIQC45KEd//////////8IABQAbWFwcy5ucHkBABAAkAAAAAAAAABVAAAAAAAAAJvsF+obEMnIUMZQrZ6SWpxcpG6loG6TaaSuo6Cell9U
UpSYF59flJIKEndLzClOBYoXZyQWpAL5GkY6CiCkqaNQq0Ae4GqwZzjAYM8ABA4ODfsb7ABQSwMELQAAAAgAAAAhAHH7Oav//////////wsAFABjbGFzc2VzLm5weQEAEACQAAAAAAAA
AEgAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNpoa6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjqaOgq1ChQALkYGVAAAUEsDBC0AAAAIAAAAIQD7oPWW////////
//8JABQAcHJlZHMubnB5AQAQAJAAAAAAAAAAUwAAAAAAAACb7BfqGxDJyFDGUK2eklqcXKRupaBuk2airqOgnpZfVFKUmBefX5SSChJ3S8wpTgWKF2ckFqQC+RpGOgpGmjoKtQpkAy4G
hgY7BgYHewYGBjAGAFBLAwQtAAAACAAAACEA7/uTZ///////////CQAUAHRhcmdzLm5weQEAEACQAAAAAAAAAEkAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNpoa6joJ6WX1RS
lJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjqaOgq1ChQALkYGCIDRAFBLAwQtAAAACAAAACEAh49xGv//////////CgAUAGxvc3Nlcy5ucHkBABAAiAAAAAAAAABMAAAAAAAAAJvsF+ob
EMnIUMZQrZ6SWpxcpG6loG6TZqKuo6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GkY6mjoKtQoUAC4GhgY7BgYGewBQSwMELQAAAAgAAAAhALDRmgv//////////wsAFAByZWdp
b25zLm5weQEAEACEAAAAAAAAAE0AAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgXpNkqK6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjoKhjoKRpo6CrUK5AEuRgYGRgBQ
SwMELQAAAAgAAAAhAK51yHb//////////wsAFABpbWFnZV8wLm5weQEAEACMAAAAAAAAAEoAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgXlNqqK6joJ6WX1RSlJgXn1+UkgoSd0vM
KU4FihdnJBakAvkaRjoKQGSsqaNQq0Ae4DJGAgBQSwMELQAAAAgAAAAhAFJsQbn//////////wsAFABpbWFnZV8xLm5weQEAEACEAAAAAAAAAEkAAAAAAAAAm+wX6hsQychQxlCtnpJa
nFykbqWgXlNqqK6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjoKRpo6CrUKZAOuNCAAAFBLAQItAy0AAAAIAAAAIQD80iVkdwEAACgGAAAKAAAAAAAAAAAAAACAAQAAAABo
ZWFkZXIubnB5UEsBAi0DLQAAAAgAAAAhALjkoR1VAAAAkAAAAAgAAAAAAAAAAAAAAIABswEAAG1hcHMubnB5UEsBAi0DLQAAAAgAAAAhAHH7OatIAAAAkAAAAAsAAAAAAAAAAAAAAIAB
QgIAAGNsYXNzZXMubnB5UEsBAi0DLQAAAAgAAAAhAPug9ZZTAAAAkAAAAAkAAAAAAAAAAAAAAIABxwIAAHByZWRzLm5weVBLAQItAy0AAAAIAAAAIQDv+5NnSQAAAJAAAAAJAAAAAAAA
AAAAAACAAVUDAAB0YXJncy5ucHlQSwECLQMtAAAACAAAACEAh49xGkwAAACIAAAACgAAAAAAAAAAAAAAgAHZAwAAbG9zc2VzLm5weVBLAQItAy0AAAAIAAAAIQCw0ZoLTQAAAIQAAAAL
AAAAAAAAAAAAAACAAWEEAAByZWdpb25zLm5weVBLAQItAy0AAAAIAAAAIQCudch2SgAAAIwAAAALAAAAAAAAAAAAAACAAesEAABpbWFnZV8wLm5weVBLAQItAy0AAAAIAAAAIQBSbEG5
SQAAAIQAAAALAAAAAAAAAAAAAACAAXIFAABpbWFnZV8xLm5weVBLBQYAAAAACQAJAPgBAAD4BQAAAAA="""


def test_files_of_the_first_format_are_read(tmp_path):
    "A file as the first version wrote it"
    (tmp_path/'old.npz').write_bytes(base64.b64decode(OLD))
    back = CAMs.load(tmp_path/'old.npz')
    maps = torch.tensor([[[1., -2.], [.5, 0.]], [[0., 3.], [-1., .25]]]).bfloat16()
    same(back, CAMs(maps, None, torch.tensor([1, 0]), ['predicted'], torch.tensor([[.25, .75], [.5, .5]]), torch.tensor([1, 1]), torch.tensor([.25, .5]), ['a.png', 'b.png'], ['cat', 'dog'], 2, 'single',
                    torch.tensor([[[True, False]], [[False, True]]]), True, .25, [None, 'why?']))
    assert np.array_equal(back[0].image, np.full((2, 2, 3), 51)) and np.array_equal(back[1].image, np.full((2, 2), 102))


def rewritten(file, header=None, **arrays):
    "The file with some words of its header, and some arrays, replaced (`None`: left out)"
    with np.load(file) as found: content = {name: found[name] for name in found.files}
    words = json.loads(str(content['header']))
    for name, value in (header or {}).items():
        if value is None: del words[name]
        else: words[name] = value
    content = {**content, 'header': np.array(json.dumps(words)), **arrays}
    np.savez_compressed(file, **{name: array for name, array in content.items() if array is not None})
    return file


@pytest.mark.parametrize('header, arrays, message', [
    *[({word: None}, {}, f"header lacks '{word}'") for word in ('n_images', 'dtypes', 'labels', 'items', 'vocab', 'texts', 'n_space', 'task', 'signed', 'thresh')],
    ({'format': None}, {}, 'names no format'), ({'format': 'x'}, {}, 'names no format'), ({'format': 0}, {}, 'names no format'),
    ({'format': True}, {}, 'names no format'),
    ({'task': 3}, {}, "3 is no 'task'"), ({'n_space': 4}, {}, "4 is no 'n_space'"), ({'n_space': [2]}, {}, 'n_space'),
    ({'signed': 1}, {}, 'signed'), ({'thresh': 2}, {}, 'thresh'),
    ({'thresh': float('nan')}, {}, 'thresh'), ({'items': 'abcd'}, {}, 'items'), ({'items': ['a']}, {}, '1 items for 4 items'),
    ({'items': [1, 2, 3, 4]}, {}, 'items'), ({'texts': ['a']*5}, {}, '5 texts for 4'),
    ({'labels': ['a']}, {}, '1 labels for 2 questions'), ({'vocab': {'a': 1}}, {}, 'vocab'), ({'n_images': -1}, {}, 'n_images'),
    ({'n_images': 2}, {}, '2 images for 4'), ({'n_images': 10**15}, {}, 'images for 4'),
    ({'n_images': 4}, {}, "has no 'image_0'"), ({'dtypes': {}}, {}, 'dtypes'), ({'dtypes': {'maps': 'torch.load'}}, {}, 'dtypes'),
    ({'dtypes': {'maps': 'torch.float32', 'header': 'torch.int8'}}, {}, 'dtypes'),
    ({'dtypes': {'maps': 'torch.float64'}}, {}, 'maps are float32, and its header says torch.float64'),
    ({'dtypes': {'maps': 'torch.int32'}}, {}, 'maps are float32'), ({'dtypes': [1]}, {}, 'dtypes'),
    ({}, {'maps': None}, "has no 'maps'"), ({}, {'preds': None}, "has no 'preds'"),
    ({}, {'maps': np.ones((4, 2), np.float32)}, 'cannot have the shape'), ({}, {'maps': np.ones((5, 2, 5, 6), np.float32)}, 'for 5 items'),
    ({}, {'classes': np.zeros((4, 3), int)}, 'classes have the shape'),
    ({}, {'losses': np.zeros(3, np.float32)}, r'losses have the shape \[3\] for 4'),
    ({}, {'preds': np.float32(1)}, r'preds have the shape \[\]'),
    ({}, {'targs': np.array(['a']*4)}, 'targs are <U1'), ({}, {'losses': np.zeros(4, 'M8[s]')}, 'losses are'),
    ({}, {'regions': np.ones((4, 20), bool)}, 'regions are a bool tensor'),
    ({'n_images': 4}, {f'image_{i}': np.zeros((3, 3), np.float32) for i in range(4)}, 'is no image'),
    ({'n_images': 4}, {f'image_{i}': np.zeros((3, 3, 7), np.uint8) for i in range(4)}, 'is no image'),
])
def test_a_header_is_not_trusted(header, arrays, message, tmp_path):
    everything().save(tmp_path/'cams.npz')
    with pytest.raises(ValueError, match='cams.npz.* is not a file that CAMs.save wrote, or it is damaged: .*' + message) as error: CAMs.load(rewritten(tmp_path/'cams.npz', header, **arrays))
    assert '\n' not in str(error.value)


def npy(shape, dtype='<f4', data=b''):
    "An array file that says it has this shape"
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(shape=shape, fortran_order=False, descr=dtype))
    return out.getvalue() + data


@pytest.mark.parametrize('name, content', [
    ('maps', npy((10**9, 2, 5, 6))), ('maps', npy((4, 10**5, 10**5, 2))), ('maps', npy((4, -1, 5, 6))),
    ('maps', npy((4, 2, 5, 6), data=b'short')), ('maps', npy((4, 2, 5, 6), data=b'\0'*961)), ('maps', npy((0, 10**30, 7))),
    ('maps', npy((4, 2, 5, 6), '|O', b'\0'*1920)), ('maps', pickle.dumps([1])), ('maps', b''), ('header', npy((), '<U1000000000')),
    ('header', npy((), '|O', pickle.dumps('x'))), ('header', npy((1,), '<U1', b'{\0\0\0')),
    ('header', npy((), '<U2', '{}'.encode('utf-32-le'))), ('header', npy((), '<U2', '[]'.encode('utf-32-le'))),
    ('header', npy((), '<U1', '{'.encode('utf-32-le'))), ('header', npy((), '<U100000', ('['*100000).encode('utf-32-le'))),
    ('header', npy((), '<U1', b'\xff'*4)),
])
def test_an_array_is_not_trusted(name, content, tmp_path):
    "Whatever a part of the file says about itself: one sentence, and no memory for what is not there"
    whole = everything().save(tmp_path/'cams.npz')
    with zipfile.ZipFile(whole) as archive: parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path/'wrong.npz', 'w', zipfile.ZIP_DEFLATED) as archive:
        for part, original in parts.items(): archive.writestr(part, content if part==f'{name}.npy' else original)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match='wrong.npz.* is not a file that CAMs.save wrote, or it is damaged: ') as error: CAMs.load(tmp_path/'wrong.npz')
        assert tracemalloc.get_traced_memory()[1] < 2e7 and '\n' not in str(error.value)
    finally: tracemalloc.stop()


def test_a_small_file_does_not_take_gigabytes(tmp_path):
    "Zeros shrink a thousandfold: 300 MB of them are a small file, as maps, as an image, or as something that nobody reads"
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, 'w', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('maps.npy', 'w', force_zip64=True) as out:
            out.write(npy((1, 10000, 7500)))
            for _ in range(100): out.write(bytes(3*10**6))
        archive.writestr('header.npy', npy((), '<U400', json.dumps(dict(format=1, n_images=0, dtypes={'maps': 'torch.float32'}, labels=None, items=None, vocab=None, texts=None, n_space=2, task='', signed=False, thresh=.5)).ljust(400).encode('utf-32-le')))
    (tmp_path/'bomb.npz').write_bytes(zeros.getvalue())
    assert (tmp_path/'bomb.npz').stat().st_size < 10**6
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match='bomb.npz.* is 0.3 MB and would unpack to 0.3 GB: if you trust it, load it with max_bytes=300000000'): CAMs.load(tmp_path/'bomb.npz')
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally: tracemalloc.stop()
    everything().save(tmp_path/'cams.npz')
    with zipfile.ZipFile(tmp_path/'cams.npz', 'a') as archive: archive.writestr('other.npy', 'nobody reads this')
    same(CAMs.load(tmp_path/'cams.npz'), everything())
    with pytest.raises(ValueError, match='max_bytes'): CAMs.load(tmp_path/'cams.npz', max_bytes=5500)
    same(CAMs.load(tmp_path/'cams.npz', max_bytes=10**6), everything())


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    cams = everything()
    cams.items = cams.items + ['another']
    with pytest.raises(ValueError, match='there are 5 items for 4 items'): cams.save(tmp_path/'cams.npz')
    assert names(tmp_path)==[]


def test_what_is_no_file_is_not_loaded(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    for wrong, kind in ((tmp_path/'pipe', FileNotFoundError), (tmp_path, ValueError), (3, TypeError), ('~nobody-of-that-name/a.npz', ValueError)):
        with pytest.raises(kind): CAMs.load(wrong)


def test_byte_order_and_memory_order_do_not_matter(tmp_path):
    cams = everything()
    cams.save(tmp_path/'cams.npz')
    same(CAMs.load(rewritten(tmp_path/'cams.npz', maps=np.asfortranarray(cams.maps.numpy().astype('>f4')))), cams)


# -- pictures that are not there any more: their sizes are

def of_pictures(n=3):
    "Maps 4×4, of one question, of pictures of different sizes that are read when they are needed"
    maps = torch.stack([bumps((4, 4), (1, 2, 1., .4))]*n)
    def fetch(idxs): return [torch.zeros(3, 40*(i + 1), 60) for i in idxs]
    return CAMs(maps, Images(fetch, range(n)))


def test_boxes_and_peaks_stay_in_pixels_of_the_picture(tmp_path):
    cams = of_pictures()
    back = CAMs.load(cams.save(tmp_path/'cams.npz'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert back.images is None and back.sizes.tolist()==[[40, 60], [80, 60], [120, 60]]
        assert back.boxes()==cams.boxes() and back.peaks()==cams.peaks() and back.boxes(.3)==cams.boxes(.3)
        assert back.boxes()[0][0].right > 4 and back.boxes()[2][0].bottom > 45
        for some in (back[[2, 0]], back[1:], back[torch.tensor([True, False, True])]): assert some.boxes()==[back.boxes()[int(h)//40 - 1] for h in some.sizes[:, 0]]
        assert back[1].boxes()==cams[1].boxes() and back[1].peaks()==cams[1].peaks()
        assert back.boxes(size=(4, 4))==cams.boxes(size=(4, 4))
        twice = CAMs.load(back.save(tmp_path/'again.npz')) # the sizes are passed on
        assert twice.boxes()==cams.boxes()
        axs = back.show(boxes=True)
        for ax, boxes, height in zip(axs, back.boxes(), (40, 80, 120)):
            assert tuple(ax.images[0].get_extent())==(-.5, 59.5, height - .5, -.5)
            assert (ax.patches[1].get_x() + .5, ax.patches[1].get_y() + .5)==(boxes[0].left, boxes[0].top)
        assert CAMs.load(tmp_path/'cams.npz', images=[torch.zeros(3, 8, 8)]*3).boxes()==cams.boxes(size=(8, 8)) # pictures say more
    several = everything()
    assert CAMs.load(several.save(tmp_path/'cams.npz')).peaks()==several.peaks() and CAMs.load(several.save(tmp_path/'cams.npz'))[1, 1].boxes()==several[1, 1].boxes()
    assert CAMs.load(several.save(tmp_path/'cams.npz', images=True)).boxes()==several.boxes()
    plt.close('all')


def test_places_in_cells_are_said_once(tmp_path):
    "A file of an earlier version knows no sizes; pictures that are gone have none; maps that never had pictures were always in cells"
    cams = of_pictures()
    cams.save(tmp_path/'new.npz')
    old = CAMs.load(rewritten(tmp_path/'new.npz', {'sizes': None}))
    def fetch(idxs): raise OSError('gone')
    gone = CAMs.load(CAMs(cams.maps, Images(fetch, range(3))).save(tmp_path/'gone.npz'))
    with warnings.catch_warnings(record=True): unpickled = pickle.loads(pickle.dumps(cams))
    for lost in (old, gone, unpickled, old[1:], CAMs.load(old.save(tmp_path/'again.npz'))):
        for find in (lost.boxes, lost.peaks, lost[0].boxes, lost[0].peaks):
            with pytest.warns(UserWarning, match='in cells of the map') as said: find()
            assert len(said)==1 and 'size=' in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert lost.boxes(size=(40, 60))[0]==cams.boxes(size=(40, 60))[0]
            assert tuple(lost.show(boxes=True)[0].images[0].get_extent())==(-.5, 3.5, 3.5, -.5) # the drawing is right in any unit
            lost[0].show(peaks=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bare = CAMs(cams.maps)
        assert CAMs.load(bare.save(tmp_path/'bare.npz')).boxes()==bare.boxes() and pickle.loads(pickle.dumps(bare)).boxes()==bare.boxes()
    plt.close('all')


@pytest.mark.parametrize('sizes, message', [('x', 'sizes'), ([[1, 2]], '1 sizes for 4'), ([[1]]*4, 'sizes'), ([[1, -2]]*4, 'sizes'), ([[1, 2.5]]*4, 'sizes'), ([[10**6, 10**6]]*4, 'sizes'), ([['a', 'b']]*4, 'sizes')])
def test_sizes_are_not_trusted(sizes, message, tmp_path):
    with pytest.raises(ValueError, match='or it is damaged: .*' + message): CAMs.load(rewritten(everything().save(tmp_path/'cams.npz'), {'sizes': sizes}))


def test_a_pickle_without_its_pictures_says_so():
    cams = of_pictures()
    with pytest.warns(UserWarning, match='are not pickled') as said: back = pickle.loads(pickle.dumps(cams))
    assert len(said)==1 and 'cams.images.load()' in str(said[0].message) and back.images is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cams.images = cams.images.load()
        back = pickle.loads(pickle.dumps(cams))
        assert back.images[2].shape==(3, 120, 60) and back.boxes()==cams.boxes()
        assert copy.deepcopy(of_pictures()).boxes()==cams.boxes()


# -- what is drawn

def test_one_map_has_its_title_once():
    for cams in (CAMs(torch.ones(1, 2, 2)), CAMs(torch.ones(1, 1, 2, 2)), CAMs(torch.ones(1, 2, 3, 3), n_space=3)):
        ax = cams.show(title='mine')[0]
        words = [text.get_text() for text in ax.figure.findobj(Text)]
        assert sum('mine' in word for word in words)==1, words
    ax = CAMs(torch.ones(2, 2, 2)).show(title='mine')[0]
    assert ax.figure.get_suptitle()=='mine' and ax.get_title()==''
    points = CAMs(torch.ones(1, 2, 2), preds=torch.zeros(1, 2), targs=torch.zeros(1, 2), task='points')
    assert points.show()[0].figure.get_suptitle()=='● Predicted / ✚ Actual'
    plt.close('all')


def test_a_number_is_the_threshold_of_what_is_drawn():
    cam_map = CAMMap(bumps((20, 20), (4, 4, 1., 2.), (14, 14, .6, 2.)), torch.zeros(20, 20))
    def n_drawn(**kwargs):
        ax = cam_map.show(**kwargs)
        return len(ax.patches)//2, len(ax.collections)
    assert n_drawn(boxes=True)==(2, 0) and n_drawn(boxes=.8)==(1, 0) and n_drawn(boxes=np.float32(.8), peaks=.5)==(1, 2) and n_drawn(peaks=.7)==(0, 1)
    assert n_drawn(boxes=None, peaks=False)==(0, 0) and n_drawn(boxes=1)==(1, 0)
    drawn = cam_map.show(boxes=.8).patches[1]
    assert (drawn.get_width(), drawn.get_height())==(cam_map.boxes(.8)[0].right - cam_map.boxes(.8)[0].left, cam_map.boxes(.8)[0].bottom - cam_map.boxes(.8)[0].top)
    cams = CAMs(torch.stack([cam_map.map]*2))
    assert [len(ax.patches)//2 for ax in cams.show(boxes=.8)]==[1, 1] and [len(ax.collections) for ax in cams.show(peaks=.5, boxes=None)]==[2, 2]
    for wrong in (3, 0, -.5, 1.5, float('nan')):
        for name in ('boxes', 'peaks'):
            for shown in (cam_map, cams):
                with pytest.raises(ValueError, match=f'{name} is True or a list.*threshold above 0 and at most 1'): shown.show(**{name: wrong})
    plt.close('all')


# -- what can be stored, but not used

@pytest.mark.parametrize('header, arrays, message', [
    ({'dtypes': {'maps': 'torch.complex64'}}, {'maps': np.ones((4, 2, 5, 6), np.complex64)}, 'maps are torch.complex64'),
    ({'dtypes': {'maps': 'torch.float8_e5m2'}}, {'maps': np.ones((4, 2, 5, 6), np.uint8)}, 'maps are torch.float8_e5m2'),
    ({}, {'maps': np.ones((4, 2, 0, 6), np.float32)}, 'have no places'), ({}, {'maps': np.ones((4, 2, 5, 0), np.float32)}, 'have no places'),
    ({}, {'regions': np.ones((4, 3, 20, 30), bool)}, 'regions are'), ({}, {'regions': np.ones((4, 2, 2, 20, 30), bool)}, 'regions are'),
    ({}, {'regions': np.ones((4, 20), bool)}, 'regions are'), ({}, {'regions': np.ones((4, 0, 20), bool)}, 'regions are'),
    ({}, {'classes': np.full((4, 2), -99)}, 'class -99 is none'),
    ({'task': 'binary'}, {'classes': np.full((4, 2), 2)}, 'class 2 is none of the two'),
])
def test_what_cannot_be_used_is_not_loaded(header, arrays, message, tmp_path):
    everything().save(tmp_path/'cams.npz')
    if 'dtypes' in header: arrays.update({name: None for name in ('classes', 'preds', 'targs', 'losses', 'regions')})
    with pytest.raises(ValueError, match='or it is damaged: .*' + message) as error: CAMs.load(rewritten(tmp_path/'cams.npz', header, **arrays))
    assert '\n' not in str(error.value)


def test_a_class_of_another_output_is_loaded(tmp_path):
    "It is called by its number, in memory and from a file"
    cams = CAMs(torch.ones(2, 2, 2), classes=torch.tensor([7, NOT_ASKED]), vocab=VOCAB)
    assert CAMs.load(cams.save(tmp_path/'cams.npz')).question(0)=='class 7'


@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_what_cannot_be_used_is_not_saved(dtype, tmp_path):
    with pytest.raises(TypeError, match=rf'maps are {dtype}.*cams.maps = cams.maps.float\(\)'): CAMs(torch.ones(1, 2, 2).to(dtype)).save(tmp_path/'cams.npz')
    with pytest.raises(TypeError, match='preds are'): CAMs(torch.ones(1, 2, 2), preds=torch.ones(1, 2).to(dtype)).save(tmp_path/'cams.npz')
    assert names(tmp_path)==[]


@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_a_link_to_itself_is_no_place(write, tmp_path):
    (tmp_path/'self.png').symlink_to(tmp_path/'self.png')
    (tmp_path/'a.png').symlink_to('b.png')
    (tmp_path/'b.png').symlink_to('a.png')
    for name in ('self.png', 'a.png'):
        with pytest.raises(ValueError, match=f'{name}.* leads back to itself'): write(tmp_path/name)
        assert (tmp_path/name).is_symlink()
    assert names(tmp_path)==['a.png', 'b.png', 'self.png']
    plt.close('all')


# -- titles beside one another

METHODS = ['hirescam', 'smooth_gradcam_pp', 'eigengradcam', 'guided_backprop+tta', 'layercam+stages+pca']


@pytest.mark.parametrize('name', ['cat', 'american staffordshire terrier', 'x'*80])
def test_titles_of_questions_do_not_overlap(name):
    n = len(METHODS)
    cams = CAMs(torch.rand(2, n, 3, 3), classes=torch.zeros(2, n, dtype=torch.long), labels=[f'{method}: {name}' for method in METHODS], preds=torch.tensor([[.9, .1]]*2), targs=torch.tensor([0, 1]), vocab=[name, 'dog'], task='single')
    axs = cams.show()
    fig = axs[0].figure
    fig.canvas.draw()
    for row in (axs[:n], axs[n:]):
        lines = [ax.get_title(loc='left').split('\n') for ax in row]
        assert len({len(one) for one in lines})==1 and all(one[0]=='' for one in lines[1:]) and lines[0][0] # the item's title is above them all
        assert all(len(line) <= 34 for one in lines for line in one[1:])
        assert [''.join(one[1:]).replace(' ', '').split(':')[0] for one in lines]==[f'▸{method}' for method in METHODS]
        for left, right in zip(row, row[1:]):
            words = left.text(0, 0, max(left.get_title(loc='left').split('\n')[1:], key=len), fontsize=9)
            assert words.get_window_extent().width < right.get_window_extent().x0 - left.get_window_extent().x0
            words.remove()
    plt.close(fig)


def test_words_are_wrapped_where_they_can_be():
    def lines(text): return wrapped_title(text, 12, 12)
    assert lines('short')==['short'] and lines('')==[] and lines('one two three four')==['one two', 'three four'] and lines('gradcam+tta+pca: x')==['gradcam+tta+', 'pca: x']
    assert lines('a'*30)==['a'*12, 'a'*12, 'a'*6] and ''.join(lines('ab:cd+ef'*5))=='ab:cd+ef'*5


def test_a_real_learner_s_boxes_come_back_from_a_file(dls, tmp_path):
    learn = vision_learner(dls, resnet18, pretrained=False)
    with learn.no_bar():
        for kwargs in ({}, dict(cls='all'), dict(method=['gradcam', 'guided_backprop'])):
            cams = learn.get_cams([0, 1, 2], **kwargs)
            back = CAMs.load(cams.save(tmp_path/'cams.npz'))
            assert back.sizes.tolist()==[[64, 64]]*3 and back.boxes()==cams.boxes() and back.peaks()==cams.peaks()
        learn.show_cam(0, title='mine', boxes=.8)
    assert sum('mine' in text.get_text() for text in plt.gcf().findobj(Text))==1
    plt.close('all')
