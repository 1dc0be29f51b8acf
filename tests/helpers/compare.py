"A learner whose pictures have masks that are known, and its measures called by hand."
import numpy as np
import torch
from torch import nn
from fastai.vision.all import DataBlock, Learner, Normalize, PILImage, PILMask, Resize, imagenet_stats

SIZE = 60, 90 # height and width of the pictures, which `Resize` crops


def box_of(i):
    "Left, top, right and bottom of the marker in picture `i`"
    left, top = (int(n) for n in np.random.default_rng(i).integers((20, 4), (48, 34)))
    return left, top, left + 20, top + 16


def picture(i):
    pixels = np.random.default_rng(1000 + i).integers(20, 60, (*SIZE, 3), dtype=np.uint8)
    left, top, right, bottom = box_of(i)
    pixels[top:bottom, left:right] = [250, 250, 250] if i%2 else [250, 200, 250]
    return PILImage.create(pixels)


def array_of(i):
    mask = np.zeros(SIZE, dtype=bool)
    left, top, right, bottom = box_of(i)
    mask[top:bottom, left:right] = True
    return mask


def learner_of(*blocks, n_out=3, loss_func=None, model=None, item_tfms=(Resize(48),), **kwargs):
    data = DataBlock(blocks, get_x=picture, splitter=lambda items: (list(range(8)), list(range(8, 15))), item_tfms=list(item_tfms), batch_tfms=Normalize.from_stats(*imagenet_stats), **kwargs)
    learn = Learner(data.dataloaders(list(range(15)), bs=3, num_workers=0), model or net(n_out), loss_func=loss_func)
    learn.remove_cb(learn.progress)
    return learn


def net(n_out):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)))


def images_of(learn): return torch.cat([batch[0] for batch in learn.dls.valid]).as_subclass(torch.Tensor)


class Draws(nn.Module):
    "A logit for each of three classes at every pixel"
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.down, self.middle, self.up = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 3, 1)
    def forward(self, x): return nn.functional.interpolate(self.up(self.middle(self.down(x).relu()).relu()), x.shape[2:], mode='bilinear')


def codes_of(i):
    "Class 1 or 2 where the marker is; picture 10 has none"
    return PILMask.create((array_of(i)*(1 + i%2)*(i != 10)).astype(np.uint8))
