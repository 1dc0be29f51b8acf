"Questions in words, about open_clip's models with random weights: against the formula, by hand, and beside what the learner was before."
import json
import pickle
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, IndexSplitter, Learner, Normalize, PILImage, Resize,
                               imagenet_stats)
from open_clip.model import CLIP, convert_weights_to_lp
from open_clip.zero_shot_classifier import build_zero_shot_classifier

from fastai_cam.all import CAMCallback, Output, Prompt, Region, Versus, WhyNot
from fastai_cam.probe import Probe
from fastai_cam.targets import prompt as room

pytestmark = pytest.mark.usefixtures('maps_by_gradcam') # these tests are about what is asked, not about how maps are made

TOWERS = dict(vit=(32, dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32)), resnet=(64, dict(layers=(1, 1, 1, 1), width=8, image_size=64)))
LAYERS = dict(vit='transformer.resblocks.1.ln_1', resnet='layer4') # the last whose places are read; attention pools what comes out of it
SIZES = {name: size for name, (size, _) in TOWERS.items()}


def clip(kind='vit', seed=0, **kwargs):
    torch.manual_seed(seed)
    text = dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1)
    return CLIP(24, TOWERS[kind][1], text, **kwargs)


def tokens(texts): return open_clip.get_tokenizer('ViT-B-32', context_length=12)(texts)


def no_loss(out, y): return torch.zeros(())


def learner_of(model, size=32, loss=None, n=5):
    pictures = [PILImage.create(np.random.default_rng(i).integers(0, 255, (size+8, size+24, 3), dtype=np.uint8)) for i in range(n)]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: pictures[i], get_y=lambda i: 'ab'[i%2], splitter=IndexSplitter(range(2, n)),
                      item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*imagenet_stats))
    learn = Learner(block.dataloaders(range(n), bs=2, num_workers=0), model, loss_func=loss or no_loss)
    learn.remove_cb(learn.progress)
    return learn


def inputs(learn): return torch.cat([batch[0] for batch in learn.dls.valid])


def text_embedding(model, text):
    was = model.training
    with torch.no_grad(): found = model.eval().encode_text(tokens([text]))[0]
    model.train(was)
    return found


def score_by_hand(model, embedding, text):
    "The logit of CLIP's paper: both on the unit sphere, their product times exp(t)"
    words = text_embedding(model, text)
    return (embedding/embedding.norm(dim=1, keepdim=True)) @ (words/words.norm())*model.logit_scale.detach().exp()


# -- the score

@pytest.mark.parametrize('kind', TOWERS)
@pytest.mark.parametrize('form', ['tuple', 'dict', 'with bias', 'scale in a list', 'tower', 'tower with tokens', 'wrapper', 'parallel'])
def test_the_score_is_the_cosine_times_the_scale(kind, form):
    if (kind, form)==('resnet', 'tower with tokens'): form = 'tower' # it has none
    model = clip(kind, output_dict=form=='dict', nonscalar_logit_scale=form=='scale in a list', init_logit_bias=-3. if form=='with bias' else None)
    model.logit_scale.data += .7
    x = torch.randn(3, 3, SIZES[kind], SIZES[kind])
    model.eval()
    if form=='tower with tokens': model.visual.output_tokens = True
    asked = model.visual if form.startswith('tower') else dict(wrapper=nn.Sequential(nn.Identity(), model), parallel=nn.DataParallel(model)).get(form, model)
    with torch.no_grad(): out, embedding = asked(x), model.visual(x)
    embedding = embedding[0] if isinstance(embedding, tuple) else embedding
    prompt = Prompt('a watermark', encoder=model if form.startswith('tower') else None).prepare(asked)
    assert prompt(out).shape==(3, 1) and torch.allclose(prompt(out)[:, 0], score_by_hand(model, embedding, 'a watermark'), rtol=1e-4, atol=1e-4)
    given = Prompt('a watermark', embedding=text_embedding(model, 'a watermark')*7)
    assert torch.allclose(given.prepare(asked)(out)*(prompt.scale/given.scale), prompt(out), rtol=1e-4, atol=1e-4)
    assert given.scale==(1. if form.startswith('tower') else prompt.scale)


def test_ways_to_say_it_are_averaged_as_in_clips_zero_shot_classifier():
    model, templates = clip().eval(), ['a photo of a {}', 'a drawing of the {}', 'one {} and nothing else that matters to anybody']
    weights = build_zero_shot_classifier(model, tokens, ['cat', 'dog'], [lambda c, t=t: t.format(c) for t in templates], use_tqdm=False)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad(): out = model(x)
    for i, name in enumerate(['cat', 'dog']):
        prompt = Prompt([t.format(name) for t in templates]).prepare(model)
        assert torch.allclose(prompt(out)[:, 0], model.logit_scale.detach().exp()*out[0] @ weights[:, i], rtol=1e-4, atol=1e-4)
        rows = torch.stack([text_embedding(model, t.format(name)) for t in templates])
        assert torch.allclose(Prompt(prompt.texts, embedding=rows).prepare(model)(out), prompt(out), rtol=1e-4, atol=1e-4)


def test_a_scale_for_each_of_several_things_is_no_scale():
    model = clip()
    model.logit_scale = nn.Parameter(torch.ones(3))
    assert Prompt('a').prepare(model).scale==1.


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = clip(cast_dtype=dtype).eval()
    if dtype is torch.double: model.double()
    else: convert_weights_to_lp(model, dtype)
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    with torch.no_grad(): out = model.visual(x)
    found = Prompt('a cat', encoder=model).prepare(model.visual)(out)
    assert torch.allclose(found[:, 0], score_by_hand(model, out, 'a cat'), rtol=3e-2 if dtype is torch.bfloat16 else 1e-6, atol=.3 if dtype is torch.bfloat16 else 1e-6)


# -- maps

@pytest.mark.parametrize('form', ['whole', 'tower'])
@pytest.mark.parametrize('kind', TOWERS)
def test_gradcam_of_a_prompt_by_hand(kind, form):
    model = clip(kind)
    asked = model if form=='whole' else model.visual
    learn = learner_of(asked, SIZES[kind])
    def ask(text): return Prompt(text, encoder=None if form=='whole' else model)
    cams = learn.get_cams([0, 1], cls=[ask('a cat'), ask('a dog'), Versus(ask('a cat'), ask('a dog'))])
    assert cams.labels==['a cat', 'a dog', 'a cat rather than a dog']
    x, kept = inputs(learn)[:2], []
    hook = model.visual.get_submodule(LAYERS[kind]).register_forward_hook(lambda module, args, out: kept.append(out))
    model.eval()
    embedding = model.visual(x)
    hook.remove()
    for k, text in enumerate(['a cat', 'a dog']):
        for i in range(2):
            grad, = torch.autograd.grad(score_by_hand(model, embedding, text)[i], kept[0], retain_graph=True)
            act, grad = kept[0][i].detach(), grad[i]
            if kind=='vit': act, grad = (t[1:].T.unflatten(1, (4, 4)) for t in (act, grad)) # without the class token
            expected = (grad.mean((1, 2))[:, None, None]*act).sum(0)
            assert torch.allclose(cams.maps[i, k], expected, rtol=1e-3, atol=1e-4*expected.abs().max()) and expected.abs().max() > 0
    assert torch.allclose(cams.maps[:, 2], cams.maps[:, 0] - cams.maps[:, 1], rtol=1e-3, atol=1e-5*cams.maps.abs().max())


@pytest.mark.parametrize('form', ['whole', 'tower'])
@pytest.mark.parametrize('kind', TOWERS)
def test_the_layer_is_found_and_the_text_tower_is_not_it(kind, form):
    model = clip(kind).eval()
    asked = model if form=='whole' else model.visual
    prompt = Prompt('a cat', encoder=model).prepare(asked)
    with Probe(asked, asks=prompt) as probe:
        cap = probe(torch.randn(2, 3, SIZES[kind], SIZES[kind]))
        assert cap.names==[('visual.' if form=='whole' else '') + LAYERS[kind]]
        assert cap.acts[0].shape==((2, 32, 4, 4) if kind=='vit' else (2, 256, 2, 2))


@pytest.mark.parametrize('kind', TOWERS)
def test_gradients_are_finite_differences(kind):
    model = clip(kind).double().eval()
    prompt = Prompt('a cat').prepare(model)
    with Probe(model, asks=prompt) as probe:
        cap = probe(torch.randn(1, 3, SIZES[kind], SIZES[kind], dtype=torch.double))
        scores = cap.score(prompt)
        act = cap.acts[0].detach()
        grad = cap.grads(scores)[0][:, 0].reshape(act.shape)
        step = 1e-5*torch.randn(act.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        rise, = (prompt(cap.run_from(act + step)) - prompt(cap.run_from(act - step))).flatten()/2
    assert torch.allclose(rise, (grad*step).sum(), rtol=1e-5) and rise.abs() > 1e-9


def test_methods_that_ask_again_ask_the_same_words():
    learn = learner_of(clip())
    both = [Prompt('a cat'), Prompt('a dog')]
    methods = ['gradcam', 'hirescam', 'layercam', 'gradcam_pp', 'shapleycam', 'scorecam', 'ablationcam', 'reciprocam', 'refinecam', 'fullgrad', 'grad_rollout', 'gradcam+tta', 'gradcam+stages']
    cams = learn.get_cams([0, 1], cls=both, method=methods)
    assert cams.maps.shape[:2]==(2, 2*len(methods)) and torch.isfinite(cams.maps).all()
    assert (cams.maps.flatten(2).abs().amax(2) > 0).all()
    gap, each = (learn.get_cams([0, 1], cls=cls, method='hirescam').maps for cls in (Versus(*both), both))
    assert torch.allclose(gap, each[:, 0] - each[:, 1], rtol=1e-3, atol=1e-5*gap.abs().max())


# -- a learner

def test_a_picture_of_a_file_is_shown_with_the_words_above_it(tmp_path):
    import matplotlib.pyplot as plt
    learn = learner_of(clip().visual)
    PILImage.create(np.random.default_rng(9).integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(tmp_path/'photo.png')
    model = clip()
    for text, title in (('a cat', '▸ a cat'), ('un chat étonné: où ça?', '▸ un chat étonné: où ça?'), (['a cat', 'the cat'], '▸ a cat;the cat')):
        learn.show_cam(tmp_path/'photo.png', cls=Prompt(text, encoder=model))
        assert title in [ax.get_title(loc='left').strip().replace('\n', '') for ax in plt.gcf().axes]
        plt.close('all')
    cams = learn.get_cams(tmp_path/'photo.png', cls=[Prompt('水印 🐈', encoder=model), Prompt('an animal', encoder=model, label='animal')])
    assert cams.labels==['水印 🐈', 'animal'] and [cams.question(0, k) for k in (0, 1)]==['水印 🐈', 'animal'] and cams.maps.shape==(1, 2, 4, 4)
    cams = learn.get_cams([0], cls=Prompt([f'a cat on picture {i}' for i in range(9)], encoder=model))
    assert cams.labels==['a cat on picture 0;a cat on picture 1;a cat on picture 2;+6']


def test_a_prompt_about_one_of_several_outputs():
    class Named(nn.Module):
        def __init__(self): super().__init__(); self.clip = clip()
        def forward(self, x): return dict(logits=self.clip.visual(x)[:, :2], picture=self.clip.visual(x))
    model = Named()
    learn = learner_of(model)
    cams = learn.get_cams([0, 1], cls=Output('picture', Prompt('a cat')))
    assert cams.labels==['picture: a cat'] and torch.allclose(cams.maps, learner_of(model.clip).get_cams([0, 1], cls=Prompt('a cat')).maps, atol=1e-5)
    with pytest.raises(ValueError, match=r"is a dict \('logits', 'picture'\): say which part is meant with cls=Output"): learn.get_cams([0], cls=Prompt('a cat'))


def test_what_is_about_classes_is_refused():
    learn = learner_of(clip().visual, loss=CrossEntropyLossFlat())
    prompt = Prompt('a cat', encoder=clip())
    with pytest.raises(ValueError, match=r'the vocab names 2 classes, but the model returns 24 numbers .* Prompt\(text\)'): learn.get_cams([0])
    with pytest.raises(ValueError, match='the vocab names 2 classes, but the model returns 24 numbers'): learn.get_cams([0], cls=WhyNot(prompt))
    with pytest.raises(ValueError, match='a Region is about a class'): learn.get_cams([0], cls=Region(prompt, 'everywhere'))
    with pytest.raises(ValueError, match=r'an embedding, .* Prompt\(text\)'): learner_of(clip().visual, loss=nn.TripletMarginLoss()).get_cams([0])


# -- encoded once, and left alone

class Counting(CLIP):
    "Notes how its texts are encoded"
    def encode_text(self, text, **kwargs):
        self.notes = [*getattr(self, 'notes', []), (len(text), torch.is_grad_enabled(), self.training or self.transformer.training)]
        torch.rand(3) # draws
        return super().encode_text(text, **kwargs)


def counting(**kwargs):
    model = clip(**kwargs)
    model.__class__ = Counting
    return model


def test_a_text_is_encoded_once_and_again_when_the_weights_are_others():
    model = counting()
    learn, cat, dogs = learner_of(model), Prompt('a cat'), Prompt(['a dog', 'the dog'])
    first = learn.get_cams([0, 1, 2], cls=[cat, dogs, Versus(cat, dogs)]) # two batches
    assert model.notes==[(1, False, False), (2, False, False)]
    again = learn.get_cams([0, 1, 2], cls=[cat, dogs], method=['gradcam', 'hirescam'])
    learn.show_cam([0], cls=cat)
    assert len(model.notes)==2 and torch.equal(again.maps[:, :2], first.maps[:, :2])
    with torch.no_grad(): model.ln_final.bias += .5*torch.randn(16)
    changed = learn.get_cams([0, 1, 2], cls=cat)
    assert len(model.notes)==3 and torch.equal(changed.maps, learn.get_cams([0, 1, 2], cls=Prompt('a cat')).maps) and not torch.allclose(changed.maps, first.maps[:, 0])
    assert cat.reference is None and not hasattr(model, 'known') # nothing that would be wrong for another model


def test_the_weights_are_looked_at_once_for_all_prompts(monkeypatch):
    looked, look, model = [], room._fingerprint, counting()
    monkeypatch.setattr(room, '_fingerprint', lambda encoder: [looked.append(encoder), look(encoder)][1])
    learner_of(model).get_cams([0, 1, 2], cls=[Prompt('a'), Prompt('b'), Versus(Prompt('c'), [Prompt('d'), Prompt('e')])])
    assert looked==[model] and len(model.notes)==5


def test_a_prompt_of_two_learners_knows_both():
    models, cat = [counting(seed=i) for i in (0, 1)], Prompt('a cat')
    maps = [learner_of(model).get_cams([0], cls=cat).maps for model in models]
    assert not torch.allclose(*maps) and torch.equal(learner_of(models[0]).get_cams([0], cls=cat).maps, maps[0])
    assert [len(model.notes) for model in models]==[1, 1]


@pytest.mark.parametrize('change', ['one word', 'rows', 'columns', 'sign', 'scale'])
def test_changes_that_raise_no_version_are_noticed(change):
    "As fastai's optimisers make them"
    model, prompt = counting(), Prompt('a cat')
    prompt.prepare(model)
    version = sum(weight._version for weight in model.parameters())
    weights, word = model.token_embedding.weight.data, int(tokens(['a cat'])[0, 2])
    if change=='one word': weights[word] += torch.randn(16)*.1
    elif change=='rows': weights[[word, 0]] = weights[[0, word]]
    elif change=='columns': weights[word] = weights[word].flip(0)
    elif change=='sign': weights[word] *= -1
    else: model.ln_final.weight.data[3] *= 1.001
    assert sum(weight._version for weight in model.parameters())==version
    before = prompt.reference
    assert not torch.equal(prompt.prepare(model).reference, before) and len(model.notes)==2


def test_maps_during_training_are_of_the_words_as_they_are_then():
    model = counting()
    learn = learner_of(model, loss=lambda out, y: -(out[0] @ F.normalize(model.encode_text(tokens(['a b'])), dim=1)[0]).mean())
    prompt, kept = Prompt('a cat'), []
    class Keep(CAMCallback):
        def after_validate(self):
            super().after_validate()
            kept.append((self.cams.maps, Prompt('a cat').prepare(model).reference, text_embedding(model, 'a cat')))
    callback = Keep(prompt)
    with learn.no_logging(): learn.fit(2, 1e-2, cbs=callback)
    (first, *_), (second, reference, by_hand) = kept
    assert torch.equal(second, learn.get_cams([0, 1, 2], cls=Prompt('a cat')).maps) and not torch.allclose(first, second)
    assert torch.allclose(reference, F.normalize(by_hand, dim=0), atol=1e-6) and len(prompt.known)==2


def test_the_learner_is_left_as_it_was():
    model = counting()
    model.train()
    model.visual.eval(); model.transformer.resblocks[0].eval(); model.token_embedding.weight.requires_grad_(False)
    for weight in model.parameters():
        if weight.requires_grad: weight.grad = torch.ones_like(weight)
    learn = learner_of(model)
    def state():
        return ([module.training for module in model.modules()], [weight._version for weight in model.parameters()],
                [weight.grad is None or bool((weight.grad==1).all()) for weight in model.parameters()], [weight.requires_grad for weight in model.parameters()],
                torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), [len(module._forward_hooks) for module in model.modules()],
                sorted(set(vars(model)) - {'notes'}), torch.is_grad_enabled())
    before, weights = state(), deepcopy(model.state_dict())
    learn.get_cams([0, 1], cls=[Prompt('a cat'), Prompt('a dog')])
    assert len(model.notes)==2 and state()==before
    with pytest.raises(ValueError, match='pass its tokenizer'):
        model.vocab_size = 3
        learn.get_cams([0, 1], cls=Prompt('a hen'))
    model.vocab_size = 49408
    with pytest.raises(ZeroDivisionError): learn.get_cams([0], cls=Prompt('a cow', tokenizer=lambda texts: 1/0))
    with torch.inference_mode(): learn.get_cams([0], cls=Prompt('a hen'))
    assert state()==before and all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def test_the_model_that_knows_the_words_is_left_as_it_was_too():
    model = counting()
    model.train(); model.transformer.eval()
    modes = [module.training for module in model.modules()]
    learn, random = learner_of(model.visual), torch.get_rng_state()
    learn.get_cams([0], cls=Prompt('a cat', encoder=model))
    assert model.notes==[(1, False, False)] and [module.training for module in model.modules()]==modes and torch.equal(torch.get_rng_state(), random)


def test_a_prompt_can_be_copied_and_stored():
    model, prompt = counting(), Prompt('a cat')
    learn = learner_of(model)
    maps = learn.get_cams([0], cls=prompt).maps
    for other in (deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert repr(other)=='Prompt(a cat)' and torch.equal(learn.get_cams([0], cls=other).maps, maps)


# -- what is wrong is said before any work

class Watched(nn.Module):
    def __init__(self, model): super().__init__(); self.model, self.n = model, 0
    def forward(self, x):
        self.n += 1
        return self.model(x)


@pytest.mark.parametrize('make, error, message', [
    (lambda: Prompt(''), ValueError, "a Prompt needs words, and this text is empty: say what to look for, as in Prompt('a watermark')"),
    (lambda: Prompt(['a cat', ' \n']), ValueError, 'this text is empty'),
    (lambda: Prompt([]), ValueError, 'this text is empty'),
    (lambda: Prompt(7), TypeError, 'a Prompt is a text, or a list of texts that say the same, not 7'),
    (lambda: Prompt([Prompt('a')]), TypeError, 'not [Prompt(a)]'),
    (lambda: Prompt('a cat', encoder='ViT-B-32'), TypeError, 'the encoder of a Prompt is a model that has encode_text, not a str'),
    (lambda: Prompt('a cat', embedding=torch.ones(2, 24)), ValueError, 'or one for each of its texts, [1, length], and this one has shape [2, 24]'),
    (lambda: Prompt(['a', 'b'], embedding=torch.ones(3, 24)), ValueError, '[2, length], and this one has shape [3, 24]'),
    (lambda: Prompt('a cat', embedding=torch.tensor(1.)), ValueError, 'has shape []'),
    (lambda: Prompt('a cat'), ValueError, "has no encode_text, so it does not know what words mean: pass the one that does, Prompt('a cat', encoder=clip), "
                                          "or what it made of them, Prompt('a cat', embedding=tensor)"),
    (lambda: Prompt('a cat', encoder=nn.Linear(2, 2)), ValueError, 'has no encode_text'),
    (lambda: Prompt('a cat', encoder=with_tokens(32000)), ValueError, "it is not known into which tokens CLIP divides a text: pass its tokenizer, as in Prompt('a cat', "
                                                                     'tokenizer=open_clip.get_tokenizer(name of the model))'),
    (lambda: Prompt(['a', 'b'], encoder=clip(), tokenizer=lambda texts: tokens(texts[:1])), ValueError, 'one embedding for each text, [2, length], but it returned shape [1, 24]'),
])
def test_what_is_wrong_is_said_before_any_work(make, error, message):
    model = Watched(clip().visual)
    learn = learner_of(model)
    with pytest.raises(error) as caught: learn.get_cams([0], cls=[lambda out: out[:, 0], make()])
    assert message in str(caught.value) and '\n' not in str(caught.value) and model.n==0


def with_tokens(n):
    model = clip()
    model.vocab_size = n
    return model


def test_an_embedding_of_another_width_is_refused():
    "How wide the model's are is known when it has run"
    with pytest.raises(ValueError, match='the embedding to compare with has length 5, and the model returns 24 numbers an item: take it from the same model'):
        learner_of(clip().visual).get_cams([0, 1, 2], cls=Prompt('a cat', embedding=torch.ones(5)))


def test_without_open_clip_its_tokenizer_is_asked_for(monkeypatch):
    room._clip_tokenizer.cache_clear()
    model = clip()
    learn = learner_of(model)
    monkeypatch.setitem(sys.modules, 'open_clip.tokenizer', None)
    with pytest.raises(ImportError, match=r"pip install 'fastai_cam\[clip\]'"): learn.get_cams([0], cls=Prompt('a cat'))
    learn.get_cams([0], cls=Prompt('a cat', tokenizer=tokens)) # which another package may bring


def test_open_clip_is_not_imported_with_the_library():
    assert 'open_clip' not in Path(room.__file__).read_text().split('def _clip_tokenizer')[0].split('class Prompt')[0]


def test_every_model_with_49408_tokens_has_clips_tokenizer():
    "The one fact that is read from a model: of all configurations of open_clip"
    n = 0
    for file in (Path(open_clip.__file__).parent/'model_configs').glob('*.json'):
        text = json.loads(file.read_text()).get('text_cfg', {})
        if text.get('vocab_size')==49408:
            n += 1
            assert not set(text) & {'hf_tokenizer_name', 'tokenizer_kwargs', 'hf_model_name'}, file.name
    assert n > 50
    found = room._clip_tokenizer(12)(['a cat', 'été 水', 'x '*40])
    assert torch.equal(found, open_clip.get_tokenizer('ViT-L-14', context_length=12)(['a cat', 'été 水', 'x '*40])) and found.shape==(3, 12)
