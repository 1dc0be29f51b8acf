"Files are replaced whole or not at all, keep their permissions and links, and what cannot be written is said before any work."
import errno
import io
import os
import signal
import stat
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from fastai.vision.all import CrossEntropyLossFlat, Learner

from fastai_cam.maps.draw import CAMMap, check_style
from fastai_cam.maps.cams import CAMs, Images

from helpers.maps import everything, names, same


# -- files

def test_a_file_is_replaced_whole(tmp_path):
    "Who has the old file open still reads the old one, from its beginning to its end"
    cams, file = everything(), tmp_path/'cams.npz'
    before = cams.save(file).read_bytes()
    with open(file, 'rb') as opened:
        cams[:1].save(file)
        assert opened.read()==before and file.read_bytes() != before


# -- what stays as it was when a file is replaced

def write_maps(file): everything().save(file)
def write_figure(file): CAMMap(torch.ones(2, 2)).show(save=file)


@pytest.fixture(params=['files without a name', 'named files', 'no links'])
def any_system(request, monkeypatch):
    "Systems that know files without a name, and others"
    def refuses(*args, src_dir_fd=None, **kwargs):
        if src_dir_fd is not None: raise PermissionError(errno.EPERM, 'no links here')
        return link(*args, **kwargs)
    link = os.link
    if request.param=='named files': monkeypatch.delattr(os, 'O_TMPFILE', raising=False)
    if request.param=='no links': monkeypatch.setattr(os, 'link', refuses)


@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_permissions_and_links_are_kept(write, tmp_path, any_system):
    for name, mode in (('a.png', 0o600), ('b.png', 0o664), ('c.png', 0o755)):
        (tmp_path/name).write_bytes(b'old')
        (tmp_path/name).chmod(mode)
        write(tmp_path/name)
        assert stat.S_IMODE((tmp_path/name).stat().st_mode)==mode and (tmp_path/name).stat().st_size > 500
    (tmp_path/'far').mkdir()
    for link, target in (('link.png', tmp_path/'a.png'), ('relative.png', Path('far/new.png')), ('chain.png', Path('relative.png'))):
        (tmp_path/link).symlink_to(target)
        write(tmp_path/link)
        assert (tmp_path/link).is_symlink() and os.readlink(tmp_path/link)==str(target) and (tmp_path/target).stat().st_size > 500
    os.link(tmp_path/'b.png', tmp_path/'other name.png')
    (tmp_path/'b.png').write_bytes(b'old'*10000)
    write(tmp_path/'b.png')
    assert (tmp_path/'b.png').samefile(tmp_path/'other name.png') and (tmp_path/'b.png').stat().st_nlink==2
    assert 500 < (tmp_path/'b.png').stat().st_size < 30000
    assert names(tmp_path)==['a.png', 'b.png', 'c.png', 'chain.png', 'far', 'link.png', 'other name.png', 'relative.png'] and names(tmp_path/'far')==['new.png']


def test_what_was_written_into_a_file_of_two_names_is_read(tmp_path):
    cams = everything()
    (tmp_path/'a.npz').write_bytes(b'old'*100000)
    os.link(tmp_path/'a.npz', tmp_path/'b.npz')
    cams.save(tmp_path/'a.npz')
    same(CAMs.load(tmp_path/'b.npz'), cams)


def test_a_new_file_has_the_permissions_of_new_files(tmp_path, any_system):
    before = os.umask(0o027)
    try: write_maps(tmp_path/'a.npz')
    finally: os.umask(before)
    assert stat.S_IMODE((tmp_path/'a.npz').stat().st_mode)==0o640


@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_pipes_and_devices_are_written_to(write, tmp_path, monkeypatch):
    os.mkfifo(tmp_path/'pipe')
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path/'pipe').read_bytes()))
    reader.start()
    write(tmp_path/'pipe')
    reader.join(20)
    assert (tmp_path/'pipe').is_fifo() and got[0][:4] in (b'PK\x03\x04', b'\x89PNG') and names(tmp_path)==['pipe']
    write(Path('/dev/null'))
    assert Path('/dev/null').is_char_device()
    if Path('/dev/full').exists():
        with pytest.raises(OSError, match='No space left'): write(Path('/dev/full'))
    monkeypatch.setattr('fastai_cam.files._pour.__defaults__', (0,))
    with pytest.raises(OSError, match='nobody reads from the pipe .*start its reader first'): write(tmp_path/'pipe')


@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_what_cannot_be_written_is_said(write, tmp_path, any_system):
    (tmp_path/'kept.png').write_bytes(b'old')
    (tmp_path/'kept.png').chmod(0o444)
    with pytest.raises(PermissionError, match='kept.png.* may only be read'): write(tmp_path/'kept.png')
    assert (tmp_path/'kept.png').read_bytes()==b'old'
    (tmp_path/'lost.png').symlink_to(tmp_path/'no'/'where.png')
    with pytest.raises(FileNotFoundError, match='a link into a folder that does not exist'): write(tmp_path/'lost.png')
    for folder in (tmp_path, f'{tmp_path}/new/', str(tmp_path/'kept.png'/'a.png')):
        with pytest.raises((ValueError, FileNotFoundError), match='folder'): write(folder)
    with pytest.raises(ValueError, match='home folder .* not known'): write('~nobody-of-that-name/a.png')
    for wrong in (3, b'a.png', [tmp_path]):
        with pytest.raises(TypeError, match='not'): write(wrong)
    assert names(tmp_path)==['kept.png', 'lost.png']


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch, any_system):
    def fails(error):
        def write(out, *args, **kwargs): out.write(b'half'); raise error
        monkeypatch.setattr(np, 'savez_compressed', write)
        monkeypatch.setattr(plt.Figure, 'savefig', lambda self, out, **kwargs: write(out))
        for write_one in (write_maps, write_figure):
            for name in ('new.png', 'old.png', 'two.png'):
                with pytest.raises(type(error)): write_one(tmp_path/name)
    for name in ('old.png', 'two.png'): (tmp_path/name).write_bytes(b'old')
    os.link(tmp_path/'two.png', tmp_path/'twin.png')
    for error in (OSError(errno.ENOSPC, 'full'), KeyboardInterrupt(), MemoryError()): fails(error)
    assert names(tmp_path)==['old.png', 'twin.png', 'two.png'] and {f.read_bytes() for f in tmp_path.iterdir()}=={b'old'}


def test_a_full_disk_costs_nothing_that_was_there(tmp_path, monkeypatch):
    "The file has two names, so it is overwritten, once there is room for all of it"
    (tmp_path/'a.npz').write_bytes(b'old')
    os.link(tmp_path/'a.npz', tmp_path/'b.npz')
    def full(descriptor, start, length): os.ftruncate(descriptor, 100); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    with pytest.raises(OSError, match='No space left'): write_maps(tmp_path/'a.npz')
    assert (tmp_path/'b.npz').read_bytes()==b'old'


def test_long_names_and_strange_names(tmp_path, any_system):
    for name in ('n'*251 + '.png', '猫'*80 + '.png', '$a$ 50%.png', '.hidden.png'):
        for write in (write_maps, write_figure): write(tmp_path/name)
        assert names(tmp_path)==[name] and (tmp_path/name).unlink() is None


@pytest.mark.parametrize('is_named', [False, True])
def test_a_killed_process_leaves_nothing_unfinished(is_named, tmp_path, monkeypatch):
    "Where files need no name, what was not finished vanishes; elsewhere its name says what it is, and the next save is not disturbed"
    if is_named: monkeypatch.delattr(os, 'O_TMPFILE', raising=False)
    elif not hasattr(os, 'O_TMPFILE'): pytest.skip('this system has no files without a name')
    cams, (reader, writer) = everything(), os.pipe()
    child = os.fork()
    if child==0:
        def slow(out, **arrays): out.write(b'half'*10000); out.flush(); os.write(writer, b'!'); signal.pause()
        np.savez_compressed = slow
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try: cams.save(tmp_path/'cams.npz')
        finally: os._exit(1)
    assert os.read(reader, 1)==b'!'
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1])==signal.SIGTERM
    left = names(tmp_path)
    assert len(left)==1 and left[0].startswith('.cams.npz.') and left[0].endswith('.unfinished') if is_named else left==[]
    cams.save(tmp_path/'cams.npz')
    same(CAMs.load(tmp_path/'cams.npz'), cams)
    assert names(tmp_path)==left + ['cams.npz']


# -- figures in files

def test_endings_of_figures(tmp_path):
    for name, begin in (('a.png', b'\x89PNG'), ('A.PNG', b'\x89PNG'), ('b.pdf', b'%PDF'), ('c.svg', b'<?xml'), ('d.jpg', b'\xff\xd8'), ('e.svgz', b'\x1f\x8b')):
        CAMMap(torch.ones(2, 2)).show(save=str(tmp_path/name))
        assert (tmp_path/name).read_bytes().startswith(begin), name
    CAMMap(torch.ones(2, 2)).show(save=tmp_path/'none')
    assert (tmp_path/'none.png').read_bytes().startswith(b'\x89PNG') and not (tmp_path/'none').exists()
    out = io.BytesIO()
    CAMs(torch.ones(1, 2, 2)).show(save=out)
    assert out.getvalue().startswith(b'\x89PNG')
    with open(tmp_path/'opened', 'wb') as opened: CAMMap(torch.ones(2, 2, 2)).show_slices(save=opened)
    assert (tmp_path/'opened').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('wrong, message', [
    ('map.xyz', r"saved as \.xyz \('map.xyz'\): use one of the endings .*pdf, .*png"), ('v1.2', r'saved as \.2'),
    ('no/such/map.png', 'a folder that exists'), ('.', 'is a folder: add a name'),
    ('new/', 'folder'), (3, 'not int'), (b'map.png', 'not bytes'), (True, 'not bool'), ('~nobody-of-that-name/a.png', 'home folder'),
])
def test_a_place_that_a_figure_cannot_go_is_said_before_any_work(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def fetch(idxs): raise AssertionError('read')
    cams = CAMs(torch.ones(2, 2, 2), Images(fetch, range(2)))
    for show in (check_style, cams.show, CAMMap(torch.ones(2, 2)).show, CAMMap(torch.ones(2, 2, 2)).show_slices):
        with pytest.raises((ValueError, TypeError), match=message): show(save=wrong)
    assert names(tmp_path)==[] and not plt.get_fignums()


def test_a_learner_is_not_asked_where_the_figure_cannot_be_saved(dls, tmp_path):
    class Asked(torch.nn.Module):
        def forward(self, x): raise AssertionError('asked')
    learn = Learner(dls, Asked(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match=r'saved as \.xyz'): learn.show_cam(0, save=tmp_path/'map.xyz')
    with pytest.raises(TypeError, match='did you mean cmap'): learn.show_cam(0, colormap='jet')


# -- what can be stored, but not used

@pytest.mark.parametrize('write', [write_maps, write_figure])
def test_a_link_to_itself_is_no_place(write, tmp_path):
    (tmp_path/'self.png').symlink_to(tmp_path/'self.png')
    (tmp_path/'a.png').symlink_to('b.png')
    (tmp_path/'b.png').symlink_to('a.png')
    for name in ('self.png', 'a.png'):
        with pytest.raises(ValueError, match=f'{name}.* leads back to itself'): write(tmp_path/name)
        assert (tmp_path/name).is_symlink()
    assert names(tmp_path)==['a.png', 'b.png', 'self.png']
    plt.close('all')
