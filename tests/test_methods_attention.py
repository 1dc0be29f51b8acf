"Methods made for transformers: rollouts against explicit matrices, LeGrad and attention × value against loops and differences, and where the blocks are."
import pytest
import torch
import torchvision
from torch import nn
import torch.nn.functional as F

from fastai_cam.methods.registry import METHODS
from fastai_cam.probe.watch import Probe

from helpers.transformers import asked_by_blocks, ByHand, vit


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


# --- each block asked by itself

BY_BLOCKS = ['legrad', 'attention_value']

@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('case', ROLLED, ids=str)
@pytest.mark.parametrize('name', BY_BLOCKS)
def test_blocks_against_loops_and_differences(name, case, fused):
    "Each block's own tokens, read by the head of the network, whatever reads them: a token, their mean, attention of its own"
    x = images(1, (12, 16))
    expected = asked_by_blocks(name, vit(**case, n_blocks=2), x)
    found = maps_of(name, vit(**case, n_blocks=2, fused=fused), x, last=None)
    assert found.shape==expected.shape==(1, 4, 3, 4) and expected.flatten(2).std(-1).min() > 1e-7
    assert (found - expected).abs().max() <= 1e-6*expected.abs().max()


@pytest.mark.parametrize('name', BY_BLOCKS)
def test_the_last_blocks(name):
    x = images(1, (12, 16))
    for last in (1, 2): assert torch.allclose(maps_of(name, vit(), x, last=last), asked_by_blocks(name, vit(), x, last), rtol=1e-5, atol=1e-8)
    assert torch.equal(maps_of(name, vit(), x, last=2), maps_of(name, vit(), x))
    assert torch.allclose(maps_of(name, vit(), x, last=5), maps_of(name, vit(), x, last=None), rtol=1e-12)


def test_attention_value_of_the_last_block_is_what_it_gives():
    "Over all tokens it adds up to the gradient times what the attention returns: nothing is lost, nothing is counted twice"
    model, x, kept = vit(n_extra=0, pool='mean', n_blocks=1), images(), []
    with torch.no_grad(): model.blocks[0].proj.bias.zero_()
    found = maps_of('attention_value', model, x)
    hook = model.blocks[0].proj.register_forward_hook(lambda module, inputs, out: kept.append(out))
    out = model(x)
    hook.remove()
    for c in range(4):
        grad, = torch.autograd.grad(out[:, c].sum(), kept[0], retain_graph=True)
        assert torch.allclose(found[:, c].sum((1, 2)), (grad*kept[0]).sum((1, 2)).detach(), atol=1e-12)


def test_the_last_block_says_what_the_network_says():
    model, x = vit(), images()
    net = ByHand(model, x[0])
    assert torch.allclose(net.read(net.given[-1]), model(x)[0], atol=1e-10)
    with Probe(model) as p, torch.no_grad():
        cap = p(x)
        whole = cap.recapture_blocks()
        asked = whole.score(cap.score(lambda out: out))
        early = [whole.score_early(asked, i).values.detach() for i in range(3)]
    assert torch.allclose(early[2], model(x).detach(), atol=1e-12)
    for i in (0, 1): assert torch.allclose(early[i][0], net.read(net.given[i + 1]), atol=1e-10) and (early[i] - early[2]).abs().max() > .01


@pytest.mark.parametrize('name', BY_BLOCKS)
def test_inside_a_block_without_autograd(name):
    "As in fastai's loop"
    x = images()
    with Probe(vit()) as p, torch.no_grad():
        cap = p(x)
        found = METHODS[name](cap, cap.score(lambda out: out))
    assert torch.equal(found, maps_of(name, vit(), x)) and found.abs().amax((2, 3)).min() > 0


def test_no_more_is_recorded_than_the_last_blocks():
    model, x, recorded = vit(n_blocks=4), images(), []
    hooks = [block.register_forward_hook(lambda module, inputs, out, i=i: recorded.append((i, len(out), out.requires_grad))) for i, block in enumerate(model.blocks)]
    with Probe(model) as p: whole = p(x).recapture_blocks(1)
    for hook in hooks: hook.remove()
    assert [(i, is_recorded) for i, n_items, is_recorded in recorded if n_items==2][-4:]==[(0, False), (1, False), (2, False), (3, True)] # of one item is what is looked for
    assert whole.names==['blocks.2', 'blocks.3'] and [len(whole.attention_of(i)) for i in range(2)]==[1, 1] and len(whole.attention)==2


# --- where the blocks are

class Parallel(nn.Module):
    "Two attentions beside each other"
    def __init__(self, block):
        super().__init__()
        self.attns = nn.ModuleList([block, vit(seed=1).blocks[0]])
    def forward(self, x): return x + sum(attn(x) - x for attn in self.attns)


def wrapped(model, wrap):
    model.blocks = nn.Sequential(*[wrap(block) for block in model.blocks])
    return model


def blocks_of(model, x=None):
    with Probe(model, 'patches') as p: return p(images() if x is None else x).blocks()


def test_blocks_by_what_they_hand_on():
    assert [(block.name, block.attentions) for block in blocks_of(vit())]==[('blocks.0', (0,)), ('blocks.1', (1,)), ('blocks.2', (2,))]
    assert [block.name for block in blocks_of(vit(n_blocks=1))] in (['blocks.0'], ['blocks']) # which are the same
    assert [(block.name, block.attentions) for block in blocks_of(wrapped(vit(), Parallel))]==[('blocks.0', (0, 1)), ('blocks.1', (2, 3)), ('blocks.2', (4, 5))]


def test_the_first_block_may_make_the_grid_coarser():
    "As where a stage begins: it is given other tokens than it returns"
    model = vit(n_extra=0, pool='mean')
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = vit(seed=1).blocks[0]
        def forward(self, x): return self.block(x.unflatten(1, (4, 6))[:, ::2, ::2].flatten(1, 2))
    model.blocks = nn.Sequential(model.blocks[0], Halved().double(), *model.blocks[1:])
    assert [(block.name, block.attentions) for block in blocks_of(model, images(2, (16, 24)))]==[('blocks.1', (0,)), ('blocks.2', (1,)), ('blocks.3', (2,))]


class Coarse(nn.Module):
    "Looks at a copy of its places that is as coarse as the next stage; the attention is seen, or made by hand and not seen"
    def __init__(self, is_seen): super().__init__(); self.is_seen = is_seen
    def forward(self, x):
        grid = x.mT.unflatten(2, (8, 12))
        few = F.avg_pool2d(grid, 2).flatten(2).mT
        logits = few @ few.mT
        paid = logits.softmax(-1) if self.is_seen else logits.exp()/logits.exp().sum(-1, keepdim=True)
        return x + F.interpolate((paid @ few).mT.unflatten(2, (4, 6)), scale_factor=2).flatten(2).mT


def test_a_stage_before_may_look_at_a_coarse_copy_of_its_places():
    def model(is_seen):
        made = vit(n_extra=0, pool='mean')
        class Halved(nn.Module):
            def __init__(self): super().__init__(); self.block = vit(seed=1).blocks[0]
            def forward(self, x): return self.block(x.unflatten(1, (8, 12))[:, ::2, ::2].flatten(1, 2))
        made.blocks = nn.Sequential(Coarse(is_seen), Halved().double(), *made.blocks[1:])
        for parameter in made.blocks.parameters(): parameter.data *= .4 # places stay places
        return made
    x = images(2, (32, 48))
    found = blocks_of(model(True), x)
    assert [(block.name, block.attentions, block.n_in_pass) for block in found]==[('blocks.1', (1,), 4), ('blocks.2', (2,), 4), ('blocks.3', (3,), 4)]
    for name in BY_BLOCKS: # the same as if that attention were none
        one, other = (maps_of(name, model(is_seen), x, layer='blocks.3') for is_seen in (True, False))
        assert torch.allclose(one, other, rtol=1e-9) and one.shape[-2:]==(4, 6) and one.abs().amax((2, 3)).min() > 0


class Core(nn.Module):
    "The attention itself, as a layer that returns heads beside tokens"
    def forward(self, q, k, v): return (q @ k.mT/q.shape[-1]**.5).softmax(-1) @ v


class WithCore(nn.Module):
    def __init__(self, block): super().__init__(); self.block, self.core = block, Core()
    def forward(self, x):
        q, k, v = self.block.qkv(self.block.norm1(x)).unflatten(-1, (3, self.block.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.block.proj(self.core(q, k, v).transpose(1, 2).flatten(2))
        return x + self.block.mlp(self.block.norm2(x))


def test_the_core_of_an_attention_may_be_a_layer():
    model = wrapped(vit(), WithCore)
    assert [(block.name, block.attentions) for block in blocks_of(model)]==[('blocks.0', (0,)), ('blocks.1', (1,)), ('blocks.2', (2,))]
    for name in BY_BLOCKS: assert torch.allclose(maps_of(name, model, images()), maps_of(name, vit(), images()), rtol=1e-9)


def test_an_attention_that_is_left_out_is_no_copy():
    "Its layer returns one token, or what all look like together, beside the blocks"
    class Pooled(nn.Module):
        def __init__(self, n): super().__init__(); self.n = n
        def forward(self, x): return ((x @ x.mT).softmax(-1) @ x)[:, :self.n]
    class Reads(nn.Module):
        def __init__(self, n): super().__init__(); self.inner, self.pooled = vit(), Pooled(n)
        def forward(self, x):
            x = self.inner.patches(x).flatten(2).mT
            x = self.inner.norm(self.inner.blocks(torch.cat([self.inner.extra.expand(len(x), -1, -1), x], 1)))
            return self.inner.head(self.pooled(x).mean(1))
    for n in (1, 4):
        with Probe(Reads(n).double(), 'inner.patches') as p, pytest.raises(ValueError, match='could not be told: 4 attentions relate all its tokens'): p(images()).blocks()


def test_blocks_of_torchvision():
    "Attention in one piece (`nn.MultiheadAttention`), a dropout between the blocks, a norm behind them"
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=4).double().eval()
    for parameter in model.parameters(): parameter.data += .2*torch.randn_like(parameter) # its head starts at zero
    x = images(2, (32, 32))
    with Probe(model) as p: assert [block.name for block in p(x).blocks()]==['encoder.layers.encoder_layer_0', 'encoder.layers.encoder_layer_1']
    maps = maps_of('attention_value', model, x)
    assert maps.shape==(2, 4, 4, 4) and maps.flatten(2).std(-1).min() > 0
    for parameter in model.parameters(): parameter.requires_grad_(False)
    assert torch.allclose(maps_of('attention_value', model, x), maps, rtol=1e-9)


class Outside(nn.Module):
    "Residuals are added by the network: no layer returns what the next is given"
    def __init__(self):
        super().__init__()
        whole = vit()
        self.patches, self.attns, self.head = whole.patches, nn.ModuleList(whole.blocks), whole.head
    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for attn in self.attns: x = attn(x)*.5 + x
        return self.head(x.mean(1))


class Again(nn.Module):
    "One block, run three times"
    def __init__(self):
        super().__init__()
        whole = vit()
        self.patches, self.block, self.head = whole.patches, whole.blocks[0], whole.head
    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for _ in range(3): x = self.block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize('name', BY_BLOCKS)
@pytest.mark.parametrize('build,words', [(Outside, 'Outside could not be told: 3 attentions relate all its tokens, .* holds 1 '), (Again, 'Again could not be told'),
                                         (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))), 'no layer of this Sequential returns all its tokens')])
def test_what_has_no_blocks_is_refused(name, build, words):
    model = build().double()
    with Probe(model, 'patches' if hasattr(model, 'patches') else None) as p:
        cap = p(images())
        with pytest.raises(ValueError, match=words): METHODS[name](cap, cap.score(lambda out: out))


@pytest.mark.parametrize('name', BY_BLOCKS)
def test_what_is_not_finite_makes_no_ordinary_map_of_blocks(name):
    model, x = vit(n_extra=1), images()
    model.patches.register_forward_hook(lambda module, inputs, out: torch.where(inputs[0].amax((1, 2, 3), keepdim=True) > 20, torch.nan, out))
    expected = maps_of(name, model, x)
    x[1, 0, 0, 0] = 30
    found = maps_of(name, model, x)
    assert torch.equal(found[0], expected[0]) and not found[1].isfinite().any()


@pytest.mark.parametrize('name', BY_BLOCKS)
def test_a_score_computed_by_hand_is_not_asked_of_blocks(name):
    with Probe(vit()) as p:
        cap = p(images())
        with pytest.raises(ValueError, match='asks the model again'): METHODS[name](cap, cap.out[:, 0])
