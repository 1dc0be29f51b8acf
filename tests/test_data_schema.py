"Rows of a table: half precision that neither overflows nor vanishes, and words as titles have them."
import builtins

import numpy as np
import pytest
import torch

from fastai_cam.data.schema import answers_of, import_pyarrow, kept_shape, parquet_bytes, schema_of, shard_table, to_half
from fastai_cam.tasks import NOT_ASKED, BinaryLabel, MultiLabel, SingleLabel, Values

FOUND = dict(questions=['predicted'], is_several=False, methods=['gradcam'], layers=['0'], map_shape=[2, 3], image_size=[64, 96], resize=None, task='single', signed=False, thresh=.5,
             is_numbers=False, output_shape=[2], target_shape=[])


def manifest(boxes=False, names=('cat', 'dog'), **found): return dict(found=FOUND | found, names=list(names), boxes=boxes)


@pytest.mark.parametrize('size', [1e-44, 1e-38, 1e-12, 1., 1e9, 3.4e38])
def test_half_precision_keeps_maps_of_any_size(size):
    maps = (np.random.default_rng(0).uniform(-1, 1, size=(20, 49))*size).astype(np.float32)
    half, scale = to_half(maps)
    peak = np.abs(maps).max(1, keepdims=True)
    assert np.isfinite(half).all() and np.isfinite(scale).all()
    assert (np.abs(half.astype(np.float64)*scale[:, None] - maps) <= peak*2**-11 + 1e-45).all()
    assert (np.log2(scale.astype(np.float64)) % 1==0).all() # dividing by a power of two rounds nothing


def test_maps_that_fit_are_kept_exactly():
    maps = np.array([[0, 1, -2, .5], [0, 0, 0, 0], [1024, 3, 0, -7]], dtype=np.float32)
    half, scale = to_half(maps)
    assert (half.astype(np.float32)*scale[:, None]==maps).all() and scale.tolist()==[2, 1, 1024]


def rows(n=4, **kwargs):
    given = dict(maps=np.arange(n*6, dtype=np.float32).reshape(n, 1, 6), classes=np.array([[1], [0], [1], [0]][:n]), preds=torch.tensor([[.25, .75], [1, 0], [0, 1], [.5, .5]])[:n],
                 targs=torch.tensor([1, 1, 0, 0])[:n], losses=torch.arange(n)/2)
    return given | kwargs


def test_a_row_an_item():
    table = shard_table(manifest(), SingleLabel(['cat', 'dog']), list('abcd'), range(8, 12), errors={2: 'gone'}, **rows())
    frame = table.to_pandas()
    assert frame['index'].tolist()==[8, 9, 10, 11] and frame['item'].tolist()==list('abcd')
    assert table.column('error').to_pylist()==[None, None, 'gone', None]
    assert table.column('prediction').to_pylist()==['dog', 'cat', None, 'cat'] and table.column('label').to_pylist()==['dog', 'dog', None, 'cat']
    assert table.column('probability').to_pylist()==[.75, 1, None, .5] and table.column('loss').to_pylist()==[0, .5, None, 1.5]
    assert table.column('explains').to_pylist()==['dog', 'cat', None, 'cat'] and table.column('target').to_pylist()==[1, 1, None, 0]
    assert table.column('map').to_pylist()[2] is None and table.column('output').to_pylist()[0]==[.25, .75]
    values = np.stack([np.array(m, dtype=np.float32)*s for m, s in zip(frame['map'].drop(2), frame['scale'].drop(2))])
    assert (values==np.arange(24).reshape(4, 6)[[0, 1, 3]]).all()
    kind = table.schema.field('map').type
    assert (kind.list_size, str(kind.value_type))==(6, 'halffloat')


def test_several_questions_are_in_one_row():
    given = rows(2, maps=np.arange(24, dtype=np.float32).reshape(2, 2, 6), classes=np.array([[1, 0], [0, NOT_ASKED]]))
    table = shard_table(manifest(questions=['one', 'two'], is_several=True), SingleLabel(['cat', 'dog']), list('ab'), range(2), errors={}, **given)
    assert table.column('explains').to_pylist()==[['dog', 'cat'], ['cat', None]] and len(table.column('map')[0])==12
    assert table.column('scale').to_pylist()==[[4, 8], [16, 16]]


def test_a_map_that_is_none_is_an_error():
    given = rows(2)
    given['maps'][1, 0, 3] = np.nan
    table = shard_table(manifest(), SingleLabel(['cat', 'dog']), list('ab'), range(2), errors={}, **given)
    assert table.column('error').to_pylist()==[None, 'the map, or the output that it explains, is not finite'] and table.column('map').to_pylist()[1] is None


def test_a_table_has_the_same_bytes_whenever_it_is_made():
    def made(): return bytes(parquet_bytes(shard_table(manifest(), SingleLabel(['cat', 'dog']), list('abcd'), range(4), errors={}, **rows())))
    assert made()==made()


def test_boxes_are_in_pixels_of_the_picture():
    given = rows(1, maps=np.array([[[0, 0, 1, 0, 0, 1]]], dtype=np.float32))
    box, = shard_table(manifest(boxes=True), SingleLabel(['cat', 'dog']), ['a'], [0], errors={}, **given).column('boxes').to_pylist()[0]
    assert box[1:]==[0, 96, 64] and 48 <= box[0] <= 72
    with pytest.raises(ValueError, match='these maps are volumes: leave out boxes=True'): shard_table(manifest(boxes=True, map_shape=[1, 2, 3]), SingleLabel(), ['a'], [0], errors={}, **given)


def test_the_metadata_says_what_the_table_is_of():
    import json
    assert json.loads(schema_of(manifest()).metadata[b'fastai_cam'])==manifest()


@pytest.mark.parametrize('task, preds, targs, expected', [
    (SingleLabel(['cat', 'dog']), [[.2, .8]], [0], (['dog'], ['cat'], [.8])), (SingleLabel(['cat', 'dog']), [[.2, .7]], [0], ([None], [None], [None])),
    (BinaryLabel(), [[.2]], [1.], (['negative'], ['positive'], [.8])), (MultiLabel(['cat', 'dog']), [[.9, .8]], [[0., 1.]], (['cat;dog'], ['dog'], [None])),
    (Values(), [[.5, 2.]], [[1., 2.]], ([[.5, 2.]], [[1., 2.]], [None]))])
def test_answers_are_those_of_titles(task, preds, targs, expected):
    found = answers_of(task, 1, torch.tensor(preds), torch.tensor(targs), ['cat', 'dog'] if len(preds[0])==2 else None)
    assert found[:2]==expected[:2] and found[2]==pytest.approx(expected[2])


def test_outputs_are_kept_where_they_are_a_handful():
    assert [kept_shape(values) for values in (None, torch.zeros(2, 3), torch.zeros(2, 1000), torch.zeros(2), torch.zeros(2).long(), torch.zeros(2, 4, 2))]==[None, [3], None, [1], [], [4, 2]]


def test_pyarrow_is_an_extra(monkeypatch):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name.startswith('pyarrow'): raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=r"pip install 'fastai_cam\[data\]'"): import_pyarrow()


def test_all_labels_of_an_item_are_named():
    names = [f'label {i}' for i in range(9)]
    predicted, label, _ = answers_of(MultiLabel(names), 2, torch.tensor([[.9]*8 + [.1], [.1]*9]), torch.tensor([[1.]*7 + [0., 0.], [0.]*9]), names)
    assert predicted==[';'.join(names[:8]), '–'] and label==[';'.join(names[:7]), '–']
