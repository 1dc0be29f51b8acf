"A small vision transformer, and its methods a second time: loops over tokens and heads, and differences instead of derivatives."
import torch
from torch import nn
import torch.nn.functional as F


# --- the net

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


# --- its methods again

def softmax(row):
    "By its definition"
    powers = [torch.exp(number - row.max()) for number in row]
    return torch.stack(powers)/sum(powers)


class ByHand:
    "The network on one image, block by block and token by token"
    def __init__(self, model, image):
        self.model = model
        places = model.patches(image[None])[0].detach()
        tokens = [*model.extra[0].detach(), *(places[:, row, column] for row in range(places.shape[1]) for column in range(places.shape[2]))]
        self.given, self.paid, self.grid = [torch.stack(tokens)], [], places.shape[1:] # what goes into each block, and what it pays attention to
        for block in model.blocks:
            self.paid.append(self.looks(block, self.given[-1]))
            self.given.append(self.after(len(self.paid) - 1, self.paid[-1]))

    def parts(self, block, x):
        "Queries, keys and values `[heads, N, C]`"
        return block.qkv(block.norm1(x)).detach().unflatten(-1, (3, block.heads, -1)).permute(1, 2, 0, 3)

    def looks(self, block, x):
        "Attention `[heads, N, N]`"
        q, k, _ = self.parts(block, x)
        return torch.stack([torch.stack([softmax(torch.stack([query @ key/len(key)**.5 for key in keys])) for query in queries]) for queries, keys in zip(q, k)])

    def after(self, l, paid):
        "What block l returns if this is what it pays attention to"
        block, x = self.model.blocks[l], self.given[l]
        values = self.parts(block, x)[2]
        mixed = torch.cat([paid[head] @ values[head] for head in range(block.heads)], dim=1)
        tokens = x + block.proj(mixed).detach()
        return tokens + block.mlp(block.norm2(tokens)).detach()

    def read(self, tokens):
        "What the head says of some tokens `[N, C]`, wherever they come from: `[4]`"
        model = self.model
        x = model.norm(tokens).detach()
        if model.pool=='token': return model.head(x[0]).detach()
        if model.pool=='mean': return model.head(sum(x[model.n_extra:])/(len(x) - model.n_extra)).detach()
        weights = softmax(torch.stack([model.query[0, 0].detach() @ token/len(token)**.5 for token in x]))
        return model.head(sum(weight*token for weight, token in zip(weights, x))).detach()

    def slopes(self, l, step=1e-5):
        "By how much the head's answer to what block l returns changes with each number of the block's attention, `[4, heads, N, N]`, by differences"
        found = torch.zeros(4, *self.paid[l].shape, dtype=torch.double)
        for head in range(found.shape[1]):
            for i in range(found.shape[2]):
                for j in range(found.shape[3]):
                    answers = []
                    for sign in (1, -1):
                        paid = self.paid[l].clone()
                        paid[head, i, j] += sign*step
                        answers.append(self.read(self.after(l, paid)))
                    found[:, head, i, j] = (answers[0] - answers[1])/(2*step)
        return found

    def of_places(self, numbers):
        "Numbers of the tokens as a map"
        return numbers[self.model.n_extra:].view(self.grid)


def column(paid, slopes, j, how):
    "What is said of token j by all heads and all tokens that look at it"
    n_heads, n_tokens = slopes.shape[:2]
    looks = [(paid[head, i, j].item(), slopes[head, i, j].item()) for head in range(n_heads) for i in range(n_tokens)]
    if how=='legrad': return sum(max(slope, 0.) for _, slope in looks)/len(looks) # the mean of the positive slopes
    return sum(attention*slope for attention, slope in looks)


def asked_by_blocks(how, model, x, last=None):
    "`'legrad'` or `'attention_value'`: of each of the last so many blocks, what its attention does to the head's answer to its own tokens, added up: `[B, 4, h, w]`"
    maps = []
    for image in x:
        net, n = ByHand(model, image), len(model.blocks)
        total = torch.zeros(4, len(net.given[0]), dtype=torch.double)
        for l in range(n - (last or n), n):
            slopes = net.slopes(l)
            for c in range(4):
                for j in range(total.shape[1]): total[c, j] += column(net.paid[l], slopes[c], j, how)
        maps.append(torch.stack([net.of_places(of_class) for of_class in total]))
    return torch.stack(maps)
