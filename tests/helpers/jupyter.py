"A real JupyterLab or Notebook on the loopback interface, in folders of its own, with a notebook in it."
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


def notebook(*cells):
    "Code, a cell each"
    made = [dict(cell_type='code', id=f'cell-{i}', execution_count=None, metadata={}, outputs=[], source=text) for i, text in enumerate(cells)]
    kernel = dict(display_name='Python 3', language='python', name='python3')
    return dict(cells=made, metadata=dict(kernelspec=kernel, language_info=dict(name='python')), nbformat=4, nbformat_minor=5)


@contextmanager
def jupyter(folder, cells, app='lab', wait=60):
    "The address of a notebook with these cells; the server and its kernels end with the block"
    home, work = folder/'home', folder/'work'
    for one in (home, work): one.mkdir(exist_ok=True)
    (work/'notebook.ipynb').write_text(json.dumps(notebook(*cells)))
    port, token = free_port(), secrets.token_hex(16)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(('JUPYTER', 'JPY', 'IPYTHON', 'XDG_', 'MPLBACKEND'))}
    env = {**kept, 'HOME': str(home), 'JUPYTER_CONFIG_DIR': str(home/'config'), 'JUPYTER_DATA_DIR': str(home/'data'), 'JUPYTER_RUNTIME_DIR': str(home/'runtime'), 'IPYTHONDIR': str(home/'ipython'),
           'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests')]), 'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])}
    root = ['--allow-root'] if hasattr(os, 'geteuid') and os.geteuid()==0 else []
    command = [sys.executable, '-m', f'jupyter{app}' if app=='lab' else app, '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}',
               f'--ServerApp.root_dir={work}', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', *root]
    if app != 'lab': command = [part for part in command if not part.startswith('--LabApp')]
    with open(folder/'server.log', 'wb') as log, subprocess.Popen(command, env=env, cwd=work, stdout=log, stderr=log) as process:
        try:
            for _ in range(wait*5):
                try:
                    urlopen(f'http://127.0.0.1:{port}/api?token={token}', timeout=2).close()
                    break
                except (URLError, OSError): time.sleep(.2)
                assert process.poll() is None, (folder/'server.log').read_text()[-3000:]
            yield f'http://127.0.0.1:{port}/{"lab/tree" if app=="lab" else "notebooks"}/notebook.ipynb?token={token}'
        finally:
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()
