"""Finished runs without a run: a study, a theta as training might have left it, and the result that names both."""

from collections.abc import Mapping
from pathlib import Path

import torch

from common.contract import theta_digest
from common.meta import flatten
from common.study import Study
from server.record import RunRecord
from server.rounds import initial_theta

__all__ = ["finished_run"]


def finished_run(folder: Path, changes: Mapping[str, bool | int | float | str]) -> Study:
    """Write a run's folder and return its study; theta is the study's initialisation, shaken."""
    study = Study.from_run_config({"model.width": 2, "model.image-size": 16, "episodes.ways": 3, **changes})
    generator = torch.Generator().manual_seed(3)
    theta = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype)
        for name, value in initial_theta(study).items()
    }
    digest = theta_digest(flatten(theta).numpy(), {name: tuple(value.shape) for name, value in theta.items()})
    RunRecord(folder, study).finish({"study": study.digest, "theta": digest}, theta)
    return study
