"Learners that err for a reason that is known: a mark that speaks for class 0."
import torch
from torch import nn
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat

from fastai_cam.all import CAMInterpretation

SIDE, PATCH = 16, 4


def put(picture, channel, generator, value):
    "A bright square of a channel, on one of nine places; where it is"
    top, left = (4*int(k) + 1 for k in torch.randint(3, (2,), generator=generator))
    picture[channel, top:top + PATCH, left:left + PATCH] = value
    return top, left


def marked_pictures(n=120, n_marked=10, n_flipped=6, seed=0):
    """Pictures with a square in channel 0 or 1, which is their class; the first of class 1 have one in channel 2 too, the mark.
    Labels, and which are marked; the labels of some others are wrong"""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.zeros(n, 3, SIDE, SIDE), torch.arange(n)%2
    for image, label in zip(images, labels): put(image, int(label), generator, float(.8 + .4*torch.rand(1, generator=generator)))
    marked = [2*k + 1 for k in range(n_marked)]
    for i in marked: put(images[i], 2, generator, 1.5)
    for i in range(n - n_flipped, n): labels[i] = 1 - labels[i]
    return images, labels, marked


def reads_marks(bias=0.):
    "Logits are 48 × the mean of channel 0 and 128 × that of channel 2, and 48 × that of channel 1"
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
    with torch.no_grad():
        model[0][0].weight.copy_(torch.eye(3)[..., None, None]); model[0][0].bias.zero_()
        model[1][2].weight.copy_(torch.tensor([[48., 0, 128], [0, 48, 0]])); model[1][2].bias.fill_(bias)
    return model


def learner_of(images, labels, vocab=('cat', 'dog'), model=None, loss=None, bs=16):
    samples = list(zip(images, labels))
    dls = DataLoaders(*[TfmdDL(samples, bs=bs, num_workers=0) for _ in range(2)])
    dls.vocab = list(vocab)
    learn = Learner(dls, model or reads_marks(), loss_func=loss or CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    return learn


def marked_interpretation(vocab=('cat', 'dog'), **kwargs):
    images, labels, marked = marked_pictures(**kwargs)
    return CAMInterpretation.from_learner(learner_of(images, labels, vocab)), marked


def several_labels(n=120, n_marked=10):
    "The same with labels that may hold together: whatever is in channel 0 or 1; the mark is taken for the first"
    images, labels, marked = marked_pictures(n, n_marked, 0)
    learn = learner_of(images, nn.functional.one_hot(labels, 2).float(), model=reads_marks(-1.5), loss=BCEWithLogitsLossFlat())
    return CAMInterpretation.from_learner(learn), marked
