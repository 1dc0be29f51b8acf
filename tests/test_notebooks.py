"Every notebook is a test: it runs from top to bottom, in a process of its own, with the code as it is."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
SLOW = {'any_task', 'mistakes', 'trust', 'several_objects', 'gallery', '33_methods.baselines', '65d_interpret.losses', '77_trust.sanity', '78_trust.compare', '79_trust.verdict',
        '85_shortcuts.report', 'ten_thousand', '90_examples.imagenet', '91_examples.scenes', '63_learner.cams',
        '65e_interpret.views', '65f_interpret.inside', '65g_interpret.concepts', '83_shortcuts.candidates', '84_shortcuts.testing', '86_shortcuts', '88c_similar.show', '96b_explore.show'} # long stories, and chapters that train networks or ask real ones
CASES = [pytest.param(file, marks=[pytest.mark.slow]*(file.stem in SLOW)) for file in NOTEBOOKS]


@pytest.fixture(scope='session')
def server():
    "A process that runs notebooks in processes of their own, without each of them importing fastai anew"
    command = [sys.executable, '-W', 'ignore', str(ROOT/'tests/notebook_server.py'), str(ROOT)]
    env = {**os.environ, 'MPLBACKEND': 'agg', 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize('notebook', CASES, ids=lambda file: file.stem)
def test_notebook(notebook, server):
    server.stdin.write(f'{notebook}\n')
    server.stdin.flush()
    passed, said = json.loads(server.stdout.readline())
    assert passed, said


def test_there_are_notebooks(): assert len(NOTEBOOKS) >= 8
