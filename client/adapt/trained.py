"""What a federated study leaves behind, read at a site: the study and its theta. No server and no network is needed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.contract import theta_digest
from common.errors import NotPreparedError, StudyError
from common.meta import Learner, flatten, head_size, make_learner
from common.models import build
from common.models.network import Network
from common.study import Study

__all__ = ["Trained", "read_trained"]


@dataclass(frozen=True)
class Trained:
    """A study and what its training ended with.

    Attributes
    ----------
    network : Network
        The study's, with the head it was trained with.
    initial, theta : mapping of str to Tensor
        Where training began, which follows from the study's seed, and where it ended.
    theta_digest : str
        As every message of the study names it.
    """

    study: Study
    learner: Learner
    network: Network
    initial: Mapping[str, Tensor]
    theta: Mapping[str, Tensor]
    theta_digest: str


def read_trained(folder: Path) -> Trained:
    """Read a run's folder or an export: ``study.json`` and ``theta.safetensors``.

    Raises
    ------
    NotPreparedError
        One of the two is not there.
    StudyError
        They are damaged, or do not belong together.
    """
    try:
        text = (folder / "study.json").read_text(encoding="utf-8")
        theta = load_file(folder / "theta.safetensors")
    except OSError:
        raise NotPreparedError(
            "--model needs the folder of a run that has ended, or of an export, with study.json and theta.safetensors"
        ) from None
    except (SafetensorError, UnicodeDecodeError):
        raise StudyError("study.json or theta.safetensors is damaged: fetch the model again") from None
    try:
        record = json.loads(text)
        study = Study.from_run_config(record["study"])
    except (ValueError, KeyError, TypeError):
        raise StudyError("study.json is damaged: fetch the model again") from None
    if record.get("digest") != study.digest:
        raise StudyError("study.json names another digest than its study has: fetch the model again")
    learner, dtype = make_learner(study.algorithm), torch.float32
    network = build(study.model, classes=head_size(study.algorithm, study.episodes), seed=study.study.seed, dtype=dtype)
    initial = learner.theta(network)
    if {n: t.shape for n, t in theta.items()} != {n: t.shape for n, t in initial.items()}:
        raise StudyError("theta.safetensors does not hold the tensors of this study: fetch the model again")
    theta = {name: theta[name] for name in initial}
    if not all(bool(t.isfinite().all()) for t in theta.values()):
        raise StudyError("theta.safetensors holds numbers that are not finite: fetch the model again")
    digest = theta_digest(flatten(theta).numpy(), {name: tuple(t.shape) for name, t in theta.items()})
    return Trained(study, learner, network, initial, {name: t.to(dtype) for name, t in theta.items()}, digest)
