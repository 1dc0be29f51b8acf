"Pictures in every form and mode are as fastai has them, and those that cannot be read are named."
import io
import struct
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor
from fastai.vision.all import CategoryBlock, DataBlock, PILImage, TensorImage, TransformBlock

from fastai_cam.all import CAMInterpretation

from helpers.source import inputs_of, learn, learner, own_readers


# ---- items that the learner reads itself

def test_pictures_of_a_learner_that_reads_paths_itself(pictures, tmp_path):
    readers = {name: (learn, items) for name, learn, items in own_readers(pictures, tmp_path)}
    learn, items = readers['pil'] # it makes a PILImage in the end, so a picture enters there
    array = np.load(items[15])
    for picture in (array, Image.fromarray(array), torch.from_numpy(array), PILImage.create(array)):
        assert torch.allclose(learn.get_cams(picture).maps, learn.get_cams(3).maps, atol=1e-6)
    assert torch.allclose(learn.get_cams([array, items[15], 3]).maps, learn.get_cams([3, 3, 3]).maps, atol=1e-6)
    read, items = readers['array_files'] # it makes a tensor in the end
    for tensor in (torch.from_numpy(array).permute(2, 0, 1), TensorImage(array).permute(2, 0, 1)):
        assert torch.allclose(read.get_cams([tensor, items[15]]).maps, read.get_cams([3, 3]).maps, atol=1e-6)
    for name, wrong in (('ids', array), ('array_files', Image.fromarray(array)), ('dicts', 'a.png'), ('rows_read', dict(a=1))):
        with pytest.raises(TypeError, match='this learner reads its items itself'): readers[name][0].get_cams(wrong)


class ReaderError(Exception): pass


def raises_bare(): raise ReaderError


@pytest.mark.parametrize('workers', [0, 1])
def test_what_the_learners_own_reader_cannot_read_is_named(tmp_path, workers):
    files = [tmp_path/f'{i}.npy' for i in range(8)]
    for i, file in enumerate(files): np.save(file, np.full((3, 32, 32), i, dtype=np.float32))
    failures = {5: lambda: struct.unpack('<i', b'abc'), 6: lambda: [][3], 7: raises_bare}
    def read(fn:Path):
        if int(fn.stem) in failures and fails: failures[int(fn.stem)]()
        return TensorImage(np.load(fn))
    fails = False
    dls = DataBlock((TransformBlock(type_tfms=read), CategoryBlock), get_items=lambda _: files, get_y=lambda f: int(f.stem)%2, splitter=lambda o: (list(range(2)), list(range(8)))).dataloaders(None, bs=4, num_workers=0)
    learn = learner(dls)
    fails, ran = True, []
    learn.model.register_forward_pre_hook(lambda *args: ran.append(1))
    for i, why in ((5, 'error: unpack requires a buffer of 4 bytes'), (6, 'IndexError: list index out of range'), (7, 'ReaderError')):
        for call in (lambda: learn.get_cams([i]), lambda: learn.get_cams([files[i]]), lambda: learn.get_cams(dls.valid.new(get_idxs=lambda: [i], num_workers=workers)), lambda: CAMInterpretation.from_learner(learn, dl=dls.valid.new(get_idxs=lambda: [i]))):
            with pytest.raises(ValueError) as caught: call()
            assert f"{i}.npy') cannot be read: {why}" in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(ValueError, match=r"5.npy'\) cannot be read"): learn.get_cams(dls.valid.new(num_workers=workers))
    assert ran==[1]*len(ran) and len(ran) <= 4 # the first batch of a loader may have run


def broken_files(folder):
    "Files that PIL refuses in ways of their own"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for kind in 'jpg', 'png', 'gif', 'tif', 'bmp', 'webp':
        picture.save(folder/f'x.{kind}')
        content = (folder/f'x.{kind}').read_bytes()
        (folder/f'cut.{kind}').write_bytes(content[:len(content)//2])
        (folder/f'head.{kind}').write_bytes(content[:12])
    (folder/'bad.ppm').write_bytes(b'P6 3_ 3 255\n')
    (folder/'empty.png').write_bytes(b'')
    (folder/'text.jpg').write_text('no picture')
    png = bytearray((folder/'x.png').read_bytes())
    png[60:80] = b'\xff'*20
    (folder/'zlib.png').write_bytes(png)
    Image.new('1', (16000, 12000)).save(folder/'slide.png')
    return [f for f in sorted(folder.iterdir()) if not f.name.startswith('x.')]


def test_files_that_cannot_be_read_are_named(pictures, learn, tmp_path, monkeypatch):
    good, ran = next(pictures.glob('*/*.png')), []
    learn.model.register_forward_pre_hook(lambda *args: ran.append(1))
    def refused(file, item):
        with pytest.raises(ValueError) as caught: learn.get_cams([good, item])
        assert str(file) in str(caught.value) and '\n' not in str(caught.value) and 'read' in str(caught.value), str(caught.value)
    for file in broken_files(tmp_path):
        refused(file, file)
        if file.name in ('cut.jpg', 'zlib.png', 'cut.tif'): refused(file, Image.open(file)) # PIL reads when it must
    for error in (struct.error('x'), EOFError(), zlib.error('y'), IndexError('z'), MemoryError(), type('SomeExtensionError', (Exception,), {})()):
        def fail(*args, **kwargs): raise error
        with monkeypatch.context() as patched:
            patched.setattr(Image, 'open', fail)
            refused(good, good)
    assert ran==[]


# ---- forms that users type

def test_forms_that_mean_pictures(dls, learn, tmp_path, monkeypatch):
    files = [dls.valid.items[i] for i in (5, 2)]
    reference = learn.get_cams([5, 2]).maps
    content = files[0].read_bytes()
    class Odd:
        def read(self): return content
    opened = open(files[0], 'rb')
    opened.seek(7)
    forms = {'paths': np.array(files), 'strings': np.array([str(f) for f in files]), 'Series': pd.Series(files, index=[3, 9]), 'Index': pd.Index([str(f) for f in files]), 'generator': (f for f in files), 'map': map(str, files), 'keys': dict.fromkeys(files).keys(), 'tuple': tuple(files),
             'bytearray': bytearray(content), 'memoryview': memoryview(content), 'BytesIO': io.BytesIO(content), 'a file': opened, 'a response': Odd(), 'TensorImage': TensorImage(torch.tensor(np.array(Image.open(files[0]))).permute(2, 0, 1)), 'in a list': [io.BytesIO(content), files[1]],
             'a number type': torch.tensor(np.array(Image.open(files[0]))).permute(2, 0, 1).int()}
    for form, item in forms.items():
        cams = learn.get_cams(item)
        assert torch.allclose(cams.maps, reference[:len(cams)], atol=1e-6), form
    assert opened.tell()==7
    opened.close()
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'mine.png').write_bytes(content)
    for home in ('~/mine.png', Path('~/mine.png')): assert torch.allclose(learn.get_cams(home).maps, reference[:1], atol=1e-6)
    for address in ('https://example.com/a.jpg', 'http://example.com/a.jpg', 's3://bucket/a.jpg', 'data:image/png;base64,AAAA', Path('https://example.com/a.jpg'), ['ftp://example.com/a.jpg']):
        with pytest.raises(ValueError, match=r"is an address, not a file: download it first, e.g. with urlsave\(address, 'photo.jpg'\)"): learn.get_cams(address)
    assert torch.allclose(learn.get_cams(PurePosixPath(files[0])).maps, reference[:1], atol=1e-6)
    for name in ('a'*5000, 'a\0b.png', 'none.png'):
        with pytest.raises(FileNotFoundError, match='there is no file'): learn.get_cams(name)
    with pytest.raises(TypeError, match="open it with 'rb'"), open(__file__) as text: learn.get_cams(text)
    with pytest.raises(TypeError, match='pass its column of paths'): learn.get_cams(pd.DataFrame(dict(file=files)))


@pytest.mark.parametrize('mode', ['P', 'LA', 'PA', 'CMYK', 'I;16', 'L', 'RGBA', '1', 'I', 'F', 'YCbCr', 'HSV'])
def test_pictures_in_every_mode_are_as_fastai_has_them(learn, tmp_path, mode):
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(array[..., 0].astype(np.uint16)) if mode=='I;16' else Image.fromarray(array).convert(mode) if mode not in ('LA', 'PA') else Image.fromarray(array).convert('L' if mode=='LA' else 'P').convert(mode)
    before = picture.tobytes()
    expected = learn.get_cams(PILImage.create(np.array(picture.convert('RGB'))))
    assert torch.allclose(learn.get_cams(picture).maps, expected.maps, atol=1e-6) and picture.mode==mode and picture.tobytes()==before
    kind = dict(CMYK='tif', YCbCr='jpg', HSV='', F='tif', I='tif', PA='').get(mode, 'png')
    if kind:
        picture.save(tmp_path/f'a.{kind}')
        x = learn.dls.test_dl([tmp_path/f'a.{kind}']).one_batch()[0]
        cams, seen = inputs_of(learn, lambda: learn.get_cams(tmp_path/f'a.{kind}'))
        assert torch.equal(seen, x.as_subclass(Tensor)) and torch.equal(inputs_of(learn, lambda: learn.get_cams(Image.open(tmp_path/f'a.{kind}')))[1], seen)


def test_turned_photographs_are_as_fastai_has_them(learn, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6 # turned by a quarter
    picture.save(tmp_path/'turned.png', exif=exif)
    x = learn.dls.test_dl([tmp_path/'turned.png']).one_batch()[0]
    for item in (tmp_path/'turned.png', Image.open(tmp_path/'turned.png'), (tmp_path/'turned.png').read_bytes()): assert torch.equal(inputs_of(learn, lambda: learn.get_cams(item))[1], x.as_subclass(Tensor))


# -- indices and masks, however they were found

def test_a_column_of_pixels_is_a_picture(dls):
    "Bytes are pixels, also where the picture is one pixel wide"
    learn = learner(dls)
    column = np.full((12, 1), 200, dtype=np.uint8)
    assert torch.equal(learn.get_cams(column).maps, learn.get_cams(np.repeat(column[...,None], 3, 2)).maps)


def test_channels_last_are_named(dls):
    learn = learner(dls)
    learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    for x in (torch.rand(64, 48, 3), torch.rand(2, 64, 48, 3), [torch.rand(64, 48, 3)]):
        with pytest.raises(ValueError, match=r'has its 3 channels last: pass it.movedim\(-1, -3\)'): learn.get_cams(x)
    x = torch.randn(64, 48, 3)
    assert torch.equal(learner(dls).get_cams(x.movedim(-1, -3)).maps, learner(dls).get_cams(x.permute(2, 0, 1)).maps)
