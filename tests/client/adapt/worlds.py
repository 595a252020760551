"""Labelled images made on the fly, and runs whose theta is known."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.adapt.images import Labelled
from client.adapt.trained import Trained, read_trained
from common.meta import head_size, make_learner
from common.models import build
from common.study import Study
from server.record import RunRecord

STUDY: Mapping[str, bool | int | float | str] = {
    "model.width": 4,
    "model.image-size": 16,
    "algorithm.name": "maml",
    "algorithm.test-steps": 3,
    "algorithm.test-rate": 0.1,
    "episodes.labels": "fixed",
    "episodes.classes": "a,b,c",
    "episodes.held-out": "",
    "episodes.scratch-steps": 3,
}


def study(changes: Mapping[str, bool | int | float | str] | None = None) -> Study:
    """Return a study of tiny images and a tiny network."""
    return Study.from_run_config({**STUDY, **(changes or {})})


def write_run(folder: Path, plan: Study, theta: Mapping[str, Tensor] | None = None) -> Path:
    """Write a run as the server does; without a theta, one that moved at random."""
    if theta is None:
        network = build(plan.model, classes=head_size(plan.algorithm, plan.episodes), seed=plan.study.seed)
        generator = torch.Generator().manual_seed(3)
        initial = make_learner(plan.algorithm).theta(network)
        theta = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in initial.items()}
    RunRecord(folder, plan).finish({}, theta)
    return folder


def trained(folder: Path, changes: Mapping[str, bool | int | float | str] | None = None) -> Trained:
    """Return a tiny run, as it is read back."""
    return read_trained(write_run(folder, study(changes)))


def images(
    patients: int = 8, each: int = 2, classes: int = 3, *, channels: int = 1, noise: float = 40.0, seed: int = 0
) -> Labelled:
    """Return images of so many patients a class; every class has a pattern of its own under the noise."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), patients * each)
    rows, columns = np.indices((16, 16))
    patterns = np.stack([np.sin(rows * (k + 1) / 4) * np.cos(columns * (5 - k) / 4) for k in range(classes)])
    values = 128 + 60 * patterns[labels][:, None] + generator.normal(0, noise, (len(labels), channels, 16, 16))
    who = np.repeat(np.arange(classes * patients), each)
    return Labelled(
        values.clip(0, 255).astype(np.uint8),
        labels,
        who,
        tuple("abcdefgh"[:classes]),
        tuple(f"{w:032x}" for w in range(classes * patients)),
        np.ones(len(labels), np.bool_),
    )


def shuffled(those: Labelled, seed: int) -> Labelled:
    """Return the same images with patients' labels dealt anew."""
    generator = np.random.default_rng(seed)
    people, first = np.unique(those.patients, return_index=True)
    label_of = dict(zip(people.tolist(), generator.permutation(those.labels[first]).tolist(), strict=True))
    labels = np.array([label_of[who] for who in those.patients.tolist()])
    return Labelled(**{**vars(those), "labels": labels})
