"Methods made for transformers: rollouts against explicit matrices, LeGrad against loops and differences, blocks in any order of layers."
import pytest
import torch
from torch import nn

from fastai_cam.methods.registry import METHODS
from fastai_cam.probe.watch import Probe

from helpers.transformers import ByHand, legrad_by_hand, vit


def images(n=2, size=(12, 20)): return torch.randn(n, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(3))


ROLLED = [dict(n_extra=1), dict(n_extra=3), dict(n_extra=0, pool='mean'), dict(n_extra=2, pool='mean'), dict(n_extra=0, pool='attention'), dict(n_extra=1, pool='attention')]


def maps_of(name, model, x, score=lambda out: out, layer=None, **options):
    with Probe(model, layer) as p:
        cap = p(x)
        return METHODS[name](cap, cap.score(score), **options)


# --- rollouts

def attentions(model, x, ask):
    "Attention of each block for one item, and its gradient, by autograd through the whole model"
    out = model(x)
    kept = [block.attention for block in model.blocks]
    return [one.detach()[0] for one in kept], [grad[0] for grad in torch.autograd.grad(ask(out), kept)]


def read_from(reached, model, last_grad):
    "The row that is read: the first token's, or the mean of the places'"
    n = model.n_extra
    rows = last_grad.abs().sum((0, 2)) # heads, columns
    if model.pool=='token': assert (rows[1:]==0).all()
    row = reached[0] if model.pool=='token' else (rows[:, None]*reached).sum(0)/rows.sum()
    return row[n:].view(3, 5)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('case', ROLLED, ids=str)
def test_rollouts_against_explicit_matrices(case, fused):
    "What reaches the tokens that are read through at least one attention: without the identity, which nothing has brought there"
    model, x = vit(**case), images()
    watched = vit(**case, fused=fused)
    with Probe(watched) as p:
        cap = p(x)
        score = cap.score(lambda out: out)
        plain, graded = METHODS['rollout'](cap, score), METHODS['grad_rollout'](cap, score)
    assert plain.shape==graded.shape==(2, 4, 3, 5)
    for i in range(2):
        for c in range(4):
            attention, grads = attentions(model, x[i:i+1], lambda out: out[0, c])
            eye = torch.eye(attention[0].shape[-1], dtype=torch.double)
            positive = [torch.stack([(looked[head]*grad[head]).clamp(min=0) for head in range(2)]).mean(0) for looked, grad in zip(attention, grads)]
            most = max(sum(row).item() for one in positive for row in one)
            reached, relevance = eye, eye
            for looked, raising in zip(attention, positive):
                reached = (looked.mean(0)/2 + eye/2) @ reached
                relevance = relevance + raising/most @ relevance
            assert torch.allclose(plain[i, c], read_from(reached - eye/8, model, grads[-1]), atol=1e-12)
            assert torch.allclose(graded[i, c], read_from(relevance - eye, model, grads[-1]), atol=1e-12)
    assert graded.flatten(2).std(-1).min() > 1e-7


@pytest.mark.parametrize('case', ROLLED, ids=str)
def test_rollouts_do_not_depend_on_the_unit_of_the_score(case):
    x, maps = images(), []
    for unit in (1e-6, 1., 1e6):
        with Probe(vit(**case)) as p:
            cap = p(x)
            maps.append([METHODS[name](cap, cap.score(lambda out: unit*out)) for name in ('rollout', 'grad_rollout')])
    for plain, graded in maps[1:]: assert torch.allclose(plain, maps[0][0], rtol=1e-8) and torch.allclose(graded, maps[0][1], rtol=1e-8)


def test_rollouts_are_not_a_picture_of_which_tokens_are_read():
    "Where every token takes as much from each, no place is before another, whatever the weights of the rows that are read"
    model, x = vit(n_extra=0, pool='mean'), images(1)
    with torch.no_grad():
        for block in model.blocks: block.qkv.weight[:24] = 0; block.qkv.bias[:24] = 0 # no queries, no keys: each token takes the same from all
    with Probe(model) as p:
        cap = p(x)
        plain = METHODS['rollout'](cap, cap.score(lambda out: out))
    assert torch.allclose(plain, plain.mean((2, 3), keepdim=True).expand_as(plain), atol=1e-12) and plain.min() > 0


def test_rollouts_say_what_is_not_finite():
    model, x = vit(n_extra=1), images()
    model.patches.register_forward_hook(lambda module, inputs, out: torch.where(inputs[0].amax((1, 2, 3), keepdim=True) > 20, torch.nan, out))
    x[1, 0, 0, 0] = 30
    for name in ('rollout', 'grad_rollout'):
        with Probe(model, 'blocks.2') as p:
            cap = p(x)
            finite = METHODS[name](cap, cap.score(lambda out: out)).isfinite().flatten(1)
        assert finite[0].all() and not finite[1].any()


def test_rollouts_are_refused_where_nothing_attends_to_the_whole_image():
    convolutional = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))).double()
    for name in ('rollout', 'grad_rollout'):
        with Probe(convolutional) as p:
            cap = p(images())
            with pytest.raises(ValueError, match='needs only the layer, such as gradcam'): METHODS[name](cap, cap.score(lambda out: out))


def test_everything_as_found_after_a_rollout():
    model = vit().train()
    with Probe(model) as p:
        cap = p(images())
        METHODS['grad_rollout'](cap, cap.score(lambda out: out))
    assert all(module.training for module in model.modules()) and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# --- LeGrad

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('case', ROLLED, ids=str)
def test_legrad_against_loops_and_differences(case, fused):
    "Each block's own tokens, read by the head of the network, whatever reads them: a token, their mean, attention of its own"
    x = images(1, (12, 16))
    expected = legrad_by_hand(vit(**case, n_blocks=2), x)
    found = maps_of('legrad', vit(**case, n_blocks=2, fused=fused), x)
    assert found.shape==expected.shape==(1, 4, 3, 4) and expected.flatten(2).std(-1).min() > 1e-7
    assert (found - expected).abs().max() <= 1e-6*expected.abs().max()


def test_legrad_of_the_last_blocks():
    x = images(1, (12, 16))
    for last in (1, 2): assert torch.allclose(maps_of('legrad', vit(), x, last=last), legrad_by_hand(vit(), x, last), rtol=1e-5, atol=1e-8)
    assert torch.equal(maps_of('legrad', vit(), x, last=5), maps_of('legrad', vit(), x))


def test_the_last_block_says_what_the_network_says():
    model, x = vit(), images()
    net = ByHand(model, x[0])
    assert torch.allclose(net.read(net.given[-1]), model(x)[0], atol=1e-10)
    with Probe(model) as p:
        cap = p(x)
        whole = cap.recapture_blocks()
        asked = whole.score(cap.score(lambda out: out))
        early = [whole.score_early(asked, i).values.detach() for i in range(3)]
    assert torch.allclose(early[2], model(x).detach(), atol=1e-12)
    for i in (0, 1): assert torch.allclose(early[i][0], net.read(net.given[i + 1]), atol=1e-10) and (early[i] - early[2]).abs().max() > .01
