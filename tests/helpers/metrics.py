"Images, maps and masks for measures, and models whose scores are known."
import pytest
import torch
from torch import nn


@pytest.fixture
def net(seeded):
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))).train()
    model[0][1].running_mean.uniform_(-.5, .5); model[0][1].running_var.uniform_(.5, 2)
    return model


@pytest.fixture
def images(seeded): return torch.randn(5, 3, 24, 32)


@pytest.fixture
def maps(seeded): return torch.randn(5, 6, 8)


@pytest.fixture
def masks(seeded):
    found = torch.zeros(5, 24, 32, dtype=torch.bool)
    for i, (top, left, height, width) in enumerate([(2, 3, 10, 12), (0, 0, 24, 32), (20, 1, 3, 3), (5, 5, 1, 1)]): found[i, top:top+height, left:left+width] = True
    return found # the last is empty, the second full
