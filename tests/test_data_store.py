"`CAMStore`: rows by position, slice and condition, read as far as needed; maps, pictures and titles as `get_cams` has them; and read without us."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Learner, Resize, get_image_files, parent_label

from fastai_cam.all import CAMMap, CAMs, CAMStore
from fastai_cam.maps.cams import ItemMaps
from fastai_cam.maps.pixels import to_pixels
from helpers.maps import everything
from helpers.tables import contents, learner, net


@pytest.fixture(scope='module')
def learn(dls): return learner(dls)


@pytest.fixture(scope='module')
def folder(learn, dls, pictures, tmp_path_factory):
    "Twelve pictures with labels, in three shards"
    folder = tmp_path_factory.mktemp('store')/'cams'
    learn.explain(dls.valid, folder, shard=5, method='gradcam')
    return folder


@pytest.fixture(scope='module')
def cams(learn, dls): return learn.get_cams(dls.valid, method='gradcam')


@pytest.fixture
def store(folder): return CAMStore.open(folder)


@pytest.fixture(scope='module')
def with_errors(learn, pictures, tmp_path_factory):
    files, folder = sorted(get_image_files(pictures))[:5], tmp_path_factory.mktemp('errors')/'cams'
    with pytest.warns(UserWarning, match='1 items have an error'): learn.explain([*files[:3], 'no.png', *files[3:]], folder, shard=2, method='gradcam')
    return folder


def test_what_it_is(store):
    assert len(store)==12 and store.is_complete and [file.name for file in store.files]==[f'maps-0000{k}-of-00003.parquet' for k in range(3)]
    assert repr(store)=='CAMStore: 12 items in 3 shards; maps 16×16, by gradcam, of predicted'
    assert store.columns==['index', 'item', 'error', 'prediction', 'label', 'probability', 'loss', 'explains', 'class_index', 'scale', 'map', 'output', 'target']


@pytest.mark.parametrize('idxs', [slice(2, 9), slice(None, None, -1), [11, 0, 5, 5], np.arange(12)%3==1, torch.tensor([7, 2]), []], ids=str)
def test_slices(store, cams, idxs):
    expected = np.arange(12)[idxs if isinstance(idxs, slice) else np.asarray(idxs, dtype=None if len(idxs) else int)].tolist()
    part = store[idxs]
    assert len(part)==len(expected) and part.read(['index']).column('index').to_pylist()==expected
    assert torch.allclose(part.maps(), cams.maps[expected], atol=6e-4*cams.maps.abs().max().item())
    assert part[::2].read(['index']).column('index').to_pylist()==expected[::2]


def test_one_row_is_a_map_over_its_picture(store, cams, learn, folder):
    for table in (store, CAMStore.open(folder, learn)):
        found = table[7]
        assert isinstance(found, CAMMap) and found.title==cams.title(7) and table[-5].title==found.title
        assert np.abs(to_pixels(found.image).astype(float) - to_pixels(cams[7].image)*[1, 255][to_pixels(cams[7].image).dtype != np.uint8]).max() <= 1
        found.show()
    with pytest.raises(IndexError, match='row 12 is out of range: there are 12, 0 to 11'): store[12]


def test_conditions(store, cams):
    wrong = (cams.preds.argmax(1) != cams.targs)
    assert 0 < wrong.sum() < 12
    for condition, expected in (('prediction != label', wrong), (f'prediction != label and loss > {cams.losses[wrong].median()}', wrong & (cams.losses > cams.losses[wrong].median())), ('index in [3, 4]', torch.isin(torch.arange(12), torch.tensor([3, 4]))),
                                ("label == 'left'", cams.targs==0), ("label != 'left'", cams.targs==1), ('loss < 0', torch.zeros(12, dtype=bool)), ("item.str.endswith('4.png')", torch.tensor([str(file).endswith('4.png') for file in cams.items]))):
        assert store.where(condition).read(['index']).column('index').to_pylist()==expected.nonzero().flatten().tolist(), condition
    twice = store.where('prediction != label').where('loss > 0')[:1]
    assert len(twice)==1 and repr(twice).startswith('CAMStore: 1 of 12 items')


def test_conditions_that_are_none(store):
    with pytest.raises(ValueError, match='has to be about some of the columns index, item, error, prediction'): store.where('colour == 3')
    with pytest.raises(ValueError, match='has to be about some of the columns'): store.where('map > 0')
    with pytest.raises(ValueError, match=r"'loss >' cannot be read \(invalid syntax\): it is 'wrong', 'right', or a condition such as"): store.where('loss >')
    for condition, message in (('error', "is a column and no condition: compare it, as in 'error.notna\\(\\)'"), ('loss = 1', 'has a single =, which compares nothing: write =='), ('predicted != label', "names 'predicted', which is no column: .*; did you mean 'prediction'"),
                               ('label > 3', 'numbers are compared with numbers, and texts in quotes with texts'), ('loss > @x', 'knows no variables'), ('loss.max() > 1', 'does not say yes or no of each row')):
        with pytest.raises(ValueError, match=message): store.where(condition)
    with pytest.raises(TypeError, match="a condition is a text, as 'prediction != label and loss > 1'"): store.where(lambda frame: frame.loss > 1)


def test_what_was_meant_is_said(store):
    with pytest.raises(ValueError, match="; the words are 'wrong' and 'right'; did you mean 'wrong'?"): store.where('wrng')
    with pytest.raises(ValueError, match="there is nothing to show: the table has no row of which 'loss > 0' and then 'loss > 1e9' holds"): store.where('loss > 0').where('loss > 1e9').show()
    with pytest.raises(TypeError, match='to_cams takes positions of rows, and this is a table'): store.to_cams(store[:2])


def test_nothing_holds_of_what_is_not_known(with_errors):
    store = CAMStore.open(with_errors)
    for condition, expected in (('label.isna()', [0, 1, 2, 4, 5]), ('error.notna()', [3]), ("error.str.contains('No such file')", [3]), ('index > 1', [2, 4, 5]), ("prediction != 'x'", [0, 1, 2, 4, 5])):
        assert store.where(condition).read(['index']).column('index').to_pylist()==expected, condition


def test_words(store, cams):
    "As `interp.select` has them, alone and in conditions"
    wrong, most = cams.preds.argmax(1) != cams.targs, float(cams.losses.median())
    for condition, expected in (('wrong', wrong), ('right', ~wrong), ('is_right', ~wrong), (f'wrong and loss > {most}', wrong & (cams.losses > most)), ('not wrong or index == 0', ~wrong | (torch.arange(12)==0))):
        assert store.where(condition).read(['index']).column('index').to_pylist()==expected.nonzero().flatten().tolist(), condition


def test_what_has_no_labels_says_so(with_errors, tmp_path):
    "A table of files is neither right nor wrong, and an empty table would say that nothing is wrong"
    store = CAMStore.open(with_errors)
    for condition in ('wrong', 'right', 'prediction != label', "label != 'left'", 'loss > 1'):
        with pytest.raises(ValueError, match='none of the 6 items has one: what has labels is a labelled DataLoader'): store.where(condition)
    assert len(store.where('error.notna()').where('index < 3'))==0
    values = CAMs(torch.rand(3, 4, 4), classes=torch.zeros(3), labels=['value'], preds=torch.rand(3, 1), targs=torch.rand(3, 1), task='values').to_table(tmp_path/'values')
    with pytest.raises(ValueError, match="right or wrong, and this learner's answers are numbers"): values.where('wrong')


def test_only_what_is_asked_for_is_read(store, monkeypatch):
    import pyarrow.parquet
    read, real = [], pyarrow.parquet.read_table
    monkeypatch.setattr(pyarrow.parquet, 'read_table', lambda file, columns, **kwargs: read.append((file.name[5:10], tuple(columns))) or real(file, columns=columns, **kwargs))
    CAMStore.open(store.folder)
    few = store[6:9]
    assert not read
    few.where('loss > 0')
    assert read==[('00001', ('loss', 'error'))]
    store[6:9].maps(), store[5]
    assert {shard for shard, _ in read}=={'00001'}


def test_sorted(store, cams):
    order = cams.losses.argsort(descending=True)
    assert store.sort('loss', ascending=False).read(['index']).column('index').to_pylist()==order.tolist()
    for word in ('reverse', 'descending'):
        with pytest.raises(TypeError, match=f'no argument .{word}.: ascending=False puts the largest first'): store.sort('loss', **{word: True})
    assert store.sort('loss')[:3].to_cams().items==[str(cams.items[i]) for i in order.flip(0)[:3]]
    with pytest.raises(ValueError, match="there is no column 'size'"): store.sort('size')


def test_cams_have_all_that_titles_say(store, cams):
    back = store.to_cams()
    assert isinstance(back, CAMs) and torch.equal(back.classes, cams.classes) and torch.equal(back.targs, cams.targs) and torch.allclose(back.preds, cams.preds) and torch.allclose(back.losses, cams.losses)
    assert (back.vocab, back.labels, back.method, back.layers, type(back.task))==(list(cams.vocab), cams.labels, cams.method, cams.layers, type(cams.task))
    assert [back.title(i) for i in range(12)]==[cams.title(i) for i in range(12)] and back.item_title(3, loss=True)==cams.item_title(3, loss=True)
    some = store.to_cams([9, 2])
    assert some.items==[str(cams.items[i]) for i in (9, 2)] and torch.equal(some.losses, back.losses[[9, 2]])
    assert back.boxes()==store.to_cams().boxes() and isinstance(store.to_cams([0])[0], CAMMap)
    store.show(2)


def test_frames(store, cams):
    frame = store.to_pandas(maps=True)
    assert len(frame)==12 and frame['map'][4].shape==(16, 16) and np.allclose(frame['map'][4], cams.maps[4], atol=6e-4*cams.maps[4].abs().max().item())
    assert 'map' not in store.to_pandas().columns and (frame['prediction'] != frame['label']).sum()==(cams.preds.argmax(1) != cams.targs).sum()


def test_items_with_an_error_have_no_map(with_errors):
    store = CAMStore.open(with_errors)
    assert len(store)==6 and len(store.to_cams())==5 and (store.maps()[3]==0).all() and store.to_pandas(maps=True)['error'].notna().tolist()==[False]*3 + [True] + [False]*2
    with pytest.raises(ValueError, match=r"item 3 \('no.png'\) has no map: FileNotFoundError"): store.to_cams([2, 3])


def test_of_a_thousand_classes_only_what_is_known_is_said(pictures, tmp_path):
    names = [f'kind {i}' for i in range(100)]
    data = DataBlock((ImageBlock, CategoryBlock(vocab=names, sort=False)), get_items=get_image_files, get_y=lambda file: names[int(file.stem)], item_tfms=Resize(64)).dataloaders(pictures, bs=5, num_workers=0)
    learn = Learner(data, net(100))
    with learn.no_bar(): store, cams = learn.explain(data.valid, tmp_path/'cams', method='gradcam', cls=['predicted', 'actual']), learn.get_cams(data.valid, method='gradcam', cls=['predicted', 'actual'])
    assert 'output' not in store.columns
    back = store.to_cams()
    best = cams.preds.max(1)
    assert torch.equal(back.preds.argmax(1), best.indices) and torch.allclose(back.preds.max(1).values, best.values) and torch.equal(back.targs, cams.targs)
    assert isinstance(store[0], ItemMaps) and back.item_title(0, loss=True)==cams.item_title(0, loss=True) and back.question(0, 0)==cams.question(0, 0)
    assert back.question(0, 1)==f'kind {cams.targs[0]}' # no probability that nobody knows


def test_pictures_that_were_cropped_are_cropped_again(tmp_path):
    wide = np.zeros((40, 90, 3), dtype=np.uint8)
    wide[:, 45:] = 250
    for side in 'ab':
        (tmp_path/side).mkdir()
        for i in range(2): Image.fromarray(wide[:, ::(1, -1)[i]]).save(tmp_path/side/f'{i}.png')
    data = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize((32, 48))).dataloaders(tmp_path, bs=2, num_workers=0)
    learn = learner(data)
    files = sorted(get_image_files(tmp_path))
    store, cams = learn.explain(files, tmp_path/'cams', method='gradcam'), learn.get_cams(files, method='gradcam')
    for i in range(4):
        seen, made = np.asarray(cams[i].image).reshape(3, 32, 48), to_pixels(CAMStore.open(tmp_path/'cams')[i].image)
        assert made.shape==(32, 48, 3) and np.abs(made.transpose(2, 0, 1).astype(float) - seen*(1 if seen.max() > 1 else 255)).max() <= 1


def test_what_is_missing_is_said(folder, tmp_path):
    part = tmp_path/'part'
    part.mkdir()
    for file in folder.iterdir():
        if '00001' not in file.name: (part/file.name).write_bytes(file.read_bytes())
    store = CAMStore.open(part)
    assert (len(store), store.n_missing, store.is_complete)==(7, 1, False) and repr(store).startswith('CAMStore: 7 items in 2 shards, 1 shards are missing')
    assert store.read(['index']).column('index').to_pylist()==[0, 1, 2, 3, 4, 10, 11] and store.to_cams([5]).items==CAMStore.open(folder).to_cams([10]).items


def test_what_is_no_table(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder .*: learn.explain'): CAMStore.open(tmp_path/'no')
    with pytest.raises(ValueError, match='is no table of maps: it holds no _manifest.json'): CAMStore.open(tmp_path)
    for file in folder.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    damaged = tmp_path/'maps-00000-of-00003.parquet'
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(ValueError, match="maps-00000-of-00003.parquet' is damaged .*: delete it, and make it again with the same call"): CAMStore.open(tmp_path)[0]
    manifest = json.loads((tmp_path/'_manifest.json').read_text())
    (tmp_path/'_manifest.json').write_text(json.dumps(manifest | dict(format=99)))
    with pytest.raises(ValueError, match='has format 99, and this version of fastai_cam reads up to 2: update'): CAMStore.open(tmp_path)
    (tmp_path/'_manifest.json').write_text(json.dumps(manifest | dict(format=1)))
    with pytest.raises(ValueError, match="called a column 'predicted' that is 'prediction' now: make it again"): CAMStore.open(tmp_path)


# -- maps in memory

@pytest.mark.parametrize('single', [True, False])
def test_maps_in_memory_as_a_table(tmp_path, single):
    cams = everything(4, 2)
    cams.regions = None
    cams = cams[:, 1] if single else cams
    store = cams.to_table(tmp_path/'cams', shard=3)
    assert len(store.files)==2 and store.to_pandas()['item'].tolist()==cams.items
    back = store.to_cams()
    assert torch.allclose(back.maps, cams.maps, atol=6e-4*cams.maps.abs().max().item()) and torch.equal(back.classes, cams.classes) and torch.equal(back.preds, cams.preds)
    assert (back.labels, back.vocab, back.items, back.task.name, back.signed, back.thresh)==(cams.labels, cams.vocab, cams.items, 'multi', True, .3)
    assert torch.allclose(back.targs, cams.targs.float()) and torch.equal(back.losses, cams.losses)
    before = contents(tmp_path/'cams')
    cams.to_table(tmp_path/'cams', shard=3)
    assert contents(tmp_path/'cams')==before
    cams.maps = cams.maps + 1
    with pytest.raises(ValueError, match='What differs: maps'): cams.to_table(tmp_path/'cams', shard=3)


def test_a_table_of_what_get_cams_gave(learn, dls, cams, tmp_path):
    back = cams.to_table(tmp_path/'cams').to_cams()
    assert [back.title(i) for i in range(12)]==[cams.title(i) for i in range(12)] and back.sizes.tolist()==[[64, 64]]*12


# -- without us

def test_pandas_reads_the_folder(folder, cams):
    frame = pd.read_parquet(folder)
    assert frame['index'].tolist()==list(range(12)) and np.allclose(frame['loss'], cams.losses)
    assert [file.name for file in folder.iterdir() if file.suffix != '.parquet']==['_manifest.json']


def test_a_table_that_was_made_before_is_opened(folder, tmp_path):
    for file in folder.iterdir(): (tmp_path/file.name.lstrip('_')).write_bytes(file.read_bytes())
    assert CAMStore.open(tmp_path).to_pandas().equals(CAMStore.open(folder).to_pandas()) and (tmp_path/'manifest.json').is_file()


def test_pandas_and_pyarrow_read_it(folder, cams):
    import pyarrow.parquet
    table = pyarrow.parquet.read_table(sorted(folder.glob('*.parquet')))
    known = json.loads(table.schema.metadata[b'fastai_cam'])
    assert known['found']['map_shape']==[16, 16] and known['method']==['gradcam'] and known['found']['layers']==cams.layers and known['names']==['left', 'right'] and 'torch' in known['versions']
    frame = table.to_pandas()
    maps = np.stack(frame['map']).astype(np.float32)*frame['scale'].to_numpy()[:, None]
    assert np.allclose(maps.reshape(-1, 16, 16), cams.maps, atol=6e-4*cams.maps.abs().max().item())


def test_duckdb_reads_it(folder, cams):
    duckdb = pytest.importorskip('duckdb')
    rows = duckdb.sql(f"select index, prediction, label, scale*list_max(map) as peak from '{folder}/*.parquet' where prediction <> label order by loss desc").fetchall()
    order = [i for i in cams.losses.argsort(descending=True).tolist() if cams.preds[i].argmax() != cams.targs[i]]
    assert [row[0] for row in rows]==order and [row[1:3] for row in rows]==[(cams.vocab[cams.preds[i].argmax()], cams.vocab[cams.targs[i]]) for i in order]
    assert np.allclose([row[3] for row in rows], [cams.maps[i].max() for i in order], rtol=1e-3)


@pytest.mark.slow
def test_datasets_reads_it(folder, cams, tmp_path):
    datasets = pytest.importorskip('datasets')
    found = datasets.load_dataset('parquet', data_files=str(folder/'*.parquet'), split='train', cache_dir=str(tmp_path))
    assert len(found)==12 and found.filter(lambda row: row['prediction'] != row['label']).num_rows==(cams.preds.argmax(1) != cams.targs).sum()
    row = found.with_format('numpy')[3]
    assert np.allclose(row['map'].astype(np.float32)*row['scale'], cams.maps[3].flatten(), atol=6e-4*cams.maps[3].abs().max().item())
