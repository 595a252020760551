"""Write an export whole or not at all, and only if every format computes what theta computes."""

import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import ExportError
from common.pixels import CENTRE, SPREAD
from server.export.facts import facts_of, readme
from server.export.monai_bundle import write_bundle
from server.export.programs import write_onnx, write_program, write_safetensors
from server.export.source import Predict, Source, read_run
from server.files import flush

__all__ = ["Exported", "Format", "export_run"]

#: Outputs may differ so much: absolutely, or in units of what float32 itself changes in wardround's own network.
_TOLERANCE, _ROUNDINGS = 1e-5, 4.0
#: Sizes of the batches that are compared: a program must take any.
_BATCHES = (5, 1)


class Format(StrEnum):
    """What theta can be exported as."""

    SAFETENSORS = "safetensors"
    MONAI = "monai"
    TORCH = "torch"
    ONNX = "onnx"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    folder : Path
        Where it lies.
    facts : dict
        What every format carries.
    differences : dict
        By format and output: the largest difference to wardround's own network in float64.
    rounding : dict
        By output: the difference of that network itself in float32.
    """

    folder: Path
    facts: dict[str, Any]
    differences: dict[Format, dict[str, float]]
    rounding: dict[str, float]


def export_run(run: Path, to: Path, formats: Sequence[Format]) -> Exported:
    """Export a finished run.

    Raises
    ------
    ExportError
        The run is not finished or was changed, ``to`` exists, a package is missing, or a format, loaded again, does not
        give the outputs of the run's theta. Nothing is left in these cases.
    """
    source = read_run(run)
    facts = facts_of(source)
    differences: dict[Format, dict[str, float]] = {}
    with _whole(to) as folder:
        reference = _Reference(source)
        for format_ in dict.fromkeys(formats):
            differences[format_] = reference.compare(format_, _WRITERS[format_](source, facts, folder))
        use = "\n".join(f"- {_USE[format_].format(id=source.study.study.id)}" for format_ in differences)
        (folder / "README.md").write_text(readme(facts, use), encoding="utf-8")
    return Exported(to, facts, differences, reference.rounding)


@contextmanager
def _whole(to: Path) -> Iterator[Path]:
    """Yield a folder that takes its name only at the end."""
    if os.path.lexists(to):
        raise ExportError(f"{to} exists already: remove it, or name another folder with --to")
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        for path in (*part.rglob("*"), part):
            flush(path)
        os.rename(part, to)
        flush(to.parent)
    except OSError as error:
        raise ExportError(f"the export cannot be written to {to}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Reference:
    """What wardround's own network gives for random pictures, in float64, and how far it is from that in float32.

    A deep network with batch statistics can lose more than 1e-5 to float32 alone. So that loss counts beside the fixed
    tolerance: a wrong export is wrong by far more.
    """

    def __init__(self, source: Source) -> None:
        fine, coarse = (copy.deepcopy(source.network).to(dtype) for dtype in (torch.float64, torch.float32))
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        self.rounding = dict.fromkeys(source.outputs, 0.0)
        with torch.no_grad():
            for count in _BATCHES:
                pixels = torch.randint(0, 256, (count, *source.image), generator=generator)
                images = (pixels.float() - CENTRE) / SPREAD
                wanted = source.predict(fine, images)
                self.batches.append((images, wanted))
                for name, value in source.predict(coarse, images).items():
                    self.rounding[name] = max(self.rounding[name], _distance(value, wanted[name]))

    def compare(self, format_: Format, predict: Predict) -> dict[str, float]:
        """Return each output's largest difference."""
        differences: dict[str, float] = {}
        with torch.no_grad():
            for images, wanted in self.batches:
                for name, found in predict(images).items():
                    differences[name] = max(differences.get(name, 0.0), _distance(found, wanted[name]))
        for name, difference in differences.items():
            allowed = max(_TOLERANCE, _ROUNDINGS * self.rounding[name])
            if not math.isfinite(difference) or difference > allowed:
                raise ExportError(
                    f"the {format_} export gives other {name} than theta does, by up to {difference:.1e} where "
                    f"{allowed:.1e} is allowed: leave it out with --format, and report this"
                )
        return differences


def _distance(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    distance = float((found.double() - wanted).abs().max())
    return math.inf if math.isnan(distance) else distance  # max() loses a NaN


_WRITERS: dict[Format, Callable[[Source, dict[str, Any], Path], Predict]] = {
    Format.SAFETENSORS: write_safetensors,
    Format.MONAI: write_bundle,
    Format.TORCH: write_program,
    Format.ONNX: write_onnx,
}

_USE = {
    Format.SAFETENSORS: "`theta.safetensors` is all of theta, in the study's type, with Meta-SGD's inner rates as "
    "`rate.*`; `study.toml` and `study.json` are the study.",
    Format.MONAI: "`{id}-bundle` is a MONAI bundle with a README of its own.",
    Format.TORCH: "`model.pt2` needs PyTorch alone: `module = torch.export.load('model.pt2').module()`, and "
    "`module(images)` gives `features` and, where theta has a head, `logits`. Its parameters have theta's names and "
    "gradients: it can be adapted.",
    Format.ONNX: "`model.onnx` has the input `images` and the same outputs. It cannot be adapted, but a linear head "
    "can be trained on its features.",
}
