"What a user may write, read by a type checker in test_typed.py and never run."
from pathlib import Path

import torch
from fastai.vision.all import Learner
from torch import nn, Tensor

from fastai_cam.all import (
    CAMInterpretation, CAMMap, CAMs, METRICS, METHODS, Predicted, Probe, Region, Score, Target, Task, Versus, WhyNot,
    cam_method, cam_metric)
from fastai_cam.methods import as_method, gradcam
from fastai_cam.probe import Capture
from fastai_cam.targets import as_target
from fastai_cam.tasks import SingleLabel
from fastai_cam.trust import spearman


def maps(learn: Learner, photo: Path) -> list:
    # fastai has no types, so what is patched onto `Learner` is `Any` to a checker: an annotation says what it is, and the rest follows.
    cams: CAMs = learn.get_cams(photo, cls=['cat', Versus('cat', 'dog'), WhyNot('hen'), Region('cat', 'actual')], method='gradcam')
    learn.show_cam(photo, cls=Score(lambda out: out[:, 0]))
    axes = cams.show(max_n=4, boxes=True, save='maps.png')
    saved: Path = cams.save(photo.with_suffix('.npz'))
    loaded: CAMs = CAMs.load(saved)
    finite: Tensor = loaded.is_finite
    return [len(loaded), cams.title(0), axes, finite, cams.boxes(threshold=.5), cams.peaks()]


def mistakes(learn: Learner) -> None:
    interp = CAMInterpretation.from_learner(learn)
    interp.plot_top_losses_cam(9, show='both')
    interp.compare_cams(['gradcam', 'likenesscam'], dtype=torch.bfloat16)
    interp.find_shortcuts()
    print(learn.cam_trust(0))


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    with Probe(model, layers='stages', grad=True) as probe:
        model(x)
        cap: Capture = probe.take()
    target: Target = as_target('cat', ['cat', 'dog'], task=SingleLabel(['cat', 'dog']))
    task: Task = target.task
    found = as_method('layercam+stages')(cap, cap.score(target))
    print(task.name, METHODS['gradcam'], METRICS['insertion'], Predicted().labels, len(cap), cap.out)
    CAMMap(found[0, 0], x[0]).show(alpha=.5)
    return gradcam(cap, cap.score(target))


@cam_method(grad=False)
def everywhere(cap: Capture, scores: Tensor) -> Tensor: return torch.ones(*scores.shape, 1, 1)


@cam_metric('maps', higher=False)
def roughness(maps: Tensor) -> Tensor: return maps.diff(dim=-1).abs().mean((1, 2))


def likeness(one: Tensor, other: Tensor) -> Tensor: return spearman(one, other)
