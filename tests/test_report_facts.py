"What a report says: numbers counted a second time by hand, items that are refused, and a checker that finds what was changed."
import json
import math
from copy import deepcopy

import jsonschema
import pandas as pd
import pytest
import torch

from fastai_cam.report import check_report, report_schema
from fastai_cam.interpret.answers import ItemAnswers
from fastai_cam.report.answers import item_answer, item_keys, kind_of
from fastai_cam.report.facts import as_finding, page_facts, share_interval
from fastai_cam.tasks import NoAnswer, Points, Segmentation, SingleLabel, Values


def item(i, label, *answers, shown=True):
    "Of classes: each answer is a prediction, its probability and the loss"
    said = [dict(prediction=p, probability=sure, loss=loss, right=None if p is None or label is None else p==label, top=[[p, sure]] if p is not None else []) for p, sure, loss in answers]
    return dict(key=f'{i}.jpg', position=i, shown=shown, label=label, answers=said)


@pytest.fixture
def facts():
    items = [item(0, 0, (1, .9, 2.5), (0, .6, .5)), item(1, 0, (0, .8, .2), (1, .9, 2.3)), item(2, 1, (1, .7, .4), (0, .6, .9)), item(3, 1, (1, .6, .5), (1, .9, .1)), item(4, 1, (0, .55, .8), (0, .5, .7))]
    return page_facts('classes', ['cat', 'dog'], items, ['new', 'old'], made=[dict(methods=['gradcam'], layers=['4'])]*2)


def test_the_numbers_are_what_one_counts_by_hand(facts):
    first, second = (model['summary'] for model in facts['models'])
    assert (first['n_right'], first['accuracy'], second['n_right']) == (3, .6, 2)
    assert first['mean_loss']==pytest.approx(.88) and first['worst_tenth']==pytest.approx(2.5/4.4, abs=1e-6)
    assert first['confusions']==[dict(predicted=0, actual=1, n=1), dict(predicted=1, actual=0, n=1)]
    assert {one['cls']: (one['n_right'], one['n']) for one in first['by_class']}=={0: (1, 2), 1: (2, 3)}
    assert first['calibration_error']==pytest.approx((.9 + .2 + .3 + .4 + .55)/5)
    assert facts['comparison'] | {} == {'n': 5, 'better': 2, 'worse': 1, 'same': 2, 'difference': .2, **{name: facts['comparison'][name] for name in ('low', 'high')}}
    assert facts['comparison']['low'] < 0 < facts['comparison']['high']


@pytest.mark.parametrize('right, n', [(0, 9), (9, 9), (15, 20), (500, 1000)])
def test_the_interval_holds_the_shares_that_are_within_two_deviations(right, n):
    low, high = share_interval(right, n)
    for end in (low, high):
        if 0 < end < 1: assert abs(right/n - end)/math.sqrt(end*(1 - end)/n)==pytest.approx(1.96, abs=.01)
    assert 0 <= low <= right/n <= high <= 1


def test_the_sentences_say_these_numbers(facts):
    said = ' '.join(one['text'] for one in facts['sentences'])
    for words in ('Of 5 pictures 3 are given the class that the label names: an accuracy of 60.0%', 'Of 5 pictures 2 got better', '1 got worse', '+20.0 points', 'The maps of both were made by gradcam at the layer 4.', 'All 5 pictures are shown'):
        assert words in said, words


def test_the_file_is_what_the_schema_says(facts):
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(facts)), schema)
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate({**facts, 'items': [dict(facts['items'][0], label='cat')]}, schema)


def test_the_checker_is_content_with_what_is_right(facts): assert check_report(json.loads(json.dumps(facts)))==[]


def corrupt(facts, path, value):
    *way, last = path
    place = facts
    for step in way: place = place[step]
    assert place[last] != value
    place[last] = value


@pytest.mark.parametrize('path, value, found', [
    (('items', 0, 'answers', 0, 'prediction'), 0, 'items[0].answers[0].right'),
    (('items', 3, 'answers', 0, 'loss'), 5., 'models[0].summary.mean_loss'),
    (('items', 3, 'answers', 0, 'probability'), .1, 'models[0].summary.mean_confidence'),
    (('items', 2, 'label'), 0, 'models[1].summary.accuracy'),
    (('items', 1, 'change'), 'worse', 'items[1].change'),
    (('items', 1, 'shown'), False, 'sentences'),
    (('models', 1, 'summary', 'n_right'), 3, 'models[1].summary.n_right'),
    (('models', 0, 'summary', 'bins', 0, 'accuracy'), .123, 'models[0].summary.bins[0].accuracy'),
    (('models', 0, 'methods', 0), 'scorecam', 'sentences'),
    (('comparison', 'better'), 3, 'comparison.better'),
    (('sentences', 0, 'text'), 'All is well.', "sentences[0].text is 'All is well.'")])
def test_the_checker_finds_what_was_changed(facts, path, value, found):
    forged = deepcopy(facts)
    corrupt(forged, path, value)
    assert any(line.startswith(found) for line in check_report(forged)), check_report(forged)


def test_what_is_no_report_is_refused():
    with pytest.raises(ValueError, match='this is no report that can be checked'): check_report({})


def test_what_is_not_known_is_counted_apart():
    facts = page_facts('classes', ['cat', 'dog'], [item(0, 0, (0, .9, .1)), item(1, 1, (None, None, None)), item(2, None, (1, .8, None))], ['mine'])
    said = [one['text'] for one in facts['sentences']]
    assert said[0].startswith('Of 1 pictures 1 are given') and said[1]=='Of 2 more the label or the answer is not known, or not finite.'
    assert check_report(facts)==[]
    nothing = page_facts('classes', ['cat'], [item(0, None, (None, None, None))], ['mine'])
    assert nothing['sentences'][0]['text']=='Of no picture is it known whether the answer is right.' and check_report(nothing)==[]


def test_labels_and_values():
    answers = lambda pred, loss, right: [dict(prediction=pred, probability=None, loss=loss, right=right, top=[])]
    labels = page_facts('labels', ['a', 'b'], [dict(key='0', position=0, shown=True, label=[0], answers=answers([0], .1, True)), dict(key='1', position=1, shown=True, label=[0], answers=answers([0, 1], .9, False))], ['mine'])
    assert labels['models'][0]['summary']['accuracy']==.5 and 'are given all their labels and no others: an' in labels['sentences'][0]['text']
    values = page_facts('values', ['age'], [dict(key=str(i), position=i, shown=True, label=[30.], answers=answers([30. + i], .1, None)) for i in range(4)], ['mine'])
    assert values['models'][0]['summary']['errors'][0]['error']==1.5 and values['sentences'][0]['text'].startswith('age is 1.5 from its label')
    for facts in (labels, values):
        assert check_report(facts)==[]
        jsonschema.validate(json.loads(json.dumps(facts)), report_schema())


def test_names_of_items():
    assert item_keys(['/a/b/x/1.png', '/a/b/y/1.png'])==['x/1.png', 'y/1.png']
    assert item_keys(['/a/1.png'])==['1.png'] and item_keys([3, None])==['item 0', 'item 1'] and item_keys([])==[]
    assert '\u202e' not in item_keys(['a/\u202egpj.exe', 'a/b'])[0]
    assert len(set(item_keys(['a', 'a', 'a'])))==3


def test_answers_of_each_task():
    labels = ItemAnswers(torch.tensor([[True, False, True]]), torch.tensor([[True, False, True]]), torch.tensor([[.9, .1, .6]]))
    label, answer = item_answer('labels', labels, 0, .3)
    assert (label, answer['prediction'], answer['right'])==([0, 2], [0, 2], True)
    assert item_answer('labels', ItemAnswers(labels.predicted, labels.actual, labels.probability*math.nan), 0, .3)[1]['prediction'] is None
    label, answer = item_answer('values', ItemAnswers(torch.tensor([[1.5, math.nan]]), torch.tensor([[1., 2.]])), 0, .3)
    assert label==[1., 2.] and answer['prediction'] is None
    unknown = ItemAnswers(torch.tensor([1]), torch.tensor([-1]), torch.tensor([.5]), n_classes=2) # pickled before the most probable were kept
    assert item_answer('classes', unknown, 0, .3)==(None, dict(prediction=1, probability=.5, top=[], loss=.3, right=None))
    assert kind_of(SingleLabel())=='classes' and kind_of(Values())=='values'
    for task in (Segmentation(), Points(), NoAnswer('picture'), NoAnswer('embedding')):
        with pytest.raises(ValueError, match='a report tells of classes, labels and numbers, and this learner gives'): kind_of(task)


def test_findings_show_themselves_in_words():
    class Verdict:
        def __repr__(self): return 'All is <b>well</b>.'
    assert as_finding(('Mine', Verdict()))==dict(title='Mine', text='All is <b>well</b>.', table=None)
    long = as_finding(pd.DataFrame(dict(x=range(500))))
    assert len(long['table']['rows'])==100 and long['title']=='DataFrame'
    assert len(as_finding('x'*10_000)['text']) <= 4000
