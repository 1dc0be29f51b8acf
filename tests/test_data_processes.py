"Processes that are killed, that share the work, and that know nothing of each other: the same folder as of one that was left alone. All of it slow."
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.tables import contents

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
SCRIPT = HERE/'helpers'/'explain_script.py'
ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'yes', 'GLOO_SOCKET_IFNAME': 'lo', 'PYTHONWARNINGS': 'ignore'}


def run(*arguments, launched=False, **env):
    "The exit code of a process and what it wrote"
    launcher = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(29500 + os.getpid() % 500)] if launched else []
    done = subprocess.run([sys.executable, *launcher, str(SCRIPT), *map(str, arguments)], env={**ENV, **env}, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def n_run(output): return [int(n) for n in re.findall(r'(\d+) items went through the model', output)]


@pytest.fixture(scope='module')
def alone(pictures, tmp_path_factory):
    "What a single process makes that nobody disturbs: 24 pictures in five shards"
    to = tmp_path_factory.mktemp('alone')/'cams'
    code, output = run(pictures, to)
    assert code==0 and n_run(output)==[25], output # the first one twice: it shows what all is about
    return contents(to)


@pytest.mark.parametrize('dies', [1, 12])
def test_killed_and_started_again(pictures, alone, tmp_path, dies):
    code, output = run(pictures, tmp_path/'cams', dies)
    assert code==-9, output
    there = contents(tmp_path/'cams')
    finished = [name for name in there if name.startswith('maps')]
    assert len(finished)==max(0, dies - 1)//5 and all(there[name]==alone[name] for name in there)
    code, output = run(pictures, tmp_path/'cams')
    assert code==0 and contents(tmp_path/'cams')==alone
    assert n_run(output)==[24 - 5*len(finished) + (not there)] # nothing that was finished is computed again


def test_two_launched_processes(pictures, alone, tmp_path):
    for name, env in (('by the environment', {}), ('in a group', dict(DIST_INIT='1'))):
        code, output = run(pictures, tmp_path/name, launched=True, **env)
        assert code==0, output
        assert contents(tmp_path/name)==alone
        assert sum(n_run(output)) in (25, 26) and all(9 <= n <= 16 for n in n_run(output)) # 14 and 10, and the first one once or twice


def test_one_of_two_is_killed_and_only_it_is_started_again(pictures, alone, tmp_path):
    code, output = run(pictures, tmp_path/'cams', 7, launched=True)
    assert code != 0, output
    there = contents(tmp_path/'cams')
    assert set(there) < set(alone) and all(there[name]==alone[name] for name in there)
    for rank in '01':
        code, output = run(pictures, tmp_path/'cams', RANK=rank, WORLD_SIZE='2')
        assert code==0, output
    assert contents(tmp_path/'cams')==alone


@pytest.mark.parametrize('size, few, many, limit', [(64, 1000, 10000, 30), (224, 300, 900, 30), (448, 300, 900, 60)])
def test_memory_does_not_grow_with_the_number_of_items(pictures, tmp_path, size, few, many, limit):
    code = '''
import sys, resource, torch
from fastai.vision.all import *
import fastai_cam.all
from helpers.tables import learner
pictures, to, size, n_few, n_many = *sys.argv[1:3], *map(int, sys.argv[3:])
torch.set_num_threads(1)
dls = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(size)).dataloaders(pictures, bs=50 if size==64 else 10, num_workers=0)
learn = learner(dls)
learn.model[0].append(nn.AdaptiveAvgPool2d(4))
files = sorted(get_image_files(pictures))
def peak(): return int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])/1024
seen = []
learn.model.register_forward_hook(lambda module, inputs, out: seen.append(peak()))
learn.explain((files*n_few)[:n_few], to + '/few', shard=500, method='gradcam')
few = max(seen)
seen.clear()
store = learn.explain((files*n_many)[:n_many], to + '/many', shard=500, method='gradcam')
print('GROWTH', max(seen) - few, len(store), max(file.stat().st_size for file in store.files))
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(pictures), str(tmp_path), *map(str, (size, few, many))], env=ENV, capture_output=True, text=True, timeout=300)
    words = re.search(r'GROWTH (\S+) (\d+) (\d+)', done.stdout)
    assert words, done.stdout + done.stderr
    assert words[2]==str(many) and int(words[3]) < 500*200 # 16 places in half precision, the file's name, what is known
    # MB; the inputs would be 492, 542 and 2,167 together, and a batch is 25 at most.
    assert float(words[1]) < limit


def test_ray_maps_frames(pictures, tmp_path):
    ray = pytest.importorskip('ray')
    import pandas as pd
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Resize, get_image_files, parent_label
    from fastai_cam.data import explain_batch
    from helpers.tables import learner
    data = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(64)).dataloaders(pictures, bs=5, num_workers=0)
    learn = learner(data)
    files = sorted(get_image_files(pictures))
    cams = learn.get_cams(files, method='gradcam')
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=dict(env_vars={'PYTHONPATH': ENV['PYTHONPATH']}))
    try: rows = ray.data.from_pandas(pd.DataFrame(dict(item=[*map(str, files), 'no.png']))).map_batches(explain_batch(learn, method='gradcam'), batch_format='pandas', batch_size=7).take_all()
    finally: ray.shutdown()
    rows = {row['item']: row for row in rows}
    assert len(rows)==25 and 'No such file' in rows['no.png']['error']
    for file, cam, pred in zip(files, cams.maps, cams.preds):
        row = rows[str(file)]
        assert row['error'] is None and row['prediction']==data.vocab[pred.argmax()] and np.allclose(np.reshape(row['map'], row['shape']), cam, atol=1e-5*cams.maps.abs().max().item())
