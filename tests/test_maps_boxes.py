"Boxes and peaks by hand, and against an exact flood."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastai_cam.tasks import NOT_ASKED
from fastai_cam.maps.boxes import Box, Peak
from fastai_cam.maps.draw import CAMMap
from fastai_cam.maps.cams import CAMs, Images

from helpers.maps import bumps


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
