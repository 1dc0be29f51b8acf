"Many maps in one figure: who shares a scale, what stands where, and which map is drawn once."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from fastai_cam.maps.cams import CAMs
from fastai_cam.maps.draw import CAMMap
from fastai_cam.maps.grid import carried

from helpers.maps import VOCAB

STRONG, FAINT = torch.tensor([[0., 4.], [1., 2.]]), torch.tensor([[.5, 0.], [0., .25]])
PICTURES = [torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(i)) for i in range(9)]


def two(labels=('cat', 'dog'), classes=((0, 1),), **kwargs):
    "One item, two maps: one strong and one faint"
    kwargs = dict(preds=torch.tensor([[.9, .1]]), vocab=VOCAB[:2]) | kwargs
    return CAMs(torch.stack([STRONG, FAINT])[None], PICTURES[:1], torch.tensor(classes), list(labels), **kwargs)


def drawn(ax): return ax.images[-1].get_array()
def bars(axs): return [ax for ax in axs[0].figure.axes if hasattr(ax, '_colorbar')]
def place(ax): return ax.get_position()


# -- one scale

def test_the_maps_of_an_item_share_a_scale():
    strong, faint = two().show()
    assert drawn(strong).tolist()==[[0, 1], [.25, .5]] and drawn(faint).tolist()==[[.125, 0], [0, .0625]]
    strong, faint = two().show(scale='own')
    assert drawn(strong).max()==1 and drawn(faint).tolist()==[[1, 0], [0, .5]]
    several = CAMs(torch.stack([STRONG, FAINT]), PICTURES[:2])
    assert [drawn(ax).max() for ax in several.show()]==[1, 1] and [drawn(ax).max() for ax in several.show(scale='all')]==[1, .125]


def test_a_map_that_can_hardly_be_seen_says_so():
    "On a scale that it shares; not by itself, not where both sides are drawn, and not where there is nothing at all"
    def said(axs): return [[text.get_text() for text in ax.texts] for ax in axs]
    def maps(faint): return CAMs(torch.stack([STRONG, faint])[None], PICTURES[:1], torch.tensor([[0, 1]]), ['cat', 'dog'])
    assert said(maps(STRONG*.09).show())==[[], ['hardly any evidence']] and said(maps(STRONG*.11).show())==[[], []]
    assert said(maps(STRONG*.09).show(scale='own'))==[[], []] and said(maps(STRONG*.09).show(signed=True))==[[], []]
    assert said(maps(-STRONG).show())==[[], ['no positive evidence']] and said(maps(STRONG*.09)[0].show())==[[], ['hardly any evidence']]


def test_methods_have_scales_of_their_own():
    cams = two(['gradcam: cat', 'layercam: cat'], ((0, 0),))
    assert [drawn(ax).max() for ax in cams.show()]==[1, 1] and [len(bars(cams.show(scale=scale))) for scale in ('item', 'all')]==[2, 2]
    assert [drawn(ax).max() for ax in two(['gradcam: cat', 'gradcam: dog']).show()]==[1, .125]


def test_the_scale_of_a_signed_map_is_its_largest_magnitude():
    strong, faint = two().show(signed=True)
    assert strong.images[-1].get_clim()==(-1, 1) and drawn(faint).max()==.125
    cams = CAMs(torch.stack([-STRONG, FAINT])[None], classes=torch.tensor([[0, 1]]), labels=['cat', 'dog'], signed=True)
    assert [drawn(ax).tolist() for ax in cams.show()]==[[[0, -1], [-.25, -.5]], [[.125, 0], [0, .0625]]]
    assert [drawn(ax).tolist() for ax in cams.show(signed=False)][1]==[[1, 0], [0, .5]] # what speaks against sets no scale here


def test_a_map_that_is_not_finite_sets_no_scale(recwarn):
    cams = CAMs(torch.stack([STRONG*float('nan'), FAINT])[None], PICTURES[:1], torch.tensor([[0, 1]]), ['cat', 'dog'])
    assert drawn(cams.show()[1]).max()==1


def test_the_maps_of_an_item_by_themselves_share_a_scale_too():
    assert [drawn(ax).max() for ax in two()[0].show()]==[1, .125] and [drawn(ax).max() for ax in two()[0].show(scale='own')]==[1, 1]
    assert [drawn(ax).max() for ax in two(['gradcam: cat', 'layercam: cat'], ((0, 0),))[0].show()]==[1, 1]
    assert two()[0][1].peak is None # showing changes nothing


def test_volumes_share_a_scale():
    cams = CAMs(torch.stack([STRONG, FAINT])[None, :, None], [torch.rand(1, 1, 8, 8)], torch.tensor([[0, 1]]), ['cat', 'dog'], n_space=3)
    assert [drawn(ax).max() for ax in cams.show()]==[1, .125] and [drawn(ax).max() for ax in cams.show(scale='own')]==[1, 1]


# -- colour bars

def test_a_colour_bar_is_in_units_of_the_map():
    bar, = bars(two().show())
    assert bar.get_ylim()==(0, 4) and [text.get_text() for text in bar.get_yticklabels()]==['0', '2', '4'] and bar.get_ylabel()=='evidence'
    bar, = bars(two().show(signed=True))
    assert bar.get_ylim()==(-4, 4) and bar.get_ylabel()=='red raises the score, blue lowers it'
    assert bars(two().show(signed=True, cmap='PiYG'))[0].get_ylabel()=='the upper colours raise the score, the lower ones lower it'
    first, second = bars(two().show(scale='own'))
    assert (first.get_ylim(), second.get_ylim())==((0, 4), (0, .5))


def test_colour_bars_do_not_crowd_a_grid():
    many = CAMs(torch.stack([STRONG]*4), PICTURES[:4])
    assert [len(bars(many.show(**kwargs))) for kwargs in ({}, dict(colorbar=True), dict(scale='all'), dict(scale='all', colorbar=False), dict(ncols=1))]==[0, 4, 1, 0, 4]
    assert bars(two().show(colorbar=False))==[] and bars(two().show(text=False))==[] and bars(two().show(style='masked'))==[]
    assert len(bars(two().show(ax=plt.subplots(1, 2)[1])))==0


def test_a_bar_is_as_high_as_its_map_and_at_the_end_of_the_row():
    axs = two().show()
    axs[0].figure.canvas.draw()
    (bar,), last = bars(axs), place(axs[1])
    assert place(bar).x0 > last.x1 > place(axs[0]).x1 and abs(place(bar).y0 - last.y0) < .02 and abs(place(bar).y1 - last.y1) < .02 and place(bar).width < .1*last.width


# -- the plain picture

def test_the_plain_picture_stands_before_the_maps_of_one_item():
    axs = two().show()
    photo, *rest = axs[0].figure.axes
    assert rest[:2]==axs and len(photo.images)==1 and np.allclose(photo.images[0].get_array(), PICTURES[0].permute(1, 2, 0)) and not photo.lines
    assert len(two().show(photo=False)[0].figure.axes)==3 # two maps and a bar
    many = CAMs(torch.stack([STRONG]*2), PICTURES[:2])
    assert len(many.show()[0].figure.axes)==2 and len(many.show(photo=True)[0].figure.axes)==4
    assert [len(ax.images) for ax in many.show(photo=True)[0].figure.axes]==[1, 2, 1, 2]
    assert len(CAMs(STRONG[None]).show()[0].figure.axes)==2 # without a picture: a map and its bar
    given = plt.subplots(1, 3)[1]
    assert two().show(photo=True, ax=given)==list(given[1:]) and len(given[0].images)==1
    with pytest.raises(ValueError, match='3 maps need 3 axes'): two().show(photo=True, ax=given[:2])
    for wrong in (dict(photo=True), dict(style='side')):
        with pytest.raises(ValueError, match='no pictures to show beside the maps'): CAMs(STRONG[None]).show(**wrong)
        with pytest.raises(ValueError, match='these are volumes'): CAMs(STRONG[None, None], n_space=3).show(**wrong)


def test_one_map_by_itself_has_its_picture_and_bar():
    ax = CAMMap(STRONG, PICTURES[0]).show()
    photo, same, bar = ax.figure.axes
    assert same is ax and len(photo.images)==1 and bar.get_ylim()==(0, 4)
    assert len(CAMMap(STRONG, PICTURES[0]).show(photo=False, colorbar=False).figure.axes)==1
    with pytest.raises(ValueError, match='takes axes of its own'): CAMMap(STRONG, PICTURES[0]).show(ax=plt.gca(), photo=True)
    with pytest.raises(ValueError, match='no picture to show beside the map'): CAMMap(STRONG).show(style='side')


# -- ways to lay out map and picture

def test_styles():
    def layers(style): return [(image.get_cmap().name, image.get_alpha()) for image in CAMMap(STRONG, PICTURES[0]).show(ax=plt.figure().gca(), style=style).images]
    assert layers('overlay')==[('gray', None), ('inferno', .6)] and layers('heat')==[('inferno', None)] and layers('masked')==[('gray', None), ('veil', None)] and layers('contour')==[('gray', None)]
    photo, heat, _ = CAMMap(STRONG, PICTURES[0]).show(style='side').figure.axes
    assert len(photo.images)==len(heat.images)==1 and drawn(heat).max()==1
    axs = CAMs(torch.stack([STRONG]*2), PICTURES[:2]).show(style='side')
    assert [len(ax.images) for ax in axs[0].figure.axes]==[1]*4


def levels(ax): return [line.get_gid() for line in ax.lines]


def test_lines_of_equal_strength():
    step = torch.tensor([[1., 0.], [1., 0.]]) # falls from the left to the right: half of it in the middle
    ax = CAMMap(step, PICTURES[0]).show()
    line, = ax.lines
    assert levels(ax)==['contour 0.5'] and np.allclose(line.get_xdata(), 9.5, atol=.6) and np.ptp(line.get_ydata()) > 18
    assert (ax.get_xlim(), ax.get_ylim())==((-.5, 19.5), (19.5, -.5))
    def at(**kwargs): return levels(CAMMap(step, PICTURES[0]).show(**kwargs))
    assert at(contour=False)==at(style='heat')==at(style='masked')==[] and at(style='contour')==['contour 0.25', 'contour 0.5', 'contour 0.75']
    assert at(contour=.8)==at(style='heat', contour=.8)==['contour 0.8'] and at(contour=(.2, .9))==['contour 0.2', 'contour 0.9']
    assert at(signed=True)==['contour 0.5'] and levels(CAMMap(step - .5, PICTURES[0]).show(signed=True))==['contour 0.5', 'contour -0.5']
    assert levels(CAMMap(step, PICTURES[0], region=torch.ones(20, 20) > 0).show())==[] # other things are outlined
    assert levels(CAMMap(-step, PICTURES[0]).show())==[] and levels(two().show()[1])==[] # faint on the scale of its item


# -- pairs

def pairs(**kwargs):
    "Three items asked for what was predicted and what is actual; the second is right"
    return CAMs(torch.stack([STRONG, FAINT])[None].repeat(3, 1, 1, 1), PICTURES[:3], torch.tensor([[0, 1], [1, 1], [1, 0]]), ['predicted', 'actual'],
                torch.tensor([[.9, .1], [.2, .8], [.3, .7]]), torch.tensor([1, 1, 0]), vocab=VOCAB[:2], **kwargs)


def test_one_map_is_drawn_where_prediction_and_label_are_one_class():
    axs = pairs().show()
    assert [ax.get_title(loc='left').split('\n')[-1] for ax in axs]==['▸ predicted cat 0.90', '▸ actual dog 0.10', '▸ predicted and actual dog 0.80', '▸ predicted dog 0.70', '▸ actual cat 0.30']
    grid = axs[0].figure.axes
    assert [len(ax.images) for ax in grid]==[2, 2, 2, 0, 2, 2]
    assert len(pairs()[1:2].show(photo=False, colorbar=False)[0].figure.axes)==1 # no place is left for the second
    assert len(pairs()[1])==2 and pairs().maps.shape[1]==2 # the maps are both there


def test_what_is_asked_by_name_is_drawn_though_it_is_the_same_class():
    cams = two(['cat', 'actual'], ((0, 0),))
    assert len(cams.show())==2
    methods = two(['gradcam: predicted', 'layercam: actual'], ((0, 0),))
    assert len(methods.show())==2 and len(two(['gradcam: predicted', 'gradcam: actual'], ((0, 0),)).show())==1
    regions = torch.zeros(1, 2, 20, 20, dtype=torch.bool)
    regions[0, 1, 5:] = True
    assert len(two(['predicted', 'actual'], ((0, 0),), regions=regions).show())==2 # of two places


def test_pairs_in_several_labels():
    cams = CAMs(torch.rand(1, 4, 3, 3), PICTURES[:1], torch.tensor([[0, 1, 1, 2]]), ['predicted', 'predicted', 'actual', 'actual'], torch.tensor([[.9, .8, .1]]), torch.tensor([[0., 1., 1.]]), vocab=VOCAB, task='multi')
    assert [ax.get_title(loc='left').split('\n')[-1] for ax in cams.show()]==['▸ predicted cat 0.90', '▸ predicted and actual dog 0.80', '▸ actual car 0.10']


def test_pairs_are_parted():
    axs = pairs().show()
    axs[0].figure.canvas.draw()
    a, b, c, _, e, f = [place(ax) for ax in axs[0].figure.axes]
    assert abs(a.y0 - f.y0) < .01 and c.x0 - b.x1 > 2*(b.x0 - a.x1) > 0 and e.x0 > c.x1


# -- where things stand

@pytest.mark.parametrize('n, k, shape', [(3, 1, (1, 3)), (4, 1, (2, 2)), (9, 1, (3, 3)), (1, 8, (2, 5)), (9, 2, (3, 6)), (2, 8, (4, 4))])
def test_how_many_are_in_a_row(n, k, shape):
    "With the plain picture, where there is one item"
    cams = CAMs(torch.rand(n, k, 2, 2), PICTURES[:n], labels=list('abcdefgh')[:k]) if k > 1 else CAMs(torch.rand(n, 2, 2), PICTURES[:n])
    axs = cams.show(colorbar=False)
    axs[0].figure.canvas.draw()
    boxes = [place(ax) for ax in axs[0].figure.axes]
    assert (len({round(box.y0, 2) for box in boxes}), len({round(box.x0, 2) for box in boxes}))==shape


def test_the_size_of_a_figure_leaves_no_holes():
    cams = CAMs(torch.rand(6, 2, 2), PICTURES[:6])
    for figsize, n_rows in (((12, 2.5), 1), ((6, 4), 2), ((2.5, 12), 6)):
        axs = cams.show(figsize=figsize)
        axs[0].figure.canvas.draw()
        assert len({round(place(ax).y0, 2) for ax in axs})==n_rows
        assert sum(place(ax).width*place(ax).height for ax in axs) > .6


def lines_of(text):
    "Where each line of a title is, but for blank ones: left, bottom, right, top"
    whole, lines = text.get_window_extent(), text.get_text().split('\n')
    for number, line in enumerate(lines):
        if not line.strip(): continue
        one = text.figure.text(0, 0, line, fontsize=text.get_fontsize())
        width, height = one.get_window_extent().width, whole.height/len(lines)
        one.remove()
        left = whole.x0 if text.get_ha()=='left' else (whole.x0 + whole.x1 - width)/2
        yield left, whole.y1 - height*(number + 1), left + width, whole.y1 - height*number


@pytest.mark.parametrize('figsize', [None, (12, 3), (5, 3.5), (4, 8)])
def test_titles_never_collide(figsize):
    name = 'American Staffordshire terrier, pit bull'
    cams = CAMs(torch.rand(4, 2, 3, 3), PICTURES[:4], torch.tensor([[0, 1]]*4), ['predicted', 'actual'], torch.tensor([[.9, .1]]*4), torch.tensor([1]*4), torch.ones(4), vocab=[name, name[::-1]])
    for some in (cams, cams[:, 0], cams[:1]):
        axs = some.show(figsize=figsize, loss=True)
        fig = axs[0].figure
        fig.canvas.draw()
        boxes = [box for ax in fig.axes for text in (ax.title, ax._left_title) for box in lines_of(text)]
        pictures = [(box.x0, box.y0, box.x1, box.y1) for box in (ax.get_window_extent() for ax in fig.axes)]
        def meet(a, b): return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1
        assert not any(meet(a, b) for i, a in enumerate(boxes) for b in boxes[:i] + pictures), figsize


# -- what marks mean

def test_outlines_of_a_mask_say_which_is_which():
    pred, actual = torch.zeros(1, 20, 20, dtype=torch.bool), torch.zeros(1, 20, 20, dtype=torch.bool)
    pred[:, 2:8, 2:8], actual[:, 10:16, 4:12] = True, True
    cams = CAMs(STRONG[None], PICTURES[:1], torch.tensor([1]), ['predicted'], torch.stack([~pred, pred], 1).float(), actual.long(), vocab=['ground', 'cell'], task='segmentation', regions=pred)
    ax, = cams.show()
    assert ax.figure.get_supxlabel()=='outline ━ (ticks inside): predicted   outline ╍: actual'
    lines = [c for c in ax.collections if np.allclose(c.get_edgecolor()[0], 1)]
    assert [tuple(np.concatenate([path.vertices for path in line.get_paths()]).min(0)) for line in lines]==[(1.5, 1.5), (3.5, 9.5)]
    assert [line.get_linestyle()[0][1] is None for line in lines]==[True, False] # the second is dashed
    cams.regions = ~pred # asked over a place of one's own: that alone is outlined
    ax, = cams.show()
    assert ax.figure.get_supxlabel()=='' and len(ax.collections)==2 and torch.equal(cams[0].region, ~pred[0]) and cams[0].outlines is None
    assert CAMs(STRONG[None], PICTURES[:1], torch.tensor([1]), regions=pred).show()[0].figure.get_supxlabel()=='' # of another task: nobody knows


def test_signed_maps_say_what_their_colours_mean():
    cams = CAMs(torch.stack([STRONG - 1, FAINT - 1]), PICTURES[:2], signed=True)
    assert cams.show()[0].figure.get_supxlabel()=='red raises the score, blue lowers it' and cams.show(signed=False)[0].figure.get_supxlabel()==''
    assert cams[:1].show()[0].figure.get_supxlabel()=='' and bars(cams[:1].show())[0].get_ylabel()=='red raises the score, blue lowers it'


def test_a_map_of_no_class_is_not_called_by_one():
    cams = two(['eigencam: predicted', 'gradcam: predicted'], ((0, 0),))
    assert [ax.get_title(loc='left').replace('\n', ' ').strip() for ax in cams.show()]==['▸ eigencam (the same for every class)', '▸ gradcam: predicted cat 0.90']
    one = CAMs(STRONG[None], PICTURES[:1], torch.tensor([0]), ['predicted'], torch.tensor([[.9, .1]]), vocab=VOCAB[:2])
    assert one[0].title=='predicted cat 0.90'
    one.method = ['eigencam'] # as maps that know their method have it
    assert one[0].title=='predicted cat 0.90 · map: eigencam (the same for every class)' and one.method_of()=='eigencam'


def test_the_share_of_the_score_that_the_strongest_places_carry(monkeypatch):
    assert carried(torch.tensor([[6., 1.], [1., 2.]]), .25)==.6 and carried(torch.tensor([[6., -2.]]), .5)==1.5 and carried(-STRONG) is None and carried(STRONG*float('nan')) is None
    cams = CAMs(torch.full((1, 10, 10), .5), PICTURES[:1])
    cams.maps[0, 0] = 5.5
    assert cams.show()[0].figure.get_supxlabel()==''
    class Facts: class_free, adds_up = False, True
    monkeypatch.setattr('fastai_cam.maps.cams.MethodFacts', Facts)
    ax, = cams.show()
    assert ax.figure.get_supxlabel()=='the strongest tenth of the places carries 55% of the score' and bars([ax])[0].get_ylabel()=='score per place'


def test_signed_volumes_say_what_their_colours_mean():
    "A grid of volumes has no bar, so the words stand below it, whatever the colours are"
    cams = CAMs(torch.tensor([1., -2., 3., 0.]).view(1, 1, 4, 1, 1).expand(2, 2, 4, 2, 2), n_space=3, labels=['a', 'b'], vocab=VOCAB, signed=True)
    def words(**kwargs): return ' '.join(text.get_text() for text in cams.show(colorbar=False, **kwargs)[0].figure.findobj(Text))
    assert 'red raises the score, blue lowers it' in words()
    assert 'the upper colours raise the score, the lower ones lower it' in words(cmap='PiYG')
