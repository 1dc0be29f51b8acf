"What a learner of each task is asked when nothing is said, through the whole pipeline: against gradients computed by hand."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from fastai.vision.all import (BBoxBlock, BBoxLblBlock, BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, ImageBlock, L1LossFlat, Learner,
                               MaskBlock, MSELossFlat, MultiCategoryBlock, Normalize, PILImage, PILImageBW, PILMask, PointBlock, PointScaler, RegressionBlock, TensorBBox, TfmdDL,
                               TitledStr, Transform, TransformBlock, imagenet_stats, load_learner, resnet18, unet_learner, vision_learner)
from fastai.vision.gan import GANLearner, basic_critic, basic_generator

from fastai_cam.captions import Row
from fastai_cam.interpret import CAMInterpretation
from fastai_cam.learner import task_of
from fastai_cam.maps.cams import CAMs
from fastai_cam.maps.pixels import to_pixels
from fastai_cam.probe.watch import Probe
from fastai_cam.targets.kinds import ClassIndex, Predicted, Several, Similarity
from fastai_cam.targets.lookup import Output, Region, Versus, WhyNot
from fastai_cam.tasks import BinaryLabel, MultiLabel, NoAnswer, NOT_ASKED, Points, SingleLabel, Task, TASKS, Values

pytestmark = pytest.mark.usefixtures('maps_by_gradcam') # these tests are about what is asked, not about how maps are made


def square_of(i):
    "Left and top of the bright square of picture `i`, and its colour"
    left, top = np.random.default_rng(i).integers(4, 40, 2)
    return int(left), int(top), ('green', 'red')[i%2]


def picture(i):
    pixels = np.random.default_rng(1000 + i).integers(40, 90, (64, 64, 3), dtype=np.uint8)
    left, top, colour = square_of(i)
    pixels[top:top+18, left:left+18] = [230, 30, 30] if colour=='red' else [30, 230, 30]
    return PILImage.create(pixels)


def mask_of(i):
    left, top, colour = square_of(i)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[top:top+18, left:left+18] = 1 if colour=='green' else 2
    return PILMask.create(mask)


def split(items): return list(range(12)), list(range(12, 20))
def colour_and_square(i): return [square_of(i)[2], 'square']
def is_red(i): return float(i%2)
def left_of(i): return float(square_of(i)[0])
def corner_of(i): return torch.tensor([square_of(i)[:2]]).float()
def dls_of(*blocks, **kwargs):
    kwargs = dict(get_x=picture) | kwargs if 'getters' not in kwargs else kwargs
    return DataBlock(blocks, splitter=split, batch_tfms=Normalize.from_stats(*imagenet_stats), **kwargs).dataloaders(list(range(20)), bs=4, num_workers=0)


def net(n_out, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_out)))


def learner(dls, model, **kwargs):
    learn = Learner(dls, model, **kwargs)
    learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else None
    return learn


def by_hand(learn, x, score, layer=None):
    "Grad-CAM of `score(out)` for one item `[1, …]`, by autograd through the whole model"
    kept = []
    hook = (learn.model[0] if layer is None else layer).register_forward_hook(lambda module, inputs, out: kept.append(out))
    out = learn.model.eval()(*x)
    hook.remove()
    grad, = torch.autograd.grad(score(out), kept[0], retain_graph=True)
    return (grad.flatten(2).mean(-1)[..., None, None]*kept[0]).sum(1)[0].detach()


def pixels_of(image):
    "0 to 255, `[H, W, C]`"
    pixels = to_pixels(image).astype(float)
    return pixels if pixels.max() > 1 else pixels*255


def close(a, b): return b.abs().max() > 1e-7 and torch.allclose(a, b, atol=1e-5*b.abs().max())


@pytest.fixture(scope='module')
def multi(): return learner(dls_of(ImageBlock, MultiCategoryBlock(vocab=['red', 'green', 'square']), get_y=colour_and_square), net(3))


def test_probabilities_by_hand():
    logits = torch.tensor([[1., 3., 4.], [1., 1., 1.]]).log()
    assert torch.allclose(SingleLabel().probabilities(logits), torch.tensor([[1/8, 3/8, 4/8], [1/3]*3]))
    assert torch.allclose(MultiLabel().probabilities(logits), torch.tensor([[1/2, 3/4, 4/5], [1/2]*3]))
    for one in (logits[0], logits[0][:, None]): assert torch.allclose(BinaryLabel().probabilities(one), torch.tensor([[1/2, 1/2], [1/4, 3/4], [1/5, 4/5]]))
    for task in (Task(), Values()):
        with pytest.raises(ValueError, match='probability of a class'): task.probabilities(logits)


def test_multi_label_asks_about_each_predicted_label(multi):
    assert task_of(multi).name=='multi'
    with torch.no_grad(): multi.model[1][2].bias.copy_(torch.tensor([.05, -.05, .3]))
    cams = multi.get_cams(multi.dls.valid)
    logits = cams.preds.logit()
    assert cams.task.name=='multi' and cams.maps.dim()==4
    for i in range(len(cams)):
        expected = [c for c in logits[i].argsort(descending=True).tolist() if logits[i, c] >= 0] or [int(logits[i].argmax())]
        asked = [c for c in cams.classes[i].tolist() if c != NOT_ASKED]
        assert asked==expected and len(cams[i])==len(expected)
        x = multi.dls.valid.one_batch()[0] if i < 4 else list(multi.dls.valid)[1][0]
        for k, c in enumerate(asked): assert close(cams.maps[i, k], by_hand(multi, [x[i%4:i%4+1]], lambda out: out[0, c]))


def test_multi_label_actual(multi):
    cams = multi.get_cams([0, 1], cls='actual')
    assert [set(row) - {NOT_ASKED} for row in cams.classes.tolist()]==[{1, 2}, {0, 2}] # picture 12 is green, picture 13 red
    assert cams.targs.tolist()==[[0, 1, 1], [1, 0, 1]]


def test_multi_label_interpretation(multi):
    interp = CAMInterpretation.from_learner(multi)
    cams = interp.top_losses_cams(3, show='both')
    preds, targs = multi.get_preds(dl=multi.dls.valid)
    losses = F.binary_cross_entropy(preds, targs, reduction='none').mean(1)
    assert torch.allclose(cams.losses, losses.sort(descending=True).values[:3], atol=1e-5)
    interp.plot_top_losses_cam(3, show='both')


@pytest.mark.parametrize('bias,answer', [(5., 1), (-5., 0)])
def test_one_logit_asks_why_yes_or_why_no(bias, answer):
    learn = learner(dls_of(ImageBlock, RegressionBlock, get_y=is_red), net(1), loss_func=BCEWithLogitsLossFlat())
    with torch.no_grad(): learn.model[1][2].bias.fill_(bias)
    cams = learn.get_cams([0, 1])
    assert cams.task.name=='binary' and cams.classes.tolist()==[answer]*2
    x = learn.dls.valid.one_batch()[0]
    sign = 1 if answer else -1
    for i in range(2): assert close(cams.maps[i], by_hand(learn, [x[i:i+1]], lambda out: sign*out[0, 0]))
    assert learn.get_cams([0, 1], cls='actual').classes.tolist()==[0, 1]
    assert torch.allclose(learn.get_cams(0, cls=1).maps, -learn.get_cams(0, cls=0).maps)
    CAMInterpretation.from_learner(learn).plot_top_losses_cam(2, show='both')


def test_regression_is_signed_and_names_no_class():
    learn = learner(dls_of(ImageBlock, RegressionBlock, get_y=left_of), net(1), loss_func=MSELossFlat())
    cams = learn.get_cams([0, 1])
    x = learn.dls.valid.one_batch()[0]
    assert cams.task.name=='values' and cams.signed and cams.classes.tolist()==[-1, -1] and cams.targs.flatten().tolist()==[left_of(12), left_of(13)]
    for i in range(2): assert close(cams.maps[i], by_hand(learn, [x[i:i+1]], lambda out: out[0, 0]))
    with pytest.raises(ValueError, match='predicts values, not classes'): learn.get_cams(0, cls='predicted')
    interp = CAMInterpretation.from_learner(learn)
    interp.plot_top_losses_cam(2)
    with pytest.raises(ValueError, match="leave show='pred'"): interp.plot_top_losses_cam(2, show='actual')


def test_points_ask_about_each_coordinate():
    learn = learner(dls_of(ImageBlock, PointBlock, get_y=corner_of), net(2))
    cams = learn.get_cams([0, 1])
    x = learn.dls.valid.one_batch()[0]
    assert cams.task.name=='points' and cams.signed and cams.labels==['x', 'y'] and cams.maps.shape[:2]==(2, 2)
    for i in range(2):
        for k in range(2): assert close(cams.maps[i, k], by_hand(learn, [x[i:i+1]], lambda out: out.flatten(1)[0, k]))
    CAMInterpretation.from_learner(learn).plot_top_losses_cam(2)


class Draws(nn.Module):
    "A segmentation model: two steps down, one up, a logit for each of three classes at every pixel"
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.down, self.bottleneck, self.up, self.out = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Conv2d(8, 3, 3, padding=1)
    def forward(self, x): return F.interpolate(self.out(self.up(self.bottleneck(self.down(x).relu()).relu()).relu()), x.shape[2:], mode='bilinear')


@pytest.fixture(scope='module')
def segmenter(): return learner(dls_of(ImageBlock, MaskBlock(['background', 'green', 'red']), get_y=mask_of), Draws(), loss_func=CrossEntropyLossFlat(axis=1))


def test_segmentation_asks_about_the_largest_class_over_its_region(segmenter):
    with Probe(segmenter.model) as p: assert p(segmenter.dls.valid.one_batch()[0]).names==['bottleneck']
    cams = segmenter.get_cams([0, 1])
    x, y = segmenter.dls.valid.one_batch()
    out = segmenter.model.eval()(x).detach()
    assert cams.task.name=='segmentation' and cams.preds is None and cams.maps.shape==(2, 16, 16)
    for i in range(2):
        shown = out[i].argmax(0)
        counts = [int((shown==c).sum()) for c in range(3)]
        largest = int(np.argmax([0, *counts[1:]])) if sum(counts[1:]) else 0
        assert cams.classes[i]==largest and torch.equal(cams.regions[i], shown==largest)
        assert close(cams.maps[i], by_hand(segmenter, [x[i:i+1]], lambda out: out[0, largest][shown==largest].mean(), segmenter.model.bottleneck))


def test_a_target_is_settled_once(segmenter):
    class Counts(Predicted):
        n_asked = 0
        def score_fn(self, out, y=None):
            Counts.n_asked += 1
            return super().score_fn(out, y)
    x, _ = segmenter.dls.valid.one_batch()
    target = Several([Counts().of_task(task_of(segmenter)), Predicted().of_task(task_of(segmenter))])
    with Probe(segmenter.model) as p:
        cap = p(x)
        score = cap.score(target)
    assert Counts.n_asked==1 and score.values.requires_grad and torch.equal(score.values[:, 0], score.values[:, 1])
    assert torch.equal(score.of(cap.out), score.values)


def test_segmentation_over_the_actual_region_and_one_of_ones_own(segmenter):
    x, y = segmenter.dls.valid.one_batch()
    cams = segmenter.get_cams([0, 1], cls=Region(['green', 'red'], 'actual'))
    own = torch.zeros(64, 64); own[:20] = 1
    given = segmenter.get_cams([0, 1], cls=Region('red', own))
    for i in range(2):
        for k in range(2):
            region = y[i]==k+1 if (y[i]==k+1).any() else torch.ones(64, 64, dtype=torch.bool) # a colour that is not there: everywhere
            assert close(cams.maps[i, k], by_hand(segmenter, [x[i:i+1]], lambda out: out[0, k+1][region].mean(), segmenter.model.bottleneck))
            assert torch.equal(cams.regions[i, k], (y[i]==k+1).as_subclass(torch.Tensor))
        assert close(given.maps[i], by_hand(segmenter, [x[i:i+1]], lambda out: out[0, 2][:20].mean(), segmenter.model.bottleneck))
    with pytest.raises(ValueError, match='of the size of the output'): segmenter.get_cams(0, cls=Region('red', own[:5]))
    with pytest.raises(ValueError, match='needs labels'): segmenter.get_cams(picture(0), cls=Region('red', 'actual'))


def test_segmentation_interpretation(segmenter):
    interp = CAMInterpretation.from_learner(segmenter)
    assert interp.vocab==['background', 'green', 'red']
    cams = interp.top_losses_cams(3, show='both')
    _, y = next(iter(segmenter.dls.valid))
    first = int(interp.top_losses(1)[1])
    assert torch.equal(cams.regions[0, 1], torch.as_tensor(np.array(mask_of(12 + first)))==cams.classes[0, 1]) # the class that the mask shows, where it shows it
    interp.plot_top_losses_cam(3, show='both')


class Tokens(Transform):
    "A question as word indices, and back"
    words = ['where', 'is', 'red', 'green']
    def encodes(self, question: str): return torch.tensor([self.words.index(word) for word in question.split()])
    def decodes(self, tokens: torch.Tensor): return TitledStr(' '.join(self.words[int(i)] for i in tokens))


class Asks(nn.Module):
    "A picture and a question: the question chooses channels; a text transformer's tokens come after the picture's last layer"
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body, self.words, self.mixed, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    def forward(self, image, question):
        features = self.body(image)
        tokens = self.mixed(self.words(question)) # [B, 3, 8]: three words, no places
        return self.fc((features*tokens.mean(1).sigmoid()[..., None, None]).mean((2, 3)))


def question_of(i): return f'where is {("red", "green")[i//2%2]}'
def answer_of(i): return ('left', 'right')[i%2]
def colour_of(i): return square_of(i)[2]


@pytest.fixture(scope='module')
def answerer():
    dls = dls_of(ImageBlock, TransformBlock(type_tfms=Tokens), CategoryBlock, n_inp=2, getters=[picture, question_of, answer_of])
    return learner(dls, Asks())


def test_a_question_about_a_picture(answerer):
    cams = answerer.get_cams([0, 1, 2])
    image, question, _ = answerer.dls.valid.one_batch()
    assert cams.texts==[question_of(i) for i in (12, 13, 14)] and cams.maps.shape==(3, 16, 16)
    for i in range(3):
        predicted = int(answerer.model.eval()(image, question)[i].argmax())
        assert close(cams.maps[i], by_hand(answerer, [image[i:i+1], question[i:i+1]], lambda out: out[0, predicted], answerer.model.body))
    assert abs(pixels_of(cams[0].image) - pixels_of(picture(12))).max() < 2 # the picture, decoded
    CAMInterpretation.from_learner(answerer).plot_top_losses_cam(2)
    unlabelled = answerer.get_cams(answerer.dls.test_dl([12, 13, 14]))
    assert torch.equal(unlabelled.maps, cams.maps) and unlabelled.texts==cams.texts and unlabelled.targs is None and unlabelled.losses is None


def test_questions_are_read_for_the_items_that_are_shown_only(answerer, monkeypatch):
    read, decode_batch = [], TfmdDL.decode_batch
    monkeypatch.setattr(TfmdDL, 'decode_batch', lambda self, batch, **kwargs: read.append(len(batch[0])) or decode_batch(self, batch, **kwargs))
    interp = CAMInterpretation.from_learner(answerer)
    assert not read
    cams = interp.top_losses_cams(2)
    assert read==[2] and cams.texts==[question_of(i) for i in cams.items]


class Twins(nn.Module):
    "One encoder for two pictures"
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.fc = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 1)), nn.Linear(16, 2)
    def forward(self, a, b): return self.fc(torch.cat([self.encoder(a).mean((2, 3)), self.encoder(b).mean((2, 3))], 1))


def other_picture(i): return picture((i + 7)%20)
def same_colour(i): return i%3==0


@pytest.mark.parametrize('image', [0, 1])
@pytest.mark.parametrize('layer', [None, 'encoder', 'encoder.0'])
def test_each_of_two_pictures_has_its_own_map(image, layer):
    learn = learner(dls_of(ImageBlock, ImageBlock, CategoryBlock, n_inp=2, getters=[picture, other_picture, same_colour]), Twins())
    cams = learn.get_cams([0, 1], image=image, layer=layer, cls=1)
    a, b, _ = learn.dls.valid.one_batch()
    module = learn.model.get_submodule(layer or 'encoder')
    for i in range(2):
        kept = []
        hook = module.register_forward_hook(lambda module, inputs, out: kept.append(out.detach().requires_grad_()) or kept[-1].clone())
        out = learn.model.eval()(a[i:i+1], b[i:i+1])
        hook.remove()
        grad, = torch.autograd.grad(out[0, 1], kept[image])
        assert close(cams.maps[i], (grad.mean((2, 3), keepdim=True)*kept[image]).sum(1)[0].detach())
        assert abs(pixels_of(cams[i].image) - pixels_of((picture, other_picture)[image](12 + i))).max() < 2
    with pytest.raises(ValueError, match='image=2 does not exist: the model takes 2 images'): learn.get_cams(0, image=2)


class TwoAnswers(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(4)
        self.body, self.colour, self.size, self.kind = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2), nn.Linear(8, 3), kind
    def forward(self, x):
        features = self.body(x).mean((2, 3))
        both = self.colour(features), self.size(features)
        return dict(zip(('colour', 'size'), both)) if self.kind is dict else self.kind(both)


@pytest.mark.parametrize('kind,colour,size', [(dict, 'colour', 'size'), (tuple, 0, 1), (list, 0, 1)])
def test_several_outputs(kind, colour, size):
    def loss(out, y, reduction='mean'): return F.cross_entropy(out[colour], y, reduction=reduction)
    learn = learner(dls_of(ImageBlock, CategoryBlock, get_y=colour_of), TwoAnswers(kind), loss_func=loss)
    cams = learn.get_cams([0, 1], cls=[Output(colour, 'red'), Output(size, 2), lambda out: out[size][:, 0]])
    x, y = learn.dls.valid.one_batch()
    questions = [lambda out: out[colour][0, 1], lambda out: out[size][0, 2], lambda out: out[size][0, 0]]
    for i in range(2):
        for k, ask in enumerate(questions): assert close(cams.maps[i, k], by_hand(learn, [x[i:i+1]], ask, learn.model.body))
    with torch.no_grad(): assert torch.allclose(cams.losses, F.cross_entropy(learn.model(x[:2])[colour], y[:2].as_subclass(torch.Tensor), reduction='none'), atol=1e-5)
    with pytest.raises(ValueError, match=r'say which part is meant with cls=Output\(part, class\)'): learn.get_cams(0)
    with pytest.raises(ValueError, match='the model has no output 7'): learn.get_cams(0, cls=Output(7, 0))
    assert not any(module._forward_hooks for module in learn.model.modules())


class FirstThen(nn.Module):
    "An auxiliary head that runs last and has nothing to do with the first output"
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.body, self.fc, self.aux = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2), nn.Conv2d(8, 4, 1)
    def forward(self, x):
        features = self.body(x)
        return dict(main=self.fc(features.mean((2, 3))), aux=self.aux(features).mean((2, 3)))


def test_the_layer_is_one_that_matters_for_the_question():
    x = torch.rand(2, 3, 16, 24)
    for asks, layer in ((None, 'body'), (lambda out: out['main'][:, 0], 'body'), (lambda out: out['aux'][:, 0], 'aux')):
        with Probe(FirstThen(), asks=asks) as p: assert p(x).names==[layer]


@pytest.mark.parametrize('wrap', ['parallel', 'distributed', 'compiled', 'compiled in place'])
def test_wrapped_models(wrap, multi, tmp_path):
    reference, model = multi.get_cams([0, 1]).maps, multi.model
    if wrap=='compiled in place': model.compile()
    elif wrap=='distributed':
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/together', rank=0, world_size=1)
        multi.model = nn.parallel.DistributedDataParallel(model)
    else: multi.model = nn.DataParallel(model) if wrap=='parallel' else torch.compile(model)
    given = multi.model
    try:
        assert torch.equal(multi.get_cams([0, 1]).maps, reference) and multi.model is given
        name = {'parallel':'module.0.2', 'distributed':'module.0.2', 'compiled':'_orig_mod.0.2'}.get(wrap, '0.2')
        assert torch.equal(multi.get_cams([0, 1], layer=name).maps, reference)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    finally:
        multi.model, model._compiled_call_impl = model, None
        if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()


class ColourAndPlace(nn.Module):
    "Which colour, and how far from the left"
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body, self.colour, self.left = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU()), nn.Linear(8, 2), nn.Linear(8, 1)
    def forward(self, x):
        features = self.body(x).mean((2, 3))
        return self.colour(features), self.left(features)


def test_a_score_of_several_labels():
    "With several targets, a function of output and labels is given all of the labels, also while the layer is looked for"
    dls = dls_of(ImageBlock, CategoryBlock, RegressionBlock, n_inp=1, getters=[picture, colour_of, left_of])
    learn = learner(dls, ColourAndPlace(), loss_func=lambda out, colour, left: F.cross_entropy(out[0], colour) + F.mse_loss(out[1][:, 0], left))
    def score(out, y): return out[0].gather(1, y[0][:, None])[:, 0] - .001*(out[1][:, 0] - y[1])**2
    cams = learn.get_cams([0, 3], cls=score)
    for i, number in enumerate((12, 15)):
        x = dls.test_dl([number]).one_batch()[0]
        y = torch.tensor([['green', 'red'].index(colour_of(number))]), torch.tensor([left_of(number)])
        assert close(cams.maps[i], by_hand(learn, [x], lambda out: score(out, y)[0], learn.model.body))


def test_exported_learners(multi, segmenter, tmp_path):
    for learn in (multi, segmenter):
        learn.export(tmp_path/'model.pkl')
        loaded = load_learner(tmp_path/'model.pkl')
        assert torch.allclose(loaded.get_cams([picture(12), picture(13)]).maps, learn.get_cams([0, 1]).maps, atol=1e-6)


def test_volumes():
    torch.manual_seed(6)
    items = [(torch.randn(1, 6, 12, 16), i%2) for i in range(8)]
    model = nn.Sequential(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 8, 3, 2, 1)), nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2)))
    learn = learner(DataLoaders(TfmdDL(items, bs=4, num_workers=0), TfmdDL(items, bs=4, num_workers=0)), model, loss_func=CrossEntropyLossFlat())
    cams = learn.get_cams([0, 5], cls=1)
    assert cams.maps.shape==(2, 3, 6, 8) and cams.n_space==3
    for i, number in enumerate((0, 5)):
        kept = []
        hook = model[0].register_forward_hook(lambda module, inputs, out: kept.append(out))
        out = model.eval()(items[number][0][None])
        hook.remove()
        grad, = torch.autograd.grad(out[0, 1], kept[0])
        assert close(cams.maps[i], (grad.mean((2, 3, 4), keepdim=True)*kept[0]).sum(1)[0].detach())
    assert close(learn.get_cams(items[5][0], cls=1).maps[0], cams.maps[1])
    methods = ['cam', 'layercam', 'hirescam', 'gradcam_pp', 'eigencam', 'xgradcam', 'ablationcam']
    several = learn.get_cams([0, 5], cls=1, method=methods).maps
    assert several.shape==(2, 7, 3, 6, 8) and torch.allclose(several[:, 0], cams.maps*144, rtol=1e-4) # CAM is Grad-CAM × the number of places
    assert torch.allclose(several[:, 2].mean((1, 2, 3)), cams.maps.mean((1, 2, 3)), rtol=1e-3) # behind pooling HiResCAM is Grad-CAM
    learn.show_cam([0, 5], slices=3)


@pytest.mark.parametrize('channels', [1, 5])
def test_other_numbers_of_channels(channels):
    torch.manual_seed(7)
    items = [(torch.randn(channels, 16, 24), i%2) for i in range(4)]
    model = nn.Sequential(nn.Sequential(nn.Conv2d(channels, 4, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    learn = learner(DataLoaders(TfmdDL(items, bs=4, num_workers=0), TfmdDL(items, bs=4, num_workers=0)), model, loss_func=CrossEntropyLossFlat())
    cams = learn.get_cams([0], cls=0)
    assert close(cams.maps[0], by_hand(learn, [items[0][0][None]], lambda out: out[0, 0]))
    learn.show_cam([0])


def test_similarity_of_embeddings():
    learn = learner(dls_of(ImageBlock, CategoryBlock, get_y=answer_of), net(6), loss_func=CrossEntropyLossFlat())
    reference = torch.tensor([1., 0., -2., 0., 0., 1.])
    cams = learn.get_cams([0], cls=Similarity(reference, 'like it'))
    x = learn.dls.valid.one_batch()[0]
    assert cams.labels==['like it'] and close(cams.maps[0], by_hand(learn, [x[:1]], lambda out: (out[0] @ reference)/(out[0].norm()*reference.norm())))


class LowRank(nn.Module):
    "A layer and a correction to it, as LoRA adds them"
    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer, self.a, self.b = layer, nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding), nn.Conv2d(rank, layer.out_channels, 1)
    def forward(self, x): return self.base_layer(x) + self.b(self.a(x))


class Wrapper(nn.Module):
    def __init__(self, model): super().__init__(); self.base_model = model
    def forward(self, *args, **kwargs): return self.base_model(*args, **kwargs)


def test_a_model_with_low_rank_corrections():
    model = net(2)
    model[0][2] = LowRank(model[0][2])
    learn = learner(dls_of(ImageBlock, CategoryBlock, get_y=answer_of), Wrapper(model), loss_func=CrossEntropyLossFlat())
    x = learn.dls.valid.one_batch()[0]
    cams = learn.get_cams([0], cls=1)
    assert close(cams.maps[0], by_hand(learn, [x[:1]], lambda out: out[0, 1], model[0])) # after the correction, not inside it
    with Probe(learn.model) as p: assert p(x).names==['base_model.0']


# --- outputs in which no number is an answer by itself

def grey(i): return np.array(picture(i)).mean(2).astype(np.float32)
def depth_of(i): return torch.tensor(grey(i))[None]/255
def halves(i): return (depth_of(i) > .5).float()
def box_of(i): left, top, _ = square_of(i); return [[left, top, left + 18, top + 18]]
def own_loss(out, *y, **kwargs): return sum(part.flatten(1).mean(1) for part in (out if isinstance(out, tuple) else (out,)))
def mean_of(out): return out.flatten(1).mean(1)
class TripletLoss(nn.Module):
    def forward(self, out, y): return out.mean()

BOXES = TransformBlock(type_tfms=TensorBBox.create, item_tfms=PointScaler)
def draws(n, flat=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, n, 4, 4), *([nn.Flatten(1, 2)] if flat else []))

UNANSWERED = {'picture, mean squares': (ImageBlock, picture, draws(3), MSELossFlat(), 'picture'), 'picture, absolute': (ImageBlock, picture, draws(3), L1LossFlat(), 'picture'),
              'picture, a loss of their own': (ImageBlock, picture, draws(3), own_loss, 'picture'), 'picture, cross entropy': (ImageBlock, picture, draws(3), BCEWithLogitsLossFlat(), 'picture'),
              'grey': (ImageBlock(cls=PILImageBW), lambda i: PILImageBW.create(np.array(picture(i))[..., 0]), draws(1), own_loss, 'picture'),
              'code of a picture': (ImageBlock, picture, net(9), own_loss, 'picture'), 'depth': (TransformBlock, depth_of, draws(1), MSELossFlat(), 'picture'),
              'depth, a loss of their own': (TransformBlock, depth_of, draws(1), own_loss, 'picture'), 'depth without a channel': (TransformBlock, lambda i: depth_of(i)[0], draws(1, flat=True), nn.HuberLoss(), 'picture'),
              'density in a mask': (MaskBlock, mask_of, draws(1), MSELossFlat(), 'picture'), 'heatmaps of points': (PointBlock, corner_of, draws(5), own_loss, 'picture'),
              'boxes': (BOXES, box_of, net(4), MSELossFlat(), 'boxes'), 'boxes, smooth': (BOXES, box_of, net(4), nn.SmoothL1Loss(), 'boxes'), 'boxes, a loss of their own': (BOXES, box_of, net(4), own_loss, 'boxes'),
              'triplets': (CategoryBlock, colour_of, net(16), nn.TripletMarginLoss(), 'embedding'), 'triplets by name': (CategoryBlock, colour_of, net(2), TripletLoss(), 'embedding')}

@pytest.mark.parametrize('kind', UNANSWERED)
def test_what_has_no_answer_by_itself_is_refused_and_asked_with_a_function(kind):
    block, get_y, model, loss, what = UNANSWERED[kind]
    learn = learner(dls_of(ImageBlock, block, get_y=get_y), model, loss_func=loss)
    says = dict(picture='returns a picture', boxes='returns boxes', embedding='returns an embedding')[what]
    by_labels = None, 'predicted', 'actual', 'all', 0, [0, 1], ClassIndex(0), Predicted, Region(0), Versus(0, 1), Output(0, 0), [mean_of, None]
    by_output = None, 0, [0, 1], ClassIndex(0), Region(0), Versus(0, 1), [mean_of, 0]
    by_both = None, 'predicted', [mean_of, None], Region('predicted'), WhyNot(0)
    for cls in {SingleLabel: by_both, NoAnswer: by_labels}.get(type(task_of(learn)), by_output):
        with pytest.raises(ValueError, match=f'{says}.*pass cls=') as found: learn.get_cams([0], cls=cls)
        assert '\n' not in str(found.value)
    if 'triplets' in kind: return # its loss needs three
    x, _ = learn.dls.valid.one_batch()
    cams = learn.get_cams([0, 1], cls=mean_of)
    assert cams.classes.tolist()==[-1, -1]
    for i in range(2):
        with Probe(learn.model) as p: names = p(x).names
        assert torch.allclose(cams.maps[i], by_hand(learn, [x[i:i+1]], lambda out: mean_of(out)[0], learn.model.get_submodule(names[0])), atol=1e-6)
    cams.show()


def test_real_learners_of_pictures(tmp_path):
    dls = dls_of(ImageBlock, ImageBlock, get_y=picture)
    learn = learner(dls, unet_learner(dls, resnet18, pretrained=False, n_out=3, loss_func=L1LossFlat()).model, loss_func=L1LossFlat())
    with pytest.raises(ValueError, match='returns a picture'): learn.show_cam(0)
    assert learn.get_cams(0, cls=mean_of).maps.shape==(1, 2, 2)
    learn.export(tmp_path/'model.pkl')
    with pytest.raises(ValueError, match='returns a picture'): load_learner(tmp_path/'model.pkl').show_cam(picture(12))
    noise = dls_of(TransformBlock, ImageBlock, getters=[lambda i: torch.randn(100), picture])
    gan = GANLearner.wgan(noise, basic_generator(64, 3), basic_critic(64, 3))
    for cls in (None, 0, 'predicted'):
        with pytest.raises(ValueError, match='returns a picture'): gan.get_cams([0], cls=cls)


class BoxesAndNames(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.boxes, self.names = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU()), nn.Linear(8, 4), nn.Linear(8, 3)
    def forward(self, x):
        features = self.body(x).mean((2, 3))
        return self.boxes(features), self.names(features)

def test_a_detector_is_asked_about_the_part_that_has_classes():
    dls = dls_of(ImageBlock, BBoxBlock, BBoxLblBlock, n_inp=1, getters=[picture, box_of, lambda i: [colour_of(i)]])
    learn = learner(dls, BoxesAndNames(), loss_func=own_loss)
    with pytest.raises(ValueError, match=r'is a tuple \(0 to 1\): say which part is meant with cls=Output\(part, class\)'): learn.get_cams([0])
    both = learner(dls, nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7)), loss_func=own_loss)
    with pytest.raises(ValueError, match='the vocab names 3 classes, but the model returns 7 numbers'): both.get_cams([0]) # coordinates and classes in one row
    names = learner(dls, net(3), loss_func=own_loss)
    assert names.get_cams([0], cls='red').classes.tolist()==[list(dls.vocab).index('red')]
    x = dls.valid.one_batch()[0]
    found = learn.get_cams([0], cls=[Output(1, 'red'), Output(1), lambda out: out[0][:, 2]])
    best = int(learn.model.eval()(x[:1])[1].argmax())
    for k, score in enumerate((lambda out: out[1][0, list(dls.vocab).index('red')], lambda out: out[1][0, best], lambda out: out[0][0, 2])):
        assert close(found.maps[0, k], by_hand(learn, [x[:1]], score, learn.model.body))


def test_what_has_an_answer_still_gives_it(segmenter):
    def task(block, get_y, model, loss=None): return task_of(learner(dls_of(ImageBlock, block, get_y=get_y), model, loss_func=loss or own_loss))
    assert type(task_of(segmenter)) is SingleLabel
    assert type(task(RegressionBlock(n_out=3), lambda i: [1., 2., 3.], net(3))) is Values # whatever the loss function is called
    assert type(task(RegressionBlock, left_of, net(1), MSELossFlat())) is Values
    assert type(task(RegressionBlock, is_red, net(1), BCEWithLogitsLossFlat())) is MultiLabel
    assert type(task(PointBlock, corner_of, net(2))) is Points
    assert type(task(MaskBlock(['a', 'b']), mask_of, draws(3))) is SingleLabel
    regression = learner(dls_of(ImageBlock, RegressionBlock(n_out=3), get_y=lambda i: [1., 2., 3.]), net(3), loss_func=own_loss)
    assert regression.get_cams([0]).labels==['value 0', 'value 1', 'value 2']
    masks = learner(dls_of(ImageBlock, TransformBlock, get_y=halves), draws(1), loss_func=own_loss) # zeros and ones are a mask
    assert masks.get_cams([0]).task.name=='segmentation'
    for out, what in ((torch.rand(2, 3), Values), (torch.rand(2, 17, 2), Values), (torch.rand(2, 5, 1, 1), Values), (torch.rand(2, 2, 40), Values), (torch.rand(2, 1, 8, 8), NoAnswer), (torch.rand(2, 8, 8), NoAnswer), (torch.rand(2, 3, 4, 4, 4), NoAnswer)):
        assert type(Values().of(out)) is what, out.shape
    for points in (torch.rand(2, 5, 2), torch.rand(2, 10)): assert type(Points().of(points)) is Points


def test_real_points_and_values():
    for block, get_y, n, labels in ((PointBlock, corner_of, 2, ['x', 'y']), (RegressionBlock(n_out=2), lambda i: [1., 2.], 2, ['value 0', 'value 1'])):
        dls = dls_of(ImageBlock, block, get_y=get_y)
        learn = vision_learner(dls, resnet18, pretrained=False, n_out=n)
        learn.remove_cb(learn.progress)
        cams = learn.get_cams([0])
        assert cams.labels==labels and cams.maps.shape==(1, 2, 2, 2)


def test_a_long_row_of_numbers_without_names_is_asked_for_by_column():
    "An autoencoder whose output and labels are flat looks like a regression: nothing is picked from it unasked, whatever its shape"
    def flat(n, loss, shape=()):
        samples = [(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)), torch.rand(*(shape or (n,)))) for i in range(4)]
        loader = lambda: TfmdDL(samples, bs=2, num_workers=0)
        model = net(n) if not shape else nn.Sequential(net(n), nn.Unflatten(1, shape))
        return learner(DataLoaders(loader(), loader()), model, loss_func=loss)
    for loss in (nn.MSELoss(), MSELossFlat(), L1LossFlat(), F.mse_loss):
        learn = flat(768, loss)
        for cls in (None, 'predicted', 'actual'):
            with pytest.raises(ValueError, match='768 numbers an item without names.*pass cls=' if cls is None else 'predicts values, not classes') as caught: learn.get_cams([0], cls=cls)
            assert '\n' not in str(caught.value)
        with pytest.raises(ValueError, match='768 numbers an item without names'): learn.show_cam([0])
        by_column, by_function = learn.get_cams([0, 1], cls=100), learn.get_cams([0, 1], cls=lambda out: out.flatten(1)[:,100])
        assert torch.equal(by_column.maps, by_function.maps) and by_column.maps.abs().max() > 0
    with pytest.raises(ValueError, match='300 numbers an item'): flat(300, nn.MSELoss(), (3, 100)).get_cams([0])
    assert flat(64, nn.MSELoss()).get_cams([0]).labels==[f'value {i}' for i in range(6)]
    assert Values([f'p{i}' for i in range(65)]).column_names(torch.rand(2, 65))==[f'p{i}' for i in range(65)]
    assert Points().column_names(torch.rand(2, 68, 2))[-1]=='y of point 67' # they have names


def test_the_task_is_known_whatever_the_loaders_are():
    batches = [(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))]
    loader = TfmdDL([(torch.rand(3, 16, 16), torch.tensor(i % 2)) for i in range(4)], bs=2, num_workers=0)
    for dls in (DataLoaders(batches, batches), DataLoaders(loader), DataLoaders(batches), DataLoaders(torch.utils.data.DataLoader(loader.dataset))):
        learn = learner(dls, net(2), loss_func=CrossEntropyLossFlat())
        assert type(task_of(learn)) is SingleLabel
    with pytest.raises(ValueError, match='has a single DataLoader.*make it DataLoaders'): learner(DataLoaders(loader), net(2), loss_func=CrossEntropyLossFlat()).get_cams([0])
    learn = learner(DataLoaders(batches, batches), net(2), loss_func=CrossEntropyLossFlat())
    assert torch.allclose(learn.get_cams(loader, cls=1).maps, learner(DataLoaders(loader, loader), learn.model, loss_func=CrossEntropyLossFlat()).get_cams(loader, cls=1).maps)


# -- a task of a user

class Grade(Task):
    "A grade, from 0 to the number of columns: column k says whether it is above k"
    name = 'grade'
    def n_classes(self, out): return out.shape[1] + 1
    def predicted(self, out): return (out.detach() > 0).sum(1, keepdim=True)
    def actual(self, out, y): return y[:, None]
    def scores(self, out, classes, regions=None): return (torch.where(torch.arange(out.shape[1]) < classes[..., None], 1, -1)*out[:, None]).sum(-1)
    def class_names(self, vocab): return [f'grade {k}' for k in range(5)]
    def row_probabilities(self, row): return -torch.diff(row.pred, prepend=torch.ones(1), append=torch.zeros(1))
    def row_class(self, row): return int((row.pred > .5).sum())
    def answers(self, row): return [f'grade {self.row_class(row)} of {len(row.pred)}', *([] if row.targ is None else [f'{int(row.targ)}'])]


class AboveLoss(nn.Module):
    "Whether the grade is above k, for every k"
    def __init__(self):
        super().__init__()
        self.reduction = 'mean'
    def forward(self, out, y): return F.binary_cross_entropy_with_logits(out, (torch.arange(4) < y[:, None]).float(), reduction=self.reduction)
    def activation(self, out): return out.sigmoid()


def grade_of(i): return square_of(i)[0]//8


@pytest.fixture
def grades():
    learn = learner(dls_of(ImageBlock, CategoryBlock(vocab=[0, 1, 2, 3, 4]), get_y=grade_of), net(4), loss_func=AboveLoss())
    with torch.no_grad(): learn.model[1][2].bias.copy_(torch.tensor([3., 2., 0., -2.]))
    learn.cam_task = Grade()
    return learn


def test_a_task_of_a_user(grades, tmp_path):
    cams = grades.get_cams([0, 1, 2])
    logits = cams.preds.logit()
    predicted = (logits > 0).sum(1).tolist()
    assert type(cams.task) is Grade and cams.classes.tolist()==predicted and set(predicted) <= {2, 3}
    assert grades.get_cams([0, 1, 2], cls='actual').classes.tolist()==[grade_of(12 + i) for i in range(3)]
    x = grades.dls.valid.one_batch()[0]
    for i in range(3): assert close(cams.maps[i], by_hand(grades, [x[i:i+1]], lambda out: out[0, :predicted[i]].sum() - out[0, predicted[i]:].sum()))
    steps = torch.cat([torch.ones(3, 1), cams.preds, torch.zeros(3, 1)], dim=1)
    shares = [(steps[i, k] - steps[i, k+1]).item() for i, k in enumerate(predicted)]
    titles = [f'predicted grade {k} of 4 {shares[i]:.2f} · actual {grade_of(12 + i)}' for i, k in enumerate(predicted)]
    assert [m.title for m in cams]==titles and cams.item_title(0, loss=True)==f'{titles[0]} · loss {cams.losses[0]:.2f}'
    assert grades.get_cams(0, cls=4)[0].title==f'{titles[0]} · map: grade 4 {cams.preds[0, 3].item():.2f}'
    back = CAMs.load(cams.save(tmp_path/'grades.npz'))
    assert [m.title for m in back]==titles and type(back.task) is Grade


def test_a_task_of_a_user_is_shown(grades):
    grades.show_cam([0, 1])
    titles = [ax.get_title().replace('\n', ' · ') for ax in plt.gcf().axes]
    assert titles==[m.title for m in grades.get_cams([0, 1])] and all(title.startswith('predicted grade ') for title in titles)
    CAMInterpretation.from_learner(grades).plot_top_losses_cam(2)


def test_a_prediction_that_is_not_finite_is_not_read():
    row = Row(torch.tensor([.9, float('nan'), .1, 0.]), torch.tensor(1))
    assert NoAnswer('embedding').caption(Row(torch.tensor([.5, .5])), .5)=='' # which are no probabilities, whatever they add up to
    assert Grade().caption(row, .5)=='output not finite' and Grade().legend(row)=='' and Grade().asked(row, 1)=='class 1'


def test_what_is_no_task_is_refused(grades):
    for wrong, got in ((Grade, 'not the class Grade itself'), ('multi', 'not a str')):
        grades.cam_task = wrong
        with pytest.raises(TypeError, match=f'cam_task is a task, an instance of a class that is derived from Task, {got}'): grades.get_cams(0)


def test_the_name_of_a_task_leads_to_it(): assert TASKS['grade'] is Grade and TASKS['multi'] is MultiLabel and 'single' in TASKS


def test_a_question_is_asked_in_the_region_of_its_own_item():
    from fastai_cam.tasks import Segmentation
    out = torch.tensor([[[[1., 0], [0, 0]], [[0, 1], [2, 3]]], [[[4., 5], [6, 0]], [[0, 0], [0, 7]]]])
    ask = Segmentation().score_fn(out, None, torch.tensor([[0], [0]]), 'predicted')
    assert ask(out[[1, 1, 0]], torch.tensor([1, 1, 0])).tolist()==[[5], [5], [1]]


def test_the_label_that_comes_closest_where_none_is_reached():
    from fastai_cam.tasks import MultiLabel, NOT_ASKED
    assert MultiLabel().predicted(torch.tensor([[-3., -1, -2], [1, 2, -1]])).tolist()==[[1, NOT_ASKED, NOT_ASKED], [1, 0, NOT_ASKED]]


def test_a_task_is_called_by_its_class(segmenter):
    assert [repr(task) for task in (SingleLabel(['a']), Points())]==['SingleLabel', 'Points'] and repr(task_of(segmenter))=='SingleLabel'
    assert repr(segmenter.get_cams([0]).task)=='Segmentation'


def test_how_a_score_becomes_a_probability():
    "Of a model with one channel for yes and no, by a sigmoid at every pixel; of values and of tasks of one's own, not at all"
    one, several = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4)
    found = [task.of(out).score_activation(out) for task, out in ((SingleLabel(), torch.zeros(2, 3)), (MultiLabel(), torch.zeros(2, 3)), (MultiLabel(), torch.zeros(2, 1)),
                                                                  (SingleLabel(), several), (SingleLabel(), one), (Values(), torch.zeros(2, 3)), (Task(), torch.zeros(2, 3)))]
    assert found==['softmax', 'sigmoid', 'sigmoid', 'softmax', 'sigmoid', None, None]
