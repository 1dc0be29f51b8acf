"`cam_trust`: the numbers of a verdict by hand, maps that are to be believed and maps that are not, and the figure."
import numpy as np
import pytest
import torch
from torch import nn
from fastai.vision.all import (
    CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, L, Learner, MaskBlock, MSELossFlat, Normalize, PILImage, RegressionBlock)

from fastai_cam.all import METHODS, Probe
from fastai_cam.maps.draw import CAMMap
from fastai_cam.trust.verdict import CAMTrust
from fastai_cam.trust.impute import impute
from fastai_cam.trust.sanity import randomization_similarity
from fastai_cam.trust.places import map_ranks, place_ranks
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
    assert isinstance(trust, CAMTrust) and trust.believed and trust.word=='believed' and trust.matters and trust.is_well_placed and trust.is_learned
    headline, ticks, sentence, advice = trust.verdict.splitlines()
    assert trust.label=='red' and headline==trust.headline=='The map of red can be believed' and ticks.count('✓')==3 and sentence==trust.sentence and advice.startswith('Next: ')
    assert sentence.startswith('Hiding the brightest 30% of the picture takes red from 0.') and repr(trust)==trust.verdict and sentence in trust._repr_html_()


# -- maps whose truth is known: the network sees one patch and nothing else

class Planted:
    "A method whose map of the network itself is given; of copies with random weights it draws another one"
    def __init__(self, model, values): self.model, self.values, self.__name__ = model, values, 'planted'

    def __call__(self, cap, scores):
        if cap.model is self.model: return self.values.expand(*scores.shape, *self.values.shape)
        return torch.rand(*scores.shape, *self.values.shape, generator=torch.Generator().manual_seed(7))


def patch_map(i):
    "Where the red patch of picture `i` is, on a grid of 14"
    found = torch.zeros(14, 14)
    found[8:11, 2 + 2*(i%4):5 + 2*(i%4)] = 1
    return found + torch.nn.functional.avg_pool2d(found[None], 3, 1, 1)[0]


@pytest.mark.parametrize('i', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_right_map_is_believed_and_the_same_map_elsewhere_is_not(sees_red, i):
    right = patch_map(i)
    words = {}
    for name, values in dict(right=right, shifted=right.roll((7, 7), (0, 1)), upside_down=right.flip(0, 1), noise=torch.rand(14, 14, generator=torch.Generator().manual_seed(i))).items():
        words[name] = [sees_red.cam_trust(i, cls='red', method=Planted(sees_red.model, values), seed=seed).word for seed in range(3 if name=='right' else 1)]
    assert words['right']==['believed']*3 # whatever the seed is
    for name in ('shifted', 'upside_down'): assert words[name]==['not'], name
    assert 'believed' not in words['noise']


def test_a_right_map_that_does_not_depend_on_the_weights_is_believed_with_care(sees_red):
    def drawn(cap, scores): return patch_map(0).expand(*scores.shape, 14, 14)
    trust = sees_red.cam_trust(0, cls='red', method=drawn)
    assert trust.word=='with care' and trust.is_well_placed and not trust.is_learned and trust.numbers['randomized_similarity']==1
    assert "method='gradcam'" in trust.next_step and '✗ it depends on what was learned' in trust.verdict


class Counts(nn.Module):
    "Counts the images that go through the network, and through copies of it"
    n = 0
    def forward(self, x):
        Counts.n += int(x.shape[0]) # which cannot be traced, so that no copy without this line runs instead
        return x


@pytest.mark.parametrize('method, most', [('gradcam', 60), (None, 60)])
def test_a_verdict_costs_sixty_passes_at_most(sees_red, method, most):
    learn = Learner(sees_red.dls, nn.Sequential(nn.Sequential(Counts(), *sees_red.model[0]), sees_red.model[1]), loss_func=CrossEntropyLossFlat())
    with learn.no_bar():
        for items in (0, [0, 1, 2]):
            Counts.n = 0
            learn.cam_trust(items, method=method)
            assert 40 < Counts.n/(1 if items==0 else 3) <= most


@pytest.mark.usefixtures('maps_by_gradcam')
def test_the_numbers_of_a_verdict(sees_red):
    "What is hidden and shown, where the map lies between the places, and the similarity, by hand"
    numbers = sees_red.cam_trust(0, share=.3, n_random=4, steps=2, seed=3).numbers
    x = images_of(sees_red)[:1]
    sees_red.model.eval()
    with torch.no_grad(): score = lambda images: sees_red.model(images).softmax(1)[0, 1].item()
    with Probe(sees_red.model) as p:
        cap = p(x)
        asked = cap.score(lambda out: out[:, 1])
        maps = METHODS['gradcam'](cap, asked)
        similar = [randomization_similarity(cap, asked, 'gradcam', 9 + k, share=.5).item() for k in range(3)]
    cells = torch.nn.functional.interpolate(torch.nn.functional.adaptive_avg_pool2d(x, 8), (56, 56), mode='bicubic')
    def altered(ranks):
        tops = [ranks < round(share*56*56) for share in (.1, .3)]
        return [score(torch.where(top, x, cells)) for top in tops], [score(impute(x, top[None])) for top in tops]
    own = altered(map_ranks(maps, x)[0, 0])
    places = [altered(ranks) for ranks in place_ranks(4, (56, 56), 3)]
    contrast = [np.mean(shown) - np.mean(hidden) for shown, hidden in [own, *places]]
    expected = dict(
        score=score(x), drop=score(x) - own[1][1], drop_elsewhere=score(x) - np.mean([hidden[1] for _, hidden in places]), shown=own[0][1],
        shown_elsewhere=np.mean([shown[1] for shown, _ in places]), faithfulness=contrast[0], average_place=np.mean(contrast[1:]), best_place=max(contrast[1:]),
        randomized_similarity=np.mean(similar))
    room = expected['best_place'] - expected['average_place']
    error = np.std(contrast[1:], ddof=1)/2*3.182446 # Student's t, three degrees of freedom
    expected |= {f'placement{end}': (contrast[0] - expected['average_place'] + sign*error)/room for end, sign in dict(_low=-1, _high=1).items()} | dict(placement=(contrast[0] - expected['average_place'])/room)
    assert room > .05*score(x)
    for name, value in expected.items(): assert numbers[name]==pytest.approx(value, abs=2e-4), name
    assert numbers['n_random']==4 and numbers['n_beaten']==sum(drop < numbers['drop'] for drop in numbers['random_drops']) and max(numbers['places'])==pytest.approx(1)
    sees_red.model.train()


def test_the_same_seed_gives_the_same_verdict(sees_red):
    torch.manual_seed(5)
    first = sees_red.cam_trust(0, n_random=4, steps=2).numbers
    torch.manual_seed(6)
    assert sees_red.cam_trust(0, n_random=4, steps=2).numbers==first
    other = sees_red.cam_trust(0, n_random=4, steps=2, seed=1).numbers
    assert other['random_drops'] != first['random_drops'] and other['drop']==first['drop']


@pytest.mark.parametrize('method', ['random_map', 'uniform_map', 'gaussian_map', 'edge_map'])
def test_a_map_that_knows_nothing_is_not_believed(sees_red, method):
    trust = sees_red.cam_trust(0, method=method)
    assert not trust.believed and not trust.is_well_placed and not trust.is_learned # random weights do not change it
    assert trust.headline=='The map of red should not be believed' and 'it hardly changes' in trust.verdict


def test_places_are_spread_and_moved_by_the_seed():
    for n in (2, 5, 9, 16):
        middles = place_ranks(n, (40, 40), 0).flatten(1).argmin(1)
        far = (middles[:, None]//40 - middles//40)**2 + (middles[:, None]%40 - middles%40)**2
        assert far.fill_diagonal_(9999).min() >= (.9*40/np.ceil(np.sqrt(n)) - 1)**2, n
    one, other = place_ranks(9, (40, 40), 0), place_ranks(9, (40, 40), 1)
    assert not torch.equal(one, other) and torch.equal(one, place_ranks(9, (40, 40), 0)) and sorted(one[3].flatten().tolist())==list(range(1600))


def test_several_items_have_a_verdict_each(sees_red):
    found = sees_red.cam_trust([0, 1, 2], n_random=3, steps=2)
    assert isinstance(found, L) and [trust.label for trust in found]==['red', 'plain', 'red']
    assert found[2].numbers['score']==pytest.approx(sees_red.cam_trust(2, n_random=3, steps=2).numbers['score'], abs=1e-6)
    assert isinstance(sees_red.cam_trust([1], n_random=2, steps=1), L)
    other = sees_red.cam_trust(red_patch(4), cls='red', method='layercam', layer='0.0', n_random=2, steps=1) # a picture of one's own
    assert isinstance(other, CAMTrust) and other.label=='red' and other.cam_map.map.shape==(56, 56)


def test_an_empty_map_says_so(sees_red):
    trust = sees_red.cam_trust(1, cls='red', n_random=2, steps=2) # a picture without any
    assert not trust.believed and not trust.matters and trust.headline=='There is nothing to believe: the map of red has no positive evidence' and trust.verdict.startswith(trust.headline)
    trust.show()


def test_the_figure_of_a_verdict(sees_red, tmp_path):
    trust = sees_red.cam_trust(0, n_random=6, steps=2)
    fig = trust.plot(figsize=(9, 3), save=tmp_path/'trust.png')
    n, (_, without, alone, order) = trust.numbers, fig.axes
    assert (tmp_path/'trust.png').stat().st_size > 5000 and trust.headline in fig.get_suptitle() and fig.get_suptitle().count('✓')==3
    assert without.get_title()==f'without the brightest 30%: {n["score"] - n["drop"]:.2f}' and alone.get_title()==f'with these alone: {n["shown"]:.2f}'
    marks = {line.get_label(): list(line.get_xdata()) for line in order.get_lines()}
    assert marks['the map, 95% interval']==[pytest.approx(min(n['placement'], 3))] and marks['6 places that know nothing']==pytest.approx(n['places'])
    assert len(trust.show().axes)==4


def test_the_altered_pictures_are_of_what_the_map_lights(sees_red):
    "The patch is gone in one, and sharp in the other"
    trust = sees_red.cam_trust(0, method=Planted(sees_red.model, patch_map(0)))
    without, alone = trust.altered()
    picture = torch.as_tensor(np.array(red_patch(0))).permute(2, 0, 1)/255
    patch = np.s_[:, 33:43, 11:21]
    assert without[patch][0].mean() < .5 < picture[patch][0].mean() and torch.allclose(alone[patch], picture[patch], atol=.02)
    assert torch.allclose(without[:, :12], picture[:, :12], atol=.02) and not torch.allclose(alone[:, :12], picture[:, :12], atol=.1)


@pytest.mark.parametrize('options,error,says', [
    (dict(share=0), ValueError, 'share is a part'), (dict(share=1), ValueError, 'share is a part'), (dict(share='all'), ValueError, 'share is a part'), (dict(n_random=1), ValueError, 'n_random=1'),
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


# -- where nothing changes the answer

def told(**changed):
    numbers = dict(score=.18, drop=.001, drop_elsewhere=0., shown=.18, shown_elsewhere=.181, best_place=.001, average_place=0., placement=.9, placement_low=.5, placement_high=1.2, randomized_similarity=.1, n_random=9, n_beaten=9)
    return CAMTrust(CAMMap(torch.rand(4, 4)), 'cat', {**numbers, **changed}, .3)


def test_an_answer_that_nothing_changes_is_not_believed():
    "An empty picture, or a model that has learned nothing: the same number whatever is hidden or shown alone"
    verdict = told()
    assert verdict.word=='not' and not verdict.moves and not any(list(verdict.ticks.values())[:2]) and 'try a picture that has something in it' in verdict.next_step
    assert told(drop=.1, best_place=.12).word=='believed'
    assert told(shown_elsewhere=.1).moves, 'showing an average place alone takes it away'


def test_no_place_decides_and_this_one_less_than_any():
    "Objects all over the picture: one cannot say; but of a place that is surely below the average one can"
    redundant = dict(drop=-.01, drop_elsewhere=.01, shown_elsewhere=.1, placement=-.1, placement_low=-.4, placement_high=.2)
    assert told(**redundant).word=='with care' and told(**redundant).ticks['it is well placed'] is None
    below = {**redundant, 'placement_high': -.05}
    assert told(**below).word=='not' and told(**below).ticks['it is well placed'] is False
