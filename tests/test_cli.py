"The program `fastai_cam`: what it writes is what a notebook would show, and whatever is wrong is said in a sentence and a number."
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed
from fastai.vision.all import CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, MultiCategoryBlock, RandomSplitter, Resize, get_image_files, parent_label

from fastai_cam.all import CAMInterpretation, CAMs, cam_head
from fastai_cam.cli import explain as room
from fastai_cam.cli.ask import one_row_an_item
from fastai_cam.cli.models import model_options
from fastai_cam.cli.results import Results
from fastai_cam.cli.shell import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent


def network(n_out):
    set_seed(1)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(body, cam_head(8, n_out))


@pytest.fixture(scope='session')
def exported(dls, tmp_path_factory):
    "A learner's file"
    file = tmp_path_factory.mktemp('exported')/'export.pkl'
    Learner(dls, network(2), loss_func=CrossEntropyLossFlat()).export(file)
    return file


@pytest.fixture
def some(pictures, tmp_path):
    "Six of the photos, three of a class, in a folder of their own"
    for file in sorted(get_image_files(pictures), key=lambda file: file.stem)[:6]:
        (tmp_path/'photos'/file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path/'photos'/file.parent.name)
    return tmp_path/'photos'


def explain(*words, method='gradcam'): return main(['explain', *map(str, words), *(['--method', method] if method else [])])
def table(out): return list(csv.DictReader(io.StringIO((Path(out)/'predictions.csv').read_text('utf-8', 'surrogateescape'))))
def pixels(file): return np.asarray(Image.open(file))


def test_pictures_and_numbers_are_those_of_the_learner(exported, some, tmp_path, capsys):
    out = tmp_path/'maps'
    assert explain(exported, some, '--out', out, '--bs', 4)==0
    files = sorted(get_image_files(some))
    learn = load_learner(exported)
    cams, (preds, _) = learn.get_cams(files, method='gradcam'), learn.get_preds(dl=learn.dls.test_dl(files))
    rows = table(out)
    assert [row['file'] for row in rows]==[str(file) for file in files]
    for i, (file, row) in enumerate(zip(files, rows)):
        assert row['picture']==f'{file.parent.name}/{file.stem}.png'
        assert (pixels(out/row['picture'])==np.asarray(cams[i].overlay())).all()
        assert row['prediction']==learn.dls.vocab[preds[i].argmax()]
        assert abs(float(row['probability']) - preds[i].max().item()) < 1e-6
        assert json.loads(row['boxes'])==[list(box[:4]) for box in cams[i].boxes()]
        assert (row['method'], row['error'])==('gradcam', '')
    said = capsys.readouterr()
    assert 'export.pkl is a pickle: loading it runs the code in it, so it must come from someone you trust' in said.err and '6 of 6 photos' in said.err
    assert str(out/'predictions.csv') in said.out


def test_several_questions_share_a_scale(exported, some, tmp_path):
    out = tmp_path/'maps'
    file = sorted(get_image_files(some))[0]
    assert explain(exported, file, '--out', out, '--cls', 'left', '--cls', '1', '--format', 'json')==0
    learn = load_learner(exported)
    left, right = learn.get_cams(file, cls=['left', 1], method='gradcam').to_df().to_dict('records')
    rows = json.loads((out/'predictions.json').read_text())
    assert [row['explains'] for row in rows]==['left', 'right'] and [row['peak'] for row in rows]==[pytest.approx(left['peak']), pytest.approx(right['peak'])]
    assert not list(out.glob('*.png'))
    assert explain(exported, file, '--out', tmp_path/'pngs', '--cls', 'left', '--cls', '1', '--format', 'html')==0
    learn.get_cams(file, cls=['left', 1], method='gradcam').save_all(tmp_path/'saved')
    written, saved = sorted((tmp_path/'pngs').glob('*.png')), sorted((tmp_path/'saved').glob('*.png'))
    assert [one.name for one in written]==[f'{file.stem}_1_left.png', f'{file.stem}_2_right.png']
    assert all((pixels(one)==pixels(other)).all() for one, other in zip(written, saved))
    page = (tmp_path/'pngs/index.html').read_text()
    assert all(f'<img src="{one.name}"' in page for one in written)


def test_full_size_is_over_the_file_and_so_are_its_boxes(pictures, tmp_path):
    "A photo twice as wide as high, of which the model sees the middle"
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=0), item_tfms=Resize(64))
    learn = Learner(dls.dataloaders(pictures, bs=4, num_workers=0), network(2), loss_func=CrossEntropyLossFlat())
    learn.export(tmp_path/'export.pkl')
    rng = np.random.default_rng(0)
    wide = np.repeat(np.repeat(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8), 16, 0), 16, 1) # 128 × 256
    Image.fromarray(wide).save(tmp_path/'wide.png')
    learn = load_learner(tmp_path/'export.pkl')
    cam_map = learn.get_cams(tmp_path/'wide.png', method='gradcam')[0]
    for option in '--full-size', '--full_size':
        out = tmp_path/f'maps{option}'
        assert explain(tmp_path/'export.pkl', tmp_path/'wide.png', '--out', out, option)==0
        row, = table(out)
        assert (pixels(out/'wide.png')==np.asarray(cam_map.overlay('original'))).all()
        boxes = [[64 + 2*left, 2*top, 64 + 2*right, 2*bottom] for left, top, right, bottom, *_ in cam_map.boxes()]
        assert boxes and json.loads(row['boxes'])==boxes
        peak = cam_map.peaks(max_n=1)[0]
        assert (int(row['peak_x']), int(row['peak_y']))==(round(64 + (peak.x + .5)*2 - .5), round((peak.y + .5)*2 - .5))


def test_photos_of_one_name_and_of_strange_names(exported, some, tmp_path):
    file = sorted(get_image_files(some))[0]
    names = ['a/cat.png', 'b/cat.png', 'a/Cat.bmp', 'a/two words.png', 'a/größe 漢字.png', 'a/line\nbreak.png', 'a/-x.png', f'a/{"long"*55}.png']
    photos = [tmp_path/name for name in names] + [Path(os.fsdecode(os.fsencode(tmp_path/'a') + b'/\xff.png'))]
    for photo in photos:
        photo.parent.mkdir(exist_ok=True)
        Image.open(file).save(photo)
    out = tmp_path/'maps'
    assert explain(exported, *photos, '--out', out, '--format', 'html')==0
    rows = table(out)
    written = [row['picture'] for row in rows]
    assert [row['file'] for row in rows]==[str(photo) for photo in photos] # to the byte, also where it is no text
    assert len({name.casefold() for name in written})==len(photos)==len(list(out.rglob('*.png')))
    assert written[0]=='cat.png' and written[1].startswith('cat-') and written[3:7]==['two words.png', 'größe 漢字.png', 'line-break.png', 'x.png']


def test_what_cannot_be_read_is_listed_and_the_rest_is_done(exported, some, tmp_path, capsys):
    good = sorted(get_image_files(some))[0]
    (some/'zero.jpg').touch()
    (some/'text.png').write_text('no picture')
    (some/'cut.png').write_bytes(good.read_bytes()[:2000])
    (some/'round').symlink_to(some, target_is_directory=True)
    (tmp_path/'loop.png').symlink_to(tmp_path/'loop.png')
    (tmp_path/'empty').mkdir()
    out = tmp_path/'maps'
    assert explain(exported, some, tmp_path/'none.jpg', tmp_path/'loop.png', tmp_path/'empty', tmp_path/'*.gif', '--out', out)==1
    rows = table(out)
    assert len([row for row in rows if not row['error']])==6 and len(list(out.rglob('*.png')))==6
    why = {Path(row['file']).name: row['error'] for row in rows if row['error']}
    assert set(why)=={'zero.jpg', 'text.png', 'cut.png', 'none.jpg', 'loop.png', 'empty', '*.gif'}
    assert why['none.jpg']=='there is no such file or folder' and why['loop.png']=='the link leads nowhere' and why['empty']=='there are no photos in this folder'
    assert all('is not an image that can be read' in why[name] for name in ('zero.jpg', 'text.png', 'cut.png'))
    said = capsys.readouterr().err
    assert '7 could not be explained:' in said and f"{str(some/'zero.jpg')!r}: is not an image that can be read" in said
    (some/'zero.jpg').write_bytes(good.read_bytes()) # mended: the same command does it
    assert explain(exported, some, '--out', out)==1
    assert '6 of 9 photos are finished already' in capsys.readouterr().err and (out/'zero.png').exists()


@pytest.mark.skipif(os.geteuid()==0, reason='root may read everything')
def test_a_folder_that_may_not_be_read_is_listed(exported, some, tmp_path, capsys):
    (some/'left').chmod(0)
    try: assert explain(exported, some, '--out', tmp_path/'maps')==1
    finally: (some/'left').chmod(0o755)
    assert 'the folder cannot be read' in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_a_problem_of_its_own(some, monkeypatch):
    from fastai_cam.cli.photos import find_photos
    real = os.scandir
    def scandir(path):
        if os.path.basename(path)=='left': raise PermissionError(13, 'Permission denied', path)
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    photos, problems = find_photos([str(some)])
    assert photos and all(photo.name.startswith('right/') for photo in photos)
    assert problems==[(str(some/'left'), 'the folder cannot be read: Permission denied')]


WRONG = [
    (['explain', 'EXPORT', 'SOME', '--out', 'OUT', '--method', 'gradcm'], "no method is named 'gradcm': did you mean 'gradcam'?"),
    (['explain', 'EXPORT', 'SOME', '--out', 'OUT', '--methd', 'gradcam'], 'unrecognized arguments: --methd gradcam; did you mean --method?'),
    (['explain', 'EXPORT', 'SOME', '--out', 'OUT', '--format', 'gif'], "invalid choice: 'gif'"),
    (['explain', 'EXPORT', 'SOME', '--out', 'OUT', '--device', 'tpu'], "there is no device 'tpu' here: --device is one of cpu"),
    (['explain', 'EXPORT', 'SOME', '--out', 'OUT', '--format', 'parquet', '--full-size'], '--full-size and --overwrite are about pictures'),
    (['explain', 'EXPORT', 'SOME', '--out', 'OUT', '--bs', '0'], '--bs is at least 1'),
    (['explain', 'EXPORT', 'SOME', '--out', 'OUT', '--weights', 'EXPORT'], '--weights and --builder go together'),
    (['explain', 'EXPORT', 'SOME'], 'the following arguments are required: --out'),
    (['explain', 'EXPORT', '--out', 'OUT'], 'no photos were named'),
    (['explain', 'EXPORT', 'photos/', '--out', 'OUT'], "there is no file or folder 'photos/'"),
    (['explain', 'EXPORT', 'a.jpg', 'b.jpg', 'more/*.jpg', 'c', '--out', 'OUT', '--format', 'parquet'], "there is no file or folder 'a.jpg', 'b.jpg', 'more/*.jpg', …"),
    (['explain', 'none.pkl', 'SOME', '--out', 'OUT'], "there is no file 'none.pkl': name the model first, then the photos"),
    (['explain', 'EXPORT', 'SOME', '--out', 'SOME'], '--out is the folder of the photos'),
    (['explain', 'EXPORT', 'SOME', '--out', 'HOME'], 'other files are in --out'),
    (['explain', 'EXPORT', 'SOME', '--out', 'EXPORT/maps'], 'cannot be a folder of results: Not a directory'),
    (['top-losses', 'EXPORT', '--data', 'none'], "--data is a folder of photos, and there is no folder 'none'"),
    (['top-losses', 'EXPORT', '--data', 'SOME', '--k', '0'], '--k 0 leaves nothing to show'),
    (['compare', 'EXPORT', '--data', 'SOME', '--method', 'layercm'], "did you mean 'layercam'?"),
    (['layers'], 'there is no model'),
    (['explain', 'SOME', 'EXPORT', '--out', 'OUT'], 'is a folder: the model comes first (the file export.pkl), then the photos'),
    (['report', 'EXPORT', '--data', 'SOME', '--out', 'r.txt'], "a report is a page: name it --out *.html, not 'r.txt'"),
    (['report', 'EXPORT', '--data', 'SOME', '--where', 'wrong AND loss > 1'], "--where 'wrong AND loss > 1' has AND: write and"),
    (['report', 'EXPORT', '--data', 'SOME', '--where', "loss.to_csv('OUT') == loss"], "asks for \"loss.to_csv('"),
    (['report', 'EXPORT', '--data', 'SOME', '--json', 'EXPORT/facts.json'], '--json'),
    (['report', 'EXPORT', '--data', 'OUT'], "there is no folder"),
    (['explan'], "there is no command 'explan': did you mean 'explain'?"),
    ([], 'a command is missing: the commands are explain, top-losses')]


@pytest.mark.parametrize('words, sentence', WRONG, ids=lambda value: ' '.join(value[:1] + value[-2:]) if isinstance(value, list) else '')
def test_wrong_usage_is_refused_before_any_work(words, sentence, exported, some, tmp_path, monkeypatch, capsys):
    def too_late(*args, **kwargs): raise AssertionError('the model was opened')
    for name in 'explain', 'ask': monkeypatch.setattr(import_module(f'fastai_cam.cli.{name}'), 'open_learner', too_late)
    places = dict(EXPORT=exported, SOME=some, OUT=tmp_path/'maps', HOME=ROOT/'tests')
    for name, path in places.items(): words = [word.replace(name, str(path)) for word in words]
    assert main(words)==2
    said = capsys.readouterr()
    assert sentence in said.err and '--help' in said.err and not said.out
    assert not list((tmp_path/'maps').rglob('*'))


def test_what_the_learner_does_not_know_is_refused_before_the_first_photo(exported, some, tmp_path, capsys):
    for words, sentence in [(['--cls', 'lefty'], "no class is named 'lefty': did you mean 'left'?"), (['--cls', '7'], 'class 7 does not exist'),
                            (['--layer', 'nope'], "'nope'"), (['--cls', 'actual'], "cls 'actual' needs labels")]:
        assert explain(exported, some, '--out', tmp_path/'maps', *words)==2
        assert sentence in capsys.readouterr().err
    assert not list((tmp_path/'maps').rglob('*'))
    for name, content in (('text.pkl', b'no pickle'), ('list.pkl', b'')):
        (tmp_path/name).write_bytes(content)
        assert explain(tmp_path/name, some, '--out', tmp_path/'maps')==2
        assert 'is no learner that can be loaded, as learn.export() writes it' in capsys.readouterr().err


def test_stopped_with_ctrl_c_and_taken_up_again(exported, some, tmp_path, monkeypatch, capsys):
    out, real, calls = tmp_path/'maps', Results.add, []
    def add(self, photo, *args):
        if len(calls)==4: signal.raise_signal(signal.SIGINT)
        calls.append(photo.path)
        real(self, photo, *args)
    monkeypatch.setattr(Results, 'add', add)
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # a shell that starts something in the background has it ignored
    try: assert explain(exported, some, '--out', out)==130
    finally: signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert f'stopped: 4 photos are finished and stay in {str(out)!r}, 2 are left; the same command, given again, does these' in said
    assert len(table(out))==4 and len(list(out.rglob('*.png')))==4
    calls.clear()
    before = {file: file.stat().st_mtime_ns for file in out.rglob('*.png')}
    monkeypatch.setattr(Results, 'add', lambda self, photo, *args: (calls.append(photo.path), real(self, photo, *args)))
    assert explain(exported, some, '--out', out)==0
    assert len(calls)==2 and {file: file.stat().st_mtime_ns for file in before}==before
    assert explain(exported, some, '--out', tmp_path/'at once')==0
    for row, at_once in zip(table(out), table(tmp_path/'at once'), strict=True): # the last photos were in another batch
        assert float(row.pop('peak'))==pytest.approx(float(at_once.pop('peak'))) and float(row.pop('probability'))==pytest.approx(float(at_once.pop('probability'))) and row==at_once


def test_finished_photos_are_left_and_other_questions_refused(exported, some, tmp_path, monkeypatch, capsys):
    out = tmp_path/'maps'
    assert explain(exported, some, '--out', out)==0
    with monkeypatch.context() as patch:
        patch.setattr(room, 'open_learner', lambda *args: pytest.fail('nothing is left to do'))
        assert explain(exported, some, '--out', out)==0
        assert explain(exported, some, '--out', out, '--cls', 'left')==2
    assert f'the maps in {str(out)!r} were made without --cls: name another folder, or make them anew with --overwrite' in capsys.readouterr().err
    assert explain(exported, some, '--out', out, '--cls', 'left', '--overwrite')==0
    assert {row['explains'] for row in table(out)}=={'left'} and len(list(out.rglob('*.png')))==6


def test_names_come_in_at_the_standard_input(exported, some, tmp_path, monkeypatch):
    files = sorted(get_image_files(some))[:2]
    strange = some/'line\nbreak.png'
    shutil.copy(files[0], strange)
    for content in f'{files[0]}\n{files[1]}\n', f'{files[0]}\0{strange}\0':
        out = tmp_path/f'maps{len(content)}'
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content.encode())))
        assert explain(exported, '-', '--out', out, '--format', 'json')==0
        assert [row['file'] for row in json.loads((out/'predictions.json').read_text())]==[name for name in content.replace('\0', '\n\n').split('\n') if name] or '\0' in content
    assert [row['file'] for row in json.loads((out/'predictions.json').read_text())]==[str(files[0]), str(strange)]


def test_several_labels_have_a_map_each(pictures, some, tmp_path):
    block = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files, get_y=lambda file: [parent_label(file), 'square'], splitter=RandomSplitter(seed=0), item_tfms=Resize(64))
    learn = Learner(block.dataloaders(pictures, bs=4, num_workers=0), network(3))
    learn.model[1][-1].bias.data[:] = torch.tensor([9., -9., 12.]) # left, and surely square
    learn.export(tmp_path/'export.pkl')
    assert explain(tmp_path/'export.pkl', some/'left', '--out', tmp_path/'maps')==0
    rows = table(tmp_path/'maps')
    assert len(rows)==6 and [row['explains'] for row in rows[:2]]==['square', 'left'] and all((tmp_path/'maps'/row['picture']).exists() for row in rows)


def test_maps_that_show_nothing_are_counted(dls, some, tmp_path, capsys):
    "A network in which nothing ever speaks for the second class"
    learn = Learner(dls, network(2), loss_func=CrossEntropyLossFlat())
    learn.model[1][-1].weight.data = torch.tensor([[1.], [-1.]])*torch.ones(8)
    learn.export(tmp_path/'export.pkl')
    assert explain(tmp_path/'export.pkl', some, '--out', tmp_path/'maps', '--cls', 'left', '--cls', 'right', method='cam')==0
    assert [row['remark'] for row in table(tmp_path/'maps')]==['', 'no positive evidence']*6
    said = capsys.readouterr().err
    assert "6 maps show nothing, and their pictures are plain: see 'remark' in the table" in said and 'speaks for what was asked' not in said


def test_pictures_of_many_sizes_are_taken_one_by_one(pictures, tmp_path):
    "A learner that resizes nothing makes no batch of them"
    dls = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(seed=0)).dataloaders(pictures, bs=4, num_workers=0)
    Learner(dls, network(2), loss_func=CrossEntropyLossFlat()).export(tmp_path/'export.pkl')
    (tmp_path/'photos').mkdir()
    for size in 48, 64, 80: Image.fromarray(np.random.default_rng(size).integers(0, 255, (size, size, 3), dtype=np.uint8)).save(tmp_path/f'photos/{size}.png')
    assert explain(tmp_path/'export.pkl', tmp_path/'photos', '--out', tmp_path/'maps')==0
    assert [pixels(tmp_path/f'maps/{size}.png').shape[0] for size in (48, 64, 80)]==[48, 64, 80]


def test_weights_hold_no_code(exported, dls, some, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType('my_model')
    module.build = lambda: Learner(dls, nn.Sequential(*network(2)), loss_func=CrossEntropyLossFlat())
    monkeypatch.setitem(sys.modules, 'my_model', module)
    state = network(2).state_dict()
    state = {name: value + .01 if value.is_floating_point() else value for name, value in state.items()}
    torch.save(state, 'weights.pth')
    from safetensors.torch import save_file
    save_file(state, 'weights.safetensors')
    torch.save(dict(model=state, opt={}), 'saved.pth') # as `learn.save` writes it
    learn = module.build()
    learn.model.load_state_dict(state)
    file = sorted(get_image_files(some))[0]
    expected = learn.get_cams(file, method='gradcam')
    for name in 'weights.pth', 'weights.safetensors', 'saved.pth':
        assert explain(file, '--out', f'maps {name}', '--weights', name, '--builder', 'my_model:build')==0
        assert float(table(f'maps {name}')[0]['peak'])==pytest.approx(expected.maps.max().item())
        assert 'pickle' not in capsys.readouterr().err
    for words, sentence in [(['--weights', str(exported), '--builder', 'my_model:build'], 'are not those of the learner'), (['--weights', 'weights.pth', '--builder', 'my_model'], '--builder is module:function'),
                            (['--weights', 'weights.pth', '--builder', 'my_model:nothing'], "there is no function 'nothing' in 'my_model'"), (['--weights', 'weights.pth', '--builder', 'no_such:f'], 'cannot be imported')]:
        assert explain(file, '--out', 'maps', *words)==2
        assert sentence in capsys.readouterr().err


def test_the_worst_mistakes(exported, pictures, tmp_path, capsys):
    (pictures/'left/extra.txt').touch()
    assert main(['top-losses', str(exported), '--data', str(pictures), '--out', str(tmp_path/'top'), '--k', '3', '--method', 'gradcam', '--show', 'pred'])==0
    learn = load_learner(exported)
    interp = CAMInterpretation.from_learner(learn, dl=learn.dls.test_dl(sorted(get_image_files(pictures)), with_labels=True))
    rows = list(csv.DictReader((tmp_path/'top/top_losses.csv').open()))
    assert [float(row['loss']) for row in rows]==pytest.approx(interp.top_losses(3)[0].tolist(), abs=1e-6)
    assert [json.loads(row['boxes']) for row in rows]==interp.top_losses_cams(3, method='gradcam').to_df().boxes.tolist()
    assert pixels(tmp_path/'top/top_losses.png').shape[0] > 200
    assert '3 of 24 photos' in capsys.readouterr().out


def test_a_page_from_the_shell(exported, pictures, tmp_path, capsys):
    page, facts = tmp_path/'new'/'page.html', tmp_path/'new'/'facts.json'
    assert main(['report', str(exported), '--data', str(pictures), '--out', str(page), '--json', str(facts), '--where', 'wrong', '--method', 'gradcam'])==0
    learn = load_learner(exported)
    interp = CAMInterpretation.from_learner(learn, dl=learn.dls.test_dl(sorted(get_image_files(pictures)), with_labels=True))
    told = json.loads(facts.read_text())
    assert {item['position'] for item in told['items'] if item['shown']}==set(interp.select('wrong').tolist()) and len(told['items'])==24
    n_shown = len(interp.select('wrong'))
    assert told['models'][0]['methods']==['gradcam'] and f'24 photos, of which {n_shown} are shown: ' in capsys.readouterr().out and page.stat().st_size > 10_000


@pytest.mark.parametrize('wrong, words', [(['--n', '0'], '--n 0 leaves nothing to show'), (['--where', 'loss >'], 'where'), (['--out', 'page.pdf'], 'a report is a page')])
def test_a_page_that_makes_no_sense(exported, pictures, tmp_path, capsys, monkeypatch, wrong, words):
    monkeypatch.chdir(tmp_path)
    assert main(['report', str(exported), '--data', str(pictures), *wrong])==2 and words in capsys.readouterr().err
    assert not list(tmp_path.glob('*.*'))


def test_an_empty_folder_is_said_once(exported, tmp_path, capsys):
    assert main(['report', str(exported), '--data', str(tmp_path)])==2
    said = capsys.readouterr().err.splitlines()
    assert len(said)==2 and said[0].endswith(f"--data {str(tmp_path)!r}: there are no photos in this folder")


def test_a_file_that_is_no_learner_says_what_to_do(dls, some, tmp_path, monkeypatch, capsys):
    code = types.ModuleType('common_labels')
    exec('def label(file): return file.parent.name', code.__dict__)
    monkeypatch.setitem(sys.modules, 'common_labels', code)
    learn = Learner(dls, network(2), loss_func=CrossEntropyLossFlat())
    learn.model.label = code.label
    learn.export(tmp_path/'mine.pkl')
    torch.save(network(2).state_dict(), tmp_path/'weights.pth')
    monkeypatch.delitem(sys.modules, 'common_labels')
    for name, words in (('mine.pkl', "cannot import module 'common_labels'; functions that it was made with, as a labelling function"), ('weights.pth', '--builder module:function, the function that builds')):
        assert explain(tmp_path/name, some, '--out', tmp_path/'maps')==2
        said = capsys.readouterr().err
        assert words in said and "'res'" not in said and "'dls'" not in said


def test_a_row_an_item():
    "What is predicted right has one map; what is not has a second, with numbers behind its names"
    cams = CAMs(torch.rand(2, 2, 4, 4), classes=torch.tensor([[0, 1], [1, 1]]), labels=['predicted', 'actual'], preds=torch.tensor([[.9, .1], [.2, .8]]), targs=torch.tensor([1, 1]), vocab=['cat', 'dog'], task='single')
    rows, maps = one_row_an_item(cams.to_df()), cams.to_df()
    assert rows[['index', 'prediction', 'label', 'explains', 'explains_2']].fillna('').values.tolist()==[[0, 'cat', 'dog', 'cat', 'dog'], [1, 'dog', 'dog', 'dog', '']]
    assert json.loads(rows['boxes'][0])==maps['boxes'][0] and json.loads(rows['boxes_2'][0])==maps['boxes'][1] and rows['peak'].tolist()==maps['peak'][[0, 2]].tolist()


@pytest.mark.slow
def test_a_label_that_the_learner_does_not_know_is_listed(exported, some, tmp_path, capsys):
    (some/'up').mkdir()
    shutil.copy(sorted(get_image_files(some))[0], some/'up/0.png')
    assert main(['top_losses', str(exported), '--data', str(some), '--out', str(tmp_path/'top'), '--k', '2', '--method', 'gradcam'])==1
    assert "0.png': it has no label that the learner knows" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_are_compared(exported, pictures, tmp_path, capsys):
    assert main(['compare', str(exported), '--data', str(pictures), '--out', str(tmp_path/'c'), '--method', 'gradcam', '--n', '2'])==0
    rows = {row['method']: row for row in csv.DictReader((tmp_path/'c/compare.csv').open())}
    learn = load_learner(exported)
    table = CAMInterpretation.from_learner(learn, dl=learn.dls.test_dl(sorted(get_image_files(pictures)), with_labels=True)).compare_cams(['gradcam'], n=2)
    assert float(rows['gradcam']['insertion'])==pytest.approx(table.set_index('method').insertion['gradcam'], abs=1e-5)
    assert 'gradcam' in capsys.readouterr().out and (tmp_path/'c/compare.png').exists()


def test_methods_and_layers_are_listed(exported, capsys):
    from fastai_cam.methods import METHODS
    assert main(['methods'])==0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:len(METHODS) + 1]]==list(METHODS)
    assert main(['layers', str(exported), '--all'])==0
    lines = capsys.readouterr().out.splitlines()
    learn = load_learner(exported)
    assert lines[0].split()==['layer', 'kind', 'grid', 'channels', 'used_by'] and [line.split()[0] for line in lines[1:]]==list(learn.cam_layers(np.zeros((64, 64, 3), np.uint8)).layer)


def test_a_table_is_what_explain_writes(exported, some, tmp_path, monkeypatch, capsys):
    "The learner's own way to a table, here a stand-in of it"
    asked = {}
    class Table(list):
        errors = pd.DataFrame(dict(item=[], error=[]))
    def stand_in(self, source, to, cls=None, method=None, layer=None, shard=4096, on_error='record', bs=None, boxes=False):
        asked.update(source=source, to=to, cls=cls, method=method, bs=bs, boxes=boxes)
        return Table(source)
    monkeypatch.setitem(sys.modules, 'fastai_cam.data', types.ModuleType('fastai_cam.data'))
    monkeypatch.setattr(Learner, 'explain', stand_in, raising=False)
    assert explain(exported, some, '--out', tmp_path/'maps', '--format', 'parquet', '--cls', 'left', '--bs', 3)==0
    assert asked==dict(source=[str(file) for file in sorted(get_image_files(some))], to=str(tmp_path/'maps'), cls='left', method='gradcam', bs=3, boxes=True)
    Table.errors = pd.DataFrame(dict(item=[str(some/'cut.png')], error=['is not an image that can be read']))
    assert explain(exported, some, '--out', tmp_path/'maps', '--format', 'parquet')==1
    assert f"{str(some/'cut.png')!r}: is not an image that can be read" in capsys.readouterr().err
    def refuse(*args, **kwargs): raise ValueError('the maps in this folder are of another model')
    monkeypatch.setattr(Learner, 'explain', refuse)
    assert explain(exported, some, '--out', tmp_path/'maps', '--format', 'parquet')==2
    assert 'the maps in this folder are of another model' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'fastai_cam.data', None)
    assert explain(exported, some, '--out', tmp_path/'maps', '--format', 'parquet')==2
    assert "needs the extra 'data'" in capsys.readouterr().err


def test_help_is_there_at_once_and_has_examples(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop: main([name, '--help'])
        said = capsys.readouterr().out
        assert stop.value.code==0 and f'usage: fastai_cam {name}' in said and f'examples:\n  fastai_cam {name}' in said
        if 'export.pkl' in said.splitlines()[0]: assert 'loading it runs the code in it, so it must come from someone you trust' in said
    assert main(['--help'])==0 and all(f'\n  {name} ' in said for name in COMMANDS for said in [capsys.readouterr().out or said])
    code = "import sys; from fastai_cam.cli.shell import main; main(['--help']); sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True).returncode==0


def test_the_program_is_installed_with_the_package():
    import tomllib
    scripts = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['scripts']
    module, _, name = scripts['fastai_cam'].partition(':')
    assert getattr(import_module(module), name) is main


def test_a_disk_that_is_full_is_said(exported, some, tmp_path, monkeypatch, capsys):
    real, calls = Results.add, []
    def add(self, *args):
        calls.append(1)
        if len(calls)==3: raise OSError(28, 'No space left on device')
        real(self, *args)
    monkeypatch.setattr(Results, 'add', add)
    assert explain(exported, some, '--out', tmp_path/'maps')==1
    assert 'No space left on device; what is finished stays' in capsys.readouterr().err and len(table(tmp_path/'maps'))==2


def program(*words, **kwargs):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'DISPLAY': '', 'MPLBACKEND': 'tkagg'} # it needs no display, whatever the shell says
    return subprocess.Popen([sys.executable, '-m', 'fastai_cam', *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize('sign, status', [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_that_is_stopped_goes_on_where_it_was(sign, status, exported, pictures, tmp_path, capsys):
    photos = tmp_path/'photos'
    for turn in range(10): shutil.copytree(pictures, photos/str(turn), ignore=shutil.ignore_patterns('*.txt')) # 240 photos
    out = tmp_path/'maps'
    command = 'explain', exported, photos, '--out', out, '--method', 'gradcam', '--bs', 8
    process = program(*command)
    while len(list(out.rglob('*.png'))) < 20: time.sleep(.05)
    process.send_signal(sign)
    said = process.communicate()[1]
    assert process.returncode==status
    if sign==signal.SIGINT: assert 'the same command, given again, does these' in said and 'Traceback' not in said
    n = len(list(out.rglob('*.png')))
    assert 20 <= n < 240
    assert all(pixels(file).shape==(64, 64, 3) for file in out.rglob('*.png')) # none is half a picture
    assert main([str(word) for word in command])==0
    assert 'of 240 photos are finished already' in capsys.readouterr().err
    assert len(table(out))==240 and len(list(out.rglob('*.png')))==240 and len({row['picture'] for row in table(out)})==240


@pytest.mark.slow
def test_a_real_program_with_workers_and_names_from_find(exported, pictures, tmp_path):
    found = subprocess.run(['find', str(pictures), '-name', '*.png', '-print0'], capture_output=True, check=True).stdout
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'fastai_cam', 'explain', str(exported), '-', '--out', str(tmp_path/'maps'), '--workers', '2', '--bs', '5', '--format', 'json']
    done = subprocess.run(command, input=found, env=env, capture_output=True)
    assert done.returncode==0, done.stderr
    rows = json.loads((tmp_path/'maps/predictions.json').read_text())
    learn = load_learner(exported)
    preds, _ = learn.get_preds(dl=learn.dls.test_dl([Path(row['file']) for row in rows]))
    assert len(rows)==24 and [row['probability'] for row in rows]==pytest.approx(preds.max(1).values.tolist(), abs=1e-6)


def test_what_is_told_about_a_model_is_the_same_for_every_command():
    "Written once, and read off the signature of each command"
    told = list(signature(model_options).parameters.values())
    for name, own in (('explain', told), ('top-losses', told), ('compare', told), ('layers', told[3:])):
        found = list(signature(COMMANDS[name]).parameters.values())[-len(own):]
        assert [(one.name, one.default) for one in found]==[(one.name, one.default) for one in own]
