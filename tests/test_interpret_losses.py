"Differences of two maps, items that are chosen, layers as columns; and that a picture costs what it did."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.all import MSELossFlat, resnet18, vision_learner

from fastai_cam.all import CAMInterpretation, CAMs, cam_head
from fastai_cam.interpret.losses import difference_rows, with_difference


def learner(n=8, vocab=('cat', 'dog', 'cow'), loss=None, targets=lambda i: i%3, n_out=3):
    set_seed(2)
    samples = [(torch.rand(3, 24, 24), targets(i)) for i in range(n)]
    dls = DataLoaders(*[TfmdDL(samples, bs=5, num_workers=0) for _ in range(2)])
    dls.vocab = list(vocab)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU())
    return Learner(dls, nn.Sequential(body, cam_head(8, n_out)), loss_func=loss or CrossEntropyLossFlat())


@pytest.fixture(scope='module')
def interp():
    learn = learner()
    learn.remove_cb(learn.progress)
    return CAMInterpretation.from_learner(learn, method='gradcam')


def test_the_difference_is_that_of_the_raw_maps():
    cams = CAMs(torch.tensor([[[[1., 2]], [[3., -1]]]]), classes=torch.tensor([[0, 1]]), labels=['predicted', 'actual'], vocab=['cat', 'dog'], method=['gradcam'])
    found = with_difference(cams)
    assert found.maps.tolist()==[[[[1, 2]], [[3, -1]], [[-2, 3]]]] and found.classes.tolist()==[[0, 1, -1]]
    assert found.labels==['predicted', 'actual', 'predicted − actual'] and found.question(0, 2)=='predicted − actual'
    assert found.to_df().explains.tolist()==['cat', 'dog', 'predicted − actual']


def test_diff(interp):
    both, found = interp.top_losses_cams(3, show='both'), interp.top_losses_cams(3, show='diff')
    assert torch.equal(found.maps[:, :2], both.maps) and torch.equal(found.maps[:, 2], both.maps[:, 0] - both.maps[:, 1]) and found.index==both.index
    assert torch.equal(interp.top_losses_cams(3, show='difference').maps, found.maps)


def test_a_row_is_one_item_on_one_scale(interp):
    cams = interp.top_losses_cams(2, where='wrong', show='diff')
    axs = interp.plot_top_losses_cam(2, where='wrong', show='diff', style='heat', interpolation='nearest')
    assert len(axs)==8 and axs[0].get_title(loc='left')==cams.item_title(0, loss=True) + '\n'
    for i in range(2):
        full = float(max(cams.maps[i, :2].clamp(min=0).max(), cams.maps[i, 2].abs().max()))
        pred, actual, difference = [np.asarray(ax.images[-1].get_array()) for ax in axs[4*i + 1:4*i + 4]]
        for drawn, own in ((pred, cams.maps[i, 0].clamp(min=0)), (actual, cams.maps[i, 1].clamp(min=0)), (difference, cams.maps[i, 2])):
            if own.max() > 0: assert np.allclose(drawn, own/full, atol=1e-5)
    figure = axs[0].figure
    assert figure._supxlabel.get_text()=='map: gradcam   predicted − actual, evidence against counted: red prediction, blue label   one scale a row'
    assert [ax.get_ylabel() for ax in figure.axes if ax not in axs]==['red: prediction, blue: label']*2


def test_an_item_that_is_predicted_right_says_so(interp):
    axs = interp.plot_top_losses_cam(1, where='right', show='diff')
    assert len(axs)==4 and [text.get_text() for text in axs[2].texts]==['predicted right:\nthe label has the same map'] and not axs[3].images
    assert axs[1].get_title(loc='left').strip().startswith('▸ predicted and actual')


def test_chosen_items_are_drawn_in_order(interp):
    df = interp.to_df()
    axs = interp.plot_top_losses_cam(2, where='wrong', cls='cow', largest=False, by='probability')
    chosen = df[~df.is_right & ((df.label=='cow') | (df.prediction=='cow'))].nsmallest(2, 'probability')
    assert [ax.get_title().replace('·', '').split()[:7] for ax in axs]==[f'predicted {row.prediction} {row.probability:.2f} actual {row.label} loss {row.loss:.2f}'.split() for row in chosen.itertuples()]


def test_axes_are_returned_and_say_nothing_in_a_notebook(interp):
    axs = interp.plot_top_losses_cam(3)
    assert isinstance(axs, list) and len(axs)==3 and all(ax.figure is axs[0].figure for ax in axs) and axs._ipython_display_() is None
    own = plt.subplots(1, 4)[1]
    assert interp.plot_top_losses_cam(1, show='diff', ax=own)==own.tolist()


def test_what_a_page_cannot_have_is_said_before_any_work(interp):
    handle = interp.learn.model.register_forward_pre_hook(lambda *args: pytest.fail('work was done'))
    try:
        for kwargs, error, message in ((dict(nrows=2), TypeError, "'nrows' is no option of this view"), (dict(photo=True), TypeError, "'photo' is no option"), (dict(style='side'), ValueError, 'leave it out'),
                                       (dict(method=['gradcam', 'layercam']), ValueError, 'takes one method'), (dict(fuse=False), ValueError, 'leave fuse'), (dict(figsize=3), ValueError, 'figsize is')):
            with pytest.raises(error, match=message) as caught: interp.plot_top_losses_cam(2, show='diff', **kwargs)
            assert '\n' not in str(caught.value)
        with pytest.raises(TypeError, match='fuse is True'): interp.learn.get_cams(0, fuse='columns')
    finally: handle.remove()
    with pytest.raises(ValueError, match='has 4 panels and needs as many axes, but 1 were given'): interp.plot_top_losses_cam(1, where='wrong', show='diff', ax=plt.subplots()[1])


def test_values_have_no_difference():
    learn = learner(loss=MSELossFlat(), targets=lambda i: float(i), n_out=1, vocab=())
    with learn.no_bar(): interp = CAMInterpretation.from_learner(learn)
    with pytest.raises(ValueError, match="show='diff' asks about the class that the label names, and this learner predicts values"): interp.plot_top_losses_cam(2, show='diff')


def test_a_network_that_draws_has_a_difference():
    set_seed(0)
    samples = [(torch.rand(3, 16, 16), (torch.arange(16)[:, None] > 4 + i%5).long().expand(16, 16)) for i in range(4)]
    dls = DataLoaders(*[TfmdDL(samples, bs=4, num_workers=0) for _ in range(2)])
    dls.vocab = ['sky', 'ground']
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)), loss_func=CrossEntropyLossFlat(axis=1))
    with learn.no_bar():
        interp = CAMInterpretation.from_learner(learn, method='gradcam', layer='0')
        assert len(interp.plot_top_losses_cam(2, show='diff'))==8
        assert interp.select(cls='sky').tolist()==[0, 1, 2, 3]


@pytest.mark.parametrize('is_same', [False, True])
def test_one_class_at_other_places_is_another_question(is_same):
    regions = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    regions[0, 0, :2], regions[0, 1, :2 if is_same else 3] = True, True
    cams = CAMs(torch.rand(1, 2, 4, 4), torch.rand(1, 3, 16, 16), torch.tensor([[1, 1]]), ['predicted', 'actual'], vocab=['sky', 'ground'], method=['gradcam'], regions=regions)
    row, = difference_rows(with_difference(cams))
    assert [bool(panel.words) for panel in row.panels]==[False, False, is_same, False] and (row.panels[2].map is None)==is_same


# -- several layers

def test_layers_as_columns(interp):
    "Each is the map of that layer alone, enlarged to the finest; fused they are what they were"
    learn = interp.learn
    apart = learn.get_cams([0, 1], cls=['cat', 'dog'], method='gradcam', layer=['0.1', '0.3'], fuse=False)
    assert apart.labels==['0.1: cat', '0.1: dog', '0.3: cat', '0.3: dog'] and apart.maps.shape==(2, 4, 11, 11) and apart.classes.tolist()==[[0, 1, 0, 1]]*2
    one = learn.get_cams([0, 1], cls=['cat', 'dog'], method='gradcam', layer='0.1')
    assert torch.allclose(apart.maps[:, :2], one.maps, atol=1e-7) and apart.layers==['0.1', '0.3']
    several = learn.get_cams(0, method=['gradcam', 'layercam'], layer=['0.1', '0.3'], fuse=False)
    assert several.labels==['gradcam: 0.1: predicted', 'gradcam: 0.3: predicted', 'layercam: 0.1: predicted', 'layercam: 0.3: predicted']
    assert [several.method_of(k) for k in range(4)]==['gradcam', 'gradcam', 'layercam', 'layercam']
    assert torch.allclose(several.maps[:, 2:3], learn.get_cams(0, method=['layercam'], layer='0.1').maps, atol=1e-7)
    assert interp.top_losses_cams(3, layer=['0.1', '0.3'], fuse=False).maps.shape==(3, 2, 11, 11)
    axs = interp.plot_top_losses_cam(2, layer=['0.1', '0.3'], fuse=False)
    assert len(axs)==4 and '▸ 0.3: predicted' in axs[1].get_title(loc='left').replace('\n', ' ')
    learn.show_cam(0, layer=['0.1', '0.3'], fuse=False)


def test_one_layer_stays_one_map(interp):
    assert torch.equal(interp.learn.get_cams(0, method='gradcam', fuse=False).maps, interp.learn.get_cams(0, method='gradcam').maps)


def test_on_fastais_own_learner(dls):
    learn = vision_learner(dls, resnet18, pretrained=False)
    with learn.no_bar():
        interp = CAMInterpretation.from_learner(learn, method='layercam')
        found = interp.top_losses_cams(2, layer='stages', fuse=False)
        assert found.maps.shape[1]==len(found.layers)==4
        for k, name in enumerate(found.layers): assert found.labels[k]==f'{name}: predicted'
