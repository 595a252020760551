"""A finished run, read and checked: its study, its theta, and the network that theta belongs to."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.export import ExportedProgram

from common.contract import theta_digest
from common.errors import ExportError
from common.meta import flatten, head_size, make_learner
from common.meta.local_only import LocalOnly
from common.models import Network, build
from common.study import Study
from server.export.plain import Plain, trace

__all__ = ["Predict", "Source", "read_run"]

#: From images ``[N, C, *]`` to the outputs by name, ``[N, F]`` each.
Predict = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes
    ----------
    study : Study
        The run's.
    theta : dict of Tensor
        As the run left it, in the study's type; with Meta-SGD's rates.
    digest : str
        Theta's, as in the run's result.
    network : Network
        Has theta's values as its own parameters.
    """

    study: Study
    theta: dict[str, Tensor]
    digest: str
    network: Network

    @property
    def has_head(self) -> bool:
        """Whether theta has a head; the prototype learners make one from a support set."""
        return "head.weight" in self.theta

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the exported network gives, the last one being what it is for."""
        return ("features", "logits") if self.has_head else ("features",)

    @property
    def image(self) -> tuple[int, ...]:
        """Shape of one image, channels first."""
        model = self.study.model
        return (model.channels, *[model.image_size] * model.dimensions)

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as a program for any number of images."""
        return trace(Plain(self.network, head=self.has_head), self.image)

    def predict(self, network: Network, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of wardround's own network, in the type of its parameters."""
        features = network.body(images.to(network.head.weight.dtype))
        out = {"features": features}
        return out | {"logits": network.head(features)} if self.has_head else out


def read_run(folder: Path) -> Source:
    """Read a run's folder; nothing in it is believed that its digests do not confirm.

    Raises
    ------
    ExportError
        The run has no result, or its files do not belong together.
    """
    if not (folder / "result.json").is_file():
        raise ExportError(
            f"the run in {folder} has no result: it runs still, or has failed; only a finished run is exported"
        )
    record, result = _object(folder / "study.json"), _object(folder / "result.json")
    config = record.get("study")
    study = Study.from_run_config(config if isinstance(config, dict) else {})
    if not study.digest == record.get("digest") == result.get("study"):
        raise ExportError(
            f"{folder / 'study.json'} is not the study that was run: it was changed, or another version of wardround "
            "wrote it; restore the file, or export with that version"
        )
    learner = make_learner(study.algorithm)
    if isinstance(learner, LocalOnly):
        raise ExportError("local-only learns nothing that sites share: its theta is the initialisation before training")
    dtype = torch.float64 if study.wire.dtype == "float64" else torch.float32
    classes = head_size(study.algorithm, study.episodes)
    network = build(study.model, classes=classes, seed=study.study.seed, dtype=dtype)
    theta = _theta(folder / "theta.safetensors", learner.theta(network), str(result.get("theta")))
    # Meta-SGD's rates are no parameters of the network, and a prototype learner's theta has no head.
    network.load_state_dict(network.state_dict() | {n: theta[n] for n in network.state_dict() if n in theta})
    return Source(study, theta, str(result["theta"]), network.requires_grad_(False))


def _theta(path: Path, layout: dict[str, Tensor], digest: str) -> dict[str, Tensor]:
    try:
        found = load_file(path)
    except Exception as error:  # safetensors has its own errors for damage, Python's for what is missing
        raise ExportError(f"{path} cannot be read: {error}") from None
    same = found.keys() == layout.keys() and all(
        found[n].shape == t.shape and found[n].dtype == t.dtype for n, t in layout.items()
    )
    theta = {name: found[name] for name in layout} if same else {}
    shapes = {name: tuple(t.shape) for name, t in layout.items()}
    if not same or theta_digest(flatten(theta).numpy(), shapes) != digest:
        raise ExportError(
            f"{path} is not the theta that the run ended with (result.json has the digest {digest[:12]}): "
            "the file was changed; restore it, or run again"
        )
    return theta


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path} is not what a run writes there: restore it")
    return value
