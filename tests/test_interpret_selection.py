"One row an item, and the words that choose among them, beside plain pandas."
import re
from inspect import signature

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import MSELossFlat
from scipy.stats import spearmanr

import fastai_cam.data
from fastai_cam.all import CAMInterpretation, CAMs, cam_head
from fastai_cam.interpret.selection import rank_disagreement

VOCAB = ['cat', 'dog', 'cow']


def learner(targets=lambda i: i%3, n_out=3, loss=None, vocab=VOCAB, n=14, model=None):
    set_seed(2)
    samples = [(torch.rand(3, 16, 16), targets(i)) for i in range(n)]
    dls = DataLoaders(*[TfmdDL(samples, bs=5, num_workers=0) for _ in range(2)])
    dls.vocab = vocab
    return Learner(dls, model or nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), cam_head(8, n_out)), loss_func=loss or CrossEntropyLossFlat(), cbs=None)


@pytest.fixture(scope='module')
def interp():
    learn = learner()
    learn.remove_cb(learn.progress)
    return CAMInterpretation.from_learner(learn)


@pytest.fixture(scope='module')
def oracle(interp):
    "The table as it is made from fastai's own predictions"
    preds, targs, losses = interp.learn.get_preds(with_loss=True)
    table = pd.DataFrame(dict(prediction=[VOCAB[c] for c in preds.argmax(1)], label=[VOCAB[c] for c in targs], probability=preds.amax(1).numpy(),
                              label_probability=preds[range(14), targs].numpy(), is_right=(preds.argmax(1)==targs).numpy(), loss=losses.numpy()))
    assert 0 < table.is_right.sum() < 14
    return table


def test_the_table(interp, oracle):
    df = interp.to_df()
    assert list(df)==['index', 'item', 'prediction', 'label', 'probability', 'label_probability', 'is_right', 'loss']
    for name in ('prediction', 'label', 'is_right'): assert df[name].tolist()==oracle[name].tolist()
    for name in ('probability', 'label_probability', 'loss'): assert np.allclose(df[name], oracle[name], atol=1e-5)
    assert df['index'].tolist()==list(range(14))


def test_where(interp, oracle):
    middle = float(oracle.loss.median())
    of = lambda mask: oracle.index[mask].tolist()
    assert interp.select('wrong').tolist()==of(~oracle.is_right) and interp.select('right').tolist()==of(oracle.is_right)
    assert interp.select(f'loss > {middle} and label == "dog"').tolist()==of((oracle.loss > middle) & (oracle.label=='dog'))
    assert interp.select(f'wrong and loss > {middle}').tolist()==of(~oracle.is_right & (oracle.loss > middle))
    assert interp.select('label in ["cat", "cow"] or right').tolist()==of(oracle.label.isin(['cat', 'cow']) | oracle.is_right)
    assert interp.select(lambda df: df.loss > middle).tolist()==of(oracle.loss > middle)
    assert interp.select(lambda df: df[df.loss > middle]).tolist()==of(oracle.loss > middle)
    assert interp.select(lambda df: df.nlargest(3, 'loss')).tolist()==oracle.nlargest(3, 'loss').index.tolist()
    assert interp.select((oracle.loss > middle).to_numpy()).tolist()==interp.select(torch.tensor((oracle.loss > middle).to_numpy())).tolist()==of(oracle.loss > middle)
    assert interp.select([5, 1, 5, 1, 2]).tolist()==[5, 1, 2] and interp.select(np.array([1, 1])).tolist()==[1]
    assert interp.select([5, 1]).tolist()==[5, 1] and interp.select(torch.tensor([2])).tolist()==[2] and interp.select().tolist()==list(range(14))


def test_cls(interp, oracle):
    either = lambda name: (oracle.label==name) | (oracle.prediction==name)
    assert interp.select(cls='cow').tolist()==interp.select(cls=2).tolist()==oracle.index[either('cow')].tolist()
    assert interp.select(cls=['cow', 'dog']).tolist()==oracle.index[either('cow') | either('dog')].tolist()
    assert interp.select('wrong', 'cat').tolist()==oracle.index[either('cat') & ~oracle.is_right].tolist()


def test_order(interp, oracle):
    assert interp.ranked(4)[1].tolist()==oracle.nlargest(4, 'loss').index.tolist()
    assert interp.ranked(4, False, 'right')[1].tolist()==oracle[oracle.is_right].nsmallest(4, 'loss').index.tolist()
    assert interp.ranked([2, 0], where='wrong')[1].tolist()==oracle[~oracle.is_right].nlargest(3, 'loss').index[[2, 0]].tolist()
    assert interp.ranked(3, by='label_probability')[1].tolist()==oracle.nlargest(3, 'label_probability').index.tolist()
    losses, idxs = interp.ranked(None, by='probability', largest=False)
    assert len(idxs)==14 and torch.equal(losses, interp.losses[idxs]) and oracle.probability.iloc[idxs.tolist()].is_monotonic_increasing


def test_maps_keep_the_places_of_the_set(interp, oracle, tmp_path):
    wrong = oracle[~oracle.is_right].nlargest(3, 'loss').index.tolist()
    cams = interp.top_losses_cams(3, where='wrong', method='gradcam')
    assert cams.index==wrong and cams.to_df()['index'].tolist()==wrong and cams[1:].index==wrong[1:]
    assert torch.allclose(cams.maps, interp.learn.get_cams(wrong, method='gradcam').maps, atol=1e-6)
    assert torch.equal(cams.losses.argsort(descending=True), torch.arange(3))
    assert CAMs.load(cams.save(tmp_path/'some')).index==wrong
    assert interp.learn.get_cams([3], method='gradcam').to_df()['index'].tolist()==[0] # no set to have a place in


@pytest.mark.parametrize('where, message', [
    ('los > 1', "names 'los', which is no column: the columns are index, item, prediction, label, probability, label_probability, is_right, loss, and share_outside and disagreement on demand"),
    ('wrng', "names 'wrng'"), ('loss >', 'cannot be read'), ('loss > "a"', 'cannot be read'), ('loss > 1e9', "of the 14 items none is left by where='loss > 1e9'"),
    (lambda df: df['lss'] > 1, "names 'lss', which is no column"), (lambda df: 3, 'where chooses among the 14 items'), ('loss', "where='loss' is a column and no condition: compare it, as in 'loss > "), (lambda df: df.loss, 'a bool for each of them, or a list of their indices, 0 to 13, not float64'),
    ('index', "is a column and no condition"), ('label = "cat"', 'has a single =, which compares nothing: write =='), ('probability > "high"', 'numbers are compared with numbers'), ('label == cat', "names 'cat', which is no column"),
    ('wrong AND loss > 1', "has AND: write and"), ("file like '%a%'", r"found by item.str.contains\('…'\)"), ("label == 'cta'", "; no label is 'cta': did you mean 'cat'"),
    ('`los` > 1', "names 'los', which is no column"), ('loss > @x', 'knows no variables'), ('`loss > 1', 'is one line'),
    ([0, 1, 999], 'where chooses among the 14 items: .*, 0 to 13, not 999'), (['wrong', 'loss > 1'], "or one text, as 'wrong and loss > 1': join conditions by and"),
    ([14], 'where chooses among the 14 items'), ([True]*3, 'where chooses among the 14 items'), ('share_outside > .5', 'needs to know where the objects are')])
def test_what_chooses_nothing(interp, where, message):
    interp.learn.model.requires_grad_(True)
    with pytest.raises(ValueError, match=message) as caught: interp.plot_top_losses_cam(3, where=where)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('where', [
    "loss.__init__.__globals__.get('sys').modules.get('os').system('touch {}') == loss", "loss.to_pickle('{}') == loss", "loss.to_csv('{}') == loss",
    "loss.values.tofile('{}') == loss", "loss.to_numpy().dump('{}') == loss", "\"`\" + loss.to_csv('{}') == \"`\"", '"""\nloss.to_csv("{}")\n""" == label',
    "__pd_eval_local_open('{}', 'w') == loss", "item.str._parent.to_csv('{}') == loss", "[loss.to_csv('{}')] == loss", "loss.isin([loss.to_csv('{}')])"])
def test_a_condition_runs_no_code(interp, where, tmp_path):
    with pytest.raises(ValueError, match='which a condition may not|is one line'): interp.select(where.format(tmp_path/'made'))
    assert not list(tmp_path.iterdir())


def test_what_a_condition_may_ask(interp, oracle):
    of = lambda mask: oracle.index[mask].tolist()
    assert interp.select('`loss` >= loss.median() and label.str.contains("o")').tolist()==of((oracle.loss >= oracle.loss.median()) & oracle.label.str.contains('o'))
    assert interp.select('loss > 0 & label == "cat"').tolist()==of(oracle.label=='cat') # pandas' own order of & and ==
    assert interp.select('label.isin(["cat"]) or abs(loss - 1) < .05').tolist()==of((oracle.label=='cat') | ((oracle.loss - 1).abs() < .05))
    assert interp.select('not label.str.upper().str.startswith("C", na=False) and probability.between(0, 1)').tolist()==of(oracle.label=='dog')
    assert interp.select('-loss < loss.quantile(.1)**2/2').tolist()==list(range(14))


def test_classes_that_are_none(interp):
    for cls, message in (('cta', "did you mean 'cat'"), (3, 'class 3 does not exist'), ('actual', 'cls chooses items here'), (lambda out: out[:, 0], 'cls chooses items here')):
        with pytest.raises(ValueError, match=message): interp.top_losses_cams(3, cls=cls)
    for by, message in (('los', "by='los' is no column of numbers: use one of 'probability', 'label_probability', 'loss', 'share_outside', 'disagreement'"), ('label', 'no column of numbers')):
        with pytest.raises(ValueError, match=message): interp.top_losses_cams(3, by=by)


def test_an_error_of_the_users_own_function_stays_what_it_is(interp):
    with pytest.raises(ZeroDivisionError): interp.select(lambda df: 1/0)


def test_several_labels():
    learn = learner(lambda i: torch.tensor([1., float(i%2), 0.]), 3, BCEWithLogitsLossFlat())
    with learn.no_bar(): interp, (preds, targs) = CAMInterpretation.from_learner(learn), learn.get_preds()
    df, n_wrong = interp.to_df(), ((preds >= .5) != (targs > .5)).sum(1)
    assert df.n_wrong.tolist()==n_wrong.tolist() and df.is_right.tolist()==(n_wrong==0).tolist()
    assert df.label.tolist()==['cat', 'cat;dog']*7 and df.prediction[0]==';'.join(name for name, p in zip(VOCAB, preds[0]) if p >= .5)
    assert interp.select(cls='dog').tolist()==((targs[:, 1] > .5) | (preds[:, 1] >= .5)).nonzero().flatten().tolist()
    with pytest.raises(ValueError, match="show='diff' compares the one class .* these items have several labels: show='both'"): interp.top_losses_cams(2, show='diff')


def test_values():
    learn = learner(lambda i: torch.tensor(float(i)), 1, MSELossFlat(), None)
    with learn.no_bar(): interp, (preds, targs) = CAMInterpretation.from_learner(learn), learn.get_preds()
    df = interp.to_df()
    assert np.allclose(df.error, (preds.flatten() - targs).abs(), atol=1e-5) and np.allclose(df.prediction, preds.flatten(), atol=1e-5)
    assert interp.ranked(2, by='error')[1].tolist()==df.nlargest(2, 'error').index.tolist()
    with pytest.raises(ValueError, match="where='wrong' is about answers that are right or wrong, and here there are none"): interp.select('wrong')
    with pytest.raises(ValueError, match='this learner predicts no classes'): interp.select(cls=0)


def test_rows_of_a_table_are_called_by_their_files(pictures):
    from fastai.vision.all import ImageDataLoaders, Resize, get_image_files
    files = sorted(get_image_files(pictures))[:6]
    frame = pd.DataFrame(dict(file=list(map(str, files)), side=['a', 'b']*3, is_valid=[False]*2 + [True]*4))
    dls = ImageDataLoaders.from_df(frame, path='/', valid_col='is_valid', label_col='side', item_tfms=Resize(32), bs=2, num_workers=0)
    found = CAMInterpretation.from_learner(Learner(dls, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), cam_head(8, 2)), loss_func=CrossEntropyLossFlat(), cbs=None))
    names = list(map(str, files[2:]))
    assert found.to_df().item.tolist()==names and found.select(f'item.str.contains({files[4].stem!r})').tolist()==[i for i, name in enumerate(names) if files[4].stem in name]
    assert found.cams_of(torch.tensor([3, 0]), method='gradcam').to_df().item.tolist()==[names[3], names[0]]
    assert found.cam_trust(n=1).table.item.tolist()==[files[2].name]


def test_yes_or_no():
    learn = learner(lambda i: torch.tensor([float(i%2)]), 1, BCEWithLogitsLossFlat(), None)
    with learn.no_bar(): interp, (preds, targs) = CAMInterpretation.from_learner(learn), learn.get_preds()
    df, p = interp.to_df(), preds.flatten()
    assert set(df.label)=={'negative', 'positive'} and np.allclose(df.probability, torch.maximum(p, 1 - p), atol=1e-6)
    assert np.allclose(df.label_probability, torch.where(targs.flatten() > .5, p, 1 - p), atol=1e-6)
    assert interp.select(cls=1).tolist()==((p > .5) | (targs.flatten() > .5)).nonzero().flatten().tolist()


# -- columns that need maps

def test_evidence_outside_masks_and_boxes(interp):
    "As the table of the maps has it"
    masks = torch.zeros(14, 16, 16, dtype=torch.bool)
    masks[:, :, :8] = True
    expected = interp.learn.get_cams(interp.learn.dls.valid).to_df(masks).share_outside
    assert np.allclose(interp.to_df('share_outside', masks=masks).share_outside, expected, equal_nan=True)
    assert interp.select('share_outside > .4').tolist()==expected.index[expected > .4].tolist()
    assert interp.ranked(3, by='share_outside')[1].tolist()==expected.nlargest(3).index.tolist()
    boxes = [[(0, 0, 8, 16)]]*13 + [None]
    again = interp.to_df('share_outside', masks=boxes).share_outside
    assert np.allclose(again[:13], expected[:13], equal_nan=True) and np.isnan(again[13])
    with pytest.raises(ValueError, match='for the n = 14 items of the set'): interp.to_df('share_outside', masks=masks[:3])


def test_disagreement_of_methods(interp):
    cams = interp.learn.get_cams(interp.learn.dls.valid, method=['objectcam', 'gradcam', 'layercam'])
    def by_hand(maps): return 1 - np.mean([spearmanr(maps[i].flatten(), maps[j].flatten()).statistic for i, j in ((0, 1), (0, 2), (1, 2))])
    found = interp.to_df('disagreement').disagreement
    assert np.allclose(found, [by_hand(one) for one in cams.maps], atol=1e-4)
    assert interp.select(lambda df: df.disagreement > found.median()).tolist()==found.index[found > found.median()].tolist()
    assert rank_disagreement(torch.stack([torch.arange(4.), torch.zeros(4)]))==1


def test_columns_are_made_once_and_when_they_are_asked_for():
    learn, n = learner(n=6), []
    with learn.no_bar():
        interp = CAMInterpretation.from_learner(learn)
        learn.model.register_forward_pre_hook(lambda *args: n.append(1))
        assert 'disagreement' not in interp.to_df() and not n
        first = interp.select('disagreement >= 0')
        passes = len(n)
        assert passes and len(first)==6
        interp.select(lambda df: df.disagreement >= 0); interp.ranked(2, by='disagreement')
    assert len(n)==passes and 'disagreement' in interp.to_df()


def test_every_view_takes_where(interp):
    "One vocabulary, whatever is done with the items; views of one item take its index"
    several = ['plot_top_losses_cam', 'top_losses_cams', 'plot_confused_cam', 'plot_class_cam', 'concepts', 'compare_cams', 'cam_trust', 'sanity_check', 'find_shortcuts', 'select']
    assert [name for name in several if 'where' not in signature(getattr(interp, name)).parameters]==[]
    for name in several[2:-1]:
        given = dict(cls='cat') if name in ('plot_class_cam', 'concepts') else dict(n=16) if name=='find_shortcuts' else {}
        with pytest.raises(ValueError, match="of the 14 items none is left by where='loss > 99'"): getattr(interp, name)(**given, where='loss > 99')
        with pytest.raises(ValueError, match="where='los > 1' names 'los', which is no column"): getattr(interp, name)(**given, where='los > 1')
    with pytest.raises(ValueError, match='leave dl, or where'): interp.find_shortcuts(interp.dl, n=16, where='wrong')


def test_some_of_those_that_are_meant(interp, oracle):
    wrong = oracle.index[~oracle.is_right].tolist()
    assert interp.spread(2, 'wrong')==[wrong[0], wrong[-1]] and interp.spread(None, 'wrong')==wrong and interp.spread(3)==[0, 6, 13]
    assert interp.labelled_so(1, 'wrong').tolist()==oracle.index[~oracle.is_right & (oracle.label=='dog')].tolist()
    assert interp.labelled_so(2).tolist()==oracle.index[oracle.label=='cow'].tolist()
    with pytest.raises(ValueError, match=r"of the 3 items that where=\[0, 3, 6\] leaves of 14 none is labelled 'dog'"): interp.labelled_so(1, [0, 3, 6])


# -- what makes no sense is said in words

RAW = 'object has no attribute|not iterable|not supported between|unexpected keyword|unhashable|subscriptable|multiple values|cannot be interpreted|must be int|NoneType'
OF_LEARNER = dict(show_cam=(), get_cams=(), cam_layers=(), plot_layers=(), plot_channels=(), sanity_check=(), random_logit_test=(), cam_trust=(), explain=(None, 'nowhere'))
OF_INTERP = dict(plot_top_losses_cam=(2,), top_losses_cams=(2,), plot_confused_cam=(), plot_class_cam=('cat',), concepts=('cat',), compare_cams=(), cam_trust=(), sanity_check=(), find_shortcuts=(), plot_layers=(), plot_channels=(),
                 select=(), to_df=())


@pytest.mark.parametrize('of, name', [('learn', name) for name in OF_LEARNER] + [('interp', name) for name in OF_INTERP])
def test_a_wrong_argument_is_answered_in_words(interp, of, name):
    "Another word, and a first argument of another type: not what Python says of them"
    ask, given = getattr(interp.learn if of=='learn' else interp, name), (OF_LEARNER if of=='learn' else OF_INTERP)[name]
    def said(*args, **kwargs):
        with pytest.raises((TypeError, ValueError)) as caught: ask(*args, **kwargs)
        assert not re.search(RAW, str(caught.value)), caught.value
        return str(caught.value)
    assert "'nonsense'" in said(*given, nonsense=1)
    for bad in (object(), {'a': 1}, 2.5): said(bad, *given[1:])


@pytest.mark.parametrize('ask, words', [
    (lambda interp: interp.cam_trust(max_n=6), "there is no argument 'max_n' here: it is called 'n'"), (lambda interp: interp.sanity_check(k=6), "it is called 'n'"), (lambda interp: interp.compare_cams(max_n=6), "it is called 'n'"),
    (lambda interp: interp.cam_trust([0, 1]), r'n is how many items are examined: where=\[...\] says which of them'), (lambda interp: interp.select(label='cat'), "it is called 'cls'"),
    (lambda interp: interp.find_shortcuts('nope', n=16), 'dl is a labelled DataLoader, not str'), (lambda interp: interp.top_losses('all'), 'k is a number of items, not str'),
    (lambda interp: CAMInterpretation.from_learner(interp.learn, cls='cat'), r"an interpretation is of all classes: cls='cat' is asked for in its views, as in interp.plot_class_cam\('cat'\)"),
    (lambda interp: CAMInterpretation.from_learner('export.pkl'), 'learn is a fastai Learner, not str'), (lambda interp: CAMInterpretation.from_learner(interp.learn, nonsense=1), 'it has learn, ds_idx, dl, act, method and layer')])
def test_what_was_meant_is_said(interp, ask, words):
    with pytest.raises(TypeError, match=words): ask(interp)
