"Every notebook is a test: it runs from top to bottom with the code as it is."
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook(notebook):
    passed, _ = run_notebook(notebook, skip_flags=['notest'], basepath=ROOT)
    assert passed, f'{notebook.name} failed: its traceback is above'


def test_there_are_notebooks(): assert len(NOTEBOOKS) >= 8
