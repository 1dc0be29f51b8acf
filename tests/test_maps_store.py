"What was saved comes back exactly, and nothing that a file says is trusted."
import base64
import copy
import io
import json
import os
import pickle
import tracemalloc
import warnings
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from fastai.vision.all import resnet18, vision_learner

import fastai_cam.learner # gives learners get_cams
from fastai_cam.tasks import NOT_ASKED, Task, TASKS
from fastai_cam.maps.cams import CAMs, Images
from fastai_cam.maps.pixels import to_slices

from helpers.maps import bumps, everything, names, same, VOCAB


# -- a batch

def test_maps_that_were_pickled_with_the_name_of_their_task():
    cams = CAMs(torch.zeros(1, 2, 2), task='multi', thresh=.3)
    state = {name: value for name, value in vars(cams).items() if name != '_task'} | dict(task='multi', signed=True, thresh=.3)
    old = CAMs.__new__(CAMs)
    old.__setstate__(state)
    assert (old.task.name, old.signed, old.thresh, type(old.task))==('multi', True, .3, TASKS['multi'])


def test_a_task_that_is_not_known_where_its_file_is_read(tmp_path):
    class Rank(Task):
        "A rank"
        name = 'rank'
        def answers(self, row): return [f'rank {int(row.pred.argmax())}']
    cams = CAMs(torch.ones(1, 2, 2), preds=torch.tensor([[.2, .7, .1]]), targs=torch.tensor([2]), vocab=VOCAB, task=Rank(), thresh=.25)
    file = cams.save(tmp_path/'cams.npz')
    assert cams.item_title(0)==CAMs.load(file).item_title(0)=='predicted rank 1 0.70' and type(CAMs.load(file).task) is Rank
    del TASKS['rank']
    back = CAMs.load(file)
    assert (type(back.task), back.task.name, back.thresh, back.signed)==(Task, 'rank', .25, False)
    assert back.item_title(0)==CAMs(cams.maps, preds=cams.preds, targs=cams.targs, vocab=VOCAB).item_title(0)=='predicted dog 0.70 · actual car'
    assert CAMs.load(back.save(tmp_path/'again.npz')).task.name=='rank'


# -- files

def test_round_trip_of_everything(tmp_path):
    cams = everything()
    assert cams.save(tmp_path/'cams.npz')==tmp_path/'cams.npz'
    same(CAMs.load(tmp_path/'cams.npz'), cams)
    assert CAMs.load(str(tmp_path/'cams.npz')).images is None
    back = CAMs.load(tmp_path/'cams.npz', images=cams.images)
    assert [m.title for maps in back for m in maps]==[m.title for maps in cams for m in maps] and len(back.show(max_n=2))==4


def test_round_trip_of_almost_nothing(tmp_path):
    for cams in (CAMs(torch.zeros(0, 7, 7)), CAMs(torch.rand(1, 2, 3, 4, 5), n_space=3)):
        cams.save(tmp_path/'cams.npz')
        same(CAMs.load(tmp_path/'cams.npz'), cams)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip_is_exact(dtype, tmp_path):
    maps = torch.tensor([[[1/3, -1e-5, float('inf')], [-0., 2., float('nan')]]]).to(dtype).requires_grad_().transpose(1, 2)
    CAMs(maps, classes=torch.tensor([NOT_ASKED], dtype=torch.int32)).save(tmp_path/'cams.npz')
    back = CAMs.load(tmp_path/'cams.npz')
    assert back.maps.dtype==dtype and back.maps.shape==(1, 3, 2) and torch.equal(back.maps.nan_to_num(7), maps.nan_to_num(7)) and torch.equal(back.maps.signbit(), maps.signbit())
    assert back.classes.dtype==torch.int32 and not back.maps.requires_grad


def test_names_that_are_no_text(tmp_path):
    cams = CAMs(torch.zeros(3, 2, 2), items=[tmp_path/'a.png', 7, torch.zeros(3, 4, 4)], vocab=[1, True, np.str_('c'), None], labels=['ü'])
    odd = CAMs(torch.zeros(2, 2, 2), items=torch.arange(2), vocab=np.array(['a', 'b']), labels=(b'caf\xc3\xa9',), signed=1)
    odd = CAMs.load(odd.save(tmp_path/'odd.npz'))
    assert (odd.items, odd.vocab, odd.labels, odd.signed)==(['0', '1'], ['a', 'b'], ['café'], True)
    back = CAMs.load(cams.save(tmp_path/'cams.npz'))
    assert back.items==[str(tmp_path/'a.png'), '7', 'tensor [3, 4, 4]'] and back.vocab==[1, True, 'c', None] and back.labels==['ü']


def test_images_are_kept_as_bytes_if_asked(tmp_path):
    images = [torch.rand(3, 8, 9), (torch.rand(6, 7)*255).byte(), np.uint8(np.random.rand(4, 5, 3)*255)]
    back = CAMs.load(CAMs(torch.ones(3, 2, 2), images).save(tmp_path/'cams.npz', images=True))
    assert np.array_equal(back[0].image, (images[0]*255).round().byte().permute(1, 2, 0)) and np.array_equal(back[1].image, images[1]) and np.array_equal(back[2].image, images[2])
    assert len(back.show())==3 and len(back[[2]].images)==1
    volumes = [torch.rand(1, 4, 6, 6), torch.rand(3, 4, 6, 6)]
    back = CAMs.load(CAMs(torch.ones(2, 2, 2, 2), volumes, n_space=3).save(tmp_path/'cams.npz', images=True))
    assert np.array_equal(to_slices(back[1].image), (to_slices(volumes[1])*255).round().astype(np.uint8)) and back[0].image.shape==(4, 6, 6)


def test_nothing_in_the_file_is_pickled(tmp_path):
    everything().save(tmp_path/'cams.npz', images=True)
    with np.load(tmp_path/'cams.npz', allow_pickle=False) as found: assert all(found[name].dtype != object for name in found.files) and json.loads(str(found['header']))['format']==1


def test_a_half_written_file_replaces_nothing(tmp_path, monkeypatch):
    cams = everything()
    file = cams.save(tmp_path/'cams.npz')
    def breaks(out, **arrays): out.write(b'half'); raise OSError('the disk is full')
    monkeypatch.setattr(np, 'savez_compressed', breaks)
    with pytest.raises(OSError, match='the disk is full'): cams[:1].save(file)
    same(CAMs.load(file), cams)
    assert [f.name for f in tmp_path.iterdir()]==['cams.npz']


def test_a_damaged_byte_is_no_riddle(tmp_path):
    "Wherever a byte is wrong, the error names the file (or the byte did not matter)"
    cams, file = everything(2), tmp_path/'cams.npz'
    whole = cams.save(file).read_bytes()
    refused = 0
    for place in range(0, len(whole), 13):
        file.write_bytes(whole[:place] + bytes([whole[place]^255]) + whole[place+1:])
        try: CAMs.load(file)
        except ValueError as e:
            assert 'cams.npz' in str(e) and 'CAMs.save' in str(e)
            refused += 1
    assert refused > len(whole)/13/2


def test_wrong_files_are_named(tmp_path):
    cams, file = everything(), tmp_path/'cams.npz'
    with pytest.raises(FileNotFoundError, match='there is no file'): CAMs.load(file)
    with pytest.raises(FileNotFoundError, match='there is no folder .*make it first'): cams.save(tmp_path/'no'/'cams.npz')
    with pytest.raises(ValueError, match='is a folder'): cams.save(tmp_path)
    whole = cams.save(file).read_bytes()
    damaged = bytearray(whole)
    damaged[200:400] = bytes(200)
    np.save(tmp_path/'array.npy', np.zeros(3))
    np.savez(tmp_path/'other.npz', maps=np.zeros(3))
    pickled = pickle.dumps(cams.maps)
    for name, content in {'cut.npz': whole[:len(whole)//2], 'damaged.npz': bytes(damaged), 'empty.npz': b'', 'text.npz': b'hello', 'pickled.npz': pickled, 'array.npy': None, 'other.npz': None}.items():
        if content is not None: (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name}.* is not a file that CAMs.save wrote'): CAMs.load(tmp_path/name)
    with pytest.raises(ValueError, match='3 images do not fit the 4 items'): CAMs.load(file, images=[None]*3)
    with pytest.raises(ValueError, match='no images to save'): CAMs.load(file).save(file, images=True)
    cams.preds = (cams.preds, cams.preds)
    with pytest.raises(TypeError, match='set cams.preds = None first'): cams.save(file)


def test_a_newer_format_is_refused(tmp_path):
    everything().save(tmp_path/'cams.npz')
    with np.load(tmp_path/'cams.npz') as found: arrays = {name: found[name] for name in found.files}
    arrays['header'] = np.array(json.dumps({**json.loads(str(arrays['header'])), 'format': 99}))
    np.savez(tmp_path/'new.npz', **arrays)
    with pytest.raises(ValueError, match='has format 99, and this version of fastai_cam reads up to 1: update fastai_cam'): CAMs.load(tmp_path/'new.npz')


def test_pickle_keeps_what_is_held_and_leaves_what_must_be_read():
    cams = everything()
    back = pickle.loads(pickle.dumps(cams[[3, 1]]))
    same(back, cams[[3, 1]])
    assert torch.equal(back.images[0], cams.images[3]) and len(back.images)==2 and len(back.show(max_n=1))==2
    def fetch(idxs): raise AssertionError('read')
    needed = CAMs(cams.maps, Images(fetch, range(4)), items=cams.items)
    back = pickle.loads(pickle.dumps(needed))
    assert back.images is None and torch.equal(back.maps, cams.maps) and back[0][0].image is None
    assert torch.equal(pickle.loads(pickle.dumps(cams[0, 1])).map, cams.maps[0, 1])


def test_maps_that_were_pickled_before_methods_were_kept(tmp_path):
    "They show, slice and save as before, and of no method"
    cams = CAMs(torch.arange(16.).view(2, 2, 2, 2), labels=['a', 'b'], vocab=VOCAB)
    state = {name: value for name,value in cams.__getstate__().items() if name not in ('method', 'layers')}
    old = CAMs.__new__(CAMs)
    old.__setstate__(state)
    assert old.method_of(0)=='' and old.layers is None and len(old.show())==4
    assert old[:1].method is None and torch.equal(old[:1].maps, cams.maps[:1])
    back = CAMs.load(old.save(tmp_path/'old.npz'))
    assert back.method is None and torch.equal(back.maps, cams.maps)


def test_copies_keep_their_images():
    needed = CAMs(torch.zeros(2, 2, 2), Images(lambda idxs: [torch.full((3, 4, 4), float(i)) for i in idxs], range(2)))
    for same_again in (copy.copy(needed), copy.deepcopy(needed)): assert same_again[1].image.max()==1
    assert copy.copy(needed.images)[1].max()==1 and pickle.loads(pickle.dumps(needed.images)) is None


# -- what comes back from a file

OLD = """
UEsDBC0AAAAIAAAAIQD80iVk//////////8KABQAaGVhZGVyLm5weQEAEAAoBgAAAAAAAHcBAAAAAAAArVTBSgMxEI1Xv2LpZRUW0VZ7KII3b4qXHkSkpLvp7uK2uySxKqVf4Q87oS80
pElh1cKDTTIz773JNN+P04en5xO2Zpu0ECqX6SRJb6ej8TDNknTRSi35atbKQpiTe94oQfuq4p2g9dl5lmyTP/xON4yxAWFBaAmSsCRwgsbZhJAQrggZvs3+ijAj1E5OSRAE5eUOvdwC
9b8IXSTHarO1u0DMAHWs9pxQES4Ic/hqcG49GR9j5LqacsRy8KiIrmOcNfqiwXEd4OmQJ9CHPvVDfkbor8+jESNxL//tw+r4ba/6eLH9KqGthb6+89ACDWK3AU8csQJrn+Mlco81+LSz
Z+JePY7aiVkeqc+hu4PXMtCXeSTG51zDd+74C3Hacx3gKlAjxmE9feI75MtofEdfGy//A3dl3oS7CId9cxQ8c2gWHpf/3tj/gsl7Y4czo9h+5ktoszWzQFyJWPeebT3DJeFTBHRUbD83
Cms3/5Lt7tR4uGG7Gf0BUEsDBC0AAAAIAAAAIQC45KEd//////////8IABQAbWFwcy5ucHkBABAAkAAAAAAAAABVAAAAAAAAAJvsF+obEMnIUMZQrZ6SWpxcpG6loG6TaaSuo6Cell9U
UpSYF59flJIKEndLzClOBYoXZyQWpAL5GkY6CiCkqaNQq0Ae4GqwZzjAYM8ABA4ODfsb7ABQSwMELQAAAAgAAAAhAHH7Oav//////////wsAFABjbGFzc2VzLm5weQEAEACQAAAAAAAA
AEgAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNpoa6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjqaOgq1ChQALkYGVAAAUEsDBC0AAAAIAAAAIQD7oPWW////////
//8JABQAcHJlZHMubnB5AQAQAJAAAAAAAAAAUwAAAAAAAACb7BfqGxDJyFDGUK2eklqcXKRupaBuk2airqOgnpZfVFKUmBefX5SSChJ3S8wpTgWKF2ckFqQC+RpGOgpGmjoKtQpkAy4G
hgY7BgYHewYGBjAGAFBLAwQtAAAACAAAACEA7/uTZ///////////CQAUAHRhcmdzLm5weQEAEACQAAAAAAAAAEkAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgbpNpoa6joJ6WX1RS
lJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjqaOgq1ChQALkYGCIDRAFBLAwQtAAAACAAAACEAh49xGv//////////CgAUAGxvc3Nlcy5ucHkBABAAiAAAAAAAAABMAAAAAAAAAJvsF+ob
EMnIUMZQrZ6SWpxcpG6loG6TZqKuo6Cell9UUpSYF59flJIKEndLzClOBYoXZyQWpAL5GkY6mjoKtQoUAC4GhgY7BgYGewBQSwMELQAAAAgAAAAhALDRmgv//////////wsAFAByZWdp
b25zLm5weQEAEACEAAAAAAAAAE0AAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgXpNkqK6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjoKhjoKRpo6CrUK5AEuRgYGRgBQ
SwMELQAAAAgAAAAhAK51yHb//////////wsAFABpbWFnZV8wLm5weQEAEACMAAAAAAAAAEoAAAAAAAAAm+wX6hsQychQxlCtnpJanFykbqWgXlNqqK6joJ6WX1RSlJgXn1+UkgoSd0vM
KU4FihdnJBakAvkaRjoKQGSsqaNQq0Ae4DJGAgBQSwMELQAAAAgAAAAhAFJsQbn//////////wsAFABpbWFnZV8xLm5weQEAEACEAAAAAAAAAEkAAAAAAAAAm+wX6hsQychQxlCtnpJa
nFykbqWgXlNqqK6joJ6WX1RSlJgXn1+UkgoSd0vMKU4FihdnJBakAvkaRjoKRpo6CrUKZAOuNCAAAFBLAQItAy0AAAAIAAAAIQD80iVkdwEAACgGAAAKAAAAAAAAAAAAAACAAQAAAABo
ZWFkZXIubnB5UEsBAi0DLQAAAAgAAAAhALjkoR1VAAAAkAAAAAgAAAAAAAAAAAAAAIABswEAAG1hcHMubnB5UEsBAi0DLQAAAAgAAAAhAHH7OatIAAAAkAAAAAsAAAAAAAAAAAAAAIAB
QgIAAGNsYXNzZXMubnB5UEsBAi0DLQAAAAgAAAAhAPug9ZZTAAAAkAAAAAkAAAAAAAAAAAAAAIABxwIAAHByZWRzLm5weVBLAQItAy0AAAAIAAAAIQDv+5NnSQAAAJAAAAAJAAAAAAAA
AAAAAACAAVUDAAB0YXJncy5ucHlQSwECLQMtAAAACAAAACEAh49xGkwAAACIAAAACgAAAAAAAAAAAAAAgAHZAwAAbG9zc2VzLm5weVBLAQItAy0AAAAIAAAAIQCw0ZoLTQAAAIQAAAAL
AAAAAAAAAAAAAACAAWEEAAByZWdpb25zLm5weVBLAQItAy0AAAAIAAAAIQCudch2SgAAAIwAAAALAAAAAAAAAAAAAACAAesEAABpbWFnZV8wLm5weVBLAQItAy0AAAAIAAAAIQBSbEG5
SQAAAIQAAAALAAAAAAAAAAAAAACAAXIFAABpbWFnZV8xLm5weVBLBQYAAAAACQAJAPgBAAD4BQAAAAA="""


def test_files_of_the_first_format_are_read(tmp_path):
    "A file as the first version wrote it"
    (tmp_path/'old.npz').write_bytes(base64.b64decode(OLD))
    back = CAMs.load(tmp_path/'old.npz')
    maps = torch.tensor([[[1., -2.], [.5, 0.]], [[0., 3.], [-1., .25]]]).bfloat16()
    same(back, CAMs(maps, None, torch.tensor([1, 0]), ['predicted'], torch.tensor([[.25, .75], [.5, .5]]), torch.tensor([1, 1]), torch.tensor([.25, .5]), ['a.png', 'b.png'], ['cat', 'dog'], 2, 'single',
                    torch.tensor([[[True, False]], [[False, True]]]), True, .25, [None, 'why?']))
    assert np.array_equal(back[0].image, np.full((2, 2, 3), 51)) and np.array_equal(back[1].image, np.full((2, 2), 102))


def rewritten(file, header=None, **arrays):
    "The file with some words of its header, and some arrays, replaced (`None`: left out)"
    with np.load(file) as found: content = {name: found[name] for name in found.files}
    words = json.loads(str(content['header']))
    for name, value in (header or {}).items():
        if value is None: del words[name]
        else: words[name] = value
    content = {**content, 'header': np.array(json.dumps(words)), **arrays}
    np.savez_compressed(file, **{name: array for name, array in content.items() if array is not None})
    return file


@pytest.mark.parametrize('header, arrays, message', [
    *[({word: None}, {}, f"header lacks '{word}'") for word in ('n_images', 'dtypes', 'labels', 'items', 'vocab', 'texts', 'n_space', 'task', 'signed', 'thresh')],
    ({'format': None}, {}, 'names no format'), ({'format': 'x'}, {}, 'names no format'), ({'format': 0}, {}, 'names no format'),
    ({'format': True}, {}, 'names no format'),
    ({'task': 3}, {}, "3 is no 'task'"), ({'n_space': 4}, {}, "4 is no 'n_space'"), ({'n_space': [2]}, {}, 'n_space'),
    ({'signed': 1}, {}, 'signed'), ({'thresh': 2}, {}, 'thresh'),
    ({'thresh': float('nan')}, {}, 'thresh'), ({'items': 'abcd'}, {}, 'items'), ({'items': ['a']}, {}, '1 items for 4 items'),
    ({'items': [1, 2, 3, 4]}, {}, 'items'), ({'texts': ['a']*5}, {}, '5 texts for 4'),
    ({'labels': ['a']}, {}, '1 labels for 2 questions'), ({'vocab': {'a': 1}}, {}, 'vocab'), ({'n_images': -1}, {}, 'n_images'),
    ({'n_images': 2}, {}, '2 images for 4'), ({'n_images': 10**15}, {}, 'images for 4'),
    ({'n_images': 4}, {}, "has no 'image_0'"), ({'dtypes': {}}, {}, 'dtypes'), ({'dtypes': {'maps': 'torch.load'}}, {}, 'dtypes'),
    ({'dtypes': {'maps': 'torch.float32', 'header': 'torch.int8'}}, {}, 'dtypes'),
    ({'dtypes': {'maps': 'torch.float64'}}, {}, 'maps are float32, and its header says torch.float64'),
    ({'dtypes': {'maps': 'torch.int32'}}, {}, 'maps are float32'), ({'dtypes': [1]}, {}, 'dtypes'),
    ({}, {'maps': None}, "has no 'maps'"), ({}, {'preds': None}, "has no 'preds'"),
    ({}, {'maps': np.ones((4, 2), np.float32)}, 'cannot have the shape'), ({}, {'maps': np.ones((5, 2, 5, 6), np.float32)}, 'for 5 items'),
    ({}, {'classes': np.zeros((4, 3), int)}, 'classes have the shape'),
    ({}, {'losses': np.zeros(3, np.float32)}, r'losses have the shape \[3\] for 4'),
    ({}, {'preds': np.float32(1)}, r'preds have the shape \[\]'),
    ({}, {'targs': np.array(['a']*4)}, 'targs are <U1'), ({}, {'losses': np.zeros(4, 'M8[s]')}, 'losses are'),
    ({}, {'regions': np.ones((4, 20), bool)}, 'regions are a bool tensor'),
    ({'n_images': 4}, {f'image_{i}': np.zeros((3, 3), np.float32) for i in range(4)}, 'is no image'),
    ({'n_images': 4}, {f'image_{i}': np.zeros((3, 3, 7), np.uint8) for i in range(4)}, 'is no image'),
])
def test_a_header_is_not_trusted(header, arrays, message, tmp_path):
    everything().save(tmp_path/'cams.npz')
    with pytest.raises(ValueError, match='cams.npz.* is not a file that CAMs.save wrote, or it is damaged: .*' + message) as error: CAMs.load(rewritten(tmp_path/'cams.npz', header, **arrays))
    assert '\n' not in str(error.value)


def npy(shape, dtype='<f4', data=b''):
    "An array file that says it has this shape"
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(shape=shape, fortran_order=False, descr=dtype))
    return out.getvalue() + data


@pytest.mark.parametrize('name, content', [
    ('maps', npy((10**9, 2, 5, 6))), ('maps', npy((4, 10**5, 10**5, 2))), ('maps', npy((4, -1, 5, 6))),
    ('maps', npy((4, 2, 5, 6), data=b'short')), ('maps', npy((4, 2, 5, 6), data=b'\0'*961)), ('maps', npy((0, 10**30, 7))),
    ('maps', npy((4, 2, 5, 6), '|O', b'\0'*1920)), ('maps', pickle.dumps([1])), ('maps', b''), ('header', npy((), '<U1000000000')),
    ('header', npy((), '|O', pickle.dumps('x'))), ('header', npy((1,), '<U1', b'{\0\0\0')),
    ('header', npy((), '<U2', '{}'.encode('utf-32-le'))), ('header', npy((), '<U2', '[]'.encode('utf-32-le'))),
    ('header', npy((), '<U1', '{'.encode('utf-32-le'))), ('header', npy((), '<U100000', ('['*100000).encode('utf-32-le'))),
    ('header', npy((), '<U1', b'\xff'*4)),
])
def test_an_array_is_not_trusted(name, content, tmp_path):
    "Whatever a part of the file says about itself: one sentence, and no memory for what is not there"
    whole = everything().save(tmp_path/'cams.npz')
    with zipfile.ZipFile(whole) as archive: parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path/'wrong.npz', 'w', zipfile.ZIP_DEFLATED) as archive:
        for part, original in parts.items(): archive.writestr(part, content if part==f'{name}.npy' else original)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match='wrong.npz.* is not a file that CAMs.save wrote, or it is damaged: ') as error: CAMs.load(tmp_path/'wrong.npz')
        assert tracemalloc.get_traced_memory()[1] < 2e7 and '\n' not in str(error.value)
    finally: tracemalloc.stop()


def test_a_small_file_does_not_take_gigabytes(tmp_path):
    "Zeros shrink a thousandfold: 300 MB of them are a small file, as maps, as an image, or as something that nobody reads"
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, 'w', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('maps.npy', 'w', force_zip64=True) as out:
            out.write(npy((1, 10000, 7500)))
            for _ in range(100): out.write(bytes(3*10**6))
        archive.writestr('header.npy', npy((), '<U400', json.dumps(dict(format=1, n_images=0, dtypes={'maps': 'torch.float32'}, labels=None, items=None, vocab=None, texts=None, n_space=2, task='', signed=False, thresh=.5)).ljust(400).encode('utf-32-le')))
    (tmp_path/'bomb.npz').write_bytes(zeros.getvalue())
    assert (tmp_path/'bomb.npz').stat().st_size < 10**6
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match='bomb.npz.* is 0.3 MB and would unpack to 0.3 GB: if you trust it, load it with max_bytes=300000000'): CAMs.load(tmp_path/'bomb.npz')
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally: tracemalloc.stop()
    everything().save(tmp_path/'cams.npz')
    with zipfile.ZipFile(tmp_path/'cams.npz', 'a') as archive: archive.writestr('other.npy', 'nobody reads this')
    same(CAMs.load(tmp_path/'cams.npz'), everything())
    with pytest.raises(ValueError, match='max_bytes'): CAMs.load(tmp_path/'cams.npz', max_bytes=5500)
    same(CAMs.load(tmp_path/'cams.npz', max_bytes=10**6), everything())


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    cams = everything()
    cams.items = cams.items + ['another']
    with pytest.raises(ValueError, match='there are 5 items for 4 items'): cams.save(tmp_path/'cams.npz')
    assert names(tmp_path)==[]


def test_what_is_no_file_is_not_loaded(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    for wrong, kind in ((tmp_path/'pipe', FileNotFoundError), (tmp_path, ValueError), (3, TypeError), ('~nobody-of-that-name/a.npz', ValueError)):
        with pytest.raises(kind): CAMs.load(wrong)


def test_byte_order_and_memory_order_do_not_matter(tmp_path):
    cams = everything()
    cams.save(tmp_path/'cams.npz')
    same(CAMs.load(rewritten(tmp_path/'cams.npz', maps=np.asfortranarray(cams.maps.numpy().astype('>f4')))), cams)


# -- pictures that are not there any more: their sizes are

def of_pictures(n=3):
    "Maps 4×4, of one question, of pictures of different sizes that are read when they are needed"
    maps = torch.stack([bumps((4, 4), (1, 2, 1., .4))]*n)
    def fetch(idxs): return [torch.zeros(3, 40*(i + 1), 60) for i in idxs]
    return CAMs(maps, Images(fetch, range(n)))


def test_boxes_and_peaks_stay_in_pixels_of_the_picture(tmp_path):
    cams = of_pictures()
    back = CAMs.load(cams.save(tmp_path/'cams.npz'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert back.images is None and back.sizes.tolist()==[[40, 60], [80, 60], [120, 60]]
        assert back.boxes()==cams.boxes() and back.peaks()==cams.peaks() and back.boxes(.3)==cams.boxes(.3)
        assert back.boxes()[0][0].right > 4 and back.boxes()[2][0].bottom > 45
        for some in (back[[2, 0]], back[1:], back[torch.tensor([True, False, True])]): assert some.boxes()==[back.boxes()[int(h)//40 - 1] for h in some.sizes[:, 0]]
        assert back[1].boxes()==cams[1].boxes() and back[1].peaks()==cams[1].peaks()
        assert back.boxes(size=(4, 4))==cams.boxes(size=(4, 4))
        twice = CAMs.load(back.save(tmp_path/'again.npz')) # the sizes are passed on
        assert twice.boxes()==cams.boxes()
        axs = back.show(boxes=True)
        for ax, boxes, height in zip(axs, back.boxes(), (40, 80, 120)):
            assert tuple(ax.images[0].get_extent())==(-.5, 59.5, height - .5, -.5)
            assert (ax.patches[1].get_x() + .5, ax.patches[1].get_y() + .5)==(boxes[0].left, boxes[0].top)
        large = [torch.zeros(3, 2*height, 120) for height in (40, 80, 120)]
        assert CAMs.load(tmp_path/'cams.npz', images=large).boxes()==[one.boxes(size=image.shape[1:]) for one, image in zip(cams, large)] # pictures say more
    several = everything()
    assert CAMs.load(several.save(tmp_path/'cams.npz')).peaks()==several.peaks() and CAMs.load(several.save(tmp_path/'cams.npz'))[1, 1].boxes()==several[1, 1].boxes()
    assert CAMs.load(several.save(tmp_path/'cams.npz', images=True)).boxes()==several.boxes()
    plt.close('all')


def test_places_in_cells_are_said_once(tmp_path):
    "A file of an earlier version knows no sizes; pictures that are gone have none; maps that never had pictures were always in cells"
    cams = of_pictures()
    cams.save(tmp_path/'new.npz')
    old = CAMs.load(rewritten(tmp_path/'new.npz', {'sizes': None}))
    def fetch(idxs): raise OSError('gone')
    gone = CAMs.load(CAMs(cams.maps, Images(fetch, range(3))).save(tmp_path/'gone.npz'))
    with warnings.catch_warnings(record=True): unpickled = pickle.loads(pickle.dumps(cams))
    for lost in (old, gone, unpickled, old[1:], CAMs.load(old.save(tmp_path/'again.npz'))):
        for find in (lost.boxes, lost.peaks, lost[0].boxes, lost[0].peaks):
            with pytest.warns(UserWarning, match='in cells of the map') as said: find()
            assert len(said)==1 and 'size=' in str(said[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert lost.boxes(size=(40, 60))[0]==cams.boxes(size=(40, 60))[0]
            assert tuple(lost.show(boxes=True)[0].images[0].get_extent())==(-.5, 3.5, 3.5, -.5) # the drawing is right in any unit
            lost[0].show(peaks=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        bare = CAMs(cams.maps)
        assert CAMs.load(bare.save(tmp_path/'bare.npz')).boxes()==bare.boxes() and pickle.loads(pickle.dumps(bare)).boxes()==bare.boxes()
    plt.close('all')


@pytest.mark.parametrize('sizes, message', [('x', 'sizes'), ([[1, 2]], '1 sizes for 4'), ([[1]]*4, 'sizes'), ([[1, -2]]*4, 'sizes'), ([[1, 2.5]]*4, 'sizes'), ([[10**6, 10**6]]*4, 'sizes'), ([['a', 'b']]*4, 'sizes')])
def test_sizes_are_not_trusted(sizes, message, tmp_path):
    with pytest.raises(ValueError, match='or it is damaged: .*' + message): CAMs.load(rewritten(everything().save(tmp_path/'cams.npz'), {'sizes': sizes}))


def test_a_pickle_without_its_pictures_says_so():
    cams = of_pictures()
    with pytest.warns(UserWarning, match='are not pickled') as said: back = pickle.loads(pickle.dumps(cams))
    assert len(said)==1 and 'cams.images.load()' in str(said[0].message) and back.images is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cams.images = cams.images.load()
        back = pickle.loads(pickle.dumps(cams))
        assert back.images[2].shape==(3, 120, 60) and back.boxes()==cams.boxes()
        assert copy.deepcopy(of_pictures()).boxes()==cams.boxes()


# -- what can be stored, but not used

@pytest.mark.parametrize('header, arrays, message', [
    ({'dtypes': {'maps': 'torch.complex64'}}, {'maps': np.ones((4, 2, 5, 6), np.complex64)}, 'maps are torch.complex64'),
    ({'dtypes': {'maps': 'torch.float8_e5m2'}}, {'maps': np.ones((4, 2, 5, 6), np.uint8)}, 'maps are torch.float8_e5m2'),
    ({}, {'maps': np.ones((4, 2, 0, 6), np.float32)}, 'have no places'), ({}, {'maps': np.ones((4, 2, 5, 0), np.float32)}, 'have no places'),
    ({}, {'regions': np.ones((4, 3, 20, 30), bool)}, 'regions are'), ({}, {'regions': np.ones((4, 2, 2, 20, 30), bool)}, 'regions are'),
    ({}, {'regions': np.ones((4, 20), bool)}, 'regions are'), ({}, {'regions': np.ones((4, 0, 20), bool)}, 'regions are'),
    ({}, {'classes': np.full((4, 2), -99)}, 'class -99 is none'),
    ({'task': 'binary'}, {'classes': np.full((4, 2), 2)}, 'class 2 is none of the two'),
])
def test_what_cannot_be_used_is_not_loaded(header, arrays, message, tmp_path):
    everything().save(tmp_path/'cams.npz')
    if 'dtypes' in header: arrays.update({name: None for name in ('classes', 'preds', 'targs', 'losses', 'regions')})
    with pytest.raises(ValueError, match='or it is damaged: .*' + message) as error: CAMs.load(rewritten(tmp_path/'cams.npz', header, **arrays))
    assert '\n' not in str(error.value)


def test_a_class_of_another_output_is_loaded(tmp_path):
    "It is called by its number, in memory and from a file"
    cams = CAMs(torch.ones(2, 2, 2), classes=torch.tensor([7, NOT_ASKED]), vocab=VOCAB)
    assert CAMs.load(cams.save(tmp_path/'cams.npz')).question(0)=='class 7'


@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_what_cannot_be_used_is_not_saved(dtype, tmp_path):
    with pytest.raises(TypeError, match=rf'maps are {dtype}.*cams.maps = cams.maps.float\(\)'): CAMs(torch.ones(1, 2, 2).to(dtype)).save(tmp_path/'cams.npz')
    with pytest.raises(TypeError, match='preds are'): CAMs(torch.ones(1, 2, 2), preds=torch.ones(1, 2).to(dtype)).save(tmp_path/'cams.npz')
    assert names(tmp_path)==[]


# -- titles beside one another

def test_a_real_learner_s_boxes_come_back_from_a_file(dls, tmp_path):
    learn = vision_learner(dls, resnet18, pretrained=False)
    with learn.no_bar():
        for kwargs in ({}, dict(cls='all'), dict(method=['gradcam', 'guided_backprop'])):
            cams = learn.get_cams([0, 1, 2], **kwargs)
            back = CAMs.load(cams.save(tmp_path/'cams.npz'))
            assert back.sizes.tolist()==[[64, 64]]*3 and back.boxes()==cams.boxes() and back.peaks()==cams.peaks()
        learn.show_cam(0, title='mine', boxes=.8)
    assert sum('mine' in text.get_text() for text in plt.gcf().findobj(Text))==1
    plt.close('all')


def test_maps_are_not_laid_over_pictures_of_another_shape(tmp_path):
    "The map of a crop, over the whole photo, would lie in the wrong place: it is refused; files are opened"
    cams = of_pictures() # 60 pixels wide, and 40, 80 and 120 high
    file = cams.save(tmp_path/'cams.npz')
    right = [Image.fromarray(np.full((2*height, 120, 3), height, dtype=np.uint8)) for height in (40, 80, 120)]
    for i, image in enumerate(right): image.save(tmp_path/f'{i}.png')
    paths = [tmp_path/f'{i}.png' for i in range(3)]
    wrong = [right[0], Image.new('RGB', (160, 100)), right[2]]
    for stored in file, cams.save(tmp_path/'pictures.npz', images=True):
        with pytest.raises(ValueError, match='image 1 has 160 × 100 pixels, and its map was made for a picture of 60 × 80: the model saw a part of it'): CAMs.load(stored, images=wrong)
    with pytest.raises(ValueError, match='image 0 has 120 × 160 pixels'): CAMs.load(file, images=[paths[1], *paths[1:]])
    with pytest.raises(ValueError, match='image 0 has 8 × 9 pixels'): CAMs.load(file, images=Images(lambda idxs: [torch.zeros(3, 9, 8) for _ in idxs], range(3)))
    with pytest.raises(FileNotFoundError, match="there is no file '.*none.png': images are decoded pictures, or files of pictures"): CAMs.load(file, images=[*paths[:2], tmp_path/'none.png'])
    for images in right, paths, [str(path) for path in paths]:
        back = CAMs.load(file, images=images)
        assert [np.asarray(one.image)[0, 0, 0] for one in back]==[40, 80, 120] and back.boxes()==[one.boxes(size=(2*height, 120)) for one, height in zip(cams, (40, 80, 120))]
        assert np.asarray(back[1].overlay()).shape==(160, 120, 3)
