"The script that measures on a GPU: what it says where there is none, and that every line of it runs."
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent/'bench/gpu.py'


def said(*options):
    "What the script prints where no CUDA device is seen"
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([sys.executable, '-W', 'ignore', SCRIPT, *options], env=env, check=True, capture_output=True, text=True, cwd=SCRIPT.parents[2]).stdout


@pytest.mark.slow
def test_without_a_device_nothing_is_claimed():
    assert said()=='There is no CUDA device here, so nothing was measured and nothing is claimed.\n'


@pytest.mark.slow
def test_every_line_of_it_runs():
    lines = said('--smoke').splitlines()
    assert 'no measurement' in lines[0] and sum(line.startswith('| resnet50, ') for line in lines)==6
    assert "| resnet50: maps are apart from the CPU's by | 2 | 0.0e+00 of their range | | |" in lines
    assert sum(line.startswith('| `get_cams(') and '×' in line for line in lines)==2
