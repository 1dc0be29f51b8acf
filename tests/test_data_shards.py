"A list in parts: every item in one, and what goes wrong on the disk said in a sentence."
import errno
import json
import os

import pytest

from fastai_cam.data import shards
from fastai_cam.data.shards import MANIFEST, ShardPlan, check_manifest, claim_folder, differences, disk_errors_in_words, make_folder, rank_and_world, read_manifest, write_whole


@pytest.mark.parametrize('n, size, world', [(10, 4, 2), (10, 10, 3), (1, 4096, 2), (12, 4, 5), (100_000_000, 4096, 64)])
def test_every_shard_is_made_by_one_process(n, size, world):
    plan = ShardPlan(n, size)
    made = sorted(k for rank in range(world) for k in plan.own(rank, world))
    assert made==list(range(len(plan)))
    assert [plan.items(k)[0] for k in (0, len(plan) - 1)]==[0, (len(plan) - 1)*size] and plan.items(len(plan) - 1)[-1]==n - 1
    assert max(len(plan.own(rank, world)) for rank in range(world)) - min(len(plan.own(rank, world)) for rank in range(world)) <= 1


def test_names_sort_as_numbers_do():
    plan = ShardPlan(100_000_000, 4096)
    assert len(plan)==24415 and plan.name(9) < plan.name(10) < plan.name(9999) < plan.name(24414)


@pytest.mark.parametrize('env, expected', [({}, (0, 1)), ({'RANK': '1', 'WORLD_SIZE': '2'}, (1, 2)), ({'RANK': '3'}, (0, 1))])
def test_launched_processes_know_their_number(env, expected, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE'): monkeypatch.delenv(name, raising=False)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    assert rank_and_world()==expected


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    write_whole(tmp_path/'one', b'whole')
    def full(descriptor): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('fastai_cam.files.os.fsync', full)
    with pytest.raises(OSError, match='there is no room left for .*the shards that are finished are whole and stay; make room, and run the same call again') as e: write_whole(tmp_path/'two', b'x'*100)
    assert e.value.errno==errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()]==['one'] and (tmp_path/'one').read_bytes()==b'whole'


def test_a_folder_that_may_only_be_read_is_said(tmp_path):
    with pytest.raises(PermissionError, match='cannot be written to .*make it writable'):
        with disk_errors_in_words(tmp_path): raise PermissionError(errno.EACCES, 'Permission denied')
    with pytest.raises(OSError, match='^another$'):
        with disk_errors_in_words(tmp_path): raise OSError('another')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may write anywhere')
def test_chmod(tmp_path):
    (tmp_path/'shut').mkdir(mode=0o555)
    with pytest.raises(PermissionError, match='cannot be written to'): make_folder(tmp_path/'shut'/'cams')


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path/'cams').write_text('')
    for name in ('cams', 'cams/deeper'):
        with pytest.raises(NotADirectoryError, match="cams' is a file, and the table is a folder"): make_folder(tmp_path/name)


WANTED = dict(format=1, model='abc', method=['gradcam'], question=None, items='x', n_items=10, shard=4, labelled=True, boxes=False, names=['a'], transforms=[])


@pytest.mark.parametrize('changed, words', [
    (dict(model='abd'), 'a model (its layers or weights)'), (dict(method=['cam']), 'a method: ["gradcam"] there, ["cam"] now'), (dict(question='dog'), 'a question (cls): null there, "dog" now'),
    (dict(items='y'), 'a list of items'), (dict(n_items=11), 'a number of items: 10 there, 11 now'), (dict(shard=8), 'a shard size: 4 there, 8 now'), (dict(boxes=True), 'a choice of boxes: false there, true now'),
    (dict(labelled=False), 'items with or without labels: true there, false now'), (dict(transforms=['Resize']), 'transforms'), (dict(names=['b']), 'names of classes: ["a"] there, ["b"] now'), (dict(layer='0'), 'a layer'),
    (dict(format=2), 'a format: 1 there, 2 now')])
def test_what_differs_is_named(changed, words, tmp_path):
    found, = differences(WANTED, WANTED | changed)
    assert found.startswith(words)
    claim_folder(tmp_path, WANTED)
    with pytest.raises(ValueError, match='holds maps of something else, and the two are not mixed. What differs: ') as e: check_manifest(tmp_path, WANTED | changed)
    assert words in str(e.value)


def test_versions_may_differ(tmp_path):
    first = claim_folder(tmp_path, WANTED | dict(versions='old'))
    assert claim_folder(tmp_path, WANTED | dict(versions='new'))==first and read_manifest(tmp_path)['versions']=='old'
    assert [file.name for file in tmp_path.iterdir()]==[MANIFEST]


def test_a_disk_without_links(tmp_path, monkeypatch):
    def no_links(*args): raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr(shards.os, 'link', no_links)
    monkeypatch.setattr('fastai_cam.files.hasattr', lambda thing, name: name != 'O_TMPFILE' and hasattr(thing, name), raising=False)
    assert claim_folder(tmp_path, WANTED)==WANTED and [file.name for file in tmp_path.iterdir()]==[MANIFEST]


def test_folders_that_are_something_else(tmp_path):
    (tmp_path/'a.parquet').write_text('')
    with pytest.raises(ValueError, match='holds Parquet files, but no _manifest.json that says what they are of'): check_manifest(tmp_path, WANTED)
    for text in ('{', '[]', '{"format": "x"}'):
        (tmp_path/MANIFEST).write_text(text)
        with pytest.raises(ValueError, match="_manifest.json' is damaged"): check_manifest(tmp_path, WANTED)
    (tmp_path/MANIFEST).write_text(json.dumps(WANTED))
    assert check_manifest(tmp_path, WANTED)==WANTED
