"The class that is explained is the one that was asked for, by whatever name."
from datetime import date
from decimal import Decimal
import enum
from fractions import Fraction
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import CategoryBlock, CategoryMap, ColReader, CrossEntropyLossFlat, DataBlock, ImageBlock, L, Learner

from fastai_cam.interpret import CAMInterpretation
from fastai_cam.targets.kinds import Actual, ClassIndex, Predicted, Several
from fastai_cam.targets.lookup import as_target, Output, Region, Versus, WhyNot
from fastai_cam.tasks import MultiLabel, SingleLabel

from helpers.targets import net, plain_learner

pytestmark = pytest.mark.usefixtures('maps_by_gradcam') # these tests are about what is asked, not about how maps are made


class Colour(enum.Enum): RED, BLUE = 'red', 'blue'
class Grade(enum.IntEnum): LOW, HIGH = 2, 3
class Word(str, enum.Enum): X, Y = 'x', 'y'

def index_of(cls, vocab): return [part.index for part in as_target(cls, vocab).parts]
numbers = 2, 3, 5
VOCABS = {'list': list(numbers), 'tuple': numbers, 'L': L(*numbers), 'int64': [np.int64(n) for n in numbers], 'uint8': np.array(numbers, dtype=np.uint8), 'float': [2., 3., 5.], 'float32': np.float32(numbers),
          'tensor': torch.tensor(numbers), 'tensors': [torch.tensor(n) for n in numbers], 'arrays': [np.array(n) for n in numbers], 'index': pd.Index(numbers), 'series': pd.Series(numbers),
          'categories': pd.Categorical(numbers).categories, 'map': CategoryMap(pd.Series(numbers)), 'decimal': [Decimal(n) for n in numbers], 'mixed': [2, 3., np.int32(5)]}


@pytest.mark.parametrize('name', VOCABS)
def test_in_a_vocab_of_numbers_a_number_is_a_name_whatever_type_holds_it(name):
    vocab = VOCABS[name]
    for position, n in enumerate(numbers):
        for asked in (n, float(n), str(n), f'{n}.0', np.int64(n), np.int8(n), np.float16(n), np.str_(n), torch.tensor(n), torch.tensor(float(n)), np.array(n), Decimal(n), Fraction(n), vocab[position]):
            assert index_of(asked, vocab)==[position], (asked, type(asked))
        assert float(as_target(n, vocab).labels[0])==n
        assert index_of(ClassIndex(position), vocab)==[position] and as_target(ClassIndex(position), vocab).labels==as_target(n, vocab).labels
    for none in (0, 1, 4, 7, -1, 2.5, True, '4', np.int64(0), torch.tensor(1)):
        with pytest.raises(ValueError, match='no class is named'): as_target(none, vocab)
    with pytest.raises(ValueError, match=r'cls=ClassIndex\(position\) asks for one by its position, 0 to 2'): as_target(0, vocab)


@pytest.mark.parametrize('name', VOCABS)
def test_the_same_in_every_question(name):
    vocab, out = VOCABS[name], torch.tensor([[1., 20., 300.], [4000., 5., 6.]])
    assert as_target(Versus(2, 5), vocab)(out).tolist()==[[1 - 300], [4000 - 6]]
    assert as_target(Versus('2', [3, np.int64(5)]), vocab)(out).tolist()==[[1 - 160], [4000 - 5.5]]
    assert as_target(WhyNot(3), vocab)(out).tolist()==[[280], [3995]]
    assert as_target([5, ClassIndex(0), Versus(3, 2)], vocab)(out).tolist()==[[300, 1, 19], [6, 4000, -3995]]
    assert as_target(Output('x', '3'), vocab)(dict(x=out)).tolist()==[[20], [5]]
    pixels = out[..., None, None].expand(-1, -1, 2, 2)
    assert as_target(Region(5, 'everywhere'), vocab, task=SingleLabel(vocab))(pixels).tolist()==[[300], [6]]
    assert as_target(3, vocab, task=MultiLabel(vocab))(out).tolist()==[[20], [5]]
    assert as_target('all', vocab)(out).tolist()==out.tolist()
    assert as_target(vocab, vocab)(out).tolist()==out.tolist()


def test_both_readings_of_a_number_are_said_and_neither_is_taken():
    for order in permutations('012'):
        for n in range(3):
            if order[n]==str(n): assert index_of(n, order)==[n]
            else:
                with pytest.raises(ValueError, match=rf"cls={n} may mean the class named '{n}', at position {order.index(str(n))}, or the class at position {n}, which is named '{order[n]}': write cls='{n}' or cls=ClassIndex\({n}\)"): as_target(n, order)
            assert index_of(str(n), order)==[order.index(str(n))] and index_of(ClassIndex(n), order)==[n] and as_target(ClassIndex(n), order).labels==[order[n]]
    with pytest.raises(ValueError, match="may mean the class named '01'"): as_target(1, ['01', '02'])
    with pytest.raises(ValueError, match="0 to 2, and cls='3' asks for the one of that name"): as_target(3, ['1', '2', '3'])
    for asked in ([1, 'a'], Versus('a', 1), WhyNot(1), Region(1), torch.tensor([1])):
        with pytest.raises(ValueError, match="cls=1 may mean"): as_target(asked, ['1', 'a'])
    for which in (2, [2], Versus(2, '3')): # the vocab may be about another of the outputs
        with pytest.raises(ValueError, match='may mean'): as_target(Output('size', which), numbers)
    assert index_of(Output('size', 1), ['a', 'b'])==[1] and as_target(Output('size', [0, 7]), ['a', 'b']).labels==['size: 0', 'size: 7']
    assert index_of(Output('size', ClassIndex(2)), numbers)==[2] and as_target(Output('size', ClassIndex(2)), numbers).labels==['size: 2']


def test_true_and_false():
    for vocab in ([False, True], np.array([False, True]), [np.False_, np.True_], torch.tensor([False, True]), [0, 1], ['False', 'True']):
        for asked in (True, np.True_, torch.tensor(True)): assert index_of([asked, not asked], vocab)==[1, 0], vocab
        if str(vocab[1]) != '1': assert index_of('True', vocab)==[1]
        assert index_of([0, 1], vocab)==[0, 1]
    assert index_of([True, 'False'], [True, False])==[0, 1]
    for n in (0, 1):
        with pytest.raises(ValueError, match=f'cls={n} may mean the class named'): as_target(n, [True, False])
    assert index_of(True, [1, 0])==[0] # by value, as 1
    with pytest.raises(TypeError, match='not bool'): as_target(True, ['cat', 'dog'])


def test_names_of_other_kinds():
    days = [date(2020, 1, 2), date(2020, 1, 1)]
    assert index_of(days[1], days)==[1] and index_of('2020-01-02', days)==[0] and index_of(np.datetime64('2020-01-01'), days)==[1]
    assert index_of([Colour.BLUE, Colour.RED], ['red', 'blue'])==[1, 0] and index_of([Colour.BLUE, 'Colour.RED', 'BLUE'], [Colour.BLUE, Colour.RED])==[0, 1, 0]
    assert index_of([Grade.HIGH, 2], [3, 2])==[0, 1] and index_of([Grade.HIGH, 2, '3'], [Grade.HIGH, Grade.LOW])==[0, 1, 0]
    assert index_of([Word.Y, 'x'], ['y', 'x'])==[0, 1] and index_of(['y', Word.X], [Word.Y, Word.X])==[0, 1]
    for vocab in (np.array(['a', 'b']), pd.Categorical(['b', 'a']).categories, CategoryMap(['b', 'a']), {'a': 0, 'b': 1}): assert index_of(['b', np.str_('a')], vocab)==[1, 0]
    assert index_of([2, '#na#'], CategoryMap(pd.Series([1, 2]), add_na=True))==[2, 0]
    assert index_of([.1, np.float32(.1), np.float16(.1), '0.1', torch.tensor(.1)], [.2, .1])==[1]*5==index_of([.1]*5, np.float32([.2, .1])) and as_target(.1, np.float16([.2, .1])).labels==['0.1']
    assert index_of([float('nan'), 'nan'], [1., float('nan')])==[1, 1] and index_of([1, 'x'], [3, 'x', 1.])==[2, 1]
    assert index_of([-1, 1], [-1, 1])==[0, 1]
    with pytest.raises(TypeError, match='not float'): as_target(1., ['a', 'b'])


def test_a_name_goes_before_a_keyword():
    vocab, out, y = ['actual', 'predicted', 'all'], torch.tensor([[1., 2., 3.]]), torch.tensor([1])
    assert [index_of(name, vocab) for name in vocab]==[[0], [1], [2]]
    assert as_target([Predicted, Actual, Predicted(), Actual()], vocab)(out, y).tolist()==[[3, 2, 3, 2]]
    assert as_target(WhyNot('actual'), vocab)(out).tolist()==[[2]] # against what is predicted
    assert as_target(WhyNot('actual'), vocab).labels==['why not actual']


def test_classes_of_one_name_are_not_taken_for_one_another():
    for vocab, name in ((['a', 'b', 'a'], 'a'), ([1, 2, 1.], 1), ([np.int64(1), 2, 1], '1')):
        with pytest.raises(ValueError, match=r"2 classes are named '.*', at the positions 0, 2: say which is meant, e.g. cls=ClassIndex\(0\)"): as_target(name, vocab)
    assert index_of(['a', 'A', 1, '1'], ['A', 'a', '#', 1])==[1, 0, 3, 3]


@pytest.mark.parametrize('asked', [[2, 0], (2, 0), L(2, 0), torch.tensor([2, 0]), np.array([2, 0]), pd.Index([2, 0]), pd.Series([2, 0]), np.array(['c', 'a']), pd.Categorical(['c', 'a']), CategoryMap(['c', 'a'], sort=False), range(2, -1, -2)])
def test_anything_with_an_order_is_a_list(asked):
    assert isinstance(as_target(asked, ['a', 'b', 'c']), Several) and index_of(asked, ['a', 'b', 'c'])==[2, 0]


@pytest.mark.parametrize('asked,kind,said', [({2, 0}, TypeError, 'not set: maps come in the order that is asked for, so make it a list'), ({'a': 1}, TypeError, 'not dict: .* make it a list'), (iter([1]), TypeError, 'make it a list'),
    ((i for i in [1]), TypeError, 'not generator: .* make it a list'), (np.zeros((2, 3)), ValueError, r'not a table of shape \[2, 3\]'), (torch.zeros(0), ValueError, 'list of classes is empty'), (slice(2), TypeError, 'not slice'), (b'a', TypeError, 'not bytes'),
    (torch.tensor([True, False]), TypeError, 'not bool'), (torch.tensor([.5]), TypeError, 'not float'), (object(), TypeError, 'not object'), (ClassIndex, TypeError, r'say ClassIndex\(…\)'), ([0, 'd'], ValueError, "no class is named 'd'"), ([0, 3], ValueError, '0 to 2')])
def test_what_is_no_class_is_refused_in_a_sentence(asked, kind, said):
    with pytest.raises(kind, match=said) as found: as_target(asked, ['a', 'b', 'c'])
    assert '\n' not in str(found.value)


def array_of(row): return np.full((16, 24, 3), 20*int(row['i']), dtype=np.uint8)

@pytest.mark.parametrize('grades', [[1, 2, 3], [10, 2, 5], [.5, 1.5, 2.5]])
def test_a_learner_with_numbers_for_labels(grades):
    frame = pd.DataFrame(dict(i=range(12), grade=[grades[i%3] for i in range(12)]))
    dls = DataBlock((ImageBlock, CategoryBlock), get_x=array_of, get_y=ColReader('grade'), splitter=lambda items: (list(range(6)), list(range(6, 12)))).dataloaders(frame, bs=6, num_workers=0)
    learn = Learner(dls, net(3), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    assert isinstance(dls.vocab[0], np.generic)
    every = learn.get_cams([0, 1], cls='all')
    for position, name in enumerate(sorted(grades)):
        for asked in (name, str(name), dls.vocab[position], ClassIndex(position), [name]):
            found = learn.get_cams([0, 1], cls=asked)
            assert found.classes.flatten().tolist()==[position]*2 and torch.allclose(found.maps.reshape(every.maps[:, position].shape), every.maps[:, position], atol=1e-6)
            assert str(name) in found.labels[0]
    assert torch.allclose(learn.get_cams([0, 1], cls=Versus(grades[0], grades[1])).maps, every.maps[:, sorted(grades).index(grades[0])] - every.maps[:, sorted(grades).index(grades[1])], atol=1e-6)
    with pytest.raises(ValueError, match='no class is named 0'): learn.show_cam(0, cls=0)


def test_predictions_and_labels_are_compared_though_a_class_is_called_actual():
    learn = plain_learner(3, ['predicted', 'actual', 'other'])
    cams = CAMInterpretation.from_learner(learn).top_losses_cams(4, show='both')
    assert cams.classes[:, 0].tolist()==cams.preds.argmax(1).tolist() and cams.classes[:, 1].tolist()==cams.targs.tolist()


def test_names_that_hold_what_was_asked_come_first():
    "Spelling alone is nearer to other words than to the animal that is meant"
    vocab = ['crate', 'Egyptian cat', 'cart', 'tiger cat', 'catamaran', 'castle']
    with pytest.raises(ValueError, match="no class is named 'cat': did you mean 'tiger cat' or 'Egyptian cat'[?]"): as_target('cat', vocab)
    with pytest.raises(ValueError, match="did you mean 'Egyptian cat'[?]"): as_target('EGYPTIAN', vocab)
    with pytest.raises(ValueError, match="did you mean 'castle' or"): as_target('castel', vocab)
    with pytest.raises(ValueError, match="did you mean 'catamaran'[?]"): as_target('maran', vocab)
