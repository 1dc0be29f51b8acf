"settings.ini -> pyproject.toml: what `nbdev-migrate-config` makes of it, and the extras that it drops."
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

EXTRAS = ['bench', 'audit', 'clip', 'data', 'report', 'explore']
TYPES = '[tool.setuptools.package-data]\n"*" = ["py.typed", "*.pyi", "*.j2", "*.css", "*.js", "*.schema.json"]\n'


def write(folder: Path) -> None:
    "Generate `folder/pyproject.toml` from `folder/settings.ini`; `NAME_requirements` there is the extra NAME"
    subprocess.run([Path(sys.executable).parent/'nbdev-migrate-config'], cwd=folder, check=True, capture_output=True)
    parser = ConfigParser()
    parser.read(folder/'settings.ini')
    extras = ''.join(f'{name} = {parser["DEFAULT"][f"{name}_requirements"].split()}\n' for name in EXTRAS)
    file = folder/'pyproject.toml'
    before, header, after = file.read_text().partition('[project.optional-dependencies]\n')
    assert header, 'nbdev-migrate-config wrote no extras to add to'
    assert 'include = ["fastai_cam"]\n' in after, 'nbdev-migrate-config names no packages to add to'
    after = after.replace('include = ["fastai_cam"]\n', f'include = ["fastai_cam*"]\n\n{TYPES}') # the packages inside it, too
    file.write_text(before + header + extras + after)


if __name__=='__main__': write(Path(__file__).resolve().parent.parent)
