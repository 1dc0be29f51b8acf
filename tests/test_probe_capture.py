"What is captured of a layer that returns several things."
import pytest
import torch
from torch import nn

from fastai_cam.probe.watch import Probe

from helpers.probe import image


class Returns(nn.Module):
    def __init__(self, how): super().__init__(); self.how, self.c = how, nn.Conv2d(3, 4, 3, 2, 1)
    def forward(self, x):
        f = self.c(x)
        return dict(tuple=(f, f.mean((2, 3))), dict=dict(pooled=f.mean((2, 3)), last=f), list=[f, f.mean((2, 3)), None])[self.how]


class Container(nn.Module):
    def __init__(self, how): super().__init__(); self.how, self.b, self.h = how, Returns(how), nn.Linear(4, 3)
    def forward(self, x):
        out = self.b(x)
        f, pooled = (out['last'], out['pooled']) if self.how=='dict' else out[:2]
        return self.h(f.relu().mean((2, 3)) + 2*pooled)


@pytest.mark.parametrize('how', ['tuple', 'dict', 'list'])
def test_the_activation_in_a_container(how):
    torch.manual_seed(0)
    model, x = Container(how).eval(), image()
    act, pooled = (out := model.b.c(x).detach()), out.mean((2, 3))
    with Probe(model, 'b') as p:
        cap = p(x)
        leaf = act.clone().requires_grad_()
        expected, = torch.autograd.grad(model.h(leaf.relu().mean((2, 3)) + 2*pooled)[:, 1].sum(), leaf)
        assert torch.equal(cap.acts[0], act) and torch.allclose(cap.grads(lambda out: out[:, 1])[0], expected, atol=1e-7)
        items = torch.tensor([1, 0, 1])
        by_hand = model.h((act[items]*3).relu().mean((2, 3)) + 2*pooled[items])
        assert torch.allclose(cap.run_from(act[items]*3, items=items), by_hand, atol=1e-6)
