"Where the places are: sequences beside grids, layers that are named, stacks of images. What is answered passes the test of alignment; the rest is refused."
import pytest
import torch
import torchvision
from torch import nn

from fastai_cam.layout import find_layout, find_layouts
from fastai_cam.probe import Probe, Survey, alignment


def conv(i, o): return [nn.Conv2d(i, o, 3, 1, 1), nn.ReLU()]


class Reader(nn.Module):
    "Convolutions over a line of text or a spectrogram, pooled along one axis, then a sequence"
    def __init__(self, kind='linear', axis=2, width=8):
        super().__init__()
        self.kind, self.axis = kind, axis
        self.body = nn.Sequential(*conv(1, width), nn.MaxPool2d(2), *conv(width, width), nn.MaxPool2d((2, 1) if axis==2 else (1, 2)), *conv(width, width))
        if kind=='conv1d': self.steps = nn.Sequential(nn.Conv1d(width, width, 3, 1, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, 2, 1))
        if kind=='lstm': self.steps = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        if kind=='gru': self.steps = nn.GRU(width, width, batch_first=True)
        if kind=='transformer': self.steps = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 16, dropout=0., batch_first=True), 2, enable_nested_tensor=False)
        if kind=='linear': self.steps = nn.Linear(width, width)
        self.head = nn.Linear(2*width if kind=='lstm' else width, 5)
    def forward(self, x):
        x = self.body(x).mean(self.axis)
        if self.kind=='conv1d': return self.head(self.steps(x).mT)
        x = self.steps(x.mT)
        return self.head(x[0] if isinstance(x, tuple) else x)


def layout_of(model, x, layer=None):
    "The layout of a layer, which has to pass the test of alignment; the words of the refusal"
    try:
        with Probe(model, layer) as p: found = p(x).layouts[0]
    except ValueError as e: return str(e)
    assert alignment(model, x, layer=layer).argmax(1).tolist()==[0, 1, 2, 3], (layer, tuple(x.shape), found)
    return str(found)


def reader(*args, **kwargs):
    torch.manual_seed(0)
    return Reader(*args, **kwargs).eval()


def lines(height, width): return torch.randn(2, 1, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('kind,layer', [('linear', 'steps'), ('linear', 'head'), ('lstm', 'steps'), ('gru', 'steps'), ('transformer', 'steps.layers.0'), ('conv1d', 'steps.0'),
                                        ('conv1d', 'steps.1'), ('conv1d', 'steps.2')])
def test_columns_of_a_line_of_text(kind, layer):
    model = reader(kind)
    kind_of = 'tokens last' if kind=='conv1d' else 'tokens'
    for width in (24, 32, 48, 50, 64, 72, 96): assert layout_of(model, lines(32, width), layer)==f'{kind_of}, 1 × {width//2}'


@pytest.mark.parametrize('height', [32, 49, 64])
def test_rows_of_a_spectrogram(height):
    model = reader(axis=3)
    assert layout_of(model, lines(height, 40), 'steps')==f'tokens, {height//2} × 1'


def test_a_square_image_does_not_say_which_way_the_sequence_goes():
    assert [layout_of(reader(axis=axis), lines(32, 32), 'steps') for axis in (2, 3)]==['tokens, 1 × 16', 'tokens, 16 × 1']


def test_no_length_is_folded():
    model = reader()
    for width in range(16, 97, 4): assert layout_of(model, lines(32, width), 'steps')==f'tokens, 1 × {width//2}'


def test_without_a_name_a_layer_with_both_sides_is_found():
    for kind in ('linear', 'lstm', 'conv1d'):
        with Probe(reader(kind)) as p: assert (cap := p(lines(32, 64))).layouts[0].kind=='channels first' and cap.layouts[0].grid==(8, 32)


class Frequencies(nn.Module):
    "Conv1d over time; the frequencies of the spectrogram are its channels"
    def __init__(self, width=24, stride=1):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv1d(32, width, 3, stride, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, 1, 1)), nn.Linear(width, 3)
    def forward(self, x): return self.head(self.body(x[:, 0]).mean(-1))


@pytest.mark.parametrize('time', [24, 25, 32, 36, 49, 64])
@pytest.mark.parametrize('width', [12, 16, 24, 36])
def test_channels_of_a_conv1d_are_no_places(time, width):
    torch.manual_seed(0)
    model = Frequencies(width).eval()
    for layer in (None, 'body.0', 'body.1', 'body.2', 'body.3'): assert layout_of(model, lines(32, time), layer)==f'tokens last, 1 × {time}'


def test_strides_over_time():
    torch.manual_seed(0)
    assert layout_of(Frequencies(24, stride=2).eval(), lines(32, 49))=='tokens last, 1 × 25'


class TimeFirst(nn.Module):
    "Steps before the batch, as recurrent layers have it by default"
    def __init__(self): super().__init__(); self.body, self.steps, self.head = nn.Sequential(*conv(1, 8)), nn.LSTM(8, 8), nn.Linear(8, 5)
    def forward(self, x): return self.head(self.steps(self.body(x).mean(2).permute(2, 0, 1))[0])


@pytest.mark.parametrize('n', [2, 16])
def test_time_before_the_batch_is_refused(n):
    "Also where there are as many steps as items"
    said = layout_of(TimeFirst().eval(), torch.randn(n, 1, 8, 16), 'head')
    assert 'time before the batch' in said if n==2 else 'could not be told' in said or 'not spatial' in said


def test_what_does_not_depend_on_where_is_refused():
    class Queries(nn.Module): # as many queries as the grid has columns
        def __init__(self): super().__init__(); self.body, self.q, self.mix, self.head = nn.Sequential(*conv(1, 8)), nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 8), nn.Linear(8, 1)
        def forward(self, x): return self.head(self.mix(self.q + self.body(x).mean((2, 3))[:, None]))[..., 0]
    torch.manual_seed(0)
    assert 'could not be told' in layout_of(Queries().eval(), lines(8, 16), 'mix')
    assert layout_of(Queries().eval(), lines(8, 16))=='channels first, 8 × 16'


def test_readings_of_a_shape():
    assert [str(layout) for layout in find_layouts((2, 16, 8), (32, 64), [(32, 64), (4, 16)])]==['tokens, 2 × 8', 'tokens, 1 × 16', 'tokens, 16 × 1']
    assert find_layout((2, 16, 8), (32, 64), [(32, 64), (4, 16)]) is None
    assert str(find_layout((2, 197, 768), (224, 224), [(14, 14)]))=='tokens, 14 × 14 after 1 other'


def test_the_map_of_a_sequence_is_drawn_over_the_whole_image():
    from fastai_cam.maps import upsample
    with Probe(reader(), 'steps') as p: cap = p(lines(32, 64))
    grads = cap.grads(lambda out: out[:, 12, 2])[0]
    assert grads.shape==(2, 8, 1, 32) and grads.abs().sum((0, 1, 2)).nonzero().flatten().tolist()==[12]
    drawn = upsample(grads.abs().sum(1), (32, 64))
    assert drawn.shape==(2, 32, 64) and torch.equal(drawn[:, 0], drawn[:, 31]) and drawn[0, 0].argmax().item() in (24, 25)


# -- layers that are named

@pytest.mark.parametrize('size', [96, 160, 224])
def test_a_pooling_makes_a_grid_of_its_own(size):
    model = torchvision.models.vgg11(init_weights=False)
    with Probe(model, 'avgpool') as p: assert str(p(torch.randn(1, 3, size, size)).layouts[0])=='channels first, 7 × 7'


@pytest.mark.parametrize('grid', [(3, 9), (5, 5), (1, 6), (8, 2)])
def test_any_grid_that_is_named(grid):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AdaptiveAvgPool2d(grid), nn.Identity(), nn.Flatten(), nn.Linear(4*grid[0]*grid[1], 2))
    for layer in ('1', '2'):
        with Probe(model, layer) as p: assert p(torch.randn(2, 3, 32, 48)).acts[0].shape==(2, 4, *grid)


# -- stacks of images

class Clip(nn.Module):
    def __init__(self): super().__init__(); self.body, self.head = nn.Sequential(*conv(3, 4)), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.body(x.flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))


class Pair(Clip):
    def forward(self, x, y):
        a, b = self.body(torch.cat([x, y])).mean((2, 3)).chunk(2)
        return self.head(a*b)


class Turned(nn.Module):
    def __init__(self, turn=True): super().__init__(); self.turn, self.body, self.head = turn, nn.Sequential(nn.Conv3d(3, 4, 3, (1, 2, 2), 1), nn.ReLU()), nn.Linear(4, 2)
    def forward(self, x): return self.head(self.body(x.transpose(1, 2) if self.turn else x).mean((2, 3, 4)))


@pytest.mark.parametrize('n,frames', [(2, 6), (3, 3), (1, 4)])
def test_images_that_run_as_one_batch(n, frames):
    clips = torch.randn(n, frames, 3, 8, 12)
    assert 'runs several images of an item in one batch' in layout_of(Clip(), clips)
    assert f'{n*frames} rows for {n} items' in layout_of(Clip(), clips, 'body')
    with Probe(Pair()) as p, pytest.raises(ValueError, match='several images of an item in one batch'): p(clips[:, 0], clips[:, 1])


@pytest.mark.parametrize('frames', [2, 3, 6])
@pytest.mark.parametrize('layer', [None, 'body.0'])
def test_frames_that_are_turned_for_a_conv3d(frames, layer):
    clips = torch.randn(2, frames, 3, 8, 12)
    assert 'turn them before the model' in layout_of(Turned(), clips, layer)
    with Probe(Turned(turn=False), layer) as p: assert p(clips.transpose(1, 2)).acts[0].shape==(2, 4, frames, 4, 6)
