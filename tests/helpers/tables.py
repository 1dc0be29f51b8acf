"A small learner whose data sets become tables, and what lies in a folder."
import hashlib

import torch
from torch import nn
from fastai.vision.all import Learner


def net(n_out=2):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)))
    with torch.no_grad(): model[1][-1].weight *= 20 # the two classes are told apart, one way or the other
    return model


def learner(dls, **kwargs):
    learn = Learner(dls, net(), **kwargs)
    learn.remove_cb(learn.progress)
    return learn


def contents(folder):
    "Name and digest of every file: two folders with the same are the same to the last byte"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def state_of(learn):
    "What a learner must be left with"
    return ([cb.name for cb in learn.cbs], [module.training for module in learn.model.modules()], {name: value.clone() for name, value in learn.model.state_dict().items()},
            sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in learn.model.modules()), torch.get_rng_state(), learn.loss_func)


def assert_left_as_it_was(learn, before):
    after = state_of(learn)
    assert before[0]==after[0] and before[1]==after[1] and before[3]==after[3] and before[5] is after[5]
    assert all(torch.equal(before[2][name], value) for name, value in after[2].items()) and torch.equal(before[4], after[4])
