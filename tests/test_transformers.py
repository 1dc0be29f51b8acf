"Token models: methods on tokens against naive loops, rollouts against explicit matrices, the tail with its extra tokens."
import pytest
import torch
from torch import nn
import torch.nn.functional as F

from fastai_cam.methods.registry import METHODS
from fastai_cam.probe.watch import Probe
from fastai_cam.probe.scan import LayerScan


class Block(nn.Module):
    "Pre-norm attention and MLP; what was attended is kept for the oracle"
    def __init__(self, width, heads, fused):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2, self.qkv, self.proj = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 3*width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2*width), nn.GELU(), nn.Linear(2*width, width))
    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused: mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            self.attention = (q @ k.mT/q.shape[-1]**.5).softmax(-1)
            mixed = self.attention @ v
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    "A vision transformer with `n_extra` tokens before the places; it reads the first of them, the mean of the places, or what a query of its own attends to"
    def __init__(self, n_extra=1, pool='token', fused=False, n_blocks=3, width=12):
        super().__init__()
        self.n_extra, self.pool = n_extra, pool
        self.patches, self.extra = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, n_extra, width))
        self.blocks = nn.Sequential(*[Block(width, 2, fused) for _ in range(n_blocks)])
        self.norm, self.head, self.query = nn.LayerNorm(width), nn.Linear(width, 4), nn.Parameter(torch.randn(1, 1, width))
    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = self.norm(self.blocks(torch.cat([self.extra.expand(len(x), -1, -1), x], 1)))
        if self.pool=='attention': return self.head(F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), x, x)[:, 0])
        return self.head(x[:, 0] if self.pool=='token' else x[:, self.n_extra:].mean(1))


def vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = ViT(**kwargs).double().eval()
    for parameter in model.parameters(): parameter.data *= 2 # attention that is not all the same
    return model


def images(n=2, size=(12, 20)): return torch.randn(n, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(3))


CASES = [dict(n_extra=1), dict(n_extra=3), dict(n_extra=0, pool='mean'), dict(n_extra=2, pool='mean')]
ROLLED = [*CASES, dict(n_extra=0, pool='attention'), dict(n_extra=1, pool='attention')]


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_layer_is_the_last_whose_places_are_read(case, fused):
    model = vit(**case, fused=fused)
    last = LayerScan(model, [images()], {}).last
    assert last.name==('blocks.2.norm1' if case.get('pool') is None else 'norm')
    assert (last.layout.kind, last.layout.grid, last.layout.n_extra)==('tokens', (3, 5), case['n_extra'])


@pytest.mark.parametrize('case', CASES, ids=str)
def test_gradcam_on_tokens_against_a_loop(case):
    model, x = vit(**case), images()
    with Probe(model) as p:
        cap = p(x)
        found, layer = METHODS['gradcam'](cap, cap.score(lambda out: out)), cap.names[0]
        assert torch.equal(cap.out.detach(), model(x).detach())
    for i in range(len(x)):
        kept = []
        hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, out: kept.append(out))
        out = model(x[i:i+1])
        hook.remove()
        for c in range(4):
            grad, = torch.autograd.grad(out[0, c], kept[0], retain_graph=True)
            expected = torch.zeros(3, 5, dtype=torch.double)
            places = range(case['n_extra'], case['n_extra'] + 15)
            for channel in range(12):
                weight = sum(grad[0, token, channel] for token in places)/15
                for number, token in enumerate(places): expected[number//5, number%5] += weight*kept[0][0, token, channel].detach()
            assert torch.allclose(found[i, c], expected, atol=1e-12) and expected.abs().max() > 1e-6


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


@pytest.mark.parametrize('layer', ['blocks.1', 'blocks.2.norm1', 'norm'])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_tail_keeps_the_extra_tokens(case, layer):
    model, x = vit(**case), images(3)
    with Probe(model, layer) as p:
        cap = p(x)
        assert torch.allclose(cap.run_from(cap.acts[0]), cap.out.detach(), atol=1e-12)
        items = torch.tensor([2, 0, 2])
        changed = cap.acts[0][items]*torch.tensor([0., 2., -1.], dtype=torch.double)[:, None, None, None]
        found = cap.run_from(changed, items=items)
    expected = []
    for row in range(3): # the whole model, with one item's tokens replaced
        hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, out, row=row: torch.cat([out[:, :case['n_extra']], changed[row:row+1].flatten(2).mT], 1))
        expected.append(model(x[items[row]:items[row]+1]).detach())
        hook.remove()
    assert torch.allclose(found, torch.cat(expected), atol=1e-12)


def test_ablation_of_tokens_against_the_whole_model():
    "Weights of Ablation-CAM: by how much the score falls when a channel is silent at every place, the class token left alone"
    model, x = vit(n_extra=1), images(1)
    with Probe(model, 'blocks.1') as p:
        cap = p(x)
        found = METHODS['ablationcam'](cap, cap.score(lambda out: out[:, 1]))
        act, score = cap.acts[0][0], cap.out[0, 1].item()
    expected = torch.zeros(3, 5, dtype=torch.double)
    for channel in range(12):
        def silent(module, inputs, out):
            out = out.clone()
            out[:, 1:, channel] = 0
            return out
        hook = model.blocks[1].register_forward_hook(silent)
        expected += (score - model(x)[0, 1].item())*act[channel]
        hook.remove()
    assert torch.allclose(found[0]/found.abs().max(), expected/expected.abs().max(), atol=1e-10)


def test_shapleycam_behind_fused_attention():
    "Fused attention has no second derivative: the pass is taken again without it, and gives what the spelled out one gives"
    x, maps = images(), []
    for fused in (False, True):
        with Probe(vit(fused=fused), 'blocks.1') as p:
            cap = p(x)
            maps.append(METHODS['shapleycam'](cap, cap.score(lambda out: out[:, :2])))
    assert torch.allclose(*maps, atol=1e-10) and maps[0].abs().max() > 1e-6


def test_everything_as_found_after_a_rollout():
    model = vit().train()
    with Probe(model) as p:
        cap = p(images())
        METHODS['grad_rollout'](cap, cap.score(lambda out: out))
    assert all(module.training for module in model.modules()) and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
