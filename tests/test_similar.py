"The training pictures that a decision is like: neighbours and matches that are known, and an index that says what it is of."
import gc
import json
import random
import re
import weakref
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import ConnectionPatch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.vision.all import CategoryBlock, ColReader, DataBlock, ImageBlock, IndexSplitter, Resize, resnet18, vision_learner

from fastai_cam.all import Versus
from fastai_cam.similar import alike, evidence_features, match_cells, SimilarIndex, typical_evidence
from fastai_cam.similar.index import index_for
from fastai_cam.similar.show import place_of
from helpers.probe import state

RED, GREEN, BLUE = 0, 1, 2


# -- vectors

def test_each_place_counts_by_its_evidence():
    acts, maps = torch.tensor([[[[1., 5.]], [[2., 0.]]]]), torch.tensor([[[[3., 1.]], [[-1., 2.]], [[-1., 0.]]]])
    assert torch.equal(evidence_features(acts, maps), torch.tensor([[[2., 1.5], [5., 0.], [0., 0.]]]))
    fine = maps.repeat_interleave(2, -1).repeat_interleave(2, -2) # a finer map of the same
    assert torch.allclose(evidence_features(acts, fine), evidence_features(acts, maps))
    assert torch.allclose(evidence_features(acts[..., None], maps[..., None]), evidence_features(acts, maps)) # of a volume


def test_typical_evidence_of_few_pictures_is_drawn_to_all():
    of_all = torch.tensor([[4., 0], [0, 2], [0, 0]]) # the last says nothing, and counts nowhere
    assert torch.allclose(typical_evidence(of_all[:1], of_all, weight=3), (torch.tensor([4., 0]) + 3*torch.tensor([2., 1]))/4)
    assert torch.equal(typical_evidence(of_all[:0], of_all), torch.tensor([2., 1]))
    assert torch.equal(typical_evidence(of_all[2:], of_all[2:]), torch.zeros(2))


def test_what_says_nothing_is_like_nothing():
    found = alike(torch.tensor([[1., 1], [0, 0]]), torch.tensor([[2., 1], [0, 0], [1, 2]]), torch.tensor([1., 0]))
    assert torch.allclose(found, torch.tensor([[.5**.5, -1, 1], [-1, -1, -1]]))


def test_neighbours_by_what_is_not_typical():
    "By plain cosines the third would be nearest: it says the same, only more loudly"
    features = torch.tensor([[10., 2], [10, -2], [30, 1], [10, .9]])
    index = SimilarIndex(features[:3], torch.arange(3), torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.ones(3), list('abc'), dict(method='gradcam'))
    assert torch.cosine_similarity(features[3:], features[:3]).argmax()==2
    rows, similarity = index.nearest(features[3], 0, 2)
    assert rows.tolist()==[0, 1] and similarity[0] > .98 and index.nearest(features[3], 0, 9, without=[0, 2])[0].tolist()==[1] and not len(index.nearest(features[3], 1)[0])


# -- matches

def cells_of(*cells, grid=(2, 3), channels=4):
    "Activations that are zero but for a channel at some cells"
    acts = torch.zeros(channels, *grid)
    for channel, row, column in cells: acts[channel, row, column] = 1
    return acts


def test_matches_that_are_known():
    acts, other = cells_of((0, 0, 0), (1, 0, 2), (2, 1, 1)), cells_of((1, 3, 1), (0, 2, 0), (2, 0, 1), grid=(4, 2))
    even, of_other = torch.tensor([[1., 0, 1], [0, 1, 0]]), torch.ones(4, 2)
    assert sorted(match_cells(acts, even, other, of_other).tolist())==[[[0, 0], [2, 0]], [[0, 2], [3, 1]], [[1, 1], [0, 1]]]
    maps = torch.tensor([[4., 0, 2], [0, 3, 0]])
    assert match_cells(acts, maps, other, of_other).tolist()==[[[0, 0], [2, 0]], [[1, 1], [0, 1]], [[0, 2], [3, 1]]] # the surest first
    assert match_cells(acts, maps, other, of_other, 1).tolist()==[[[0, 0], [2, 0]]]
    maps[0, 2] = .9 # a root of less than a quarter
    assert match_cells(acts, maps, other, of_other).tolist()==[[[0, 0], [2, 0]], [[1, 1], [0, 1]]]
    assert match_cells(acts, -maps, other, of_other).shape==(0, 2, 2) and match_cells(acts, maps, other, -of_other).shape==(0, 2, 2)


def test_a_match_is_the_best_on_both_sides():
    acts, other = cells_of((0, 0, 0), (0, 1, 2)), cells_of((0, 0, 1))
    found = match_cells(acts, torch.tensor([[1., 0, 0], [0, 0, 2]]), other, torch.ones(2, 3))
    assert found.tolist()[0]==[[1, 2], [0, 1]] and [[0, 0], [0, 1]] not in found.tolist()


def test_what_a_whole_picture_has_in_common_tells_no_places_apart():
    "On grounds that differ, cells are more like their own neighbours than like what they match"
    acts, other = .1*cells_of((1, 0, 0), (2, 0, 1)), .1*cells_of((2, 0, 0), (1, 1, 2))
    acts[0] += 5
    other[3] += 5
    assert match_cells(acts, torch.tensor([[1., 1, 0], [0, 0, 0]]), other, torch.tensor([[1., 0, 0], [0, 0, 1]])).tolist()==[[[0, 0], [1, 2]], [[0, 1], [0, 0]]]


def test_the_middle_of_a_cell():
    assert place_of((0, 0), (2, 4), (20, 40))==(4.5, 4.5) and place_of((1, 3), (2, 4), (20, 80))==(69.5, 14.5)
    assert place_of(torch.tensor([0, 0]), (1, 1), (1, 1))==(0, 0) # the middle of a picture of one pixel is where matplotlib has it


# -- learners whose evidence is known: colours are channels, and each class is a colour

def painted(*squares, size=12):
    "A picture with squares of 4 pixels, each a colour at a row and a column of squares"
    image = torch.zeros(3, size, size)
    for colour, row, column in squares: image[:, 4*row:4*row + 4, 4*column:4*column + 4] = torch.as_tensor(colour, dtype=torch.float)[:, None, None]
    return image


class Colours(nn.Module):
    "The mean of red and of green over the picture, as logits; activations are the means of squares of 4 pixels"
    def __init__(self, n_out=2):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 3, 4, 4, bias=False), nn.Linear(3, n_out, bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(3)[..., None, None].expand(-1, -1, 4, 4)/16)
            self.head.weight.copy_(8*torch.eye(3)[:n_out])
    def forward(self, x): return self.head(self.body(x).relu().mean((2, 3)))


REDS = [painted(((1, 0, 0), 0, 0)), painted(((1, 0, .8), 1, 1)), painted(((1, 0, 0), 2, 2)), painted(((1, 0, .7), 0, 2))] # two have a blue tinge
GREENS = [painted(((0, 1, 0), 0, 1)), painted(((0, 1, .8), 1, 2)), painted(((0, 1, 0), 2, 0))]
TRAIN = [(x, RED) for x in REDS] + [(x, GREEN) for x in GREENS] + [(painted(((1, 0, .75), 1, 0)), GREEN)] # the last is red, with a wrong label
VALID = [(painted(((1, 0, .8), 2, 1), ((0, .3, 0), 0, 0)), RED), (painted(((0, 1, 0), 1, 1), ((.2, 0, 0), 0, 0)), GREEN)]


def learner(train=None, valid=None, model=None, loss=None, vocab=('red', 'green')):
    dls = DataLoaders(TfmdDL(train or TRAIN, bs=3, num_workers=0), TfmdDL(valid or VALID, bs=4, num_workers=0))
    dls.vocab = list(vocab)
    learn = Learner(dls, model or Colours(), loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def passes(learn, call):
    "How many items went through the model in a call"
    n = []
    handle = learn.model.register_forward_pre_hook(lambda module, args: n.append(len(args[0])))
    try: call()
    finally: handle.remove()
    return sum(n)


def refuses(learn, call, error, *words):
    "Is the call refused with these words, in one sentence, and before anything runs?"
    def refused():
        with pytest.raises(error) as caught: call()
        assert all(word in str(caught.value) for word in words) and '\n' not in str(caught.value), str(caught.value)
    assert passes(learn, refused)==0


def test_neighbours_that_are_known():
    "The query is red with a blue tinge: so are pictures 1 and 3 of those labelled red, and of those labelled green the one with a wrong label"
    table = learner().get_like(0, k=2, method='gradcam').to_df()
    assert table['position'].tolist()[:2]==[1, 3] and table['label'].tolist()==['red', 'red', 'green', 'green']
    assert table['role'].tolist()==['predicted']*2 + ['runner-up']*2 and (table['similarity'][:2] > .9).all() and table['rank'].tolist()==[1, 2]*2
    assert table['actual'].tolist()==['red']*4
    by_hand = torch.tensor([8*.3/9, 8/9]).softmax(0)
    assert np.allclose(table['probability'], [by_hand[1]]*2 + [by_hand[0]]*2, atol=1e-5)


def test_a_wrong_label_is_marked():
    learn = learner()
    found = learn.get_like(0, k=4, cls='green', method='gradcam')
    table = found.to_df()
    wrong = table[table['position']==7].iloc[0]
    assert wrong['suspicious'] and (wrong['label'], wrong['model_says'])==('green', 'red') and table['suspicious'].sum()==1
    assert np.isclose(wrong['label_probability'], torch.tensor([8/9, 0]).softmax(0)[1].item(), atol=1e-5) and len(found)==1 and repr(found)=='Alike: 4 training pictures for 1 item'
    axs = learn.show_like(0, k=4, cls='green', method='gradcam')
    marked = [ax.get_title(loc='left') for ax in axs if '⚠' in ax.get_title(loc='left')]
    assert len(marked)==1 and '⚠ the model says red' in marked[0] and 'labelled green' in marked[0]


def test_lines_lie_on_the_places_and_move_no_picture():
    learn = learner()
    def drawn(n_places):
        axs = learn.show_like(0, k=1, cls='red', method='gradcam', n_places=n_places, figsize=(8, 4)) # as wide as what stands below is long
        axs[0].figure.canvas.draw()
        return axs, [ax.get_position().bounds for ax in axs], [(ax.get_xlim(), ax.get_ylim()) for ax in axs]
    axs, places, limits = drawn(3)
    lines = [one for one in axs[0].figure.artists if isinstance(one, ConnectionPatch)]
    assert len(lines)==1 and (tuple(lines[0].xy1), tuple(lines[0].xy2))==((5.5, 9.5), (5.5, 5.5)) # the middles of the red squares
    assert lines[0].get_zorder() < 0 and all(len([one for one in ax.patches if isinstance(one, ConnectionPatch)])==1 for ax in axs)
    ends = lines[0]._get_path_in_displaycoord()[0][0].vertices # where it is really drawn
    assert np.allclose(ends[[0, -1]], [axs[0].transData.transform((5.5, 9.5)), axs[1].transData.transform((5.5, 5.5))], atol=.6)
    without, places_without, limits_without = drawn(0)
    assert not without[0].figure.artists and np.allclose(places, places_without) and limits==limits_without
    assert axs[0].get_title(loc='left').split('\n')[0]=='red 0.65' and axs[1].get_title(loc='left').split('\n')[0].startswith('labelled red, alike 1.00')


def test_one_pass_and_then_only_what_is_shown():
    learn = learner()
    assert passes(learn, lambda: learn.show_like(0, k=2, method='gradcam')) <= 8 + 1 + 4 + 3 # the layer is looked for in one item a pass
    assert passes(learn, lambda: learn.show_like(0, k=2, method='gradcam', layer=None)) <= 1 + 4 + 2
    assert passes(learn, lambda: learn.get_like([0, 1], method='gradcam')) <= 2 + 1
    assert passes(learn, lambda: learn.get_like(0, method='hirescam')) >= 8 # another question, another index


def test_a_learner_is_left_as_it_was():
    learn = learner()
    learn.model.train()
    before, known, weights = state(learn.model), set(vars(learn)), [p.clone() for p in learn.model.parameters()]
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    learn.show_like(0)
    assert (torch.rand(1), np.random.rand(), random.random())==expected
    assert state(learn.model)==before and set(vars(learn))==known and all(map(torch.equal, weights, learn.model.parameters()))
    assert all(p.grad is None for p in learn.model.parameters())


def test_the_index_in_memory_goes_with_its_learner():
    learn = learner()
    index = weakref.ref(learn.similar_index())
    assert index_for(learn) is index()
    del learn
    gc.collect()
    assert index() is None


def test_another_training_set_with_the_same_labels_is_another_one():
    learn = learner()
    index = learn.similar_index('gradcam')
    assert index_for(learn, 'gradcam') is index
    valid = learn.dls.valid
    learn.dls = DataLoaders(TfmdDL([TRAIN[i] for i in (3, 2, 1, 0, 4, 5, 6, 7)], bs=3, num_workers=0), valid)
    learn.dls.vocab = ['red', 'green']
    assert index_for(learn, 'gradcam') is not index and learn.get_like(0, k=2, cls='red', method='gradcam').to_df()['position'].tolist()==[2, 0]
    xs, ys = (torch.stack([torch.as_tensor(sample[i]) for sample in TRAIN]) for i in (0, 1))
    sets = [TensorDataset(*(part[order] for part in (xs, ys))) for order in (range(8), [3, 2, 1, 0, 4, 5, 6, 7])]
    found = []
    for ds in (sets[0], sets[0], sets[1]):
        learn.dls.loaders[0] = torch.utils.data.DataLoader(ds, batch_size=3)
        found.append(index_for(learn, 'gradcam'))
    assert found[0] is found[1] is not found[2] # another loader of the same set asks nothing again


class OfTargets(torch.utils.data.Dataset):
    def __init__(self): self.targets = [y for _, y in TRAIN]
    def __len__(self): return len(TRAIN)
    def __getitem__(self, i): return TRAIN[i][0], torch.tensor(self.targets[i])


def mend_tensors(ds): ds.tensors[1][7] = RED
def mend_targets(ds): ds.targets[7] = RED
def mend_part(ds): ds.dataset.targets[7] = RED
def mend_parts(ds): ds.datasets[1].dataset.targets[7] = RED


@pytest.mark.parametrize('make, mend', [
    (lambda: TensorDataset(*(torch.stack([torch.as_tensor(sample[i]) for sample in TRAIN]) for i in (0, 1))), mend_tensors), (OfTargets, mend_targets),
    (lambda: Subset(OfTargets(), range(8)), mend_part), (lambda: ConcatDataset([Subset(OfTargets(), [0, 1, 2, 3]), Subset(OfTargets(), [4, 5, 6, 7])]), mend_parts)])
def test_labels_of_pytorchs_sets_that_change_in_place(make, mend):
    learn, ds = learner(), make()
    learn.dls.loaders[0] = torch.utils.data.DataLoader(ds, batch_size=3)
    index = learn.similar_index('gradcam')
    assert index_for(learn, 'gradcam') is index and index.labels[7]==GREEN
    mend(ds)
    assert index_for(learn, 'gradcam').labels[7]==RED
    with pytest.raises(ValueError, match='since this index was made, the labels of the training set changed'): index_for(learn, 'gradcam', index=index)


# -- what an index is of

def test_an_index_of_something_else_is_refused():
    learn = learner()
    index = learn.similar_index('gradcam')
    refuses(learn, lambda: learn.similar_index(method=['gradcam', 'hirescam']), TypeError, 'one method')
    with pytest.raises(ValueError, match='made with method gradcam, and what is asked has method hirescam: ask with the same'): learn.get_like(0, method='hirescam', index=index)
    with pytest.raises(ValueError, match='made with layer null, and what is asked has layer "layer \'body\'"'): learn.get_like(0, method='gradcam', layer=learn.model.body, index=index)
    others = dict(labels=learner([(x, 1 - y) for x, y in TRAIN]), items=learner(TRAIN[:-1]), weights=learner(model=Colours()))
    with torch.no_grad(): others['weights'].model.head.weight[0, 0] += 1e-3
    for words, message in (('labels', 'the labels of the training set'), ('items', 'the items of the training set'), ('weights', 'the weights of the model')):
        with pytest.raises(ValueError, match=f'since this index was made, .*{message}.* changed: make it anew'): others[words].get_like(0, method='gradcam', index=index)
    assert len(learner().get_like(0, method='gradcam', index=index)) # the same learner, made again
    with torch.no_grad(): learn.model.head.weight.mul_(2)
    assert index_for(learn, 'gradcam') is not index and index_for(learn, 'gradcam').made_of['model'] != index.made_of['model'] # in memory: made anew


def test_a_file_holds_all_of_it(tmp_path):
    learn = learner()
    index = learn.similar_index()
    index.names[0] = hostile = '<script>$x^2$\u202e "\n' + 'a'*300
    file = index.save(tmp_path/'train.npz')
    again = SimilarIndex.load(file)
    for name in ('features', 'positions', 'labels', 'predicted', 'probability'): assert torch.equal(getattr(again, name), getattr(index, name)) and getattr(again, name).dtype is getattr(index, name).dtype
    assert again.names[0]==hostile and again.names==index.names and again.made_of==index.made_of and repr(again)==repr(index)=='SimilarIndex: 8 labels of 8 items, 3 channels each, by objectcam'
    one, other = learn.get_like(0, index=str(file)).to_df(), learn.get_like(0, index=index).to_df()
    assert one.equals(other)
    learn.show_like(0, k=4, cls='red', index=file, save=tmp_path/'like.png', dpi=50)
    assert (tmp_path/'like.png').stat().st_size > 2000


def test_files_that_are_none(tmp_path):
    index = learner().similar_index()
    file = index.save(tmp_path/'train.npz')
    with pytest.raises(FileNotFoundError, match='make an index with learn.similar_index'): SimilarIndex.load(tmp_path/'nowhere.npz')
    (tmp_path/'torn.npz').write_bytes(file.read_bytes()[:-200])
    (tmp_path/'text.npz').write_text('no archive')
    arrays = dict(np.load(file))
    np.savez(tmp_path/'pickled.npz', **arrays | dict(labels=np.array([{}, 1], dtype=object)))
    np.savez(tmp_path/'short.npz', **arrays | dict(labels=arrays['labels'][:3]))
    np.savez(tmp_path/'far.npz', **arrays | dict(positions=arrays['positions'] + 99))
    np.savez(tmp_path/'lacking.npz', **{name: array for name, array in arrays.items() if name != 'header'})
    header = json.loads(str(arrays['header']))
    np.savez(tmp_path/'newer.npz', **arrays | dict(header=np.array(json.dumps(header | dict(format=99)))))
    np.savez(tmp_path/'odd.npz', **arrays | dict(header=np.array('[1, 2]')))
    for name, more in (('unsaid', dict(made_of={})), ('half', dict(made_of=dict(method='gradcam'))), ('nobody', dict(names=None)), ('deep', None)):
        np.savez(tmp_path/f'{name}.npz', **arrays | dict(header=np.array('['*100_000 if more is None else json.dumps(header | more))))
    np.savez(tmp_path/'nan.npz', **arrays | dict(features=arrays['features']*np.nan))
    np.savez(tmp_path/'classless.npz', **arrays | dict(labels=arrays['labels'] - 9))
    content = bytearray(file.read_bytes())
    packed = content.index(b'features.npy') + 40
    content[packed:packed + 60] = bytes(60)
    (tmp_path/'rotten.npz').write_bytes(content) # zlib.error
    content = bytearray(file.read_bytes())
    place = content.index(b'PK\x01\x02')
    content[place + 10:place + 12] = b'\x63\x00'
    (tmp_path/'foreign.npz').write_bytes(content) # a compression that Python does not know
    for name in ('torn', 'text', 'pickled', 'short', 'far', 'lacking', 'newer', 'odd', 'unsaid', 'half', 'nobody', 'deep', 'nan', 'classless', 'rotten', 'foreign'):
        with pytest.raises(ValueError, match='is no index that can be read') as caught: SimilarIndex.load(tmp_path/f'{name}.npz')
        assert '\n' not in str(caught.value) and ('it is damaged, or was not written by' in str(caught.value))==(name != 'newer'), name
    np.savez(tmp_path/'wide.npz', **arrays | dict(features=np.repeat(arrays['features'], 2, 1)))
    with pytest.raises(ValueError, match='the index is damaged: it has 6 channels, and the layer has 3'): learner().get_like(0, index=tmp_path/'wide.npz')
    with pytest.raises(ValueError, match='it would unpack to'): SimilarIndex.load(file, max_bytes=100)


# -- what is asked

def test_several_labels():
    train = [(x, torch.tensor([1., 0])) for x in REDS] + [(x, torch.tensor([0., 1])) for x in GREENS] + [(painted(((1, 0, 0), 0, 0), ((0, 1, .8), 2, 2)), torch.tensor([1., 1]))]
    learn = learner(train, [(x, nn.functional.one_hot(torch.tensor(y), 2).float()) for x, y in VALID], loss=BCEWithLogitsLossFlat())
    index = learn.similar_index('gradcam')
    assert sorted(zip(index.positions.tolist(), index.labels.tolist()))==[(i, 0) for i in range(4)] + [(4, 1), (5, 1), (6, 1), (7, 0), (7, 1)]
    assert (index.predicted[index.positions < 4]==RED).all() and (index.probability > .5).all()
    table = learn.get_like(0, k=9, method='gradcam').to_df()
    assert set(table[table['cls']=='red']['position'])=={0, 1, 2, 3, 7} and set(table[table['cls']=='green']['position'])=={4, 5, 6, 7} and not table['suspicious'].any()
    assert len(learn.show_like(0, k=2, method='gradcam'))==6
    learn.loss_func.thresh = .9 # none of the labels is predicted with that
    with pytest.raises(ValueError, match='since this index was made, what the classes are, or what counts as predicted changed'): learn.get_like(0, method='gradcam', index=index)
    table = learn.get_like(VALID[0][0], k=9, method='gradcam').to_df()
    assert table['suspicious'].all() and (table['model_says']=='').all() and (table['actual']=='').all()
    assert '⚠ the model gives it 0.7' in learn.show_like(0, k=1, method='gradcam')[1].get_title(loc='left')


def test_yes_or_no():
    class OneLogit(Colours):
        def forward(self, x): return super().forward(x).diff(dim=1)*3
    learn = learner([(x, float(y)) for x, y in TRAIN], [(x, float(y)) for x, y in VALID], OneLogit(), BCEWithLogitsLossFlat())
    table = learn.get_like(0, k=2, method='gradcam').to_df()
    assert table['cls'].tolist()==['red', 'red', 'green', 'green'] and table['position'].tolist()[:2]==[1, 3] and np.isclose(table['probability'][0] + table['probability'][2], 1)


def test_classes_that_are_named():
    learn = learner()
    assert learn.get_like([0, 1], k=1, cls=['green', 'red'], method='gradcam').to_df()['cls'].tolist()==['green', 'red']*2
    assert learn.get_like(1, k=1, cls='actual', method='gradcam').to_df()['cls'].tolist()==['green']
    one = learner(vocab=('red',), model=Colours(1), train=[(x, 0) for x in REDS], valid=[(REDS[0], 0)])
    assert one.get_like(0, k=1, method='gradcam').to_df()['role'].tolist()==['predicted'] # there is no other
    with pytest.raises(ValueError, match="cls='actual' needs labels"): learn.get_like(REDS[0], cls='actual')


def test_more_items_than_are_shown():
    learn = learner()
    with pytest.warns(UserWarning, match='the first 1 of these 2 items are shown'): assert len(learn.show_like([0, 1], k=1, method='gradcam', max_n=1))==4


def test_pictures_of_different_sizes():
    large = torch.zeros(3, 16, 24)
    large[:, :12, :12] = REDS[1]
    learn = learner([(large, RED)] + TRAIN, [(large + 0, RED)] + VALID)
    for i in (0, 1): learn.dls.loaders[i] = learn.dls.loaders[i].new(bs=1)
    assert len(learn.show_like([0, 1], k=3, cls='red', method='gradcam'))==8 and len(learn.get_like([0, 1], k=3, cls='red', method='gradcam').to_df())==6


def test_a_table_of_maps_is_refused(tmp_path):
    learn = learner()
    pytest.importorskip('pyarrow')
    store = learn.get_cams([0, 1], method='gradcam').to_table(tmp_path/'maps')
    with pytest.raises(TypeError, match=re.escape("ask for its items, table.where(...).to_pandas()['item']")): learn.get_like(store.where('right'))


def test_pytorchs_own_loader():
    learn = learner()
    learn.dls.loaders[0] = torch.utils.data.DataLoader([(x, torch.tensor(y)) for x, y in TRAIN], batch_size=3, shuffle=True)
    table = learn.get_like(0, k=2, method='gradcam').to_df()
    assert table['position'].tolist()[:2]==[1, 3] and len(learn.show_like(0, k=2, method='gradcam'))==6


def test_where_nothing_speaks_for_a_class():
    learn = learner(valid=[(painted(((1, 0, 0), 1, 1)), RED)])
    axs = learn.show_like(0, k=2, method='gradcam')
    assert len(axs)==3 + 2 and axs[-1].texts[0].get_text()=='nothing in it speaks for green' and len(learn.get_like(0, k=2, method='gradcam').to_df())==2
    legend = lambda axs: ' '.join(text.get_text() for text in axs[0].figure.texts)
    assert '⚠' not in legend(learn.show_like(0, k=2, cls='red', method='gradcam')) and 'lines join' in legend(learn.show_like(0, k=2, cls='red', method='gradcam'))
    with_wrong = learn.show_like(0, k=9, cls='green', method='gradcam', n_places=0), learner().show_like(1, k=9, cls='green', method='gradcam', n_places=0)
    assert ['⚠' in legend(axs) for axs in with_wrong]==['⚠' in ' '.join(ax.get_title(loc='left') for ax in axs) for axs in with_wrong] and 'lines' not in legend(with_wrong[0])
    learn = learner(train=[(x, RED) for x in REDS])
    assert learn.show_like(TRAIN[0], k=1, cls='green', method='gradcam')[-1].texts[0].get_text()=='no training picture is labelled green' # though nothing in it speaks for green, either
    axs = learn.show_like(1, k=2, method='gradcam')
    assert axs[1].texts[0].get_text()=='no training picture is labelled green' and axs[2].get_title(loc='left').startswith('runner-up red')


def test_what_has_no_such_pictures():
    values = learner([(x, float(y)) for x, y in TRAIN], [(x, float(y)) for x, y in VALID], Colours(1), MSELossFlat(), ())
    refuses(values, lambda: values.show_like(0), ValueError, 'this learner predicts no classes')
    learn = learner()
    for call, error, words in (
            (lambda: learn.show_like(0, k=0), ValueError, 'k=0 leaves nothing to show'), (lambda: learn.show_like(0, n_places=-1), ValueError, 'n_places=-1'),
            (lambda: learn.show_like(0, cls='blue'), ValueError, "no class is named 'blue'"), (lambda: learn.show_like(0, cls=Versus('red', 'green')), ValueError, 'not a function, a Versus'),
            (lambda: learn.show_like(0, cls=lambda out: out[:, 0]), ValueError, 'not a function'), (lambda: learn.show_like(0, target_layer='body'), TypeError, "it is called 'layer'"),
            (lambda: learn.show_like(0, style='side'), ValueError, "style='side'"), (lambda: learn.show_like(0, colour='red'), TypeError, "'colour' is no option of this view"),
            (lambda: learn.get_like(0, figsize=(3, 3)), TypeError, "get_like has no argument 'figsize'"), (lambda: learn.similar_index(k=3), TypeError, "similar_index has no argument 'k'"),
            (lambda: learn.get_like(99), IndexError, 'item 99 is out of range'), (lambda: learn.get_like([]), ValueError, 'the list of items is empty'), (lambda: learn.show_like(0, max_n=0), ValueError, 'max_n'),
            (lambda: learn.show_like(0, layer='nowhere'), ValueError, 'nowhere')):
        refuses(learn, call, error, words)


def test_masks_have_a_label_at_every_pixel():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 2, 1)
        def forward(self, x): return nn.functional.interpolate(self.head(self.body(x).relu()), size=x.shape[2:])
    samples = [(x, torch.zeros(12, 12, dtype=torch.long)) for x in REDS]
    with pytest.raises(ValueError, match='each pixel has a label of its own'): learner(samples, samples, Pixels()).show_like(0)


def test_without_a_training_set():
    learn = learner()
    learn.dls.loaders[0] = TfmdDL([(x,) for x in REDS], bs=3, num_workers=0)
    with pytest.raises(ValueError, match='the items of the training set have no labels'): learn.show_like(0)
    learn.dls.loaders[0] = TfmdDL(iter(TRAIN), bs=3, num_workers=0)
    with pytest.raises(ValueError, match='does not say which items are in its batches'): learn.show_like(0)


# -- files

@pytest.fixture
def files(tmp_path):
    "The painted pictures as files, some with names that nobody should have to draw"
    names = ['a$x^2$.png', '<b>&amp;.png', 'c\u202e.png', 'd'*200 + '.png', 'e.png', 'f.png', 'g.png', 'h.png', 'i.png', 'j.png']
    for name, (x, _) in zip(names, TRAIN + VALID): Image.fromarray((255*x.permute(1, 2, 0)).byte().numpy()).save(tmp_path/name)
    return [tmp_path/name for name in names]


def of_files(files, labels=None):
    labels = labels or [('red', 'green')[y] for _, y in TRAIN + VALID]
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['red', 'green'], sort=False)), get_y=lambda f: labels[files.index(f)], splitter=IndexSplitter([8, 9]), item_tfms=Resize(12))
    learn = Learner(block.dataloaders(files, bs=4, num_workers=0), Colours(), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def test_files_and_their_names(files, tmp_path):
    learn = of_files(files)
    table = learn.get_like(files[8], k=2, method='gradcam').to_df()
    assert table['neighbour'].tolist()[:2]==[str(files[1]), str(files[3])] and table['item'][0]==str(files[8])
    axs = learn.show_like(str(files[0]), k=4, cls='red', method='gradcam', save=tmp_path/'like.png', text=False, dpi=50)
    titles = ' '.join(ax.get_title(loc='left') for ax in axs)
    assert '<b>&amp;.png' in titles and '\u202e' not in titles and (tmp_path/'like.png').exists()
    assert max(len(line) for ax in axs for line in ax.get_title(loc='left').split('\n')) <= 34


def test_a_training_picture_is_not_its_own_neighbour(files, monkeypatch):
    learn = of_files(files)
    assert learn.get_like(files[1], k=9, cls='red', method='gradcam').to_df()['position'].tolist()[0]==3
    monkeypatch.chdir(files[0].parent)
    found = learn.get_like(files[1].name, k=9, cls='red', method='gradcam').to_df()['position'].tolist()
    assert sorted(found)==[0, 2, 3] # by another path


def neighbours(learn, item, **options): return learn.get_like(item, k=9, cls='red', method='gradcam', **options).to_df().groupby('item', sort=False)['position'].apply(lambda found: sorted(set(found))).tolist()


def test_a_file_that_is_there_twice_is_not_its_own_neighbour(files):
    labels = ['red']*4 + ['green']*4
    table = pd.DataFrame(dict(name=[file.name for file in files[:8]] + [files[1].name, files[8].name], label=labels + ['red']*2))
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['red', 'green'], sort=False)), get_x=ColReader('name', pref=files[0].parent), get_y=ColReader('label'), splitter=IndexSplitter([9]), item_tfms=Resize(12))
    learn = Learner(block.dataloaders(table, bs=4, num_workers=0), Colours(), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    for item in (files[1], table.iloc[1], table.iloc[[1]]): assert neighbours(learn, item)==[[0, 2, 3]]
    assert neighbours(learn, learn.dls.train)[:2]==[[1, 2, 3, 8], [0, 2, 3]] and neighbours(learn, 0)==[[0, 1, 2, 3, 8]]
    assert learn.get_like(0, method='gradcam').to_df()['item'][0]==str(files[8])


def test_a_picture_in_memory_is_not_its_own_neighbour():
    learn = learner()
    assert neighbours(learn, learn.dls.train)[:4]==[[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert neighbours(learn, TRAIN[2])==[[0, 1, 3]] and neighbours(learn, [TRAIN[2], VALID[0]])==[[0, 1, 3], [0, 1, 2, 3]]
    assert neighbours(learn, learn.dls.train.new(get_idxs=lambda: [2, 5, 1]))==[[0, 1, 3], [0, 2, 3]] # nothing in the green one speaks for red
    assert neighbours(learn, [0, 1])==[[0, 1, 2, 3]]*2
    ds = torch.utils.data.TensorDataset(torch.stack([x for x, _ in TRAIN]), torch.tensor([y for _, y in TRAIN]))
    learn.dls.loaders[0] = torch.utils.data.DataLoader(ds, batch_size=3, shuffle=True)
    assert neighbours(learn, learn.dls.loaders[0])[:4]==[[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]] and neighbours(learn, [0, 1])==[[0, 1, 2, 3]]*2
    chosen = torch.utils.data.DataLoader(ds, batch_size=3, sampler=torch.utils.data.SubsetRandomSampler([3, 1]))
    assert sorted(neighbours(learn, chosen))==[[0, 1, 2], [0, 2, 3]]


def test_a_label_or_a_transform_that_changed(files):
    index = of_files(files).similar_index('gradcam')
    labels = [('red', 'green')[y] for _, y in TRAIN + VALID]
    labels[7] = 'red' # the wrong one, mended
    with pytest.raises(ValueError, match='since this index was made, the labels of the training set changed'): of_files(files, labels).get_like(0, method='gradcam', index=index)
    learn = of_files(files)
    learn.dls.valid.after_item.add(Resize(20))
    with pytest.raises(ValueError, match='since this index was made, what is done to the pictures changed'): learn.get_like(0, method='gradcam', index=index)


def test_a_picture_that_changed_is_noticed(files):
    learn = of_files(files)
    learn.similar_index('gradcam')
    Image.fromarray((255*painted(((0, 1, .1), 0, 0)).permute(1, 2, 0)).byte().numpy()).save(files[1])
    with pytest.raises(ValueError, match='is not what it was when the index was made of it: make it anew'): learn.show_like(0, k=1, method='gradcam')


def test_an_exported_learner_has_no_training_set(files):
    learn = of_files(files)
    learn.dls = learn.dls.new_empty()
    with pytest.raises(ValueError, match='has no training set to look for pictures in'): learn.show_like(files[0])


def test_axes_that_are_given():
    learn, (fig, axs) = learner(), plt.subplots(2, 3)
    found = learn.show_like(0, k=2, method='gradcam', ax=axs)
    assert list(found)==list(axs.flat) and any(isinstance(one, ConnectionPatch) for one in fig.artists)
    with pytest.raises(ValueError, match='needs as many axes, but 2 were given'): learn.show_like(0, k=2, method='gradcam', ax=axs.flat[:2])


# -- learners of fastai's

@pytest.mark.slow
def test_on_fastais_own_learner(dls, seeded):
    with vision_learner(dls, resnet18, pretrained=False).no_bar() as learn:
        table = learn.get_like(0, k=3).to_df()
        assert len(table) in (3, 6) and set(table['neighbour']) <= {str(file) for file in dls.train.items} # untrained, it may find nothing that speaks for a class
        assert (table['label']==table['cls']).all() and all(Path(name).parent.name==label for name, label in zip(table['neighbour'], table['label']))
        axs = learn.show_like(0)
        assert len(axs) in (5, 6, 7, 8) and Path(dls.valid.items[0]).name in axs[0].get_title(loc='left')


@pytest.mark.slow
def test_on_tokens(dls, seeded):
    timm = pytest.importorskip('timm')
    with Learner(dls, timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=2), loss_func=CrossEntropyLossFlat()).no_bar() as learn:
        index = learn.similar_index()
        assert index.features.shape==(12, 192) and len(learn.get_like([0, 1], k=2).to_df()) >= 2
        learn.show_like(0, k=2)
