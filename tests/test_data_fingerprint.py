"Short texts for models and questions: the same in another process, another one for whatever differs."
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from fastai.layers import Lambda

from fastai_cam.data.fingerprint import describe, digest, model_digest, without_addresses
from fastai_cam.targets import ClassIndex, Similarity, Versus
from helpers.tables import net


@pytest.mark.slow
def test_another_process_says_the_same():
    code = 'from helpers.tables import net; from fastai_cam.data.fingerprint import *; print(model_digest(net()), describe(lambda out: out[:,0]), sep=chr(10))'
    other = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.splitlines()
    assert other[0]==model_digest(net())
    asked = lambda out: out[:,0]
    assert eval(other[1])[1:]==describe(asked)[1:] # but for the module that the function is in


def test_one_bit_of_a_weight_is_another_model():
    model = net()
    before = model_digest(model)
    with torch.no_grad(): model[0][0].weight[0, 0, 0, 0] = torch.nextafter(model[0][0].weight[0, 0, 0, 0], torch.tensor(9.))
    assert model_digest(model) != before and model_digest(net())==before


def test_a_buffer_a_layer_and_a_type_count():
    found = {model_digest(model) for model in (nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), nn.Sequential(nn.BatchNorm2d(3)).half(), nn.Sequential(nn.BatchNorm2d(3, eps=1e-3)))}
    assert len(found)==4


def test_places_in_memory_do_not_count():
    assert model_digest(Lambda(lambda x: x))==model_digest(Lambda(lambda x: x))
    assert without_addresses('<function f at 0x7f00aa> and <g at 0x1>')=='<function f> and <g>'


def test_parts_do_not_run_into_each_other(): assert digest('ab', 'c') != digest('a', 'bc')


def test_questions():
    asked = [None, 'cat', 3, ['cat', 'dog'], ClassIndex(1), ClassIndex(2), Versus('cat', 'dog'), Versus('dog', 'cat'), Similarity(torch.ones(3)), Similarity(torch.zeros(3)),
             lambda out: out[:, 0], lambda out: out[:, 1], partial(torch.topk, k=2), partial(torch.topk, k=3), np.arange(3), np.arange(4)]
    words = [str(describe(one)) for one in asked]
    assert len(set(words))==len(asked) and words==[str(describe(one)) for one in asked]
    assert describe(ClassIndex(1))==describe(ClassIndex(1)) and describe(Similarity(torch.ones(3)))==describe(Similarity(torch.ones(3)))


def test_variables_that_a_function_has_taken_along_count():
    def above(limit): return lambda out: (out > limit).float().sum(1)
    assert describe(above(1)) != describe(above(2)) and describe(above(1))==describe(above(1))


def test_layers_are_called_by_their_names():
    model = net()
    assert describe([model[0][3], model], model)==["layer '0.3'", "layer ''"]
    assert describe(nn.Conv2d(3, 3, 1), model) != describe(nn.Conv2d(3, 3, 1), model) # of another model: its weights


def test_what_a_function_refers_to_is_not_what_it_asks(dls):
    from helpers.tables import learner
    learn = learner(dls)
    asked = lambda out: out[:, len(learn.dls.vocab) - 1]
    before = describe(asked)
    learn.extra = [torch.rand(3)]
    assert describe(asked)==before
