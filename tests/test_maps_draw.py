"One map over one picture: regions, points, slices, frames and levels where they belong, by hand and by implementations that share nothing with ours."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgba

from fastai_cam.maps.boxes import Box, Peak
from fastai_cam.maps.draw import CAMMap, check_style
from fastai_cam.maps.cams import CAMs
from fastai_cam.maps.pixels import normalize

from helpers.maps import bumps, frames


# -- one map

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


def test_slices_of_an_image_share_their_greys():
    image = torch.stack([torch.full((4, 4), value) for value in (.25, .5, 1.)])
    assert [ax.images[0].get_clim() for ax in CAMMap(torch.ones(1, 2, 2), image).show_slices()]==[(.25, 1.)]*3


def test_region_of_a_volume_follows_the_slice():
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[1] = True
    axs = CAMMap(torch.ones(1, 2, 2), torch.zeros(4, 8, 8), region=region).show_slices(4)
    assert [len(ax.collections) for ax in axs]==[0, 0, 2, 2]


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
    cam_map.show(ax=ax, interpolation=interpolation, alpha=1, title='', contour=False)
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


# -- figures in files

@pytest.mark.parametrize('wrong, near', [('colormap', 'cmap'), ('box', 'boxes'), ('figsiz', 'figsize'), ('transparency', None), ('Alpha', 'alpha')])
def test_unknown_options_have_a_hint(wrong, near):
    with pytest.raises(TypeError, match=f"'{wrong}' is no option of show: the options are alpha, .*, title" + (f'; did you mean {near}\\?$' if near else '$')): check_style(**{wrong: 1})


# -- what is drawn

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


def rings(ax): return [line for line in ax.lines if str(line.get_gid()).startswith('contour')]


def test_the_line_goes_around_what_is_strong_and_not_around_holes_in_it():
    y, x = torch.meshgrid(torch.arange(40.), torch.arange(40.), indexing='ij')
    ring = torch.exp(-((torch.hypot(x - 20, y - 20) - 10)/3)**2) # strong from 7.5 to 12.5 pixels from the middle
    def radii(cam_map, **kwargs): return sorted(round(float(np.hypot(*(line.get_xydata() - 20).T).mean()), 1) for line in rings(cam_map.show(**kwargs)))
    picture = torch.zeros(3, 40, 40)
    assert radii(CAMMap(ring, picture))==radii(CAMMap(ring, picture), contour=.5)==[12.5]
    assert radii(CAMMap(ring, picture), style='contour', contour=.5)==[7.5, 12.5] # where the lines are all there is
    assert radii(CAMMap(-ring, picture, signed=True))==[12.5]


def test_a_thicket_of_lines_is_left_out_unless_it_is_asked_for():
    places = torch.kron(torch.ones(3, 3), torch.nn.functional.pad(torch.ones(8, 8), (4,)*4)) # nine squares in 48 × 48
    for n, last in ((9, 48), (6, 32)):
        some = places.clone()
        some[last:] = 0
        cam_map = CAMMap(some, torch.zeros(3, 48, 48))
        assert len(rings(cam_map.show()))==(n if n <= 8 else 0) and len(rings(cam_map.show(contour=True)))==n


def test_ticks_stand_on_the_inner_side_of_an_outline():
    from matplotlib.patheffects import TickedStroke
    region = torch.zeros(40, 40, dtype=torch.bool)
    region[8:32, 8:32] = True
    region[16:24, 16:24] = False
    ax = CAMMap(torch.ones(2, 2), torch.full((3, 40, 40), .5), region=region).show(contour=False, photo=False, colorbar=False, alpha=0)
    ax.figure.canvas.draw()
    pixels = np.asarray(ax.figure.canvas.buffer_rgba())[..., :3].astype(int)
    where = lambda x, y: (pixels.shape[0] - 1 - np.array(ax.transData.transform((x, y)))[1]).round().astype(int), lambda x, y: np.array(ax.transData.transform((x, y)))[0].round().astype(int)
    def white(left, top, right, bottom):
        rows, cols = sorted([where[0](left, top), where[0](left, bottom)]), sorted([where[1](left, top), where[1](right, top)])
        return int((pixels[rows[0]:rows[1], cols[0]:cols[1]] > 200).all(-1).sum())
    assert white(7.8, 12, 8.2, 28) > 4 and white(6.8, 12, 7.2, 28)==0 # inside the square, beside its left side; and as far outside
    assert white(14.8, 16, 15.2, 24) > 1 and white(15.8, 17, 16.2, 23)==0 # the inside of the region is outside of the hole
    predicted = torch.roll(region, 4, 1)
    solid, dashed = CAMMap(torch.ones(2, 2), torch.zeros(3, 40, 40), outlines=dict(predicted=predicted, actual=region)).show().collections[1::2]
    assert any(isinstance(effect, TickedStroke) for effect in solid.get_path_effects()) and not dashed.get_path_effects()
    speckled = torch.zeros(40, 40, dtype=torch.bool)
    speckled[4::8, 4::8] = True
    assert not CAMMap(torch.ones(2, 2), torch.zeros(3, 40, 40), region=speckled).show().collections[-1].get_path_effects()
