"Where the places are: sequences beside grids, layers that are named, stacks of images. What is answered passes the test of alignment; the rest is refused."
import gc
import weakref

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from fastai_cam.probe.layers import EVERY_STAGE, EVIDENCE
from fastai_cam.probe.layout import find_layout, find_layouts
from fastai_cam.probe.watch import alignment, Probe
from fastai_cam.targets.kinds import ClassIndex


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


class Windows(nn.Module):
    "Columns of the image in sliding windows: any number of steps, perhaps a class token before them"
    def __init__(self, height=32, size=8, step=4, n_extra=0, axis=2):
        super().__init__()
        self.size, self.step, self.axis, self.extra = size, step, axis, nn.Parameter(torch.randn(1, n_extra, 16)*.02)
        self.e, self.t = nn.Linear(height*size, 16), nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True)
        self.steps, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 3)
    def forward(self, x):
        x = self.e((x[:, 0] if self.axis==2 else x[:, 0].mT).unfold(2, self.size, self.step).permute(0, 2, 1, 3).flatten(2))
        if not self.extra.shape[1]: return self.head(self.steps(x)[0].mean(1))
        return self.head(self.t(torch.cat([self.extra.expand(len(x), -1, -1), x], 1))[:, 0])


@pytest.mark.parametrize('width,n', [(64, 15), (100, 24), (128, 31), (256, 63)])
def test_windows_of_any_number_are_not_folded(width, n):
    torch.manual_seed(0)
    model, turned = Windows().eval(), Windows(axis=3).eval()
    for layer in ('e', 'steps', None):
        assert layout_of(model, lines(32, width), layer)==f'tokens, 1 × {n}'
        assert layout_of(turned, lines(width, 32), layer)==f'tokens, {n} × 1'


@pytest.mark.parametrize('width,n', [(64, 16), (100, 25), (144, 36), (256, 64)])
@pytest.mark.parametrize('n_extra', [1, 2])
def test_class_tokens_before_columns(width, n, n_extra):
    torch.manual_seed(0)
    model = Windows(size=4, n_extra=n_extra).eval()
    for layer in ('t', 't.norm1'): assert layout_of(model, lines(32, width), layer)==f'tokens, 1 × {n} after {n_extra} other{"s" if n_extra > 1 else ""}'


class Columns(nn.Module):
    "Convolutions, columns, a class token"
    def __init__(self): super().__init__(); self.body, self.cls, self.q, self.head = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)), nn.Parameter(torch.randn(1, 1, 16)), nn.TransformerEncoderLayer(16, 2, 32, dropout=0., batch_first=True), nn.Linear(16, 3)
    def forward(self, x):
        x = self.body(x).mean(2).mT
        return self.head(self.q(torch.cat([self.cls.expand(len(x), -1, -1), x], 1))[:, 0])


@pytest.mark.parametrize('height', [32, 48])
def test_a_class_token_before_the_columns_of_convolutions(height):
    torch.manual_seed(0)
    model = Columns().eval()
    for width in (40, 80, 128, 200): assert layout_of(model, lines(height, width), 'q')==f'tokens, 1 × {width//4} after 1 other'


class Ordered(nn.Module):
    "Patches in one of several orders"
    def __init__(self, order, cls=False): super().__init__(); self.order, self.patches, self.p, self.head, self.cls = order, nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(1, int(cls), 8))
    def forward(self, x):
        x = self.patches(x)
        if self.order=='columns': x = x.transpose(2, 3)
        if self.order=='snake': x = torch.stack([row if i%2 else row.flip(-1) for i, row in enumerate(x.unbind(2))], 2)
        if self.order=='flipped': x = x.flip(2)
        if self.order=='shuffled': x = x.flatten(2)[..., torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(3))]
        return self.head(self.p(torch.cat([self.cls.expand(len(x), -1, -1), x.flatten(2).mT], 1)).relu().mean(1))


@pytest.mark.parametrize('size', [(32, 32), (64, 32), (36, 64), (64, 64)])
@pytest.mark.parametrize('cls', [False, True])
def test_tokens_in_another_order_than_their_grid_are_refused(size, cls):
    torch.manual_seed(0)
    for order in ('columns', 'flipped', 'shuffled', 'snake')[:4 - size[0]//4%2]: # of an odd number of rows, most run one way
        model = Ordered(order, cls).eval()
        assert 'could not be told' in layout_of(model, lines(*size), 'p')
        assert layout_of(model, lines(*size)).startswith('channels first')
    grid = f'{size[0]//4} × {size[1]//4}'
    for layer in ('p', None): assert layout_of(Ordered('rows', cls).eval(), lines(*size), layer)==f'tokens, {grid}' + ' after 1 other'*cls


def test_the_order_of_a_model_is_looked_at_once():
    torch.manual_seed(0)
    model, calls = Ordered('rows').eval(), []
    model.patches.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    def n_calls():
        calls.clear()
        with Probe(model, 'p') as p: p(lines(32, 32))
        return len(calls)
    assert [n_calls(), n_calls()]==[7, 2] # the pass and the survey; once, one item undisturbed and with four disturbances


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
    from fastai_cam.maps.pixels import upsample
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


class Pooled(nn.Module):
    "Channels last on a grid that a pooling made"
    def __init__(self): super().__init__(); self.l, self.act = nn.Linear(12, 12), nn.ReLU()
    def forward(self, x): return self.act(self.l(nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), (2, 3)).permute(0, 2, 3, 1)))


class ChannelsLast(nn.Module):
    def __init__(self): super().__init__(); self.b, self.blk, self.fc, self.norm, self.same, self.head = nn.Conv2d(3, 12, 4, 4), Pooled(), nn.Linear(12, 12), nn.LayerNorm(12), nn.Identity(), nn.Linear(12, 3)
    def forward(self, x): return self.head(self.same(self.norm(self.fc(self.blk(self.b(x).permute(0, 2, 3, 1))))).mean((1, 2)))


@pytest.mark.parametrize('size,grid', [((48, 48), (6, 4)), ((32, 96), (4, 8)), ((48, 36), (6, 3))])
def test_channels_last_on_a_grid_of_a_pooling(size, grid):
    torch.manual_seed(0)
    model, x = ChannelsLast().eval(), torch.randn(2, 3, *size)
    for layer in ('blk', 'blk.l', 'fc', 'norm', 'same'): assert layout_of(model, x, layer)==f'channels last, {grid[0]} × {grid[1]}'


@pytest.mark.parametrize('pool', [(4, 2), (8, 1), (2, 2)])
def test_a_body_that_ends_in_a_pooling_before_a_sequence(pool):
    "Also where the sequence is as long as the grid is wide"
    class Text(nn.Module):
        def __init__(self): super().__init__(); self.body, self.steps, self.head = nn.Sequential(*conv(1, 8), nn.MaxPool2d(2), *conv(8, 8), nn.MaxPool2d(pool)), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)
        def forward(self, x): return self.head(self.steps(self.body(x).mean(2).mT)[0].mean(1))
    torch.manual_seed(0)
    height, width = 32//2//pool[0], 64//2//pool[1]
    for layer in ('body', 'body.5'): assert layout_of(Text().eval(), lines(32, 64), layer)==f'channels first, {height} × {width}'


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


class OneByOne(Clip):
    def forward(self, x): return self.head(torch.stack([self.body(frame).mean((2, 3)) for frame in x.unbind(1)], 1).mean(1))


@pytest.mark.parametrize('layer', [None, 'body', 'body.0'])
def test_frames_that_run_one_by_one(layer):
    for frames in (2, 4, 5): assert 'frames' in (said := layout_of(OneByOne(), torch.randn(2, frames, 3, 8, 12), layer)) and 'one by one' in said


@pytest.mark.parametrize('frames', [2, 3, 6])
@pytest.mark.parametrize('layer', [None, 'body.0'])
def test_frames_that_are_turned_for_a_conv3d(frames, layer):
    clips = torch.randn(2, frames, 3, 8, 12)
    assert 'turn them before the model' in layout_of(Turned(), clips, layer)
    with Probe(Turned(turn=False), layer) as p: assert p(clips.transpose(1, 2)).acts[0].shape==(2, 4, frames, 4, 6)


# -- what a scan has shown is remembered where no picture could decide otherwise

def stages(n=10):
    block = lambda c_in, c_out, stride: nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.ReLU(), nn.Conv2d(c_out, c_out, 3, 1, 1))
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(block(3, 5, 1), block(5, 7, 2), block(7, 11, 2)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(11, n))).eval()


def counting(model, n):
    "A hook that notes how many items each pass has; no stranger's, as `foreign_hooks` tells them"
    def count(module, inputs): n.append(len(inputs[0]))
    count.__module__ = 'fastai_cam.probe.test'
    return model.register_forward_pre_hook(count)


def rows_of(model, layers, x=None):
    "How many items each pass of a probe had, and the layers it took"
    n, x = [], torch.rand(3, 3, 32, 32) if x is None else x
    handle = counting(model, n)
    with Probe(model, layers) as probe:
        cap = probe(x)
    handle.remove()
    return sorted(n), cap.names, [tuple(act.shape[1:]) for act in cap.acts]


def test_a_network_whose_shapes_decide_is_looked_at_once():
    model = stages()
    first, second = rows_of(model, EVIDENCE), rows_of(model, EVIDENCE)
    assert (first[0], second[0])==([1, 3], [3]) and first[1:]==second[1:]==(['0.1', '0'], [(7, 16, 16), (11, 8, 8)])
    assert rows_of(model, EVERY_STAGE)[0]==[1, 3], 'another question'
    assert rows_of(model, EVIDENCE, torch.rand(3, 3, 48, 32))[0]==[1, 3], 'another size'


def test_what_is_remembered_of_a_model_ends_with_its_modules():
    model = stages()
    rows_of(model, EVIDENCE)
    model[0][2] = nn.Sequential(nn.Conv2d(7, 11, 3, 1, 1), nn.ReLU()) # no smaller than the one before
    assert rows_of(model, EVIDENCE)==([1, 3], ['0.0', '0'], [(5, 32, 32), (11, 16, 16)])


def test_a_changed_stride_gets_another_look():
    model = stages()
    rows_of(model, EVIDENCE)
    model[0][2][0].stride = (1, 1)
    assert rows_of(model, EVIDENCE)==([1, 3], ['0.0', '0'], [(5, 32, 32), (11, 16, 16)])
    assert rows_of(model, EVIDENCE)[0]==[3]


class Told(nn.Module):
    "Which layer is the last depends on a flag, on an argument, or on another `forward`"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.head, self.late = nn.Conv2d(3, 5, 3, 1, 1), nn.Conv2d(5, 5, 3, 1, 1), nn.Conv2d(5, 5, 3, 1, 1), nn.Linear(5, 2), False
    def forward(self, x, deep=False):
        x = self.a(x)
        return self.head((self.c(self.b(x)) if self.late or deep else self.b(self.c(x))).mean((2, 3)))


@pytest.mark.parametrize('change', ['flag', 'argument', 'forward'])
def test_what_is_remembered_is_of_what_a_model_was_told(change):
    model, x, named = Told().eval(), torch.rand(2, 3, 16, 16), {}
    def last(**named):
        with Probe(model, EVERY_STAGE) as probe: return probe(x, **named).names
    assert [last(), last()]==[['b']]*2
    if change=='flag': model.late = True
    if change=='argument': named = dict(deep=True)
    if change=='forward': model.forward = lambda x: model.head(model.c(model.b(model.a(x))).mean((2, 3)))
    assert last(**named)==['c'] and last(**named)==['c']


def test_the_same_modules_under_other_names():
    model = stages()
    rows_of(model, EVIDENCE)
    model[0]._modules = {f'part{name}': part for name, part in model[0]._modules.items()}
    assert rows_of(model, EVIDENCE)[1]==['0.part1', '0']


class Sides: step = None
HIDDEN = [None] # of the module, not of a model


def test_another_shape_than_was_remembered_gets_another_look():
    class Listed(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = stages()[0], nn.Linear(11, 2)
        def forward(self, x): return self.head((self.body(x) if HIDDEN[0] is None else self.body(x[..., ::2, ::2])).mean((2, 3)))
    model = Listed().eval()
    rows_of(model, EVIDENCE)
    HIDDEN[0] = 2 # what is outside of a model is not compared
    try: assert rows_of(model, EVIDENCE)==([1, 3, 3], ['body.1', 'body'], [(7, 8, 8), (11, 4, 4)]), 'tried, looked again, and run again'
    finally: HIDDEN[0] = None


def test_maps_are_the_same_whether_the_layers_are_remembered_or_not():
    model, x = stages(), torch.rand(3, 3, 32, 32)
    def maps():
        with Probe(model, EVIDENCE) as probe:
            cap = probe(x)
            return [grad.clone() for grad in cap.grads(cap.score(ClassIndex(3)))]
    for before, after in zip(maps(), maps(), strict=True): assert torch.equal(before, after)


class Branches(nn.Module):
    "Of three classes the first depends on the first block of tokens alone, the last on the second as well; or all on both"
    def __init__(self, are_parted=True):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.a, self.b, self.are_parted = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 8), are_parted
        self.first, self.second = nn.Linear(8, 2), nn.Linear(8, 1)
    def forward(self, x):
        early = self.a(self.patches(x).flatten(2).mT).relu()
        late = early + self.b(early).relu()
        return torch.cat([self.first((early if self.are_parted else late).mean(1)), self.second(late.mean(1))], 1)


def names_of(model, x, cls=None, **named):
    "Layer that is found for a question, and how many items each pass had"
    n, asks = [], None if cls is None else lambda out: out[:, cls]
    handle = counting(model, n)
    with Probe(model, asks=asks) as probe: names = probe(x, **named).names
    handle.remove()
    return names, sorted(n)


@pytest.mark.parametrize('first', [None, 0, 2])
def test_tokens_are_looked_at_once_where_every_question_has_the_same_answer(first):
    model, x = Branches(are_parted=False).eval(), torch.rand(3, 3, 24, 32)
    looked = names_of(model, x, first)
    assert looked[0]==['b'] and set(looked[1][:-1])=={1} and looked[1][-1]==3
    for cls in (None, 0, 1, 2): assert names_of(model, x, cls)==(['b'], [3])


@pytest.mark.parametrize('does', ['other shape', 'raises'])
def test_what_a_model_makes_of_disturbed_places_is_its_own_affair(does):
    class Chooses(Branches):
        def forward(self, x):
            tokens = self.b(self.a(self.patches(x).flatten(2).mT))
            if float(tokens.std()) > 1.2*self.usual and does=='raises': raise IndexError('no such thing')
            n = int(10/(1 + abs(float(tokens.std()) - self.usual)))
            return self.first(tokens.mean(1)).repeat(1, n)
    model, x = Chooses().eval(), torch.rand(3, 3, 24, 32)
    with torch.no_grad(): model.usual = float(model.b(model.a(model.patches(x[:1]).flatten(2).mT)).std())
    assert names_of(model, x)[0]==['b']


@pytest.mark.parametrize('order', [(None, 0, 2), (2, 0, None), (0, 2, 0)])
def test_tokens_of_branches_are_looked_at_for_each_question(order):
    model, x, layers = Branches().eval(), torch.rand(3, 3, 24, 32), {None: 'b', 0: 'a', 2: 'b'}
    for cls in (*order, *order):
        names, passes = names_of(model, x, cls)
        assert names==[layers[cls]] and len(passes) > 1, 'another class may depend on another layer'


@pytest.mark.parametrize('change', ['one weight', 'sign', 'order', 'order in rows', 'integers', 'complex', 'attribute', 'list', 'object', 'kind', 'hook'])
def test_tokens_of_other_weights_get_another_look(change):
    model, x = Branches(are_parted=False).eval(), torch.rand(3, 3, 24, 32)
    model.gates, model.told, model.said = torch.ones(2), [dict(deep=[True])], Sides() # no buffer
    model.said.deep = dict(er={1, 2}, array=[np.arange(3)])
    model.register_buffer('count', torch.tensor([1, 2, 3]))
    model.register_buffer('phase', torch.tensor([1j, 2]))
    names_of(model, x)
    assert names_of(model, x)==(['b'], [3])
    with torch.no_grad():
        if change=='one weight': model.b.bias.data[0] += 1e-3
        if change=='sign': model.b.weight.neg_()
        if change=='order': model.b.weight.copy_(model.b.weight.flip(0))
        if change=='order in rows': model.b.weight.copy_(model.b.weight.flip(1))
        if change=='integers': model.count += 1
        if change=='complex': model.phase *= 1j
        if change=='attribute': model.gates *= 2
        if change=='list': model.told[0]['deep'][0] = False
        if change=='object': model.said.deep['er'].add(3)
        if change=='kind': model.__class__ = type('Other', (Branches,), {})
        if change=='hook': model.b.register_forward_hook(lambda module, inputs, out: 0*out)
    names, passes = names_of(model, x)
    assert len(passes) > 1 and names==(['a'] if change=='hook' else ['b']) and names_of(model, x)==(names, [3])
    with torch.no_grad(): model.b.weight.zero_(); model.b.bias.fill_(-1)
    assert names_of(model, x)[0]==['a'], 'nothing depends on it any more'


def test_tokens_whose_order_is_in_doubt_are_looked_at_each_time():
    torch.manual_seed(0)
    model, x = Ordered('rows').eval(), lines(32, 32)
    passes = [rows_of(model, EVIDENCE, x)[0] for _ in range(3)]
    assert passes[1]==passes[2]==[len(x)]


@pytest.mark.parametrize('error', [NotImplementedError, TypeError, ValueError, RuntimeError])
def test_weights_that_cannot_be_read_are_not_remembered(monkeypatch, error):
    import fastai_cam.probe.finder as finder
    model, x = Branches(are_parted=False).eval(), torch.rand(3, 3, 24, 32)
    def packed(*args, **kwargs): raise error('packed')
    monkeypatch.setattr(torch.linalg, 'vector_norm', packed)
    assert finder._weights(model) is None
    names_of(model, x)
    assert len(names_of(model, x)[1]) > 1
    monkeypatch.undo()
    assert torch.isfinite(finder._weights(model.half())).all()
    model.lazy = nn.LazyLinear(3) # which has no numbers yet
    assert finder._weights(model) is None


def test_what_is_remembered_keeps_no_model_alive():
    model = stages()
    model.forward = model.forward # a bound method, which holds the model
    rows_of(model, EVIDENCE)
    dies = weakref.ref(model)
    del model.forward, model
    gc.collect()
    assert dies() is None
