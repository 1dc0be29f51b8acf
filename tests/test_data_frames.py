"A function of a frame, as Ray and Spark call it: what `get_cams` gives, row by row."
import pickle

import numpy as np
import pandas as pd
import pytest
from fastai.vision.all import get_image_files

from fastai_cam.data import explain_batch
from helpers.tables import assert_left_as_it_was, learner, state_of


@pytest.fixture
def learn(dls): return learner(dls)


@pytest.fixture
def files(pictures): return sorted(get_image_files(pictures))[:7]


@pytest.mark.parametrize('asked', [dict(method='gradcam'), dict(method='gradcam', cls=['predicted', 'left'])], ids=str)
def test_it_is_what_get_cams_gives(learn, files, asked):
    explain, before = explain_batch(learn, bs=3, **asked), state_of(learn)
    frame = explain(pd.DataFrame(dict(key=range(7), item=list(map(str, files)))))
    assert_left_as_it_was(learn, before)
    cams = learn.get_cams(files, **asked)
    assert list(frame.columns)==['key', 'item', 'error', 'prediction', 'probability', 'explains', 'map', 'shape']
    for i in range(7): assert np.allclose(np.reshape(frame['map'][i], frame['shape'][i]), cams.maps[i], atol=1e-5*cams.maps.abs().max().item())
    assert frame['prediction'].tolist()==[cams.vocab[c] for c in cams.preds.argmax(1)] and np.allclose(frame['probability'].astype(float), cams.preds.max(1).values)
    assert frame['error'].isna().all() and frame['key'].tolist()==list(range(7))


def test_bytes_of_files_are_files(learn, files):
    by_name, by_bytes = (explain_batch(learn, method='gradcam', column='photo')(pd.DataFrame(dict(photo=values))) for values in (files, [file.read_bytes() for file in files]))
    assert by_name['map'].tolist()==by_bytes['map'].tolist() and by_name['prediction'].tolist()==by_bytes['prediction'].tolist()


def test_what_cannot_be_read_is_a_row(learn, files):
    explain = explain_batch(learn, method='gradcam', boxes=True)
    frame = explain(pd.DataFrame(dict(item=['no.png', *map(str, files[:3]), 'nor.png']), index=[5, 6, 7, 8, 9]))
    assert frame['error'].notna().tolist()==[True, False, False, False, True] and 'No such file' in frame['error'][0] and frame['map'].isna().tolist()==[True, False, False, False, True]
    assert frame['boxes'][1]==[list(box[:4]) for box in learn.get_cams(files[0], method='gradcam').boxes()[0]]
    mixed = explain(pd.DataFrame(dict(item=[b'no picture', files[0].read_bytes()])))
    assert mixed['error'].notna().tolist()==[True, False] and 'not an image that can be read' in mixed['error'][0]
    none = explain(pd.DataFrame(dict(item=['no.png'])))
    assert none['error'][0].startswith('none of the 1 items can be read') and none['map'][0] is None
    empty = explain(pd.DataFrame(dict(item=[])))
    assert len(empty)==0 and list(empty.columns)==list(frame.columns)


def test_it_can_be_sent_to_other_machines(learn, files):
    explain = explain_batch(learn, method='gradcam')
    frame = pd.DataFrame(dict(item=list(map(str, files))))
    assert pickle.loads(pickle.dumps(explain))(frame)['map'].tolist()==explain(frame)['map'].tolist()


def test_what_is_wrong_is_said_here_and_not_there(learn):
    with pytest.raises(ValueError, match="did you mean 'gradcam'"): explain_batch(learn, method='gradcamm')
    with pytest.raises(ValueError, match=r"the frame has no column 'item', it has 'path': explain_batch\(learn, column=...\)"): explain_batch(learn)(pd.DataFrame(dict(path=['a.png'])))
