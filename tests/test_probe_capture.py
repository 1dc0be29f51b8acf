"What a pass leaves behind: layers that return several things, scores and their columns, the pass run again."
import pytest
import torch
from torch import nn

from fastai_cam.probe.capture import Scores
from fastai_cam.probe.watch import Probe

from helpers.probe import image
from helpers.transformers import vit


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


# --- scores: which columns, how many together, of what form

def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def test_columns_of_scores_and_what_they_ask():
    scores, out = Scores(torch.arange(10.).view(2, 5), lambda out, items: out, most=2), torch.rand(2, 5)
    assert [piece.values.tolist() for piece in scores.chunks()]==[[[0, 1], [5, 6]], [[2, 3], [7, 8]], [[4], [9]]]
    assert scores[:, -1].values.tolist()==[[4], [9]] and torch.equal(scores[:, -1].of(out), out[:, 4:])
    assert torch.equal(scores[:, 1:4][:, 1].detach().of(out), out[:, 2:3])
    for beyond in (5, -6):
        with pytest.raises(IndexError): scores[:, beyond]


def test_how_many_gradients_fit_and_which_scores_are_single():
    with Probe(small_net(), '2') as p:
        cap = p(image())
        one, several, n = cap.score(lambda out: out[:, 1]), cap.score(lambda out: out), len(cap)
        assert one.single and not several.single and not several[:, 1].single
        assert torch.equal(cap.grads(one)[0], cap.grads(several)[0][:, 1])
        assert cap._most(several.values, max_bytes=1000*4*(cap.acts[0].numel() + 3*3*n))==1000 # activations, twice the score, the output
        ask = lambda out: out[:, 0]
        assert cap.as_scores(ask) is cap.as_scores(ask) # whose gradients are kept


# --- run again

class Pooled(nn.Module):
    def __init__(self): super().__init__(); self.h = nn.Linear(4, 3)
    def forward(self, both): return self.h(both[0].relu().mean((2, 3)) + 2*both[1])


def test_a_container_handed_on_by_a_sequential():
    torch.manual_seed(0)
    model, x = nn.Sequential(Returns('tuple'), Pooled()).eval(), image()
    act, pooled = (part.detach() for part in model[0](x))
    with Probe(model, '0') as p: assert torch.allclose(p(x).run_from(act*3), model[1]((act*3, pooled)), atol=1e-6)


def test_a_faster_copy_that_says_something_else_is_not_used(monkeypatch):
    def wrong(model, inplace):
        with torch.no_grad(): model[-1].weight.mul_(1.01)
        return model
    monkeypatch.setattr('fastai_cam.probe.rerun.fold_batch_norm', wrong)
    model, x = small_net(), image()
    with Probe(model, '2') as p:
        cap = p(x)
        cap.prepare(1000)
        assert torch.allclose(cap.run(x), cap.out.detach(), atol=1e-6)


class TwoImages(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = small_net(), small_net()
    def forward(self, x, z): return self.a(x) + self.b(z)


def test_another_pass_is_of_the_same_image_and_shows_its_progress_in_the_same_way():
    x, bar = image(), lambda steps: list(steps)
    with Probe(TwoImages().eval(), 'b.2', image=1) as p:
        cap = p(x, x.flip(-1))
        cap.bar = bar
        again = cap.recapture()
    assert torch.equal(again.image, x.flip(-1)) and again.bar is bar


# --- what came before a layer, kept while the pass runs

class Skips(nn.Module):
    "A layer that is called twice; what ran before its calls is used behind them, changed in place in between"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 3)
    def forward(self, x):
        before = self.a(x)
        f = self.b(self.b(before).relu_())
        return self.h((f + before.mul_(2)).mean((2, 3)))


def counted(model):
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize('build,layer', [(Skips, 'b'), (lambda: Container('tuple'), 'b')])
def test_a_pass_that_will_be_resumed_keeps_what_came_before(build, layer):
    "The same numbers as from a pass of its own, and one pass less"
    torch.manual_seed(0)
    model, x = build().eval(), image()
    calls, outs = counted(model), {}
    for resumes in ('', 'all'):
        with Probe(model, layer, resumes=resumes) as p:
            cap = p(x)
            calls.clear()
            outs[resumes] = [cap.run_from(cap.acts[0]*3), cap.run_from(cap.acts[0][[1, 1]], items=torch.tensor([1, 0])), len(calls)]
    assert all(torch.equal(*both) for both in zip(outs[''][:2], outs['all'][:2]))
    assert (outs[''][2], outs['all'][2])==(3, 2)
    if build is Skips:
        before = model.a(x).detach()
        act = model.b(model.b(before).relu()).detach()
        assert torch.allclose(outs['all'][0], model.h((3*act + 2*before).mean((2, 3))), atol=1e-6)


def test_only_tokens_that_were_found_are_resumed_from():
    "Of a grid of convolutions, and of a layer that is named, nothing is kept"
    model, x = vit(), torch.rand(2, 3, 24, 32, dtype=torch.float64)
    calls = counted(model)
    for layers, n in ((None, 0), ('blocks.0', 1)):
        with Probe(model, layers, resumes='tokens') as p:
            cap = p(x)
            calls.clear()
            cap.run_from(cap.acts[0])
        assert len(calls)==n + 1
    with Probe(Skips().eval(), resumes='tokens') as p:
        p(x.float())
        assert not p._last._recordings
