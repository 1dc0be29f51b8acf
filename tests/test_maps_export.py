"Maps as numbers, pictures and files, against values worked out by hand and against what matplotlib draws."
import io
import pickle
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.vision.all import CategoryBlock, CropPad, DataBlock, FlipItem, ImageBlock, Learner, RandomResizedCrop, Resize, get_image_files
from matplotlib import colormaps
from PIL import Image
from torch import nn

import fastai_cam.learner # adds get_cams to Learner
from fastai_cam.maps.cams import CAMs, Images
from fastai_cam.maps.draw import CAMMap
from fastai_cam.maps.export import as_bytes, blended
from fastai_cam.maps.pixels import to_pixels

WHERE = torch.tensor([[0., 1.], [.5, 0.]])
PICTURE = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))*.2 + .4


def drawn(cam_map, size=(40, 60), **kwargs):
    "The map as matplotlib renders it, one pixel a pixel of the picture"
    h, w = size
    fig = plt.figure(figsize=(w/100, h/100), dpi=100)
    cam_map.show(ax=fig.add_axes([0, 0, 1, 1]), title='', **kwargs)
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].astype(int)


# -- overlays

@pytest.mark.parametrize('style', ['overlay', 'heat', 'masked'])
@pytest.mark.parametrize('signed', [False, True])
def test_an_overlay_is_what_is_drawn(style, signed):
    "Interpolation apart: matplotlib resamples before it colours, and rounds its opacities"
    one = CAMMap(WHERE - .3*signed, PICTURE)
    for interpolation, most in (('nearest', 4), ('bilinear', 12)):
        apart = np.abs(np.asarray(one.overlay(style=style, signed=signed, interpolation=interpolation, contour=False)).astype(int) - drawn(one, style=style, signed=signed, interpolation=interpolation, contour=False))
        assert np.quantile(apart, .95) <= most and apart.mean() <= 3, (interpolation, apart.max())


def test_an_overlay_is_on_the_scale_of_its_map():
    full = np.asarray(CAMMap(WHERE, PICTURE).overlay(style='heat', cmap='viridis', interpolation='nearest'))
    half = np.asarray(CAMMap(WHERE, PICTURE, peak=2.).overlay(style='heat', cmap='viridis', interpolation='nearest'))
    rgb = lambda share: (np.array(colormaps['viridis'](share)[:3])*255).astype(int)
    assert np.abs(full[0, 59] - rgb(1.)).max() <= 1 and np.abs(half[0, 59] - rgb(.5)).max() <= 1 and np.abs(full[39, 0] - half[0, 59].astype(int)).max() <= 1


def test_the_line_at_half_strength_lies_where_the_map_is_half():
    step = torch.tensor([[1., 0.]])
    picture = as_bytes(to_pixels(PICTURE))
    lined, plain = (np.asarray(CAMMap(step, PICTURE).overlay(contour=contour)).astype(int) for contour in (None, False))
    changed = (np.abs(lined - plain).sum(-1) > 0).nonzero()[1]
    assert 27 <= changed.min() and changed.max() <= 31 and (lined[20, 29]==255).all() and (lined[20, [28, 30]]==0).all()
    assert np.array_equal(np.asarray(CAMMap(-step, PICTURE).overlay()), picture) and np.asarray(CAMMap(step, PICTURE).overlay(style='contour')).shape==(40, 60, 3)


def test_pictures_of_every_kind_have_an_overlay():
    for picture, size in ((PICTURE[0], (60, 40)), (PICTURE.permute(1, 2, 0).numpy(), (60, 40)), (Image.fromarray(as_bytes(to_pixels(PICTURE))), (60, 40)), ((PICTURE*255).byte(), (60, 40)), (None, (2, 2))):
        image = CAMMap(WHERE, picture).overlay()
        assert image.mode=='RGB' and image.size==size
    assert CAMMap(WHERE, PICTURE).overlay((80, 20)).size==(20, 80) and CAMMap(WHERE, PICTURE).overlay(style='side').size==(120, 40)
    rgba = torch.cat([PICTURE, torch.ones(1, 40, 60)])
    assert np.array_equal(np.asarray(CAMMap(WHERE, rgba).overlay()), np.asarray(CAMMap(WHERE, PICTURE).overlay()))


def test_a_map_that_is_not_finite_has_a_plain_overlay():
    bad = WHERE.clone()
    bad[0, 0] = float('nan')
    with pytest.warns(UserWarning, match='not finite'): image = CAMMap(bad, PICTURE).overlay()
    assert np.array_equal(np.asarray(image), as_bytes(to_pixels(PICTURE)))


@pytest.mark.parametrize('kwargs, message', [(dict(size='file'), "or 'original'"), (dict(size=(0, 3)), 'size is'), (dict(style='blend'), 'style is'), (dict(alpha=2), 'alpha'), (dict(cmap='hot-metal'), 'not known to matplotlib'),
                                             (dict(interpolation='gaussian'), "'bilinear' or 'nearest'"), (dict(size='original'), "this item is a NoneType")])
def test_what_is_no_overlay_is_refused(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message): CAMMap(WHERE, PICTURE).overlay(**kwargs)
    if 'size' in kwargs: return
    with pytest.raises(ValueError, match=message): CAMs(WHERE[None], [PICTURE]).save_all(tmp_path/'nowhere', **kwargs)
    assert not (tmp_path/'nowhere').exists()


# -- the file itself

class Sees(nn.Module):
    "A map that is the picture's own brightness, so that it is seen where it lands"
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.AvgPool2d(8)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        self.head[-1].weight.data.copy_(torch.tensor([[1., 1., 1.], [-1., -1., -1.]]))
    def forward(self, x): return self.head(self.body(x))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Two wide pictures, mottled, with one white spot: at x 200 to 230, y 20 to 50 of 300 × 160"
    folder, rng = tmp_path_factory.mktemp('photos'), np.random.default_rng(1)
    for i in range(2):
        picture = np.asarray(Image.fromarray(rng.integers(0, 60, (8, 15, 3), dtype=np.uint8)).resize((300, 160), Image.Resampling.BICUBIC)).copy()
        picture[20:50, 200:230] = 255
        Image.fromarray(picture).save(folder/f'{i}.png')
    return folder


def learner_of(photos, *item_tfms, batch_tfms=()):
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['a', 'b'])), get_items=get_image_files, get_y=lambda f: 'a', splitter=lambda files: (list(range(len(files))),)*2, item_tfms=list(item_tfms), batch_tfms=list(batch_tfms))
    return Learner(block.dataloaders(photos, bs=2, num_workers=0), Sees(), loss_func=nn.CrossEntropyLoss())


@pytest.mark.parametrize('tfms', [(Resize(80),), (Resize(80, method='squish'),), (Resize(80, method='pad', pad_mode='zeros'),), (Resize((80, 120)),), (CropPad(160),), (RandomResizedCrop(80),)],
                         ids=['crop', 'squish', 'pad', 'oblong', 'cropped only', 'random crop'])
def test_a_map_lies_on_its_file_where_it_lay_on_the_picture(photos, tfms):
    learn = learner_of(photos, *tfms)
    for file in sorted(photos.iterdir()):
        cam_map = learn.get_cams(file, cls='a', method='gradcam', layer='body')[0]
        image = cam_map.overlay('original', style='heat', cmap='gray', interpolation='nearest')
        light = np.asarray(image)[..., 0].astype(float)
        y, x = (light > .6*light.max()).nonzero() # the cells that the spot lies in
        assert image.size==(300, 160) and abs(x.mean() - 214.5) < 12 and abs(y.mean() - 34.5) < 12


def test_a_picture_that_is_not_found_in_its_file_is_refused(photos):
    flip = FlipItem(p=1.)
    flip.split_idx = None # in validation too
    file = photos/'0.png'
    cams = learner_of(photos, Resize(80), flip).get_cams(file, cls='a', layer='body')
    with pytest.raises(ValueError, match='not the file resized, cropped in the middle or padded'): cams[0].overlay('original')
    cams = learner_of(photos, Resize(80)).get_cams([file, Image.open(file)], cls='a', layer='body')
    assert cams[0].overlay('original').size==(300, 160)
    with pytest.raises(ValueError, match='needs the file of the picture'): cams[1].overlay('original')


# -- files

def test_the_maps_of_a_folder(tmp_path, recwarn):
    cams = CAMs(torch.stack([WHERE, WHERE/4])[None].repeat(2, 1, 1, 1), [PICTURE, PICTURE.flip(1)], torch.tensor([[0, 1], [1, 0]]), ['a/b: predicted', 'actual'], items=['x/one two.jpg', 7])
    files = cams.save_all(tmp_path/'new'/'folder', style='heat', cmap='viridis', interpolation='nearest')
    assert [file.name for file in files]==['0_one-two_a-b-predicted.png', '0_one-two_actual.png', '1_item_a-b-predicted.png', '1_item_actual.png'] and sorted(files)==sorted((tmp_path/'new'/'folder').iterdir())
    assert Image.open(files[0]).size==(60, 40) and Image.open(files[0]).getpixel((59, 0))==tuple(colormaps['viridis'](1., bytes=True)[:3])
    assert np.array_equal(np.asarray(Image.open(files[0])), np.asarray(cams[0, 0].overlay(style='heat', cmap='viridis', interpolation='nearest'))) and plt.get_fignums()==[]
    for wrong in (dict(title='x'), dict(boxes=True), dict(photo=True)):
        with pytest.raises(TypeError, match=f'there is no argument {next(iter(wrong))!r} here: the arguments are folder, size, scale, style'): cams.save_all(tmp_path, **wrong)
    with pytest.raises(ValueError, match='is a file: give the name of a folder'): cams.save_all(files[0])
    with pytest.raises(ValueError, match='these are volumes'): CAMs(torch.ones(1, 2, 2, 2), n_space=3).save_all(tmp_path)


def test_the_scales_of_a_folder(tmp_path):
    cams = CAMs(torch.stack([WHERE, WHERE/4])[None], [PICTURE], torch.tensor([[0, 1]]), ['one', 'two'])
    def brightest(**kwargs): return [np.asarray(Image.open(file)).max() for file in cams.save_all(tmp_path, style='heat', cmap='gray', interpolation='nearest', **kwargs)]
    assert brightest()==[255, 64] and brightest(scale='own')==[255, 255]


def test_pictures_are_read_once_a_few_at_a_time(tmp_path):
    read = []
    cams = CAMs(torch.ones(70, 2, 2), Images(lambda idxs: (read.append(len(idxs)), [PICTURE]*len(idxs))[1], range(70)))
    assert len(cams.save_all(tmp_path, size=(8, 8)))==70 and read==[64, 6]


# -- in notebooks

def test_maps_show_themselves_in_notebooks(tmp_path):
    cams = CAMs(torch.stack([WHERE]*6), [torch.rand(3, 300, 500)]*6, torch.zeros(6, dtype=torch.long), preds=torch.tensor([[.9, .1]]*6), vocab=['<b>"x"', 'y'])
    small = Image.open(io.BytesIO(cams[0]._repr_png_()))
    assert small.size==(224, 134) and len(cams[0]._repr_png_()) < 40_000
    html = cams._repr_html_()
    assert html.count('<img ')==4 and len(html) < 60_000 and '<b>' not in html and 'predicted &lt;b&gt;&quot;x&quot; 0.90' in html and 'CAMs: 6 items' in html
    assert cams[0].map.shape==(2, 2) and plt.get_fignums()==[]


def test_what_cannot_be_shown_is_words_in_notebooks():
    def gone(idxs): raise FileNotFoundError('gone')
    lost = CAMs(WHERE[None], Images(gone, [0]))
    assert lost._repr_html_() is None and CAMs(torch.ones(1, 2, 2, 2), [torch.rand(1, 2, 4, 4)], n_space=3)._repr_html_() is None and CAMMap(torch.ones(2, 2, 2))._repr_png_() is None
    assert CAMs(torch.ones(1, 2, 2, 2), labels=['a', 'b'])[0]._repr_html_() is None and pickle.loads(pickle.dumps(CAMMap(WHERE, PICTURE)))._repr_png_()


# -- numbers

def test_numbers_are_raw_and_of_a_type_that_numpy_knows():
    maps = torch.tensor([[[-1., 2.], [3., .5]]], dtype=torch.bfloat16, requires_grad=True)
    cams = CAMs(maps)
    assert cams.numpy().tolist()==maps.tolist() and cams.numpy().dtype==np.float32 and cams[0].numpy().tolist()==maps[0].tolist()
    two = CAMs(torch.rand(1, 2, 3, 4, dtype=torch.double))
    assert two[0].numpy().shape==(2, 3, 4) and two[0].numpy().dtype==np.float64 and np.array_equal(two.numpy()[0], two[0].numpy())


# -- figures in files

def test_a_figure_without_words_in_the_resolution_asked_for(tmp_path):
    cams = CAMs(torch.stack([WHERE]*2), [PICTURE]*2, torch.tensor([0, 0]), preds=torch.tensor([[.9, .1]]*2), vocab=['a', 'b'])
    axs = cams.show(save=tmp_path/'with.png', title='mine')
    shown = axs[0].get_title()
    still = cams.show(save=tmp_path/'without.png', dpi=300, text=False, title='mine')[0]
    a, b = (np.asarray(Image.open(tmp_path/f'{name}.png').convert('L')) for name in ('with', 'without'))
    assert abs(b.shape[1]/a.shape[1] - 2) < .1 and shown=='predicted a 0.90' and still.title.get_visible() and still.get_title()==shown
    margin = b.shape[0]//40 # the first ink is the pictures' own edge, which is as wide as all of it
    rows = (b < 250).mean(1)
    assert rows[rows > 0][margin] > .85 and (a < 250).mean(1)[(a < 250).mean(1) > 0][margin//2] < .5


@pytest.mark.parametrize('ending', ['pdf', 'svg'])
def test_words_stay_words_where_the_file_can_have_them(tmp_path, ending):
    file = tmp_path/f'map.{ending}'
    CAMMap(WHERE, PICTURE, 'hedgehog').show(save=file)
    content = file.read_bytes()
    if ending=='svg': assert b'>hedgehog</text>' in content and content.count(b'<image') >= 2
    else: assert b'/Type42' in content or b'/TrueType' in content or b'/CIDFontType2' in content
    CAMMap(WHERE, PICTURE, 'hedgehog').show(save=file, text=False)
    assert b'hedgehog' not in file.read_bytes()


def test_lines_of_overlays_are_those_of_figures():
    "Around what is strong, not around holes in it, and none where they would be a thicket"
    y, x = torch.meshgrid(torch.arange(120.), torch.arange(120.), indexing='ij')
    away = torch.hypot(x - 60, y - 60)
    ring, picture = (away - 36).abs().le(12).float(), torch.full((3, 120, 120), .5)
    def lined(values, **kwargs): return (np.asarray(CAMMap(values, picture).overlay(alpha=0, **kwargs)).astype(int) - 127 > 100).all(-1)
    line = lined(ring)
    assert line[60, 12:16].any() and not line[60, 34:40].any() and np.ptp(np.asarray(CAMMap(ring, picture).overlay(style='contour', contour=.5))[60, 34:40].astype(int)) > 50
    places = torch.zeros(120, 120)
    places[10::40, 10::40] = 1
    many = (torch.nn.functional.max_pool2d(places[None], 21, 1, 10))[0]
    assert not lined(many).any() and lined(many, contour=True).any() and lined(many*(y < 70)).any() # nine, and six


def test_an_empty_overlay_is_said(tmp_path):
    cams = CAMs(torch.stack([torch.ones(2, 2), -torch.ones(2, 2)]), [PICTURE]*2, items=['a.png', 'b.png'])
    with pytest.warns(UserWarning, match='nothing in the map speaks for what was asked, so the overlay is the plain picture: 1_b.png; show the other side with signed=True'): cams.save_all(tmp_path)
    with pytest.warns(UserWarning, match='the overlay is the plain picture: b.png'): CAMMap(-torch.ones(2, 2), PICTURE, item='b.png').overlay()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cams.save_all(tmp_path, signed=True), cams[0].overlay()


def test_a_class_that_is_asked_about_twice_has_two_files(tmp_path):
    cams = CAMs(torch.stack([torch.ones(1, 2, 2), 2*torch.ones(1, 2, 2)], 1), [PICTURE], items=['a.png'], labels=['cat', 'cat'])
    files = cams.save_all(tmp_path)
    assert [file.name for file in files]==['0_a_cat.png', '0_a_cat_2.png'] and all(file.exists() for file in files)
