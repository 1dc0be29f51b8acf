"Types: the package says that it has some, stubs know what @patch adds, and a user's file passes a type checker."
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stubs

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = (ROOT/'tests/typed_sample.py').read_text(encoding='utf-8')


def checked(text, tmp_path):
    "What mypy says of a user's file"
    (tmp_path/'sample.py').write_text(text, encoding='utf-8')
    options = ['--cache-dir', 'cache', '--follow-imports', 'silent', '--ignore-missing-imports', '--check-untyped-defs']
    command = [sys.executable, '-m', 'mypy', *options, 'sample.py']
    return subprocess.run(command, cwd=tmp_path, env={**os.environ, 'MYPYPATH': str(ROOT)}, capture_output=True, text=True).stdout


def test_stubs_are_what_the_modules_say():
    found = stubs.render()
    assert {str(file.relative_to(ROOT)) for file in (ROOT/'fastai_cam').rglob('*.pyi')}==set(found), 'run: make stubs'
    for name, text in found.items(): assert (ROOT/name).read_text(encoding='utf-8')==text, f'{name} is out of date: run make stubs'
    assert (ROOT/'fastai_cam/py.typed').exists()


def test_stubs_know_what_patch_adds():
    rendered = stubs.render()
    cams, probe, finder = (rendered[f'fastai_cam/{room}.pyi'] for room in ('maps/cams', 'probe/watch', 'probe/finder'))
    assert '    @classmethod\n    def load(cls, file: str | Path, ' in cams # of another room
    assert '    def boxes(self, threshold: float=..., ' in cams
    assert '    @property\n    def is_finite(self) -> Tensor: ...' in cams
    assert '    def take(self) -> Capture: ...' in probe and '    grad: Any' in probe and 'def _watch' not in probe
    assert '    image: Any' in finder


@pytest.mark.slow
def test_a_users_file_passes_a_type_checker(tmp_path):
    pytest.importorskip('mypy', reason='of the dev extra')
    assert checked(SAMPLE, tmp_path).startswith('Success')
    wrong = SAMPLE + '\n\ndef wrong(cams: CAMs, probe: Probe) -> None:\n    cams.boxs()\n    probe.take(1)\n    cams.save(3)\n'
    found = checked(wrong, tmp_path)
    for word in ('has no attribute "boxs"', 'Too many arguments for "take"', 'Argument 1 to "save"'): assert word in found, found
