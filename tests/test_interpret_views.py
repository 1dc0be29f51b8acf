"What is confused with what, and what a class looks like: the items that are shown are those that counting by hand finds."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import MSELossFlat, resnet18, vision_learner

from fastai_cam.all import CAMInterpretation, CAMs, cam_head
from fastai_cam.interpret.views import mean_map, most_typical

VOCAB = ['cat', 'dog', 'cow']


def interpreted(targets=lambda i: i%3, n_out=3, loss=None, vocab=VOCAB, n=18, model=None):
    set_seed(3)
    samples = [(torch.rand(3, 16, 16)*(1 + i%4), targets(i)) for i in range(n)]
    dls = DataLoaders(*[TfmdDL(samples, bs=6, num_workers=0) for _ in range(2)])
    dls.vocab = vocab
    learn = Learner(dls, model or nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), cam_head(8, n_out)), loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return CAMInterpretation.from_learner(learn, method='gradcam')


@pytest.fixture(scope='module')
def interp(): return interpreted()


def heads(axs): return [ax.get_title(loc='left').strip().split('\n')[0] for ax in axs]


def test_a_pair(interp):
    "Items of the pair, the largest loss first, with the title of the figure saying how many there are"
    actual, predicted, n = interp.most_confused()[0]
    df = interp.to_df()
    of_pair = df[(df.label==actual) & (df.prediction==predicted)].nlargest(2, 'loss')
    axs = interp.plot_confused_cam(actual, predicted, k=2)
    assert len(axs)==8 and axs[0].figure._suptitle.get_text()==f'{actual} taken for {predicted}, {n}×'
    assert heads(axs[::4])==[f'predicted {predicted} {row.probability:.2f} · actual {actual} · loss {row.loss:.2f}' for row in of_pair.itertuples()]
    drawn, own = np.asarray(axs[0].images[0].get_array()), interp.learn.get_cams(int(of_pair.index[0])).images[0]
    assert np.allclose(drawn, np.asarray(own).transpose(1, 2, 0)/float(own.max()) if own.max() > 1 else np.asarray(own).transpose(1, 2, 0), atol=.02)


def test_the_pairs_that_are_confused_most(interp):
    pairs, wrong = interp.most_confused(), interp.to_df().query('label != prediction')
    by_hand = wrong.groupby(['label', 'prediction'], observed=True).loss.agg(['size', 'max']).reset_index().sort_values(['size', 'max'], ascending=False)
    axs = interp.plot_confused_cam(k=1, n_pairs=len(by_hand))
    assert [head.split(':')[0] for head in heads(axs[::4])]==[f'{a} taken for {b}, {n}×' for a, b, n, _ in by_hand.itertuples(index=False)]
    assert len(by_hand) > 2 and by_hand['size'].nunique() < len(by_hand), 'some are confused as often as others: the one with the largest loss comes first'
    assert len(axs)==4*len(by_hand)
    a = pairs[0][0]
    assert all(head.startswith(f'{a} taken for') or head.startswith('predicted') for head in heads(interp.plot_confused_cam(a, k=1)[::4]))


def test_pairs_that_are_none(interp):
    never = next((a, b) for a in VOCAB for b in VOCAB if a != b and (a, b) not in {one[:2] for one in interp.most_confused()})
    handle = interp.learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    try:
        with pytest.raises(ValueError, match=f"no item of '{never[0]}' is taken for '{never[1]}': most often taken is '"): interp.plot_confused_cam(*never)
        with pytest.raises(ValueError, match='are the same class: name two, the actual one first'): interp.plot_confused_cam('cat', 'cat')
        with pytest.raises(ValueError, match="no class is named 'bat'"): interp.plot_confused_cam('bat', 'cat')
        with pytest.raises(ValueError, match='k=0 leaves nothing to show'): interp.plot_confused_cam(k=0)
        with pytest.raises(TypeError, match="'ncols' is no option of this view"): interp.plot_confused_cam(ncols=2)
        with pytest.raises(TypeError, match="it is called 'layer'"): interp.plot_confused_cam(target_layer='0')
    finally: handle.remove()


def test_tasks_without_pairs():
    labels = interpreted(lambda i: torch.tensor([1., float(i%2), 0.]), 3, BCEWithLogitsLossFlat())
    values = interpreted(lambda i: float(i), 1, MSELossFlat(), None)
    masks = interpreted(lambda i: torch.ones(16, 16, dtype=torch.long), loss=CrossEntropyLossFlat(axis=1), model=nn.Conv2d(3, 3, 3, padding=1))
    for one, message in ((labels, 'does not put its items into one class each'), (values, 'predicts values'), (masks, r'here each pixel has a class of its own: plot_top_losses_cam\(9, cls=...\)')):
        one.learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
        with pytest.raises(ValueError, match=message): one.plot_confused_cam()
    for one, message in ((values, 'this learner predicts no classes'), (masks, 'here each pixel has a probability of its own')):
        with pytest.raises(ValueError, match=message): one.plot_class_cam(0)


def test_a_pair_among_some(interp):
    "Only the items that are meant are counted, shown, and named in what is refused"
    df = interp.to_df()
    wrong = df[~df.is_right]
    a, b = wrong.iloc[0][['label', 'prediction']]
    of_pair = wrong[(wrong.label==a) & (wrong.prediction==b)]
    axs = interp.plot_confused_cam(a, b, where=of_pair.index[:1].tolist())
    assert len(axs)==4 and axs[0].figure._suptitle.get_text()==f'{a} taken for {b}, 1×' and f'loss {of_pair.loss.iloc[0]:.2f}' in heads(axs)[0]
    with pytest.raises(ValueError, match=f"nothing is confused among the {int(df.is_right.sum())} items that where='right' leaves"): interp.plot_confused_cam(where='right')
    with pytest.raises(ValueError, match=f"most often taken is '{a}' for '{b}'$"): interp.plot_confused_cam(b, a, where=[of_pair.index[0]])


def test_nothing_is_confused():
    right = interpreted(lambda i: 0, 3, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Always()))
    with pytest.raises(ValueError, match='no item is taken for another class: nothing is confused in this set'): right.plot_confused_cam()


class Always(nn.Linear):
    "Says class 0 of everything"
    def __init__(self): super().__init__(4, 3)
    def forward(self, x): return super().forward(x)*0 + torch.tensor([3., 0, 0]) + x[:, :1]*torch.tensor([1., 0, 0])


# -- a class

def test_a_class(interp):
    "Which items, in which order, and what is said of them"
    df = interp.to_df()
    dogs = df[df.label=='dog']
    axs = interp.plot_class_cam('dog', k=2)
    assert len(axs)==9 and axs[0].figure._suptitle.get_text()=='dog: 6 items' and axs[0].figure._supxlabel.get_text()=='map: gradcam   each on its own scale'
    said = lambda kind, rows: [f'{kind}: {row.label_probability:.2f}' + ', wrong'*(not row.is_right) for row in rows.itertuples()]
    assert heads(axs[4:6])==said('most sure', dogs.nlargest(2, 'label_probability')) and heads(axs[7:9])==said('least sure', dogs.nsmallest(2, 'label_probability'))
    features = interp.learn.model[:2](torch.stack([interp.dl.dataset[i][0] for i in dogs.index])).detach().mean((2, 3))
    likeness = F.cosine_similarity(features, features.mean(0, keepdim=True)).argsort(descending=True)
    others = dogs.iloc[likeness.tolist()]
    others = others[others.label_probability.rank().between(3, 4)[others.index].reindex(others.index)]
    assert heads(axs[1:3])==said('typical', others)
    n_right = int(dogs.is_right.sum())
    assert [ax.get_title(loc='left').split('\n')[-1] for ax in axs[::3]]==[f'{n} item' + 's'*(n != 1) for n in (6, n_right, 6 - n_right)]


@pytest.mark.parametrize('n, k, shape', [(1, 4, (0, 1, 0)), (2, 4, (0, 1, 1)), (3, 2, (0, 2, 1)), (5, 2, (1, 2, 2))])
def test_no_picture_is_shown_twice(interp, n, k, shape):
    "However few a class has: the surest first, and what is left over is typical"
    df = interp.to_df()
    chosen = df.index[df.label=='dog'][:n].tolist()
    said = [head.split(':')[0] for head in heads(interp.plot_class_cam('dog', k=k, where=chosen)) if not head.startswith('mean')]
    assert said==['typical']*shape[0] + ['most sure']*shape[1] + ['least sure']*shape[2]


def test_rows_do_not_push_panels_apart():
    "The sentence over a row is as wide as it may be: two panels"
    fig = interpreted(vocab=['white stork on a wire', 'spoonbill in the mud', 'crane over the house']).plot_confused_cam(k=1, n_pairs=2)[0].figure
    fig.canvas.draw()
    places = [ax.get_position() for ax in fig.axes[:4]]
    gaps = [right.x0 - left.x1 for left, right in zip(places, places[1:])]
    assert max(gaps) < 1.5*min(gaps) and fig._supxlabel.get_text().startswith('map: gradcam   predicted − actual')


def test_a_class_among_some(interp):
    df = interp.to_df()
    chosen = df[df.label=='dog'].nsmallest(3, 'loss').sort_index()
    axs = interp.plot_class_cam('dog', k=1, where=chosen.index.tolist())
    assert axs[0].figure._suptitle.get_text()=='dog: 3 items' and heads(axs)[3].startswith(f'most sure: {chosen.label_probability.max():.2f}')
    with pytest.raises(ValueError, match="of the 1 items that where='index == 0' leaves of 18 none is labelled 'dog'"): interp.plot_class_cam('dog', where='index == 0')


def test_the_mean_map_is_the_mean_of_the_maps(interp):
    maps = interp.learn.get_cams([1, 4, 7, 10, 13, 16], cls='dog', method='gradcam').maps.clamp(min=0)
    maps = maps/maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    axs = interp.plot_class_cam('dog', k=1, interpolation='nearest')
    assert np.allclose(np.asarray(axs[0].images[-1].get_array()), maps.mean(0)/maps.mean(0).max(), atol=1e-5)


def test_a_sample_of_a_large_class_says_so(interp):
    axs = interp.plot_class_cam('dog', k=1, n=2)
    n = int(axs[0].figure._suptitle.get_text().split(' ')[1])
    assert 2 <= n <= 4 and axs[0].figure._suptitle.get_text()==f'dog: {n} of 6 items' # two, and the surest and the least sure of all
    df = interp.to_df()
    assert heads(axs)[3].startswith(f'most sure: {df[df.label=="dog"].label_probability.max():.2f}')


def test_one_pass_over_the_items_of_the_class():
    interp, n = interpreted(), []
    interp.learn.model.register_forward_pre_hook(lambda module, args: n.append(len(args[0])))
    interp.plot_class_cam('cow', k=2)
    assert sum(n) <= 6 + 1 # and what finds the layer


def test_a_label_among_others():
    interp = interpreted(lambda i: torch.tensor([1., float(i%2), 0.]), 3, BCEWithLogitsLossFlat())
    probs = interp.answers.probability[1::2, 1]
    axs = interp.plot_class_cam('dog', k=1)
    assert heads(axs)[3]==f'most sure: {probs.max():.2f}' + ', wrong'*bool(probs.max() < .5) and axs[0].figure._suptitle.get_text()=='dog: 9 items'
    with pytest.raises(ValueError, match="no item of the set is labelled 'cow'"): interp.plot_class_cam('cow')
    with pytest.raises(TypeError, match='takes one method'): interp.plot_class_cam('dog', method=['gradcam', 'layercam'])


def test_typical_and_mean_by_hand():
    assert most_typical(torch.tensor([[1., 0], [.9, .1], [0, 1]])).tolist()==[1, 0, 2]
    cams = CAMs(torch.tensor([[[2., 4]], [[-1, 3]], [[float('nan'), 1]]]))
    assert mean_map(cams, torch.tensor([True, True, True])).tolist()==[[.25, 1]] and mean_map(cams, torch.tensor([False, False, True])) is None


@pytest.mark.slow
def test_on_fastais_own_learner(dls):
    with vision_learner(dls, resnet18, pretrained=False).no_bar() as learn:
        interp = CAMInterpretation.from_learner(learn)
        assert len(interp.plot_class_cam('left', k=2))==9 and (not interp.most_confused() or len(interp.plot_confused_cam(k=1)) >= 4)


@pytest.mark.slow
def test_on_fastais_own_unet(tmp_path):
    "Masks are drawn, chosen and looked into; what makes no sense for them says so"
    from PIL import Image
    from fastai.vision.all import DataBlock, FuncSplitter, ImageBlock, MaskBlock, PILMask, Resize, unet_learner
    rng = np.random.default_rng(0)
    for i in range(6):
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[8 + i:40, 8:40] = 1 + i%2
        Image.fromarray(mask).save(tmp_path/f'{i}_mask.png')
        Image.fromarray((rng.integers(0, 100, (64, 64, 3)) + 70*mask[..., None]).astype(np.uint8)).save(tmp_path/f'{i}.png')
    block = DataBlock((ImageBlock, MaskBlock(codes=['none', 'cat', 'dog'])), get_items=lambda path: sorted(path.glob('?.png')), get_y=lambda f: PILMask.create(f.with_name(f'{f.stem}_mask.png')),
                      splitter=FuncSplitter(lambda f: int(f.stem) >= 2), item_tfms=Resize(64))
    learn = unet_learner(block.dataloaders(tmp_path, bs=2, num_workers=0), resnet18, pretrained=False)
    with learn.no_bar():
        interp, (preds, targs) = CAMInterpretation.from_learner(learn), learn.get_preds()
        predicted = preds.argmax(1)
        assert interp.confusion_matrix().tolist()==[[int(((targs==i) & (predicted==j)).sum()) for j in range(3)] for i in range(3)]
        df = interp.to_df()
        assert np.allclose(df.share_right, [float((p==t).float().mean()) for p, t in zip(predicted, targs)], atol=1e-6) and df.label.tolist()==['cat', 'dog']*2
        assert interp.select(cls='dog').tolist()==[i for i in range(4) if bool((predicted[i]==2).any() or (targs[i]==2).any())]
        outside = interp.to_df('share_outside').share_outside
        assert outside.dropna().between(0, 1).all()
        assert len(interp.plot_top_losses_cam(2, show='diff', by='share_right', largest=False))==8 and len(learn.plot_channels(0, n=3))==5
        assert interp.concepts('dog', k=2).index==[1, 3]
        with pytest.raises(ValueError, match='here each pixel has a class of its own'): interp.plot_confused_cam()
