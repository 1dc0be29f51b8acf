"Maps as rows of a table, against numbers worked out by hand."
import numpy as np
import pytest
import torch

import fastai_cam.learner # adds get_cams to Learner
from fastai_cam.tasks import NOT_ASKED
from fastai_cam.maps.cams import CAMs
from fastai_cam.maps.table import outside

from helpers.maps import VOCAB, everything

WHERE = torch.tensor([[0., 0., 0.], [0., 3., 1.]])


def cells(*places):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for place in places: mask[place] = True
    return mask


def test_the_share_outside_is_of_the_evidence_for():
    assert outside(WHERE, cells((1, 1)))==.25 and outside(WHERE, cells((0, 0)))==1 and outside(WHERE, ~cells())==0 and outside(-WHERE, cells()) is None
    assert outside(WHERE - 2, cells((1, 1)))==0 # what speaks against does not count
    fine = cells((1, 1)).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert .3 < outside(WHERE, fine) < .5 # enlarged as it is drawn, it spreads


def test_a_row_a_map():
    cams = CAMs(torch.stack([WHERE, WHERE.flip(1)]), [torch.rand(3, 20, 30)]*2, torch.tensor([1, 0]), preds=torch.tensor([[.1, .9, 0.], [.5, .3, .2]]), targs=torch.tensor([1, 2]), losses=torch.tensor([.1, 1.5]),
                items=['x/a.png', torch.zeros(1)], vocab=VOCAB)
    table = cams.to_df()
    assert table[['item', 'index', 'prediction', 'label', 'explains', 'peak']].values.tolist()==[['x/a.png', 0, 'dog', 'dog', 'dog', 3.], ['item 1', 1, 'cat', 'car', 'cat', 3.]]
    assert np.allclose(table[['probability', 'loss']], [[.9, .1], [.5, 1.5]]) and [peak for peak in zip(table.peak_x, table.peak_y)]==[(peak.x, peak.y) for peak, in cams.peaks(max_n=1)]
    assert table.boxes.tolist()==[[list(box[:4]) for box in boxes] for boxes in cams.boxes()] and cams.to_df(threshold=.9).boxes[0] != table.boxes[0]
    assert not {'share_outside', 'carried', 'method'} & set(table)
    masks = torch.stack([cells((1, 1)), cells((0, 0))])
    assert cams.to_df(masks).share_outside.tolist()==[.25, 1]
    assert cams.to_df([[(10, 10, 20, 20)], [(0, 0, 30, 20)]]).share_outside.round(2).tolist()==[round(outside(WHERE, torch.zeros(20, 30).index_fill(0, torch.arange(10, 20), 1).bool() & (torch.arange(30) >= 10) & (torch.arange(30) < 20)), 2), 0]


def test_what_is_not_known_has_no_column():
    table = CAMs(WHERE[None]).to_df()
    assert list(table)==['index', 'peak', 'peak_x', 'peak_y', 'boxes'] and table.boxes[0]==[[1, 1, 2, 2]]
    with pytest.warns(UserWarning, match='not finite'): none = CAMs(torch.stack([WHERE, WHERE*float('nan')])).to_df()
    assert none.boxes[1]==[] and np.isnan(none.peak[1]) and np.isnan(none.peak_x[1])


def test_only_what_was_asked_has_a_row():
    cams = CAMs(torch.stack([WHERE, WHERE*2])[None].repeat(2, 1, 1, 1), classes=torch.tensor([[0, 1], [2, NOT_ASKED]]), labels=['gradcam: predicted', 'layercam: predicted'], preds=torch.tensor([[.9, .8, .1], [.1, .2, .7]]), vocab=VOCAB, task='multi')
    assert cams.to_df()[['index', 'prediction', 'method', 'explains', 'peak']].values.tolist()==[[0, 'cat;dog', 'gradcam', 'cat', 3.], [0, 'cat;dog', 'layercam', 'dog', 6.], [1, 'car', 'gradcam', 'car', 3.]]
    assert len(everything().to_df())==8


@pytest.mark.parametrize('masks', [torch.ones(1, 2, 3), torch.ones(2, 2, 3, dtype=torch.bool), cells(), [[(0, 0, 1, 1)]]*2, 3])
def test_masks_of_other_items_are_refused(masks):
    with pytest.raises(ValueError, match='None for one whose object is not known'): CAMs(WHERE[None]).to_df(masks)


def test_boxes_need_pictures_and_volumes_have_no_rows():
    with pytest.raises(ValueError, match='boxes are in pixels of the pictures'): CAMs(WHERE[None]).to_df([[(0, 0, 1, 1)]])
    with pytest.raises(ValueError, match='these maps are volumes'): CAMs(WHERE[None, None], n_space=3).to_df()


def test_the_table_of_a_learner(dls):
    from fastai.vision.all import CrossEntropyLossFlat, Learner
    from torch import nn
    torch.manual_seed(0)
    learn = Learner(dls, nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))), loss_func=CrossEntropyLossFlat())
    cams = learn.get_cams([3, 5])
    table = cams.to_df()
    assert table.item.tolist()==[str(dls.valid.items[i]) for i in (3, 5)] and table.label.tolist()==['right', 'right'] and np.allclose(table.loss, cams.losses) and np.allclose(table.probability, cams.preds.max(1).values)
