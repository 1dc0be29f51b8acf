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

pytest.register_assert_rewrite('helpers') # their assertions say what was compared, as those of tests do


# -- what sweeps is marked `slow`: `make test` leaves it out and says so, `make test-slow` runs it alone

def pytest_addoption(parser):
    parser.addoption('--slow', choices=('leave', 'only', 'too'), default='leave', help='leave slow tests out (default), run them only, or run them too')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: a sweep, a story or a build, run by `make test-slow`')
    config.n_left_out = 0


# of the zoo, one architecture of each kind; and what only a wrong reading would pass
QUICK = ('test_every_module', 'test_torchvision[resnet18]', 'test_torchvision[vit_b_32]', 'test_timm[test_convnext]', 'test_timm[test_efficientnet]', 'test_timm[test_vit]',
         'test_timm[efficientvit_m0]', 'test_what_fastai_makes_of_timm[test_resnet]', 'test_height_and_width', 'test_windows_are_refused', 'test_a_vector_with',
         'test_legrad_responds_where_the_image_was_disturbed[vit_tiny', 'test_a_layout_that_is_wrong_is_seen[by_columns-size0]')

# of fastai's U-Net, what asks it hundreds of times
OF_UNETS = tuple(f'test_{name}[masks]' for name in (
    'every_method_and_wrapper_makes_a_map_or_says_why_not', 'verdicts_do_not_depend_on_the_company', 'sanity_and_its_figures',
    'ablation_of_a_layer_with_few_channels', 'every_measure_and_its_plot'))

# what takes ten seconds, and has a sibling that is quick
LONG = ('test_every_measure_and_its_plot[numbers]', 'test_verdicts_do_not_depend_on_the_company[numbers]', 'test_every_method_and_wrapper_makes_a_map_or_says_why_not[points]',
        'test_a_clean_learner_has_none', 'test_a_thing_is_suspect_and_its_place_is_said[different places]')


def is_sweep(item):
    "Is this a slow test, by its mark, as one of many architectures, or of a large network?"
    is_of_the_zoo = item.path.name=='test_zoo.py' and not item.name.startswith(QUICK)
    return item.get_closest_marker('slow') is not None or is_of_the_zoo or item.name in (*OF_UNETS, *LONG)


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption('--slow')
    if wanted=='too': return
    left_out = [item for item in items if is_sweep(item)==(wanted=='leave')]
    items[:] = [item for item in items if item not in set(left_out)]
    config.n_left_out = len(left_out)
    config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session):
    output = getattr(session.config, 'workeroutput', None) # of a process that runs a part of the tests
    if output is not None: output['n_left_out'] = session.config.n_left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node): node.config.n_left_out = getattr(node, 'workeroutput', {}).get('n_left_out', 0)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption('--slow')=='leave' and config.n_left_out: terminalreporter.write_line(f'{config.n_left_out} slow tests were left out: make test-slow runs them, make test-all everything')


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


@pytest.fixture
def maps_by_gradcam(monkeypatch):
    "For tests of tasks and targets: whoever names no method has Grad-CAM, which is easily made by hand"
    monkeypatch.setattr('fastai_cam.methods.registry.DEFAULT_METHOD', 'gradcam')


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
