"""The folder of an adapted model: all that a prediction needs, and what is known of how good it is.

It holds ``adapted.json`` (recipe, classes, calibration, digests, verdict), ``weights.safetensors`` (the adapted body
and head, theta's own body, and where the labelled images lie in its features), ``patients.json`` (keyed hashes of the
patients used, so that they can be left out later), ``report.json`` and ``report.md``. Reading it needs no server and
no network.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from client.adapt.classifier import Classifier
from client.adapt.familiar import Familiar
from client.calibration import Calibration, from_json
from client.data.image import Recipe
from common.canonical import sha256_hex
from common.errors import DataError, NotPreparedError
from common.models import build, untrained
from common.models.fixed_norm import with_fixed_statistics
from common.study import Model

__all__ = ["AdaptedModel", "read_adapted", "write_adapted"]

_VERSION = 2
_ADAPTED, _THETA, _FAMILIAR = "adapted.", "theta.", "familiar."


@dataclass(frozen=True)
class AdaptedModel:
    """A site's own model.

    Attributes
    ----------
    model : common.study.Model
        The network and how pixels are prepared for it.
    classes : tuple of str
        In the order of the head.
    classifier, theta : Classifier
        Adapted; and before adaptation, for its features.
    calibration : Calibration
        From its logits to probabilities and sets.
    familiar : Familiar
        Where the labelled images lie.
    grey : bool or None
        Whether theta was trained on grey pictures.
    refusals : tuple of str
        Why it is not to be used; empty where it may be.
    facts : mapping
        Study's and theta's digest, learner, setting, date.
    digest : str
        16 hexadecimal digits of the folder's files that it was read from; what is not written has none.
    """

    model: Model
    classes: tuple[str, ...]
    classifier: Classifier
    theta: Classifier
    calibration: Calibration
    familiar: Familiar
    grey: bool | None
    refusals: tuple[str, ...]
    facts: Mapping[str, Any]
    digest: str = ""

    @property
    def recipe(self) -> Recipe:
        """How pixels are prepared."""
        return Recipe.of(self.model)

    def to(self, device: torch.device) -> "AdaptedModel":
        """Return it on a device."""

        def move(c: Classifier) -> Classifier:
            return replace(c, weights={name: t.to(device) for name, t in c.weights.items()})

        return replace(self, classifier=move(self.classifier), theta=move(self.theta))


def write_adapted(
    folder: Path, model: AdaptedModel, report: Mapping[str, Any], text: str, patients: tuple[str, ...]
) -> None:
    """Write an adapted model's folder; ``adapted.json`` comes last, so that a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "adapted.json").unlink(missing_ok=True)
    tensors = {_ADAPTED + name: t for name, t in model.classifier.weights.items()}
    tensors |= {_THETA + name: t for name, t in model.theta.weights.items()}
    tensors |= {
        _FAMILIAR + name: torch.from_numpy(getattr(model.familiar, name)).float() for name in ("centres", "precision")
    }
    save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, folder / "weights.safetensors")
    _write(folder / "report.json", json.dumps(report, indent=1))
    _write(folder / "report.md", text)
    _write(folder / "patients.json", json.dumps(sorted(patients), indent=1))
    about = {
        "version": _VERSION,
        "model": model.model.model_dump(by_alias=True),
        "recipe": vars(model.recipe),
        "classes": list(model.classes),
        "calibration": model.calibration.json(),
        "familiar": {"threshold": model.familiar.threshold, "grey": model.grey},
        "refusals": list(model.refusals),
        **model.facts,
    }
    _write(folder / "adapted.json", json.dumps(about, indent=1, allow_nan=False))


def read_adapted(folder: Path) -> AdaptedModel:
    """Read an adapted model's folder.

    Raises
    ------
    NotPreparedError
        It is no such folder, or not whole.
    DataError
        It is damaged, or of another version.
    """
    try:
        written, numbers = ((folder / name).read_bytes() for name in ("adapted.json", "weights.safetensors"))
        about, tensors = json.loads(written), load(numbers)
    except OSError:
        raise NotPreparedError(
            "--model needs the folder of an adapted model, as `wardround-site adapt --out` writes it"
        ) from None
    except (ValueError, SafetensorError):
        raise DataError("the adapted model's folder is damaged: adapt again, or restore it") from None
    if about.get("version") != _VERSION:
        raise DataError(f"this program reads adapted models of version {_VERSION}: adapt again")
    try:
        plan, classes = Model.model_validate(about["model"]), tuple(about["classes"])
        structure = with_fixed_statistics(build(untrained(plan), classes=len(classes), seed=0))
        names = [name for name, _ in structure.named_parameters()]
        adapted, theta = (
            Classifier(structure, {name: tensors[prefix + name] for name in names}) for prefix in (_ADAPTED, _THETA)
        )
        centres, precision = (_array(tensors[_FAMILIAR + name]) for name in ("centres", "precision"))
        kept = ("study digest", "theta digest", "learner", "setting", "date")
        return AdaptedModel(
            plan,
            classes,
            adapted,
            theta,
            from_json(about["calibration"]),
            Familiar(centres, precision, float(about["familiar"]["threshold"])),
            about["familiar"]["grey"],
            tuple(about["refusals"]),
            {name: about[name] for name in kept},
            sha256_hex(written + numbers)[:16],
        )
    except (KeyError, ValueError, TypeError):
        raise DataError("the adapted model's folder is damaged: adapt again, or restore it") from None


def _array(tensor: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(tensor.double().numpy())


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
