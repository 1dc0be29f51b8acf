"Learners whose classes are asked about."
import torch
from torch import nn
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL


def net(n_out):
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)))

def plain_learner(n_out, vocab=None, n_items=4):
    items = [(torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(i)), i%2) for i in range(n_items)]
    dls = DataLoaders(*[TfmdDL(items, bs=4, num_workers=0) for _ in range(2)])
    if vocab is not None: dls.vocab = vocab
    learn = Learner(dls, net(n_out), loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn
