"The interpretation: what it takes, what it refuses in a sentence, and that it can be kept."
import pickle
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.callback.core import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
                                  CancelValidException)
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize
from fastai.learner import Learner, load_learner
from fastai.interpret import ClassificationInterpretation
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.text.data import Numericalize, pad_input
from fastai.torch_core import set_seed
from fastai.vision.all import CategoryBlock, DataBlock, FuncSplitter, ImageBlock, Normalize, RegressionBlock, Resize, TensorImage, Transform, get_image_files, imagenet_stats, parent_label
from fastai.vision.all import resnet18, vision_learner

from fastai_cam.all import CAMCallback, CAMInterpretation, METHODS, Region, WRAPPERS, cam_head


def ready(dls, loss=None):
    set_seed(1)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    return Learner(dls, nn.Sequential(body, cam_head(8, dls.c)), loss_func=loss or CrossEntropyLossFlat())


# -- losses of items, whatever the loss function

def mean_loss(pred, targ): return F.cross_entropy(pred, targ)


class OwnLoss(nn.Module):
    def forward(self, pred, targ): return F.cross_entropy(pred, targ)


@pytest.mark.parametrize('loss', [mean_loss, OwnLoss(), lambda p, t: F.cross_entropy(p, t, reduction='sum'), lambda p, t, **kw: F.cross_entropy(p, t, **kw),
                                  lambda p, t: -p.log_softmax(1)[range(len(t)), t], nn.CrossEntropyLoss(), F.cross_entropy, lambda p, t, reduction='mean': F.cross_entropy(p, t, reduction=reduction)])
def test_any_loss_function(dls, loss):
    "Each item's loss is its −log p, be the loss a mean, a sum, an object, or one that gives the items' own"
    learn, reference = ready(dls, loss), CAMInterpretation.from_learner(ready(dls))
    found = CAMInterpretation.from_learner(learn)
    assert torch.allclose(found.losses, reference.losses, atol=1e-5) and learn.loss_func is loss and getattr(loss, 'reduction', 'mean')=='mean'
    assert found.top_losses_cams(3).items==reference.top_losses_cams(3).items


@pytest.mark.parametrize('loss', [lambda p, t: F.cross_entropy(p, t, weight=torch.tensor([1., 3.])), lambda p, t: 1 - p.softmax(1)[range(len(t)), t].prod(), lambda p, t: p.std(0, unbiased=True).sum()/len(p[1:])])
def test_a_loss_that_no_item_has_of_its_own(dls, loss):
    learn = ready(dls, loss)
    with pytest.raises(ValueError, match='no item has a loss of its own: give it an argument reduction') as caught: CAMInterpretation.from_learner(learn)
    assert '\n' not in str(caught.value)


# -- near misses

def test_what_is_no_loader_is_refused(dls):
    learn = ready(dls)
    for dl, message in ((dls, 'these are the training and the validation one: pass dls.valid'), (list(dls.valid.items), 'not list: make one of files'), (dls.valid.items, 'test_dl'), ('x.png', 'not str')):
        with pytest.raises(TypeError, match=message): CAMInterpretation.from_learner(learn, dl=dl)
    with pytest.raises(TypeError, match='CAMInterpretation.from_learner'): CAMInterpretation(learn)


def test_other_words_for_what_to_show(dls):
    interp = CAMInterpretation.from_learner(ready(dls))
    pred, actual = interp.top_losses_cams(3), interp.top_losses_cams(3, show='actual')
    assert not torch.equal(pred.maps, actual.maps)
    for word in ('predicted', 'prediction'): assert torch.equal(interp.top_losses_cams(3, show=word).maps, pred.maps)
    for word in ('label', 'targ'): assert torch.equal(interp.top_losses_cams(3, show=word).maps, actual.maps)
    with pytest.raises(ValueError, match="'pred', 'actual', 'both' or 'diff'"): interp.top_losses_cams(3, show='target')


@pytest.mark.parametrize('name, word', [('class_name', 'cls'), ('target', 'cls'), ('target_category', 'cls'), ('target_layers', 'layer'), ('target_layer', 'layer'), ('layers', 'layer'), ('label', 'cls'),
                                        ('methods', 'method'), ('img', 'item'), ('n', 'max_n')])
def test_words_of_other_libraries(dls, name, word):
    learn = ready(dls)
    calls = [lambda: learn.get_cams(**{name: 0})]
    if name != 'label': calls.append(lambda: learn.show_cam(**{name: 0})) # which is matplotlib's
    if word in ('layer', 'method'):
        interp = CAMInterpretation.from_learner(learn)
        calls += [lambda: CAMInterpretation.from_learner(learn, **{name: 0}), lambda: interp.top_losses_cams(3, **{name: 0}), lambda: interp.plot_top_losses_cam(3, **{name: 0})]
    learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    for call in calls:
        with pytest.raises(TypeError, match=f"{name!r} here: it is called {word!r}"): call()


def test_options_of_a_method(dls):
    learn = ready(dls)
    with pytest.raises(TypeError) as caught: learn.show_cam(0, method='scorecam', top=4)
    code = str(caught.value).partition('from functools import partial, then method=')[2]
    wanted = eval(code, dict(partial=partial, METHODS=METHODS)) # what the sentence says works
    assert wanted.func is METHODS['scorecam'] and wanted.keywords==dict(top=4)
    assert learn.get_cams(0, method=wanted).maps.abs().max() > 0
    for call in (lambda: learn.get_cams(0, method=['gradcam', 'sscam'], sigma=3), lambda: CAMInterpretation.from_learner(learn, method='sscam', sigma=3)):
        with pytest.raises(TypeError, match="'sigma' is an option of the method 'sscam'"): call()
    with pytest.raises(TypeError, match="there is no argument 'nonsense' here"): learn.get_cams(0, nonsense=1)


# -- learners without pictures

def test_tables_are_refused():
    df = pd.DataFrame(dict(a=torch.rand(20).tolist(), b=list('xy')*10, y=list('uuvv')*5))
    learn = tabular_learner(TabularDataLoaders.from_df(df, y_names='y', cat_names=['b'], cont_names=['a'], procs=[Categorify], bs=4), layers=[4])
    for call in (learn.show_cam, lambda: learn.show_cam(0), lambda: learn.get_cams([1, 2]), lambda: CAMInterpretation.from_learner(learn), lambda: learn.cam_trust(0), lambda: learn.sanity_check()):
        with pytest.raises(ValueError, match='this learner reads tables'): call()


def test_texts_are_refused():
    words, labels = [text.split() for text in ['a b c', 'b c d', 'c d e', 'd e f']*5], list('uvuv')*5
    sets = Datasets(list(range(20)), [[lambda i: words[i], Numericalize(min_freq=1)], [lambda i: labels[i], Categorize()]], splits=[range(10), range(10, 20)])
    dls = sets.dataloaders(bs=4, before_batch=pad_input)
    learn = Learner(dls, nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.LazyLinear(2)), loss_func=CrossEntropyLossFlat())
    for call in (learn.show_cam, lambda: learn.show_cam(0), lambda: CAMInterpretation.from_learner(learn)):
        with pytest.raises(ValueError, match='this learner reads texts'): call()


# -- it can be kept

def test_pickled_and_read_again(dls, tmp_path):
    "On fastai's own learner: losses, ranks and maps are the same, and its plots work"
    set_seed(2)
    learn = vision_learner(dls, resnet18, pretrained=False)
    interp = CAMInterpretation.from_learner(learn, method='layercam')
    again = pickle.loads(pickle.dumps(interp))
    assert torch.equal(again.losses, interp.losses) and again.method=='layercam' and again.dl.n==interp.dl.n==12
    assert torch.allclose(again.top_losses_cams(3, show='both').maps, interp.top_losses_cams(3, show='both').maps, atol=1e-6)
    again.plot_top_losses_cam(2)
    assert (again.confusion_matrix()==interp.confusion_matrix()).all() and again.confusion_matrix().sum()==12
    file = tmp_path/'learner.pkl'
    learn.export(file)
    assert torch.allclose(load_learner(file).get_cams(dls.valid.items[0]).maps, learn.get_cams(0).maps, atol=1e-6)
    pickle.loads(pickle.dumps(CAMCallback('left')))


# -- pictures that validation draws at random

class Dims(Transform):
    "Another brightness in every pass, in validation too"
    order = 200
    def encodes(self, x:TensorImage): return x*(4*torch.rand(len(x), 1, 1, 1))


def dims(pictures):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=FuncSplitter(lambda f: int(f.stem) >= 12), item_tfms=Resize(64),
                      batch_tfms=[Dims(), Normalize.from_stats(*imagenet_stats)])
    return block.dataloaders(pictures, bs=5, num_workers=0)


@pytest.mark.parametrize('show', ['pred', 'actual', 'both'])
def test_the_loss_in_the_title_is_that_of_the_picture_shown(pictures, show):
    learn = ready(dims(pictures))
    for p in learn.model.parameters(): p.data.mul_(2)
    interp = CAMInterpretation.from_learner(learn)
    torch.manual_seed(7)
    cams = interp.top_losses_cams(6, show=show)
    assert cams.items==[interp.dl.items[i] for i in interp.top_losses(6)[1]] # in the order of the interpretation's losses
    assert torch.allclose(cams.losses, -cams.preds[range(6), cams.targs].log(), atol=1e-4)
    assert (cams.losses - interp.top_losses(6)[0]).abs().max() > 1e-3


def test_items_without_a_loss_of_their_own_keep_the_interpretations(dls):
    interp = CAMInterpretation.from_learner(ready(dls, mean_loss))
    assert torch.equal(interp.top_losses_cams(4).losses, interp.top_losses(4)[0].as_subclass(torch.Tensor))


def test_a_label_is_asked_about_without_a_region(dls):
    learn = ready(dls)
    idxs = CAMInterpretation.from_learner(learn).top_losses(4)[1]
    assert torch.allclose(CAMInterpretation.from_learner(learn).top_losses_cams(4, show='actual').maps, learn.get_cams(idxs, cls='actual').maps, atol=1e-6)
    with pytest.raises(ValueError, match='a Region is for models'): learn.get_cams(0, cls=Region('left', 'actual'))


# -- what is inherited

class Samples(torch.utils.data.Dataset):
    def __init__(self): self.x = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    def __len__(self): return 9
    def __getitem__(self, i): return self.x[i], torch.tensor(i%3)


def counted(learn, dl, n):
    "The confusion matrix, item by item"
    found = np.zeros((n, n), dtype=int)
    for batch in dl:
        with torch.no_grad(): out = learn.model.eval()(batch[0].as_subclass(torch.Tensor))
        for row, label in zip(out, batch[1]): found[int(label), int(row.argmax())] += 1
    return found


def test_confusion_without_names(capsys):
    "PyTorch's loaders have no vocab: classes are called by their number"
    loader = torch.utils.data.DataLoader(Samples(), batch_size=4)
    set_seed(3)
    learn = Learner(DataLoaders(loader, loader), nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), cam_head(4, 3)), loss_func=nn.CrossEntropyLoss())
    interp, expected = CAMInterpretation.from_learner(learn), counted(learn, loader, 3)
    assert (interp.confusion_matrix()==expected).all() and expected.sum()==9
    off = sorted(((i, j, expected[i, j]) for i in range(3) for j in range(3) if i != j and expected[i, j]), key=lambda one: -one[2])
    assert sorted(interp.most_confused())==sorted(off)
    interp.plot_confusion_matrix()
    assert [text.get_text() for text in plt.gca().get_yticklabels()]==['0', '1', '2'] and len(plt.gca().texts)==9
    capsys.readouterr()
    interp.print_classification_report()
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()[:2] in ('0 ', '1 ', '2 ')]==['3', '3', '3']


def test_confusion_is_fastais(dls):
    interp = CAMInterpretation.from_learner(ready(dls))
    assert (interp.confusion_matrix()==ClassificationInterpretation.confusion_matrix(interp)).all()
    yes_or_no = Learner(dls, nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), cam_head(4, 1)), loss_func=BCEWithLogitsLossFlat())
    interp = CAMInterpretation.from_learner(yes_or_no)
    logits = torch.cat([yes_or_no.model.eval()(x.as_subclass(torch.Tensor)) for x, _ in interp.dl])[:,0]
    labels = torch.cat([y for _, y in interp.dl])
    assert interp.confusion_matrix().tolist()==[[int(((labels==i) & ((logits > 0)==bool(j))).sum()) for j in (0, 1)] for i in (0, 1)]


def test_values_are_not_confused_with_each_other(pictures):
    block = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=lambda f: float(int(f.stem)%3), splitter=FuncSplitter(lambda f: int(f.stem) >= 12), item_tfms=Resize(32))
    interp = CAMInterpretation.from_learner(ready(block.dataloaders(pictures, bs=5, num_workers=0), nn.MSELoss()))
    for call in (interp.confusion_matrix, interp.plot_confusion_matrix, interp.most_confused, interp.print_classification_report):
        with pytest.raises(ValueError, match='not classes, and only classes can be confused with each other'): call()


def test_names_in_the_confusion_matrix_are_no_formulas(dls):
    interp = CAMInterpretation.from_learner(ready(dls))
    interp.vocab = ['a$x_1$', '$\\frac']
    interp.plot_confusion_matrix(title='50% $a_')
    figure, ax = plt.gcf(), plt.gca()
    figure.canvas.draw()
    texts = [ax.title, *ax.get_xticklabels(), *ax.get_yticklabels()]
    assert [text.get_text() for text in texts]==['50% $a_', 'a$x_1$', '$\\frac', 'a$x_1$', '$\\frac'] and not any(text.get_parse_math() for text in texts)


def test_a_loader_by_its_place(dls):
    learn = ready(dls)
    plain = CAMInterpretation.from_learner(learn, dl=dls.train)
    assert torch.equal(CAMInterpretation.from_learner(learn, dls.train).losses, plain.losses) and len(plain.losses)==12
    assert list(plain.dl.items)==list(dls.train.items)
    for wrong in ('x.png', [1, 2], 1.):
        with pytest.raises(TypeError, match='dl is a labelled DataLoader'): CAMInterpretation.from_learner(learn, wrong)
    with pytest.raises(TypeError, match='pass dls.valid'): CAMInterpretation.from_learner(learn, dls)


# -- a callback that cancels

@pytest.mark.parametrize('cancel', [CancelBatchException, CancelValidException, CancelFitException, CancelEpochException, CancelTrainException, CancelStepException])
@pytest.mark.parametrize('event', ['before_validate', 'before_batch', 'after_pred', 'after_loss', 'after_batch'])
def test_a_cancelled_pass_says_so(dls, event, cancel):
    def stop(self):
        if not self.training: raise cancel
    Stops = type('Stops', (Callback,), {event: stop, 'before_batch': stop if event=='before_batch' else lambda self: None})
    learn = ready(dls)
    learn.add_cb(Stops())
    for call in (lambda: learn.get_cams([0, 1]), lambda: CAMInterpretation.from_learner(learn)):
        with pytest.raises(ValueError, match=r'a callback of the learner cancel.*take it off meanwhile, with learn.removed_cbs') as caught: call()
        assert '\n' not in str(caught.value) and not any(m._forward_hooks for m in learn.model.modules())
    with learn.removed_cbs(learn.cbs[-1]): assert len(learn.get_cams([0, 1]))==2


def test_a_validation_of_ones_own_that_is_cancelled(dls):
    "Also before the callback has begun"
    class Stops(Callback):
        order = -10
        def before_validate(self): raise CancelValidException
    with pytest.raises(ValueError, match='gave no batch: it has no items, or a callback of the learner cancels them'): ready(dls).validate(cbs=[Stops(), CAMCallback()])


# -- arguments that are called otherwise

def test_options_of_wrapped_methods_and_of_partials(dls):
    learn = ready(dls)
    interp = CAMInterpretation.from_learner(learn)
    handle = learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    names = dict(partial=partial, METHODS=METHODS, WRAPPERS=WRAPPERS)
    for method, option, step in (('scorecam+tta', dict(top=4), 'scorecam'), ('scorecam + tta', dict(top=4), 'scorecam'), ('smooth_gradcam_pp', dict(n=2), 'smooth_gradcam_pp'),
                                 ('gradcam+tta', dict(flip=False), 'tta'), ('scorecam', dict(top=4), 'scorecam')):
        for call in (learn.get_cams, learn.show_cam, lambda item, **kwargs: interp.top_losses_cams(3, **kwargs), lambda item, **kwargs: interp.plot_top_losses_cam(3, **kwargs)):
            with pytest.raises(TypeError, match=f'{next(iter(option))!r} is an option of the method {step!r}') as caught: call(0, method=method, **option)
            assert '\n' not in str(caught.value)
        wanted = eval(str(caught.value).partition('then method=')[2], names) # what the sentence says works
        handle.remove()
        assert learn.get_cams(0, method=wanted).maps.shape==(1, 8, 8)
        handle = learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    for call in (lambda: learn.get_cams(0, method=partial(METHODS['scorecam'], topk=16)), lambda: learn.show_cam(0, method=['gradcam', partial(METHODS['scorecam'], topk=16)]),
                 lambda: CAMInterpretation.from_learner(learn, method=partial(METHODS['scorecam'], topk=16)), lambda: interp.top_losses_cams(2, method=partial(METHODS['scorecam'], topk=16))):
        with pytest.raises(TypeError, match="the method 'scorecam' has no option 'topk': its options are top, reduce, bs"): call()


def test_a_class_where_show_chooses(dls):
    interp = CAMInterpretation.from_learner(ready(dls))
    for name in ('class_name', 'target', 'category'):
        for call in (interp.top_losses_cams, interp.plot_top_losses_cam):
            with pytest.raises(TypeError, match=r"there is no argument .* cls='left' chooses the items of a class, show='pred', 'actual', 'both' or 'diff' whose maps are shown, and learn.show_cam\(interp.top_losses\(k\)\[1\], cls='left'\) asks about one class"): call(3, **{name: 'left'})
    for name in ('n', 'n_items'):
        for call in (interp.top_losses_cams, interp.plot_top_losses_cam):
            with pytest.raises(TypeError, match=f"{name!r} here: it is called 'k'"): call(3, **{name: 3})


@pytest.mark.parametrize('check, wrong, right', [('cam_trust', dict(target=1), 'cls'), ('cam_trust', dict(target_layers=[]), 'layer'), ('sanity_check', dict(target_layer='0'), 'layer'),
                                                 ('compare_cams', dict(class_name='left'), 'cls'), ('compare_cams', dict(method='gradcam'), 'methods'), ('find_shortcuts', dict(target_layer='0'), 'layer')])
def test_checks_name_the_argument_that_is_meant(dls, check, wrong, right):
    learn = vision_learner(dls, resnet18, pretrained=False)
    whose = learn if check=='cam_trust' else CAMInterpretation(learn, dls.valid, torch.zeros(len(dls.valid_ds)))
    with pytest.raises(TypeError, match=f"{next(iter(wrong))!r} here: it is called {right!r}"): getattr(whose, check)(**wrong)
    with pytest.raises(TypeError, match="there is no argument 'nonsense' here: the arguments are"): getattr(whose, check)(nonsense=1)
