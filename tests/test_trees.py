"What holds tensors keeps its type, in outputs, between modules and in inputs; and how many items there are is what the inputs say."
import gc
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
import enum
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
import torch.nn.functional as F
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL
from fastcore.foundation import L

from fastai_cam.trust.verdict import CAMTrust
from fastai_cam.interpret import CAMInterpretation
from fastai_cam.methods.registry import as_method
from fastai_cam.probe.watch import Probe
from fastai_cam.core import map_tensors, tensors_in
from fastai_cam.targets.lookup import as_target, Output, Versus

pytestmark = pytest.mark.usefixtures('maps_by_gradcam') # these tests are about what is asked, not about how maps are made


class Attributes(OrderedDict):
    "A dict that answers to names, and raises what it likes"
    def __getattr__(self, key): return self[key]

class Bunch(dict):
    "A dict that is its own `__dict__`"
    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self

class Locked(dict):
    "A dict that nobody may write to"
    def __setitem__(self, key, value): raise TypeError('locked')

@dataclass
class Found(OrderedDict):
    "A dict whose items are fields as well"
    emb: Tensor|None = None
    logits: Tensor|None = None
    loss: Tensor|None = None
    def __post_init__(self):
        for name in ('emb', 'logits', 'loss'):
            if vars(self)[name] is not None: OrderedDict.__setitem__(self, name, vars(self)[name])
    def __delitem__(self, key): raise TypeError('not from here')

Pair = namedtuple('Pair', 'emb logits')
class Strict(Pair):
    "A namedtuple that is made in its own way"
    def __new__(cls, both): return super().__new__(cls, *both)

@dataclass(frozen=True)
class Frozen:
    emb: Tensor
    logits: Tensor
    note: str = 'none'

@dataclass(slots=True)
class Slots:
    emb: Tensor
    logits: Tensor

class Plain:
    "An object that counts how often it was made"
    n_made = 0
    def __init__(self, emb, logits):
        Plain.n_made += 1
        self.emb, self.logits, self.of = emb, logits, nn.Linear(1, 1)

class Refusal(Exception):
    def __init__(self, emb, logits): self.emb, self.logits = emb, logits

class Hidden:
    "Tensors two levels down, under names with a property in front"
    def __init__(self, emb, logits): self._fields = dict(inner=Plain(emb, logits))
    @property
    def emb(self): return self._fields['inner'].emb
    @property
    def logits(self): return self._fields['inner'].logits


KINDS = {'dict': lambda f, z: dict(emb=f, logits=z), 'attributes': lambda f, z: Attributes(emb=f, logits=z), 'bunch': lambda f, z: Bunch(emb=f, logits=z),
         'locked': lambda f, z: Locked(emb=f, logits=z), 'found': lambda f, z: Found(f, z), 'user dict': lambda f, z: UserDict(emb=f, logits=z), 'namedtuple': Pair,
         'strict': lambda f, z: Strict((f, z)), 'frozen': Frozen, 'slots': Slots, 'namespace': lambda f, z: SimpleNamespace(emb=f, logits=z), 'error': Refusal, 'plain': Plain, 'hidden': Hidden}
def part(out, name): return out[name] if isinstance(out, (dict, UserDict)) else getattr(out, name)
def plus_one(t): return t + 1


@pytest.mark.parametrize('kind', KINDS)
def test_a_copy_is_of_the_same_type_and_the_original_stays(kind):
    f, z = torch.tensor([1., 2.]), torch.tensor([3.])
    out = KINDS[kind](f, z)
    made, Plain.n_made = Plain.n_made, 0
    new = map_tensors(plus_one, [out, None, 'a', 3])
    assert Plain.n_made==0 and type(new[0]) is type(out) and new[0] is not out and new[1:]==[None, 'a', 3]
    assert part(new[0], 'emb').tolist()==[2, 3] and part(new[0], 'logits').tolist()==[4]
    assert part(out, 'emb') is f and part(out, 'logits') is z
    assert [id(t) for t in tensors_in(out)]==[id(f), id(z)]


def test_items_that_are_attributes_too_stay_one_thing():
    for kind in (Bunch, Found):
        new = map_tensors(plus_one, kind(emb=torch.ones(2), logits=torch.zeros(1)))
        assert new.emb is new['emb'] and new.emb.tolist()==[2, 2] and list(new)==['emb', 'logits']
    assert map_tensors(plus_one, Found(logits=torch.ones(1))).loss is None


def test_shared_and_circular_references():
    shared = torch.ones(1)
    ring = Plain(shared, [shared])
    ring.me, ring.pair = ring, (ring, 5)
    new = map_tensors(plus_one, ring)
    assert new.me is new and new.pair[0] is new and new.pair[1]==5 and new.logits[0] is new.emb and new.of is ring.of
    assert ring.emb is shared and len(tensors_in(ring))==1 and len(tensors_in([shared, shared]))==2


def test_a_namespace_that_refers_to_itself():
    ring = SimpleNamespace(emb=torch.ones(1))
    ring.me, ring.rest = ring, [ring, 5]
    new = map_tensors(plus_one, ring)
    assert new.me is new and new.rest[0] is new and new.rest[1]==5 and new.emb==2 and ring.emb==1 and ring.me is ring


def test_what_is_special_about_a_container_stays():
    lists = defaultdict(list, a=torch.ones(1))
    new = map_tensors(plus_one, lists)
    assert new['a']==2 and new['b']==[] and 'b' not in lists
    assert map_tensors(plus_one, deque([torch.ones(1)], maxlen=2)).maxlen==2
    most = map_tensors(plus_one, torch.max(torch.zeros(2, 3), 1))
    assert type(most) is torch.return_types.max and most.values.tolist()==[1, 1]
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    assert type(map_tensors(plus_one, packed)) is type(packed) and map_tensors(plus_one, packed).data.sum()==8
    assert type(map_tensors(plus_one, L(torch.ones(1), 2))) is L
    assert map_tensors(plus_one, torch.distributions.Normal(torch.zeros(2), torch.ones(2))).mean.tolist()==[1, 1]


class Colour(enum.Enum): RED = 1

def test_what_holds_no_tensor_is_handed_on_as_it_is():
    for thing in (nn.Linear(2, 2), Plain, Colour.RED, lambda x: x, torch, object(), {1, 2}, dict(a=1), [1, [2]], (1,), range(3), torch.Size([2])):
        assert map_tensors(plus_one, thing) is thing and not tensors_in(thing)


# --- models whose outputs, inner outputs and inputs are such things: the maps are those of the same model with plain tensors

class Wraps(nn.Module):
    "A part that returns its activation in something"
    def __init__(self, make): super().__init__(); self.conv, self.make = nn.Conv2d(8, 8, 1), make
    def forward(self, x): return self.make(self.conv(x), x.mean((2, 3)))


class Net(nn.Module):
    def __init__(self, inner=Plain, outer=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.mid, self.head, self.outer = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)), Wraps(inner), nn.Linear(8, 3), outer
    def forward(self, x):
        f = part(self.mid(self.body(x)), 'emb').relu()
        z = self.head(f.mean((2, 3)))
        return z if self.outer is None else self.outer(f.mean((2, 3)), z)


def learner(model, items=None, loss=None, n_inp=1):
    generator = torch.Generator().manual_seed(1)
    items = items or [(torch.randn(3, 16, 24, generator=generator), torch.tensor(i%3)) for i in range(5)]
    dls = DataLoaders(*[TfmdDL(items, bs=3, num_workers=0, n_inp=n_inp) for _ in range(2)])
    learn = Learner(dls, model, loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


METHODS = ['gradcam', 'ablationcam', 'scorecam', 'gradcam+tta', 'fullgrad', 'layercam+stages']
@pytest.fixture(scope='module')
def expected(): return {method: learner(Net()).get_cams(cls=1, method=method).maps for method in METHODS}


@pytest.mark.parametrize('kind', KINDS)
def test_models_that_return_such_things_inside_and_out(kind, expected):
    learn = learner(Net(KINDS[kind], KINDS[kind]), loss=lambda out, y, **kwargs: F.cross_entropy(part(out, 'logits'), y, **kwargs))
    for cls in (lambda out: part(out, 'logits')[:, 1], Output('logits', 1)):
        for method in METHODS: assert torch.allclose(learn.get_cams(cls=cls, method=method).maps, expected[method], atol=1e-6), method
    for layer in ('body.1', 'mid.conv'): assert torch.allclose(learn.get_cams(cls=cls, method='ablationcam', layer=layer).maps, learner(Net()).get_cams(cls=1, method='ablationcam', layer=layer).maps, atol=1e-6)
    with pytest.raises(ValueError, match='the model has no output .nothing.: they are .*emb|they are .inner|they are its parts'): learn.get_cams(0, cls=Output('nothing', 1))
    with pytest.raises(ValueError, match=r'Output\(part, class\)'): learn.get_cams(0)


@pytest.mark.parametrize('kind', ['dict', 'attributes', 'found', 'namedtuple', 'frozen', 'slots', 'plain'])
@pytest.mark.parametrize('method', ['gradcam', 'scorecam', 'fullgrad', 'guided_backprop'])
def test_models_that_take_such_things(kind, method):
    class Takes(Net):
        def forward(self, inputs): return super().forward(part(inputs, 'emb')) + part(inputs, 'logits')
    class Apart(Net):
        def forward(self, x, bias): return super().forward(x) + bias
    def score(out): return out[:, 1]
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randn(4, 3, 16, 24, generator=generator), torch.randn(4, 3, generator=generator)
    def maps(model, *inputs):
        with Probe(model, grad=True) as probe:
            cap = probe(*inputs)
            assert len(cap)==4
            return as_method(method)(cap, cap.score(score))
    given = KINDS[kind](x, bias)
    assert torch.allclose(maps(Takes(), given), maps(Apart(), x, bias), atol=1e-6)
    assert part(given, 'emb') is x and part(given, 'logits') is bias and not x.requires_grad


# --- the number of items

class Answers(Net):
    "One and the same answer, handed over in the ways in which models do"
    def __init__(self, way): super().__init__(); self.way = way
    def forward(self, x):
        z = super().forward(x)
        if self.way=='detector': return [dict(boxes=torch.rand(7, 4), scores=one.repeat(3)[:7]) for one in z]
        if self.way=='ragged': return [one.repeat(2)[:3 + i] for i, one in enumerate(z)]
        if self.way=='time first': return torch.stack([z*(t + 1) for t in range(6)])
        if self.way=='loss beside': return dict(loss=z.logsumexp(1).mean(), logits=z)
        if self.way=='anchors first': return torch.rand(50, 4), z
        if self.way=='words first': return ['a', 'b'], None, z
        if self.way=='classes first': return z.t()
        if self.way=='object': return Plain(torch.zeros(()), z)


WAYS = {'detector': lambda out: torch.stack([one['scores'][1] for one in out]), 'ragged': lambda out: torch.stack([one[1] for one in out]), 'time first': lambda out: out[0, :, 1],
        'loss beside': lambda out: out['logits'][:, 1], 'anchors first': lambda out: out[1][:, 1], 'words first': lambda out: out[2][:, 1], 'classes first': lambda out: out[1], 'object': lambda out: out.logits[:, 1]}
PARTS = {'loss beside': 'logits', 'anchors first': 1, 'words first': 2, 'object': 'logits'}

@pytest.mark.parametrize('way', WAYS)
def test_an_output_need_not_have_one_row_an_item(way, expected):
    learn, score = learner(Answers(way), loss=lambda out, y, **kwargs: WAYS[way](out) - 0*y), WAYS[way]
    asked = [score] + ([Output(PARTS[way], 1), Output(PARTS[way], lambda z: z[:, 1])] if way in PARTS else [])
    for method in METHODS:
        for cls in asked: assert torch.allclose(learn.get_cams(cls=cls, method=method).maps, expected[method], atol=1e-6), method
    several = learn.get_cams(cls=[*asked, Versus(score, lambda out: 0*score(out))])
    assert several.maps.shape[:2]==(3, len(asked) + 1)
    for k in range(len(asked) + 1): assert torch.allclose(several.maps[:, k], expected['gradcam'], atol=1e-6)
    names = [1 if isinstance(one, Output) and not callable(one.cls) else -1 for one in asked] + [-1]
    assert several.classes.tolist()==[names]*3


def test_outputs_without_rows_everywhere_else():
    learn = learner(Answers('time first'), loss=lambda out, y, **kwargs: out.sum((0, 2)) - 0*y)
    assert isinstance(learn.cam_trust(0, cls=WAYS['time first']), CAMTrust)
    assert len(CAMInterpretation.from_learner(learn).compare_cams('gradcam', n=2, cls=WAYS['time first'], baselines=False).per_item['gradcam', 'default']['insertion'])==2


@pytest.mark.parametrize('way,score,said', [('plain', lambda out: out, r'shape \[3\]\), but it returned shape \[3, 3\]'), ('time first', lambda out: out[:, 0, 0], r'shape \[3\]\), but it returned shape \[6\]'),
                                            ('detector', lambda out: out[0]['scores'], r'shape \[3\]\), but it returned shape \[7\]'), ('plain', lambda out: 3., 'but it returned a float'), ('plain', lambda out: out.sum(), r'returned shape \[\]')])
def test_a_score_that_is_not_one_an_item_is_refused_with_the_number_of_items(way, score, said):
    learn = learner(Answers(way) if way != 'plain' else Net(), loss=lambda out, y, **kwargs: y.float())
    with pytest.raises(ValueError, match='one score per item') as found: learn.get_cams(cls=score, layer='body')
    assert re.search(said, str(found.value)) and '\n' not in str(found.value)


def test_an_input_without_items_is_not_counted():
    class Scaled(Net):
        def forward(self, scale, x): return super().forward(x)*scale
    with Probe(Scaled()) as probe:
        cap = probe(torch.tensor(2.), torch.rand(3, 3, 16, 24))
        assert len(cap)==3 and cap.score(lambda out: out[:, 1]).shape==(3, 1)


def test_a_question_is_about_the_items_of_its_pass():
    "Asked again of other outputs, each row has its own item's labels, of several kinds of labels too"
    y = (torch.tensor([0, 1, 2]), dict(weight=torch.tensor([1., 10., 100.])))
    def score(out, y): return out.gather(1, y[0][:, None])[:, 0]*y[1]['weight']
    with Probe(Net()) as probe:
        cap = probe(torch.rand(3, 3, 16, 24))
        scores = cap.score(as_target(score), y)
    other = torch.arange(12.).view(4, 3)
    assert scores.of(other, torch.tensor([2, 0, 1, 2]))[:, 0].tolist()==[200, 3, 70, 1100]


def test_tensors_that_were_looked_for_are_let_go_at_once():
    kept = [dict(a=torch.ones(2)), torch.ones(3)]
    dies = weakref.ref(kept[1])
    gc.collect()
    gc.disable()
    try:
        assert len(tensors_in(kept))==2 and len(map_tensors(torch.neg, kept))==2
        del kept
        assert dies() is None, 'a cycle keeps it until Python looks for one: whole batches, in a loop'
    finally: gc.enable()
