"The test of a suspect, by hand."
from dataclasses import replace

import numpy as np
import torch

import fastai_cam.shortcuts.testing as shortcuts_testing_room
from fastai_cam.shortcuts.evidence import Evidence
from fastai_cam.shortcuts.report import as_shortcut
from fastai_cam.shortcuts.candidates import Candidate
from fastai_cam.shortcuts.edits import edge_places, place_edits
from fastai_cam.shortcuts.matching import Match, paste_at_random
from fastai_cam.shortcuts.testing import EditTester

from helpers.shortcuts import corner_candidate, corner_reader


def test_effects_are_shares_of_the_way():
    tester = corner_reader(4.)
    assert abs(tester.log_odds_gap(0) - 4) < 1e-5 # from -2 to 2
    found = tester.test(corner_candidate(tester))
    measured = found.measured
    assert all(abs(value - 1) < 1e-5 for value in (measured.effect, *measured.interval, *measured.removed))
    assert abs(measured.before - 1/(1 + np.exp(2))) < 1e-6 and abs(measured.after - 1/(1 + np.exp(-2))) < 1e-6

def test_it_must_go_as_far_as_is_asked():
    tester = corner_reader(1.) # a quarter of the way
    assert abs(tester.test(corner_candidate(tester, .2)).measured.effect - .25) < 1e-5
    assert tester.test(corner_candidate(tester, .3)) is None
    assert corner_reader(0.).test(corner_candidate(tester)) is None # the model does not look at it

def test_what_is_sure_of_an_effect_has_to_reach_the_limit(monkeypatch):
    tester = corner_reader(4.)
    monkeypatch.setattr(shortcuts_testing_room, 'mean_interval', lambda values: (.4, .2, .6))
    assert tester.test(corner_candidate(tester, .3)) is None and tester.test(corner_candidate(tester, .1)).low==.2

def test_what_is_lost_is_measured_against_others_of_the_class():
    tester = corner_reader(4.)
    images, mine = tester.evidence.images.clone(), tester.evidence.predicted[:, 0]
    images[mine, :, 3, 3] = 1.
    def predict(some):
        p = (4*some[:, 0, :2, :2].mean((1, 2)) - 8*(some[:, 0, 3, 3] == 0).float() + 4*some[:, 0, 4, 4] - 2).sigmoid()
        return torch.stack([p, 1 - p], 1)
    tester = EditTester(Evidence(images, predict(images), *tester.evidence[2:]), predict, 0)
    whole = edge_places(8, 8)['top left corner'] | (torch.arange(64).view(8, 8) == 27) # and the place (3, 3)
    candidate = corner_candidate(tester)
    assert abs(tester.effect_of_removal(candidate._replace(edits=place_edits(whole), mask=whole), 'mean')[0] - 12/tester.log_odds_gap(0)) < 1e-4
    assert abs(tester.effect_of_removal(candidate, 'mean')[0] - 4/tester.log_odds_gap(0)) < 1e-4
    speckled = images + torch.rand(images.shape, generator=torch.Generator().manual_seed(0))*(torch.arange(8) > 5)
    unread = EditTester(Evidence(speckled, predict(speckled), *tester.evidence[2:]), predict, 0)
    right = edge_places(8, 8)['right edge']
    assert unread.effect_of_removal(candidate._replace(edits=place_edits(right), mask=right), 'mean') == (0., 0., 0.) # the model does not look there

def test_damage_is_no_loss():
    codes, mine = torch.linspace(0, 1, 24), torch.arange(24) < 12
    images = torch.zeros(24, 1, 8, 8)
    images[:, 0, :2, :2] = codes[torch.randperm(24, generator=torch.Generator().manual_seed(0))][:, None, None] # as of an object that reaches into the corner
    images[:, 0, 4, 4], images[:, 0, 5, 5] = images[:, 0, 0, 0], mine.float()
    def predict(some):
        p = (4*some[:, 0, 5, 5] - 2 - 8*(some[:, 0, 0, 0] != some[:, 0, 4, 4]).float()).sigmoid() # everything falls apart where the corner is not the picture's own
        return torch.stack([p, 1 - p], 1)
    one_hot = torch.stack([mine, ~mine], 1)
    tester = EditTester(Evidence(images, predict(images), one_hot, one_hot, torch.zeros(24, 2, 2), torch.zeros(24, 3)), predict, 0)
    lost, low, high = tester.effect_of_removal(corner_candidate(tester), 'mean')
    assert abs(lost) < .4 # of a way of 4; 8 are lost by the damage. Some get their own corner back by chance

def reader_of_a_thing():
    "A tester of a model that counts pixels of 1, and the suspect: four of them, in pictures of class 0"
    images, mine = torch.zeros(24, 1, 16, 16), torch.arange(24) < 12
    corners = [(3, 2 + k % 5) for k in range(12)]
    for image, (top, left) in zip(images, corners): image[0, top:top+2, left:left+2] = 1.
    def predict(some):
        p = (2*(some[:, 0] == 1).float().sum((1, 2)) - 4).sigmoid() # from -4 to 4
        return torch.stack([p, 1 - p], 1)
    one_hot, items = torch.stack([mine, ~mine], 1), list(range(12))
    tester = EditTester(Evidence(images, predict(images), one_hot, one_hot, torch.zeros(24, 2, 2), torch.zeros(24, 3)), predict, 0)
    match = Match(torch.ones(1, 2, 2), torch.ones(2, 2).bool(), torch.zeros(1, 2, 2), items, corners)
    return tester, Candidate(0, 'thing', 'different places', torch.tensor(items), torch.tensor(items), dict(piece=paste_at_random(match.crop, match.mask)), .1, match=match)

def test_a_thing_is_painted_over_and_as_much_elsewhere(monkeypatch):
    tester, candidate = reader_of_a_thing()
    here = candidate.match.corners
    monkeypatch.setattr(shortcuts_testing_room, 'random_corners', lambda images, size, generator: [(12, 12)]*6 + here[6:]) # half of them miss it, the others are painted over twice in the same place
    lost, low, high = tester.effect_of_removal(candidate, 'piece')
    assert abs(lost - .5) < 1e-5 and low < .5 < high # the whole way of the first half, nothing of the second

def test_a_thing_put_into_others(monkeypatch):
    tester, candidate = reader_of_a_thing()
    found = tester.test(candidate)
    assert abs(found.measured.effect - 1) < 1e-5 and abs(found.measured.after - 1/(1 + np.exp(-4))) < 1e-6
    beyond = candidate._replace(match=candidate.match._replace(corners=[(-1, 15), *candidate.match.corners[1:]]))
    shortcut = as_shortcut(tester, replace(found, candidate=beyond), 'ones', list)
    assert shortcut.boxes[0] == (15, 0, 16, 1) and shortcut.boxes[1] == (3, 3, 5, 5) # left, top, right, bottom; what of it is in the picture
    assert repr(shortcut).startswith('ones: one and the same small thing at different places, in 12 of 12 pictures')
    before, after = shortcut.pictures
    assert (before == 1).sum() == 0 and (after == 1).sum() == 4
