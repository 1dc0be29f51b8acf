"Modes that a pass needs: recurrent layers on CUDA have gradients in training mode only."
import pytest
import torch
from torch import nn

import fastai_cam.probe.modes as probe_modes_room
from fastai_cam.probe.watch import Probe

from helpers.probe import image


class Recurrent(nn.Module):
    "A recurrent layer with dropout behind a convolution"
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.conv, self.steps, self.head, self.seen = nn.Conv2d(3, 4, 3, 1, 1), kind(4, 4, 2, batch_first=True, dropout=.5), nn.Linear(4, 3), []
    def forward(self, x):
        self.seen.append((self.steps.training, self.steps.dropout))
        return self.head(self.steps(self.conv(x).mean(2).mT)[0].mean(1))


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_cudnn_gives_recurrent_layers_gradients_in_training_mode_only(kind, monkeypatch):
    "On CUDA the layer is in training mode while a pass is recorded, without its dropout; on the CPU nothing changes"
    torch.manual_seed(0)
    model = Recurrent(kind).eval()
    with Probe(model, 'conv') as p: expected = p(image()).grads(lambda out: out[:, 1])[0]
    assert model.seen==[(False, .5)]
    monkeypatch.setattr(probe_modes_room, '_is_cuda', lambda inp: True)
    with Probe(model, 'conv') as p:
        cap = p(image())
        assert model.seen[-1]==(True, 0.) and (model.steps.training, model.steps.dropout)==(False, .5)
        assert torch.equal(cap.grads(lambda out: out[:, 1])[0], expected)
        cap.run(image())
        assert model.seen[-1]==(False, .5) # nothing is recorded
    p = Probe(model, 'conv').attach()
    model.head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt): model(image())
    p.detach()
    assert (model.steps.training, model.steps.dropout)==(False, .5)
