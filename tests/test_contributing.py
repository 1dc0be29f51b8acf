"CONTRIBUTING.md: its code runs, block by block in one namespace, and asserts what it says."
import re
from pathlib import Path

import pytest
import torch

from fastai_cam import methods
from fastai_cam.methods import METHODS
from fastai_cam.trust import METRICS

TEXT = (Path(__file__).resolve().parent.parent/'CONTRIBUTING.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```python\n(.+?)^```', TEXT, re.S | re.M)
FOR_LATER = [] if hasattr(methods, 'cam_weights') else ['cam_weights']


@pytest.fixture
def registries():
    "What the code registers is known to it alone"
    before = dict(METHODS), dict(METRICS)
    yield
    for registry, old in zip((METHODS, METRICS), before):
        registry.clear()
        registry.update(old)


def test_every_block_runs_and_is_short(registries):
    torch.manual_seed(0)
    names = {'__name__': 'contributing'}
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10, f'too long to be read at a glance:\n{block}'
        if any(word in block for word in FOR_LATER): continue
        exec(compile(block, 'CONTRIBUTING.md', 'exec'), names)
    assert {'brightest', 'share_inside', 'RunnerUp', 'TopTwo'} <= set(names)


def test_every_kind_of_thing_has_its_block():
    sections = {text.splitlines()[0]: text for text in TEXT.split('\n### ')[1:]}
    assert set(sections)=={'A method that weighs activations', 'Any other method', 'A measure', 'A target', 'A task'}
    for title, text in sections.items(): assert 'assert ' in ''.join(re.findall(r'^```python\n(.+?)^```', text, re.S | re.M)), title


def test_what_is_said_of_the_commands_is_true():
    makefile = (Path(__file__).resolve().parent.parent/'Makefile').read_text()
    for target in re.findall(r'`make ([\w-]+)`', TEXT): assert re.search(rf'^{target}:', makefile, re.M), f'make {target} does not exist'
