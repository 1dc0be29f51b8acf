"`cam_trust`: the numbers of a verdict by hand, maps that are to be believed and maps that are not, and the figure."
import numpy as np
import pytest
import torch
from torch import nn
from fastai.vision.all import (
    CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, L, Learner, MaskBlock, MSELossFlat, Normalize, PILImage, RegressionBlock)

from fastai_cam.all import METHODS, Probe
from fastai_cam.methods.baselines import BASELINES
from fastai_cam.trust.verdict import CAMTrust
from fastai_cam.trust.rescore import baseline_images
from fastai_cam.trust.impute import impute
from fastai_cam.maps.pixels import upsample
from fastai_cam.trust.sanity import randomization_similarity
from fastai_cam.trust.verdict import _elsewhere
from fastai_cam.trust.rescore import pixel_ranks
from test_learner import learner_state, same
from helpers.compare import codes_of, Draws, images_of, learner_of


def red_patch(i):
    "A smooth red patch, and sharp grey stripes that mean nothing"
    pixels = np.full((56, 56, 3), 100, dtype=np.uint8)
    pixels[4:18, ::4] = pixels[4:18, 1::4] = 180
    left = 8 + 6*(i%4)
    if i%2==0: pixels[30:46, left:left+16] = [220, 30, 30]
    return PILImage.create(pixels)


@pytest.fixture(scope='module')
def sees_red():
    "A learner whose second class is the amount of red, channel by channel"
    data = DataBlock((ImageBlock, CategoryBlock(vocab=['plain', 'red'])), get_x=red_patch, get_y=lambda i: ('red', 'plain')[i%2], splitter=lambda items: (list(range(4)), list(range(4, 10))), batch_tfms=Normalize.from_stats(.5, .25, dim=1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 8, 8), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[0][0].weight[0, :, 0, 0], model[0][0].bias[0] = torch.tensor([1., -.5, -.5]), -.3
        model[0][2].weight[0] = 0
        model[0][2].weight[0, 0], model[0][2].bias[0] = 1/64, 0
        model[1][2].weight.zero_()
        model[1][2].weight[1, 0], model[1][2].bias[:] = 20, torch.tensor([1.5, -1.5])
    learn = Learner(data.dataloaders(list(range(10)), bs=4, num_workers=0), model, loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def test_a_map_of_the_evidence_is_believed(sees_red):
    trust = sees_red.cam_trust(0)
    assert isinstance(trust, CAMTrust) and trust.believed and trust.matters and trust.beats_baselines and trust.is_learned
    assert trust.label=='red' and trust.verdict.startswith('The map can be believed: removing the lit 20% of the picture takes red from') and repr(trust)==trust.verdict in trust._repr_html_()


@pytest.mark.usefixtures('maps_by_gradcam')
def test_the_numbers_of_a_verdict(sees_red):
    "What is removed, insertion minus deletion, and the similarity, by the measures themselves"
    numbers = sees_red.cam_trust(0, share=.1, n_random=5, steps=4, seed=3).numbers
    x = images_of(sees_red)[:1]
    sees_red.model.eval()
    with torch.no_grad(): scores = lambda images, items=None: sees_red.model(images).softmax(1)[:, 1].detach()
    with Probe(sees_red.model) as p:
        cap = p(x)
        score = cap.score(lambda out: out[:, 1])
        maps = METHODS['gradcam'](cap, score)
        others = {name: METHODS[name](cap, score) for name in BASELINES}
        assert numbers['randomized_similarity']==pytest.approx(randomization_similarity(cap, score, 'gradcam', 3, share=.5).item(), abs=1e-6)
    large = upsample(maps, (56, 56))[0]
    lit = large >= large.flatten().sort(descending=True).values[round(.1*56*56) - 1]
    assert abs(int(lit.sum()) - 314) < 60 # a few are tied
    patch = torch.zeros(56, 56, dtype=torch.bool)
    patch[30:46, 8:24] = True
    assert (patch & ~lit).sum() < 80 # the patch is what is removed
    assert numbers['score']==pytest.approx(scores(x).item(), abs=1e-5) and numbers['drop']==pytest.approx((scores(x) - scores(impute(x, lit[None]))).item(), abs=.02)
    def faithfulness(some):
        start, end, found = baseline_images(x, 'blur'), baseline_images(x, 'mean'), []
        for inside, outside in ((x, start), (end, x)):
            ranks = pixel_ranks(some, x, 0)
            found.append(np.trapezoid([scores(torch.where(ranks[:, None] < round(56*56*k/4), inside, outside)).item() for k in range(5)])/4)
        return found[0] - found[1]
    assert numbers['faithfulness']==pytest.approx(faithfulness(maps), abs=1e-4)
    for name in BASELINES: assert numbers['baselines'][name]==pytest.approx(faithfulness(others[name]), abs=1e-4)
    assert len(numbers['random_drops'])==numbers['n_random']==5 and numbers['drop_elsewhere']==pytest.approx(np.mean(numbers['random_drops']))
    beaten = sum(drop < numbers['drop'] for drop in numbers['random_drops'])
    assert numbers['n_beaten']==beaten and numbers['chance_p']==pytest.approx((6 - beaten)/6)
    sees_red.model.train()


def test_the_same_seed_gives_the_same_verdict(sees_red):
    torch.manual_seed(5)
    first = sees_red.cam_trust(0, n_random=4, steps=2).numbers
    torch.manual_seed(6)
    assert sees_red.cam_trust(0, n_random=4, steps=2).numbers==first
    assert sees_red.cam_trust(0, n_random=4, steps=2, seed=1).numbers['random_drops'] != first['random_drops']


@pytest.mark.parametrize('method', ['random_map', 'uniform_map', 'gaussian_map', 'edge_map'])
def test_a_map_that_knows_nothing_is_not_believed(sees_red, method):
    trust = sees_red.cam_trust(0, method=method)
    assert not trust.believed and not trust.beats_baselines and not trust.is_learned # it is one of the baselines, and random weights do not change it
    assert trust.verdict.startswith(('The map should not be believed', 'Believe the map with care')) and 'it hardly changes' in trust.verdict and 'no more than the' in trust.verdict


def test_elsewhere_is_as_much_and_not_there():
    maps, generator = torch.zeros(3, 8, 8), torch.Generator().manual_seed(0)
    maps[:, 0, 1] = 1
    places = [tuple(m.nonzero()[0].tolist()) for _ in range(40) for m in _elsewhere(maps, generator)[:1]]
    assert len(set(places)) > 15
    moved = _elsewhere(torch.arange(64.).view(1, 8, 8), generator)
    assert sorted(moved.flatten().tolist())==list(range(64))


def test_several_items_have_a_verdict_each(sees_red):
    found = sees_red.cam_trust([0, 1, 2], n_random=3, steps=2)
    assert isinstance(found, L) and [trust.label for trust in found]==['red', 'plain', 'red']
    assert found[2].numbers['score']==pytest.approx(sees_red.cam_trust(2, n_random=3, steps=2).numbers['score'], abs=1e-6)
    assert isinstance(sees_red.cam_trust([1], n_random=1, steps=1), L)
    other = sees_red.cam_trust(red_patch(4), cls='red', method='layercam', layer='0.0', n_random=1, steps=1) # a picture of one's own
    assert isinstance(other, CAMTrust) and other.label=='red' and other.cam_map.map.shape==(56, 56)


def test_an_empty_map_says_so(sees_red):
    trust = sees_red.cam_trust(1, cls='red', n_random=2, steps=2) # a picture without any
    assert not trust.believed and not trust.matters and trust.verdict=='There is nothing to believe: the map of red has no positive evidence.'
    trust.show()


def test_the_figure_of_a_verdict(sees_red, tmp_path):
    trust = sees_red.cam_trust(0, n_random=6, steps=2)
    fig = trust.show(figsize=(9, 3), save=tmp_path/'trust.png')
    assert len(fig.axes)==3 and (tmp_path/'trust.png').stat().st_size > 5000
    n = trust.numbers
    assert [line.get_xdata()[0] for line in fig.axes[1].lines]==[n['score'], n['score'] - n['drop']] and sum(bar.get_height() for bar in fig.axes[1].patches)==6
    assert [bar.get_width() for bar in fig.axes[2].patches]==[*n['baselines'].values(), n['faithfulness']]


@pytest.mark.parametrize('options,error,says', [
    (dict(share=0), ValueError, 'share is a part'), (dict(share=1), ValueError, 'share is a part'), (dict(share='all'), ValueError, 'share is a part'), (dict(n_random=0), ValueError, 'n_random=0'),
    (dict(n_random=True), ValueError, 'n_random=True'), (dict(steps=0), ValueError, 'steps=0'), (dict(method=['gradcam', 'cam']), TypeError, 'about one method'), (dict(method='grad'), ValueError, 'no method is named'),
    (dict(layer='0.9'), ValueError, "no layer named '0.9'"), (dict(cls='blue'), ValueError, "no class is named 'blue'"), (dict(cls=['red', 'plain']), ValueError, 'one question at a time'), (dict(item=99), IndexError, 'out of range')])
def test_a_verdict_refuses_wrong_input_before_any_work(sees_red, options, error, says):
    runs, before = [], learner_state(sees_red)
    hook = sees_red.model.register_forward_hook(lambda *args: runs.append(1))
    with pytest.raises(error, match=says): sees_red.cam_trust(**options)
    hook.remove()
    assert runs==[] and same(before, learner_state(sees_red))


def test_a_value_and_a_segmentation_have_a_verdict():
    learn = learner_of(ImageBlock, RegressionBlock, get_y=lambda i: float(i), n_out=1, loss_func=MSELossFlat())
    x = images_of(learn)[:1]
    with torch.no_grad(): assert learn.cam_trust(0, n_random=2, steps=2).numbers['score']==pytest.approx(learn.model.eval()(x).item(), abs=1e-5)
    learn = learner_of(ImageBlock, MaskBlock(['nothing', 'even', 'odd']), get_y=codes_of, model=Draws(), loss_func=CrossEntropyLossFlat(axis=1))
    trust = learn.cam_trust(0, cls='odd', n_random=2, steps=2)
    assert trust.label=='odd' and 0 < trust.numbers['score'] < 1
