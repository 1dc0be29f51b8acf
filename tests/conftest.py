"Shared by all tests: no windows, no hub, small learners whose data is made here."
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import matplotlib

matplotlib.use('agg')

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from fastai.vision.all import CategoryBlock, DataBlock, FuncSplitter, ImageBlock, Normalize, Resize, get_image_files, imagenet_stats, parent_label


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    "Twenty-four small pictures of two classes: a bright square on the left, or on the right"
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for i in range(24):
        side = ('left', 'right')[i%2]
        pixels = rng.integers(40, 100, (64, 64, 3), dtype=np.uint8)
        pixels[20:44, 6 + 32*(i%2):26 + 32*(i%2)] = 230
        (folder/side).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder/side/f'{i:02}.png')
    return folder


@pytest.fixture(scope='session')
def dls(pictures):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=FuncSplitter(lambda f: int(f.stem) >= 12),
                      item_tfms=Resize(64), batch_tfms=Normalize.from_stats(*imagenet_stats))
    return block.dataloaders(pictures, bs=5, num_workers=0)


@pytest.fixture
def seeded():
    torch.manual_seed(0)
