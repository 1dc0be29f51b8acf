"Titles, questions and legends, word by word and beside one another."
import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.text import Text

from fastai_cam.tasks import TASKS, Values
from fastai_cam.maps.cams import CAMs

from helpers.maps import VOCAB


# -- a batch

def title(task, pred, targ=None, **kwargs):
    cams = CAMs(torch.zeros(1, 2, 2), preds=None if pred is None else torch.tensor([pred]), targs=None if targ is None else torch.tensor([targ]), losses=torch.tensor([.1234]), task=task, **kwargs)
    return cams.item_title(0, loss=True), cams.legend(), cams.item_title(0)


@pytest.mark.parametrize('task, pred, targ, kwargs, expected', [
    ('', [.2, .7, .1], 2, dict(vocab=VOCAB), ('predicted dog 0.70 · actual car · loss 0.12', '', 'predicted dog 0.70 · actual car')),
    ('single', [.2, .7, .1], None, dict(vocab=VOCAB), ('predicted dog 0.70 · loss 0.12', '', 'predicted dog 0.70')),
    ('', [.2, .7, .9], 2, dict(vocab=VOCAB), ('', '', '')),
    ('binary', [.7], 1, dict(vocab=['ham', 'spam']), ('predicted spam 0.70 · actual spam · loss 0.12', '', 'predicted spam 0.70 · actual spam')),
    ('binary', .1, [1.], dict(vocab=['ham', 'spam']), ('predicted ham 0.90 · actual spam · loss 0.12', '', 'predicted ham 0.90 · actual spam')),
    ('binary', .1, None, dict(), ('predicted negative 0.90 · loss 0.12', '', 'predicted negative 0.90')),
    ('binary', .4, 0, dict(vocab=['spam'], thresh=.3), ('predicted positive 0.40 · actual negative · loss 0.12', '', 'predicted positive 0.40 · actual negative')),
    ('multi', [.5, .49, .9], [0, 1, 1], dict(vocab=VOCAB), ('predicted cat;car · actual dog;car · loss 0.12', '', 'predicted cat;car · actual dog;car')),
    ('multi', [.5, .49, .9], None, dict(vocab=VOCAB, thresh=.6), ('predicted car · loss 0.12', '', 'predicted car')),
    ('multi', [.5, .35, .9], [0., .4, 1.], dict(vocab=VOCAB, thresh=.3), ('predicted cat;dog;car · actual car · loss 0.12', '', 'predicted cat;dog;car · actual car')), # thresh is about predictions
    ('multi', [.1, .1, .1], [0., 0., 0.], dict(vocab=VOCAB), ('predicted – · actual – · loss 0.12', '', 'predicted – · actual –')),
    ('segmentation', [[[.1, .9]]], [[[0, 1]]], dict(vocab=VOCAB), ('loss 0.12', '', '')),
    ('values', [1234.5, -.00012345], [1., 2.], dict(), ('predicted 1230;-0.000123 · actual 1;2 · loss 0.123', '', 'predicted 1230;-0.000123 · actual 1;2')),
    ('values', [3.14159], 3., dict(), ('predicted 3.14 · actual 3 · loss 0.123', '', 'predicted 3.14 · actual 3')),
    ('values', [99949., 999999., 2., 3., 4., 5., 6.], None, dict(), ('predicted 99900;1e+06;2;3;4;+2 · loss 0.123', '', 'predicted 99900;1e+06;2;3;4;+2')),
    ('points', [.1, .2], [[.1, .2]], dict(), ('loss 0.12', '● predicted   ✚ actual', '')),
    ('points', [.1, .2], None, dict(), ('loss 0.12', '● predicted', '')),
    ('values', None, [1.], dict(), ('', '', '')),
    ('', [.2, .7, .1], 2, dict(vocab=VOCAB, texts=['What is it?']), ('What is it? · predicted dog 0.70 · actual car · loss 0.12', '', 'What is it? · predicted dog 0.70 · actual car')),
])
def test_titles(task, pred, targ, kwargs, expected): assert title(task, pred, targ, **kwargs)==expected


def question(task, pred, c, **kwargs): return CAMs(torch.zeros(1, 2, 2), preds=torch.tensor([pred]), classes=torch.tensor([c]), task=task, **kwargs).question(0)


@pytest.mark.parametrize('task, pred, c, kwargs, expected', [
    ('multi', [.5, .49, .9], 1, dict(vocab=VOCAB), 'dog 0.49'),
    ('binary', [.7], 1, dict(vocab=['ham', 'spam']), 'spam 0.70'),
    ('binary', [.7], 0, dict(vocab=['ham', 'spam']), 'ham 0.30'),
    ('binary', .7, 0, dict(), 'negative 0.30'),
    ('segmentation', [[[.1, .9]]], 2, dict(vocab=VOCAB, labels=['predicted']), 'car'),
    ('values', [1., 2.], 1, dict(labels=['weight'], vocab=VOCAB), 'weight'),
    ('points', [.1, .2], -1, dict(labels=['gradcam: nose']), 'gradcam: nose'),
    ('multi', [.5, .49, .9], -1, dict(labels=['gradcam: score'], vocab=VOCAB), 'gradcam: score'),
    ('multi', [.5, .49, .9], 1, dict(labels=['gradcam: dog'], vocab=VOCAB), 'gradcam: dog 0.49'),
])
def test_questions(task, pred, c, kwargs, expected): assert question(task, pred, c, **kwargs)==expected


OF_TASKS = {'': ([.2, .7, .1], 2), 'single': ([.2, .7, .1], 2), 'binary': ([.4], 1), 'multi': ([.7, .2, .9], [0, 1, 1]), 'segmentation': ([[[.1, .9]]], [[[0, 1]]]),
            'values': ([1234.5, .5], [1200., .25]), 'points': ([.1, .2], [[.1, .3]])}


@pytest.mark.parametrize('task, vocab, has_label, item, item_and_loss, legend, asked, drawn', [
    ('', '', False, 'predicted class 1 0.70', 'predicted class 1 0.70 · loss 0.12', '', 'gradcam: class 0 0.20', None),
    ('', '', True, 'predicted class 1 0.70 · actual class 2', 'predicted class 1 0.70 · actual class 2 · loss 0.12', '', 'gradcam: class 0 0.20', None),
    ('', 'names', False, 'predicted dog 0.70', 'predicted dog 0.70 · loss 0.12', '', 'gradcam: cat 0.20', None),
    ('', 'names', True, 'predicted dog 0.70 · actual car', 'predicted dog 0.70 · actual car · loss 0.12', '', 'gradcam: cat 0.20', None),
    ('single', '', False, 'predicted class 1 0.70', 'predicted class 1 0.70 · loss 0.12', '', 'gradcam: class 0 0.20', None),
    ('single', '', True, 'predicted class 1 0.70 · actual class 2', 'predicted class 1 0.70 · actual class 2 · loss 0.12', '', 'gradcam: class 0 0.20', None),
    ('single', 'names', False, 'predicted dog 0.70', 'predicted dog 0.70 · loss 0.12', '', 'gradcam: cat 0.20', None),
    ('single', 'names', True, 'predicted dog 0.70 · actual car', 'predicted dog 0.70 · actual car · loss 0.12', '', 'gradcam: cat 0.20', None),
    ('binary', '', False, 'predicted negative 0.60', 'predicted negative 0.60 · loss 0.12', '', 'gradcam: negative 0.60', None),
    ('binary', '', True, 'predicted negative 0.60 · actual positive', 'predicted negative 0.60 · actual positive · loss 0.12', '', 'gradcam: negative 0.60', None),
    ('binary', 'names', False, 'predicted cat 0.60', 'predicted cat 0.60 · loss 0.12', '', 'gradcam: cat 0.60', None),
    ('binary', 'names', True, 'predicted cat 0.60 · actual dog', 'predicted cat 0.60 · actual dog · loss 0.12', '', 'gradcam: cat 0.60', None),
    ('multi', '', False, 'predicted class 0;class 2', 'predicted class 0;class 2 · loss 0.12', '', 'gradcam: class 0 0.70', None),
    ('multi', '', True, 'predicted class 0;class 2 · actual class 1;class 2', 'predicted class 0;class 2 · actual class 1;class 2 · loss 0.12', '', 'gradcam: class 0 0.70', None),
    ('multi', 'names', False, 'predicted cat;car', 'predicted cat;car · loss 0.12', '', 'gradcam: cat 0.70', None),
    ('multi', 'names', True, 'predicted cat;car · actual dog;car', 'predicted cat;car · actual dog;car · loss 0.12', '', 'gradcam: cat 0.70', None),
    ('segmentation', '', False, '', 'loss 0.12', '', 'gradcam: class 0', None),
    ('segmentation', '', True, '', 'loss 0.12', '', 'gradcam: class 0', None),
    ('segmentation', 'names', False, '', 'loss 0.12', '', 'gradcam: cat', None),
    ('segmentation', 'names', True, '', 'loss 0.12', '', 'gradcam: cat', None),
    ('values', '', False, 'predicted 1230;0.5', 'predicted 1230;0.5 · loss 0.123', '', 'gradcam: asked', None),
    ('values', '', True, 'predicted 1230;0.5 · actual 1200;0.25', 'predicted 1230;0.5 · actual 1200;0.25 · loss 0.123', '', 'gradcam: asked', None),
    ('values', 'names', False, 'predicted 1230;0.5', 'predicted 1230;0.5 · loss 0.123', '', 'gradcam: asked', None),
    ('values', 'names', True, 'predicted 1230;0.5 · actual 1200;0.25', 'predicted 1230;0.5 · actual 1200;0.25 · loss 0.123', '', 'gradcam: asked', None),
    ('points', '', False, '', 'loss 0.12', '● predicted', 'gradcam: asked', ['predicted']),
    ('points', '', True, '', 'loss 0.12', '● predicted   ✚ actual', 'gradcam: asked', ['predicted', 'actual']),
    ('points', 'names', False, '', 'loss 0.12', '● predicted', 'gradcam: asked', ['predicted']),
    ('points', 'names', True, '', 'loss 0.12', '● predicted   ✚ actual', 'gradcam: asked', ['predicted', 'actual']),
])
def test_what_each_task_says(task, vocab, has_label, item, item_and_loss, legend, asked, drawn):
    "Item, legend, question and points; by the name of the task, and by the task itself"
    pred, targ = OF_TASKS[task]
    vocab = (VOCAB[:2] if task=='binary' else VOCAB) if vocab else None
    for what in (task, TASKS[task]()):
        cams = CAMs(torch.ones(1, 2, 2), preds=torch.tensor([pred]), targs=torch.tensor([targ]) if has_label else None, losses=torch.tensor([.1234]), classes=torch.tensor([0]),
                    labels=['gradcam: asked'], vocab=vocab, task=what)
        assert (cams.item_title(0), cams.item_title(0, loss=True), cams.legend(), cams.question(0))==(item, item_and_loss, legend, asked)
        assert cams.title(0)==(item if task=='binary' else f'{item} · map: {asked}' if item else asked) # 'negative' is what was predicted
        points = cams[0].points
        assert (points if points is None else list(points))==drawn and (not drawn or torch.equal(points['predicted'], torch.tensor([[.1, .2]])))


def test_the_task_says_what_the_maps_do_not():
    own = Values()
    assert CAMs(torch.zeros(1, 2, 2), task=own).task is own and CAMs(torch.zeros(1, 2, 2), task=own).signed
    some = CAMs(torch.zeros(2, 2, 2), task=own, signed=False)[1:]
    assert not some.signed and own.signed and type(some.task) is Values
    some.signed, some.thresh = True, .25
    assert some.task.signed and some.task.thresh==.25 and own.thresh==.5 # other maps may be of the same task
    some.task = 'multi'
    assert type(some.task) is TASKS['multi'] and type(some[:1].task) is TASKS['multi']
    with pytest.raises(ValueError, match="task 'x' is not known"): some.task = 'x'
    with pytest.raises(ValueError, match="task 'x' is not known: use one of '', 'single', 'binary', 'multi', 'segmentation', 'values', 'points'"): CAMs(torch.zeros(1, 2, 2), task='x')
    with pytest.raises(ValueError, match='is not known'): CAMs(torch.zeros(1, 2, 2), task=Values)


def test_binary_map_of_the_predicted_class_needs_no_second_title():
    cams = CAMs(torch.zeros(2, 2, 2), preds=torch.tensor([[.9], [.1]]), classes=torch.tensor([1, 1]), vocab=['ham', 'spam'], task='binary')
    assert [m.title for m in cams]==['predicted spam 0.90', 'predicted ham 0.90 · map: spam 0.10']


def test_long_lists_and_long_texts_are_shortened():
    many = CAMs(torch.ones(1, 2, 2, 2), preds=torch.ones(1, 30), targs=torch.ones(1, 30), vocab=[f'label number {i}' for i in range(30)], task='multi', texts=['why ' + 'so '*100 + 'long?'])
    assert many.item_title(0).count(';+25')==2 and many.item_title(0, width=22).endswith('predicted label number 0;+29 · actual label number 0;+29')
    text = many.item_title(0).split(' · ')[0]
    assert len(text) <= 120 and text.endswith(' …')
    assert len(many.show()[0].get_title(loc='left').split('\n')[0]) < 120


# -- words from users

def test_a_method_before_a_name_with_a_colon():
    cams = CAMs(torch.ones(1, 2, 2, 2), vocab=['Alien: Romulus', 'b'], preds=torch.tensor([[.75, .25]]), classes=torch.tensor([[0, 0]]), labels=['layercam: Alien: Romulus', 'gradcam: predicted'])
    assert [cams.question(0, k) for k in (0, 1)]==['layercam: Alien: Romulus 0.75', 'gradcam: Alien: Romulus 0.75']


def test_a_class_that_the_vocab_does_not_have_is_called_by_its_number():
    assert CAMs(torch.ones(1, 2, 2), preds=torch.tensor([[.1, .9]]), targs=torch.tensor([7]), classes=torch.tensor([7]), vocab=['a', 'b'])[0].title=='predicted b 0.90 · actual class 7 · map: class 7'


# -- what is drawn

def test_one_map_has_its_title_once():
    for cams in (CAMs(torch.ones(1, 2, 2)), CAMs(torch.ones(1, 1, 2, 2)), CAMs(torch.ones(1, 2, 3, 3), n_space=3)):
        ax = cams.show(title='mine')[0]
        words = [text.get_text() for text in ax.figure.findobj(Text)]
        assert sum('mine' in word for word in words)==1, words
    ax = CAMs(torch.ones(2, 2, 2)).show(title='mine')[0]
    assert ax.figure.get_suptitle()=='mine' and ax.get_title()==''
    points = CAMs(torch.ones(1, 2, 2), preds=torch.zeros(1, 2), targs=torch.zeros(1, 2), task='points')
    assert points.show()[0].figure.get_supxlabel()=='● predicted   ✚ actual'
    plt.close('all')


# -- titles beside one another

METHODS = ['hirescam', 'smooth_gradcam_pp', 'eigengradcam', 'guided_backprop+tta', 'layercam+stages+pca']


@pytest.mark.parametrize('name', ['cat', 'american staffordshire terrier', 'x'*80])
def test_titles_of_questions_do_not_overlap(name):
    n = len(METHODS)
    cams = CAMs(torch.rand(2, n, 3, 3), classes=torch.zeros(2, n, dtype=torch.long), labels=[f'{method}: {name}' for method in METHODS], preds=torch.tensor([[.9, .1]]*2), targs=torch.tensor([0, 1]), vocab=[name, 'dog'], task='single')
    axs = cams.show()
    fig = axs[0].figure
    fig.canvas.draw()
    for row in (axs[:n], axs[n:]):
        lines = [ax.get_title(loc='left').split('\n') for ax in row]
        n_head = min([line.startswith('▸') for line in one].index(True) for one in lines) # the item's title is above them all
        heads, lines = [one[:n_head] for one in lines], [one[n_head:] for one in lines]
        assert len({len(one) for one in lines})==1 and heads[0][0] and not any(''.join(head) for head in heads[1:])
        assert all(len(line) <= 34 for one in lines for line in one) and all(len(one) <= (4 if len(name) > 60 else 2) for one in lines)
        assert [''.join(one).replace(' ', '').split(':')[0] for one in lines]==[f'▸{method}' for method in METHODS]
        whole = row[0].text(0, 0, max(heads[0], key=len), fontsize=9)
        assert whole.get_window_extent().width < row[-1].get_window_extent().x1 - row[0].get_window_extent().x0
        whole.remove()
        for left, right in zip(row, row[1:]):
            words = left.text(0, 0, max(left.get_title(loc='left').split('\n')[n_head:], key=len), fontsize=9)
            assert words.get_window_extent().width < right.get_window_extent().x0 - left.get_window_extent().x0
            words.remove()
    plt.close(fig)
