"Small networks and maps for checks of sanity."
import pytest
import torch
from torch import nn


def make_net():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.ReLU())
    net = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    for param in net.parameters(): nn.init.normal_(param)
    return net


@pytest.fixture
def net(): return make_net()


@pytest.fixture
def x(): return torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(2)) + 3


def state(model): return {key: value.clone() for key, value in model.state_dict().items()}
def changed(model, before): return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
