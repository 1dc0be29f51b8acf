"Learners that read a mark in the corner, and pieces that come again."
import torch

from fastai_cam.shortcuts.evidence import Evidence
from fastai_cam.shortcuts.candidates import Candidate
from fastai_cam.shortcuts.edits import edge_places, place_edits
from fastai_cam.shortcuts.testing import EditTester


def blotches(n, side=64, seed=0):
    "Pictures that are smooth and have nothing in common, `[n, 3, side, side]`, about from 0 to 1"
    coarse = torch.rand(n, 3, side//8, side//8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode='bicubic')


def evidence_of_maps(images, places, size, n_positives):
    "The maps light the places (top, left) of the positives"
    n, maps = len(images), torch.zeros(len(images), 8, 8)
    for i, (top, left) in places.items(): maps[i, min((top + size//2)*8//images.shape[-2], 7), min((left + size//2)*8//images.shape[-1], 7)] = 1.
    features = torch.rand(n, 4, generator=torch.Generator().manual_seed(2))
    return Evidence(images, torch.rand(n, 2), torch.zeros(n, 2).bool(), torch.zeros(n, 2).bool(), maps, features), torch.arange(n_positives), torch.arange(n_positives, n)


def corner_reader(slope, n=24):
    "Pictures of class 0 have a bright corner; the log-odds of class 0 are `slope`·corner + 4·middle − 2, and its middle makes up for what the corner does not say"
    images = torch.zeros(n, 1, 8, 8)
    mine = torch.arange(n) < n//2
    images[mine, :, :2, :2] = 1.
    images[mine, :, 4, 4] = (4 - slope)/4
    def predict(some):
        p = (slope*some[:, 0, :2, :2].mean((1, 2)) + 4*some[:, 0, 4, 4] - 2).sigmoid()
        return torch.stack([p, 1 - p], 1)
    one_hot = torch.stack([mine, ~mine], 1)
    return EditTester(Evidence(images, predict(images), one_hot, one_hot, torch.zeros(n, 2, 2), torch.zeros(n, 3)), predict, 0)

def corner_candidate(tester, min_effect=.1):
    mask = edge_places(8, 8)['top left corner']
    mine = tester.evidence.predicted[:, 0].nonzero()[:, 0]
    return Candidate(0, 'place', 'top left corner', mine, mine, place_edits(mask), min_effect, mask)
