"Render nbs/index.ipynb, with the outputs it holds, to README.md and nbs/images/, and the list of all notebooks to nbs/llms.txt."
from pathlib import Path
import re
import nbformat
from nbconvert import MarkdownExporter

import llms

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 'nbs/images'


def render() -> dict[str, bytes]:
    "The files that the index notebook becomes: name → content"
    nb = nbformat.read(ROOT/'nbs/index.ipynb', as_version=4)
    nb.metadata.language_info = dict(name='python') # `nbdev-clean` drops it
    nb.cells = [cell for cell in nb.cells if not cell.source.startswith('#| hide')]
    for cell in nb.cells: # progress bars are no part of a page
        if cell.cell_type=='code': cell.outputs = [out for out in cell.outputs if 'image/png' in out.get('data', {}) or 'text/html' not in out.get('data', {})]
    body, resources = MarkdownExporter().from_notebook_node(nb, resources=dict(output_files_dir=IMAGES, unique_key='readme'))
    body = re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'
    body = '<!-- Rendered from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n' + body
    return {'README.md': body.encode(), 'nbs/llms.txt': llms.render().encode(), **resources['outputs']}


if __name__=='__main__':
    for old in (ROOT/IMAGES).glob('readme_*'): old.unlink()
    for name, content in render().items():
        file = ROOT/name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        print(file.relative_to(ROOT))
