"Mistakes with a reason in common: groups that were put there are found, chance is not, and what evidence does to a model is what arithmetic says."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, ImageDataLoaders, MSELossFlat, resnet18, vision_learner
from PIL import Image

from fastai_cam.all import CAMInterpretation
from fastai_cam.reasons import Effect, mistake_groups, Reason, Reasons
from fastai_cam.reasons import atlas
from fastai_cam.reasons.atlas import counted, Given, given_classes, looked_over, recipients_of
from fastai_cam.reasons.effects import effect_of, elsewhere, evidence_pixels, picked
from fastai_cam.reasons.groups import clusters_of, deal_mistakes, evidence_distances, Excess, expected_mistakes, Group, grown, log_likelihood_ratio, rate_interval, strata_of
from helpers.reasons import learner_of, marked_interpretation, marked_pictures, reads_marks, several_labels
from helpers.reports import HOSTILE


def cloud(n=200, n_wrong=16, n_planted=8, seed=0):
    "Vectors around three centres with mistakes anywhere, and mistakes in a corner of their own beside one right answer"
    rng, centres = np.random.default_rng(seed), np.eye(8)
    vectors = np.concatenate([centres[np.arange(n)%3] + .15*rng.normal(size=(n, 8)), centres[[5]*(n_planted + 1)] + .1*rng.normal(size=(n_planted + 1, 8))])
    wrong = np.isin(np.arange(len(vectors)), [*rng.choice(n, n_wrong, replace=False), *range(n, n + n_planted)])
    return vectors, wrong, rng.random(len(vectors))


# -- groups

def test_distances_do_not_know_how_strong_evidence_is():
    features = np.array([[3., 0], [1, 0], [0, 5], [0, 0]])
    found = evidence_distances(features, np.array([0, 0, 0, 1]))
    assert np.allclose(found[:3, :3], [[0, 0, 2**.5], [0, 0, 2**.5], [2**.5, 2**.5, 0]], atol=1e-6)
    assert np.isclose(found[0, 3], (1 + .49)**.5) # of another class, and without evidence
    assert np.allclose(found, found.T) and (np.diag(found)==0).all()


def test_what_is_expected_adds_up_to_what_there_is():
    confidence, wrong = np.array([.9, .1, .8, .2, .7, .3, .6, .4]), np.array([1, 1, 0, 1, 0, 0, 0, 0], dtype=bool)
    strata = strata_of(confidence)
    assert strata.tolist()==[3, 0, 3, 0, 2, 1, 2, 1]
    assert expected_mistakes(wrong, strata).tolist()==[.5, 1, .5, 1, 0, 0, 0, 0]
    assert strata_of(np.ones(5)).tolist()==[0]*5 # a model that is always as sure


def test_deals_keep_the_strata():
    wrong, strata = np.array([1, 1, 0, 0, 0, 1], dtype=bool), np.array([0, 0, 0, 1, 1, 1])
    deals = [deal_mistakes(wrong, strata, np.random.default_rng(seed)) for seed in range(20)]
    assert all(deal[:3].sum()==2 and deal[3:].sum()==1 for deal in deals) and len({tuple(deal) for deal in deals}) > 3


def test_likelihood_ratio_by_hand():
    found = log_likelihood_ratio(np.array([4, 1, 6]), np.array([1., 2., 2.]), 6.)
    assert np.allclose(found, [4*np.log(4) + 2*np.log(2/5), 0, 6*np.log(3)])
    assert np.allclose(rate_interval(5, 5, .05), (.025**(1/5), 1)) and np.allclose(rate_interval(0, 5, .05), (0, 1 - .025**(1/5)))


def test_a_neighbourhood_ends_where_right_answers_begin():
    at = np.array([0, .1, .2, .3, .6, 5, 6, 7, 8, 9])
    distances, wrong = abs(at[:, None] - at), np.isin(np.arange(10), [0, 1, 2, 3, 8])
    group = grown(distances, np.array([0, 1, 2, 3]), wrong, np.full(10, .5), 3)
    assert sorted(group.inside)==[0, 1, 2, 3] and sorted(group.members)==[0, 1, 2, 3] and group.rate==1 and group.expected==2
    assert np.isclose(group.strength, 4*np.log(4/2) + np.log(1/3))
    assert np.isclose(group.reach[4], .5) and np.isclose(group.reach[0], .3) # to the third nearest of the core; a member is not its own
    assert grown(distances, np.array([0, 1, 2, 3]), wrong, np.full(10, 2.), 3).strength==0 # more are expected than there are


def test_groups_that_were_put_there_are_found():
    vectors, wrong, confidence = cloud()
    groups = mistake_groups(vectors, np.zeros(len(wrong)), wrong, confidence, n_deals=39)
    assert len(groups)==1 and sorted(groups[0].members[:8])==list(range(200, 208)) and len(groups[0]) <= 9
    assert groups[0].chance==1/40 and groups[0].interval[0] > groups[0].expected/len(groups[0].inside)
    again = mistake_groups(vectors, np.zeros(len(wrong)), wrong, confidence, n_deals=39)
    assert [group.members.tolist() for group in again]==[group.members.tolist() for group in groups]


def test_two_reasons_are_two_groups():
    vectors, wrong, confidence = cloud(n_planted=9)
    vectors, wrong = np.concatenate([vectors, np.eye(8)[[6]*9] + .1*np.random.default_rng(1).normal(size=(9, 8))]), np.concatenate([wrong, [True]*9])
    groups = mistake_groups(vectors, np.zeros(len(wrong)), wrong, np.concatenate([confidence, np.full(9, .5)]), n_deals=39)
    assert sorted(sorted(group.members[:9]) for group in groups)==[list(range(200, 209)), list(range(210, 219))]


def test_as_many_right_answers_make_no_group():
    "The same place, where every other answer is right: no more mistakes than elsewhere"
    rng = np.random.default_rng(0)
    vectors, wrong = np.eye(8)[np.arange(160)%4] + .1*rng.normal(size=(160, 8)), np.arange(160)%8 < 4
    assert mistake_groups(vectors, np.zeros(160), wrong, rng.random(160), n_deals=39)==[]


@pytest.mark.slow
def test_chance_makes_a_group_no_more_often_than_it_says():
    found = []
    for seed in range(60):
        vectors, wrong, confidence = cloud(120, 20, 0, seed=seed)
        found.append(len(mistake_groups(vectors, np.zeros(len(wrong)), np.random.default_rng(seed).permutation(wrong), confidence, n_deals=39)) > 0)
    assert np.mean(found) <= .1 # .05, and what 60 may add


def test_no_more_deals_than_can_matter():
    vectors, wrong, confidence = cloud(n_planted=0)
    excess = Excess(vectors, np.zeros(len(wrong)), wrong, confidence, n_deals=199)
    assert excess.groups==[] and len(excess.by_chance) < 199
    assert (excess.by_chance >= excess.clusters[0].strength).sum()==10 # 11 of 200 is more than a twentieth
    assert Excess(vectors, np.zeros(len(wrong)), np.zeros(len(wrong), dtype=bool), confidence).groups==[]


def test_clusters_are_of_mistakes():
    vectors, wrong, confidence = cloud()
    found = clusters_of(evidence_distances(vectors, np.zeros(len(wrong))), wrong, 4)
    assert all(wrong[members].all() and len(members) >= 4 for members in found)
    assert any(set(range(200, 208)) >= set(members) for members in found)
    assert clusters_of(np.zeros((3, 3)), np.ones(3, dtype=bool), 4)==[]


# -- effects

def test_where_the_evidence_is():
    ramp = torch.tensor([[[0., 1], [2, 4]]])
    assert evidence_pixels(ramp, (2, 2)).tolist()==[[[False, False], [False, True]]] # at half of the peak is another, but a quarter is most
    assert evidence_pixels(torch.tensor([[[0., 0, 0, 0], [0, 9, 5, 4]]]), (2, 4)).sum()==2
    assert not evidence_pixels(-ramp, (2, 2)).any()


def test_elsewhere_is_as_much_and_not_there():
    pixels = torch.zeros(2, 12, 12, dtype=torch.bool)
    pixels[0, :3, :3], pixels[1, 4:6, 4:9] = True, True
    found = elsewhere(pixels)
    assert found.flatten(2).sum(2).tolist()==[[9, 10]]*3 and not (found & pixels).any() and not torch.equal(found[0], found[1])


def test_effect_by_hand():
    "A model that reads one corner"
    def predict(images):
        p = images[:, 0, :4, :4].mean((1, 2)).clamp(.1, .9)
        return torch.stack([p, 1 - p], 1)
    bright, corner = torch.zeros(3, 1, 16, 16), torch.zeros(3, 16, 16)
    bright[:, :, :4, :4], corner[:, :4, :4] = 1, 1
    found = effect_of(predict, bright, corner, torch.tensor([[0, 1], [0, 1], [0, -1]]), torch.full((2, 1, 16, 16), .3), torch.tensor([2, 0]))
    assert torch.allclose(found.before[:2], torch.tensor([.9, .1])) and torch.allclose(found.without[:2], torch.tensor([.1, .9]), atol=.02)
    assert torch.allclose(found.elsewhere[:2], torch.tensor([.9, .1])) and found.before[2, 1].isnan() # no label
    assert torch.allclose(found.other[:, 0], torch.tensor(.3)) and torch.allclose(found.pasted[:, 0], torch.tensor(.9))
    assert (found.control[:, 0] <= .3001).all() and found.control.isnan().any(1).tolist()==[True, False]
    assert np.allclose(found.fall, .8, atol=.02) and found.rise[1] > .5
    nobody = effect_of(predict, bright, corner, torch.tensor([[0, 1]]*3), torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.long))
    assert nobody.pasted.shape==(0, 2) and np.isnan(nobody.rise).all()
    assert picked(torch.tensor([[.2, .8]]), torch.tensor([[1, 5]])).nan_to_num(-1).tolist()==[[pytest.approx(.8), -1]]


# -- the atlas

@pytest.fixture(scope='module')
def marked(): return marked_interpretation()

@pytest.fixture(scope='module')
def found(marked): return marked[0].reasons()


def test_the_mark_is_found(marked, found):
    interp, items = marked
    assert len(found)==1 and sorted(found[0].items)==items and found.n_mistakes==16 and found.in_groups==10
    assert repr(found)=='16 mistakes in 120 answers: 10 of them in 1 group with evidence in common: 10× cat → dog.'
    assert found[0].title.startswith('10 mistakes · predicted cat → labelled dog · without this evidence cat falls ')
    row, = found.to_df().itertuples()
    assert (row.group, row.size, row.predicted, row.labelled, sorted(row.items))==(1, 10, 'cat', 'dog', items)
    assert row.chance <= .05 and row.rate_low > row.expected/row.n_inside


def test_what_the_mark_does_is_what_arithmetic_says(marked, found):
    interp, _ = marked
    effect, items = found[0].effect, found[0].items[:8]
    images = torch.stack([interp.dl.dataset[i][0] for i in items])
    means = images.mean((2, 3))
    before = (48*means[:, 0] + 128*means[:, 2] - 48*means[:, 1]).sigmoid()
    assert torch.allclose(effect.before[:, 0], before, atol=1e-5) and torch.allclose(effect.before.sum(1), torch.ones(8))
    apart = [i for i, image in enumerate(images) if not (image[1].bool() & image[2].bool()).any()] # where the mark does not cover the object
    without = (-48*means[:, 1]).sigmoid()
    assert (effect.without[apart, 0] < before[apart] - .2).all() and effect.without[apart, 0].mean() < effect.elsewhere[apart, 0].mean()
    assert torch.allclose(effect.without[apart, 0], without[apart], atol=.12) # but for what blurs in from the rim
    assert effect.fall[1] > 0 and effect.rise[1] > 0 and (effect.other[:, 0] < .1).all()
    assert found[0].removal.endswith(')') and found[0].pasting.startswith('put into right pictures, cat goes ')


def test_same_seed_same_groups(marked, found):
    again = marked[0].reasons()
    assert again[0].items==found[0].items and torch.equal(again[0].effect.pasted, found[0].effect.pasted)


def test_several_labels():
    interp, items = several_labels()
    found = interp.reasons(test=True)
    assert [sorted(one.items) for one in found]==[items] and set(found[0].predicted)=={'cat'} and set(found[0].labelled)=={'dog'}
    assert found[0].effect.before[:, 1].isnan().all() and len(found[0].effect.other)==8
    assert (found[0].effect.other[:, 0] < .5).all() and found[0].effect.rise[0] > .2


def test_given_classes_of_several_labels():
    from fastai_cam.interpret import ItemAnswers
    answers = ItemAnswers(torch.tensor([[True, True], [False, False]]), torch.tensor([[True, False], [True, True]]), torch.tensor([[.9, .6], [.2, .1]]), n_classes=2)
    assert [part.tolist() for part in given_classes(answers)]==[[0, 0], [0, 1], [-1, -1], [False, True], [pytest.approx(.9), pytest.approx(.6)]]


def test_evidence_is_put_into_right_pictures():
    from fastai_cam.interpret import ItemAnswers
    one_each = ItemAnswers(torch.tensor([0, 1, 1, 0]), torch.tensor([1, 1, 0, 0]))
    assert recipients_of(one_each, 0, 1).tolist()==[1] and recipients_of(one_each, 1, 0).tolist()==[3]
    several = ItemAnswers(torch.tensor([[True, False], [False, True], [False, False]]), torch.tensor([[False, True], [True, True], [False, False]]))
    assert recipients_of(several, 0, -1).tolist()==[2] and recipients_of(several, 1, -1).tolist()==[2]


def test_all_mistakes_of_a_large_set_are_looked_over():
    given = Given(*[np.arange(100)]*3, np.arange(100)%10==0, np.ones(100))
    kept = looked_over(given, 30)
    assert len(kept)==30 and given.wrong[kept].sum()==10 and (np.diff(kept) > 0).all()
    mostly = Given(*[np.arange(100)]*3, np.arange(100)%10 > 0, np.ones(100))
    assert len(looked_over(mostly, 30))==30 and mostly.wrong[looked_over(mostly, 30)].sum()==20
    assert len(looked_over(given, None))==len(looked_over(given, 100))==100


def test_no_group_is_a_result():
    none, _ = marked_interpretation(n_marked=0, n_flipped=12)
    found = none.reasons()
    assert len(found)==0 and repr(found)=='12 mistakes in 120 answers: none of them form a group that mistakes at random would not form, too.'
    axs = found.plot()
    assert 'none of them' in ' '.join(text.get_text() for text in axs[0].texts).replace('\n', ' ') and len(found.to_df())==0


def test_few_mistakes_are_said_to_be_few():
    few, _ = marked_interpretation(n=60, n_marked=0, n_flipped=3)
    runs = []
    handle = few.learn.model.register_forward_pre_hook(lambda *args: runs.append(1))
    try: assert repr(few.reasons())=='3 mistakes in 60 answers: at least 6 are needed to see what they have in common.' and not runs
    finally: handle.remove()
    right, _ = marked_interpretation(n=60, n_marked=0, n_flipped=0)
    assert repr(right.reasons())=='There is no mistake in 60 answers.' and len(right.plot_reasons())==1
    plt.close('all')


def test_the_page(marked, tmp_path):
    axs = marked[0].plot_reasons(3, figsize=(8, 4), save=tmp_path/'reasons.png')
    assert len(axs)==3 and (tmp_path/'reasons.png').stat().st_size > 5000
    title = axs[0].get_title(loc='left').replace('\n', ' ')
    assert title.startswith('10 mistakes · predicted cat → labelled dog · without this evidence cat falls 1.00 → .') and title.endswith('cat → dog')
    assert axs[0].figure._suptitle.get_text()=='10 of 16 mistakes have evidence in common'
    plt.close('all')


def test_without_the_test(marked, monkeypatch):
    monkeypatch.setattr(atlas, 'effect_of', lambda *args: pytest.fail('was tested'))
    found = marked[0].reasons(test=False)
    assert found[0].effect is None and found[0].title=='10 mistakes · predicted cat → labelled dog' and 'Without' not in repr(found[0])


def test_state_is_left_as_found(marked):
    interp, _ = marked
    learn = interp.learn
    learn.model.train()
    learn.model[0][1].eval()
    before, weights = torch.get_rng_state(), [parameter.clone() for parameter in learn.model.parameters()]
    numpy_state = np.random.get_state()[1].copy()
    interp.reasons()
    assert learn.model.training and not learn.model[0][1].training and torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1]==numpy_state).all()
    assert all(torch.equal(one, other) and one.grad is None for one, other in zip(learn.model.parameters(), weights))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in learn.model.modules()) and len(learn.cbs) < 4


def test_cost_is_said_before(marked, capsys):
    from fastai.callback.progress import ProgressCallback
    interp, _ = marked
    interp.learn.add_cb(ProgressCallback())
    try: interp.reasons()
    finally: interp.learn.remove_cb(ProgressCallback)
    said = capsys.readouterr().out
    assert 'reasons of 16 mistakes among 120 answers: a pass of each' in said and 'about 64 forward passes' in said


def test_names_that_would_break_a_page(tmp_path):
    interp, items = marked_interpretation(vocab=HOSTILE[:2])
    found = interp.reasons()
    assert HOSTILE[1][:20] in found[0].title and len(found[0].title) < 300
    found.plot(2, save=tmp_path/'hostile.svg')
    assert '<script>document' not in (tmp_path/'hostile.svg').read_text()
    interp, _ = marked_interpretation(vocab=['x'*10_000, '$\\frac{a}{$'])
    assert len(interp.reasons(test=False)[0].title) < 200
    interp.plot_reasons(2, test=False, save=tmp_path/'math.png')
    plt.close('all')


def test_what_is_refused(marked):
    interp, _ = marked
    images, labels, _ = marked_pictures(n=12, n_marked=2, n_flipped=2)
    values = CAMInterpretation.from_learner(learner_of(images, labels.float()[:, None], model=nn.Sequential(reads_marks(), nn.Linear(2, 1)), loss=MSELossFlat(), vocab=()))
    for call, error, message in ((lambda: interp.reasons(min_size=2), ValueError, 'min_size=2 mistakes are no group'), (lambda: interp.reasons(n=3), ValueError, 'n=3 answers are too few'),
                                 (lambda: interp.reasons(methods='gradcam'), TypeError, "it is called 'method'"), (lambda: interp.reasons(method=['gradcam', 'cam']), TypeError, 'takes one method'),
                                 (lambda: interp.reasons(size=3), TypeError, "no argument 'size'"), (lambda: interp.plot_reasons(0), ValueError, 'n=0 leaves nothing to show'),
                                 (lambda: interp.plot_reasons(style='side'), ValueError, "style='side'"), (lambda: interp.reasons(layer='nowhere'), ValueError, 'nowhere'),
                                 (lambda: values.reasons(), ValueError, 'predicts values, points or pictures, and reasons are looked for in classes')):
        with pytest.raises(error, match=message): call()


def test_masks_are_refused():
    from fastai_cam.tasks import Segmentation
    images = torch.rand(4, 3, 8, 8)
    learn = learner_of(images, torch.zeros(4, 8, 8, dtype=torch.long), model=nn.Conv2d(3, 2, 1))
    learn.loss_func = CrossEntropyLossFlat(axis=1)
    learn.cam_task = Segmentation(['a', 'b'])
    with pytest.raises(ValueError, match='gives each pixel a class of its own, and reasons are looked for in classes'): CAMInterpretation.from_learner(learn).reasons()


def test_pictures_that_are_no_numbers():
    images, labels, _ = marked_pictures(n=40)
    learn = learner_of(images, labels)
    interp = CAMInterpretation.from_learner(learn)
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match='of 1 of 40 answers the probability or the map is not finite'): interp.reasons()


@pytest.mark.slow
def test_a_learner_as_fastai_makes_it(tmp_path, monkeypatch):
    "Its default head, files, and a random network, which errs"
    rng = np.random.default_rng(0)
    for i in range(24):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path/'ab'[i%2]/f'{i}.png')
    learn = vision_learner(ImageDataLoaders.from_folder(tmp_path, valid_pct=.9, seed=0, bs=8, num_workers=0), resnet18, pretrained=False)
    learn.remove_cb(learn.progress)
    interp = CAMInterpretation.from_learner(learn)
    wrong = (interp.answers.predicted != interp.answers.actual).numpy()
    assert repr(interp.reasons()).startswith(f'{wrong.sum()} mistakes in {len(wrong)} answers')
    group = Group(np.flatnonzero(wrong)[:5], np.zeros(len(wrong)), np.arange(7), 2., 3.)
    monkeypatch.setattr(atlas, 'mistake_groups', lambda *args, **kwargs: [group])
    found = interp.reasons()
    assert found[0].effect.before.shape==(5, 2) and torch.allclose(found[0].effect.before[:, 0], interp.answers.probability[wrong][:5], atol=1e-4)
    assert len(found.plot(5))==5
    plt.close('all')


def test_names_are_counted():
    assert counted(['a', 'b', 'b', 'c', 'd', 'e'])=='b 2×, a 1×, c 1× and 2 more' and counted(['a'])=='a'
    one = Reason([1], ['cat', 'dog'], ['a', 'a'], None)
    assert one.what=='the prediction' and len(Reasons([one], 2, 9))==1 and Effect(*[torch.empty(0, 2)]*6).rise != 0
