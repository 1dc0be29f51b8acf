"Maps with everything set, and words that are hard to draw."
import torch

from fastai_cam.maps.cams import CAMs

VOCAB = ['cat', 'dog', 'car']


def bumps(size, *peaks):
    "A map of Gaussian bumps: (row, column, height, width)"
    y, x = torch.meshgrid(torch.arange(float(size[0])), torch.arange(float(size[1])), indexing='ij')
    return torch.stack([height*torch.exp(-((y - row)**2 + (x - column)**2)/(2*width**2)) for row, column, height, width in peaks]).amax(0)


def everything(n=4, k=2):
    "`CAMs` with every attribute set, no two alike"
    torch.manual_seed(0)
    return CAMs(torch.randn(n, k, 5, 6), [torch.full((3, 20, 30), i/10) for i in range(n)], torch.arange(n*k).reshape(n, k)%3, ['one', 'two'], torch.rand(n, 3),
                torch.randint(2, (n, 3)), torch.rand(n), [f'{i}.png' for i in range(n)], VOCAB, 2, 'multi', torch.rand(n, k, 20, 30) > .5, True, .3, ['a', None, 'c', 'd'][:n])


def frames(n, c=3): return torch.stack([torch.full((c, 6, 5), (i + 1)/n) for i in range(n)])*torch.tensor([1., .5, .25, .75])[:c, None, None]


def same(a, b):
    for name in ('maps', 'classes', 'preds', 'targs', 'losses', 'regions'):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None)==(right is None), name
        if left is not None: assert left.dtype==right.dtype and left.shape==right.shape and torch.equal(left, right), name
    for name in ('labels', 'items', 'vocab', 'texts', 'n_space', 'signed', 'thresh'): assert getattr(a, name)==getattr(b, name), name
    assert (type(a.task), a.task.name)==(type(b.task), b.task.name)


def names(folder): return sorted(f.name for f in folder.iterdir())
