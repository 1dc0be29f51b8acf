"Maps, boxes, titles and files: against values worked out by hand, and implementations that share nothing with ours."
import copy
import json
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba

from fastai_cam.maps import NOT_ASKED, Box, CAMMap, CAMs, Images, ItemMaps, Peak, check_style, normalize, to_slices

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
    assert (some.labels, some.vocab, some.n_space, some.task, some.signed, some.thresh)==(cams.labels, VOCAB, 2, 'multi', True, .3)
    second = cams[:, 1]
    assert torch.equal(second.regions, cams.regions[:, 1]) and torch.equal(second.maps, cams.maps[:, 1]) and second.labels==['two'] and second.task=='multi' and second.texts==cams.texts
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


# -- files

def same(a, b):
    for name in ('maps', 'classes', 'preds', 'targs', 'losses', 'regions'):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None)==(right is None), name
        if left is not None: assert left.dtype==right.dtype and left.shape==right.shape and torch.equal(left, right), name
    for name in ('labels', 'items', 'vocab', 'texts', 'n_space', 'task', 'signed', 'thresh'): assert getattr(a, name)==getattr(b, name), name


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
