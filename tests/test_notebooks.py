"Every notebook is a test: it runs from top to bottom, in a process of its own, with the code as it is."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
SLOW = {'any_task', 'trust', 'several_objects', '91_examples.scenes', '78_trust.compare', '85_shortcuts.report'} # long stories, and chapters that train networks
CASES = [pytest.param(file, marks=[pytest.mark.slow]*(file.stem in SLOW)) for file in NOTEBOOKS]
RUN = """
import sys
from nbdev.test import test_nb
passed, seconds = test_nb(sys.argv[1], skip_flags=['notest'], basepath=sys.argv[2])
sys.exit(0 if passed else 1)
"""


@pytest.mark.parametrize('notebook', CASES, ids=lambda file: file.stem)
def test_notebook(notebook):
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', RUN, str(notebook), str(ROOT)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'MPLBACKEND': 'agg'})
    assert run.returncode==0, run.stderr[-6000:]


def test_there_are_notebooks(): assert len(NOTEBOOKS) >= 8
