"What raises a suspicion, by hand: features, places and surroundings."
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import fastai_cam.shortcuts.evidence as shortcuts_evidence_room
from fastai_cam.shortcuts.evidence import (
    _cells, _least_salient_corners, LIMITS, log_odds, separability, shrunken_auc, surroundings_log_odds)


# -- pieces, by hand

def test_log_odds():
    found = log_odds(torch.tensor([.5, .75, 1., 0.]))
    assert torch.allclose(found[:2], torch.tensor([0., float(np.log(3))]), atol=1e-6) and found[2] == -found[3] and found[2] > 15

def test_cells_tell_colour_contrast_and_edges():
    images = torch.zeros(2, 3, 8, 8)
    images[1, 0, :, 4:] = 1.
    features = _cells(images, 2)
    assert features.shape == (2, 12 + 4 + 4) # 3 colours, contrast, edges in 2×2 cells
    assert features[1, :4].tolist() == [0, 1, 0, 1] and (features[0, :12] == 0).all()

def test_a_telling_feature_is_told_from_noise():
    rng = np.random.default_rng(0)
    is_class = np.arange(90) % 3 == 0
    told, p = separability(np.c_[is_class + .1*rng.normal(size=90), rng.normal(size=(90, 3))], is_class)
    assert told > .99 and (p[is_class] > .5).all() and (p[~is_class] < .5).all()
    assert abs(separability(rng.normal(size=(90, 4)), is_class)[0] - .5) < .2
    assert separability(rng.normal(size=(90, 4)), np.arange(90) < 2)[0] == .5 # too few to tell
    few = np.arange(90) < 6
    assert abs(separability(few[:, None] + .01*rng.normal(size=(90, 1)), few)[0] - (.5 + .5*.065/np.sqrt(91/(12*6*84)))) < 1e-9 # told without error, but they are few


def test_few_pictures_prove_less():
    is_class = np.arange(288) % 6 == 0
    assert shrunken_auc(is_class, is_class + 0.) == 1 and abs(shrunken_auc(is_class, -(is_class + 0.))) < 1e-9 and shrunken_auc(is_class, np.ones(288)) == .5 # 48 of 288: chance is .046, less than .065
    few = np.arange(40) < 6
    assert abs(shrunken_auc(few, few + 0.) - (.5 + .5*.065/np.sqrt(41/(12*6*34)))) < 1e-9

def test_corners_without_the_object_come_first():
    images = torch.zeros(2, 1, 16, 16)
    for value, place in zip((1., 2., 3., 4.), (np.s_[:6, :6], np.s_[:6, 10:], np.s_[10:, :6], np.s_[10:, 10:])): images[(slice(None), 0, *place)] = value
    maps = torch.tensor([[[3., 2.], [-5., 0.]], [[0., 4.], [5., 1.]]]) # what speaks against the class is as good as nothing
    first, second = _least_salient_corners(images, maps)
    assert first.shape == (2, 1, 6, 6) and first.flatten(1).unique(dim=1).tolist() == [[4], [1]] and second.flatten(1).unique(dim=1).tolist() == [[3], [4]] # the top left one reaches further down than the top right one

def test_what_the_model_says_to_the_surroundings_alone():
    images = torch.zeros(2, 1, 16, 16)
    images[0, 0, :6, :6], images[1, 0, 10:, 10:] = .5, .25
    images[:, :, 6:10, 6:10] = 100. # the object: never seen
    maps = torch.tensor([[[0., 1.], [1., 1.]], [[1., 1.], [1., 0.]]])
    def predict(some):
        assert some.max() < 1
        p = some.mean((1, 2, 3))/2 + .25 # a corner of .5 gives 1/2, of .25 gives 3/8, of nothing 1/4
        return torch.stack([p, 1 - p], 1)
    odds = lambda p: np.log(p/(1 - p))
    found = surroundings_log_odds(images, maps, predict)
    assert np.allclose(found[:, 0], [(odds(.5) + odds(.25))/2, (odds(.375) + odds(.25))/2], atol=1e-5) and torch.allclose(found[:, 0], -found[:, 1], atol=1e-5)


# -- the test of a candidate, by hand

def test_limits_are_fields_and_old_keys_say_so():
    assert LIMITS.place_auc == .6 and LIMITS.auc_effects[0] == (.68, .3)
    with pytest.raises(TypeError, match=r"LIMITS\['lit place'\] is called LIMITS.salient_effect now"): LIMITS['lit place']
    with pytest.raises(KeyError, match='nothing'): LIMITS['nothing']
    with pytest.raises(FrozenInstanceError): LIMITS.place_auc = .7
    with pytest.raises(ImportError, match='EFFECTS is called LIMITS now'): from fastai_cam.shortcuts import EFFECTS
    assert set(shortcuts_evidence_room._FIELD_OF.values()) <= set(vars(LIMITS))
