"""Checkpoints of a run: whole or not there, checked when they are read, the last few kept."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from common.canonical import canonical_json, sha256_hex
from common.errors import StorageError
from server.files import flush, write_durably

__all__ = ["KEPT", "Checkpoint", "latest", "store"]

#: So many are kept: if the last one is damaged, there are others.
KEPT = 3
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run after a complete round.

    Attributes
    ----------
    round : int
        Which one.
    tensors : mapping
        Arrays by name.
    about : mapping
        The rest, as JSON.
    """

    round: int
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


def store(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably, then remove all but the last `KEPT`.

    Everything is written under another name, flushed to the disk, and renamed. A crash at any moment leaves the
    checkpoints before it as they were.

    Raises
    ------
    StorageError
        It cannot be written; those before it are intact.
    """
    final = folder / f"{checkpoint.round:06d}"
    part = folder / f".part-{checkpoint.round:06d}"
    tensors = save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    about = {
        "format": _FORMAT,
        "round": checkpoint.round,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "about": checkpoint.about,
    }
    about["sha256"] = sha256_hex(canonical_json(about))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_durably(part / "arrays.safetensors", tensors)
        write_durably(part / "state.json", canonical_json(about))
        flush(part)
        os.rename(part, final)
        flush(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        before = _rounds(folder)
        kept = f"that of round {before[-1]} is intact" if before else "there is none before it"
        raise StorageError(
            f"the checkpoint of round {checkpoint.round} cannot be written to {folder} ({error.strerror or error}); "
            f"{kept}: make room there, or make it writable, and resume the run"
        ) from None
    for number in _rounds(folder)[:-KEPT]:
        shutil.rmtree(folder / f"{number:06d}", ignore_errors=True)


def latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the last checkpoint that is whole, or None where there is none at all.

    A damaged one is moved aside under the name ``damaged-ROUND``, and said.

    Raises
    ------
    StorageError
        There are checkpoints, and all are damaged.
    """
    numbers = _rounds(folder)
    for number in reversed(numbers):
        path = folder / f"{number:06d}"
        try:
            return _read(path, number)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            aside = folder / f"damaged-{number:06d}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            warn(f"the checkpoint of round {number} is damaged ({error}): moved to {aside}, the one before it is used")
    if numbers:
        raise StorageError(f"every checkpoint in {folder} is damaged: the run cannot go on, start it anew")
    return None


def _read(path: Path, number: int) -> Checkpoint:
    about = json.loads((path / "state.json").read_bytes())
    if about.pop("sha256") != sha256_hex(canonical_json(about)) or about["round"] != number:
        raise ValueError("state.json does not match its checksum")
    if about["format"] != _FORMAT:
        raise StorageError(f"{path} was written by another version of wardround: resume with that one")
    tensors = (path / "arrays.safetensors").read_bytes()
    if hashlib.sha256(tensors).hexdigest() != about["tensors_sha256"]:
        raise ValueError("arrays.safetensors does not match its checksum")
    return Checkpoint(number, load(tensors), about["about"])


def _rounds(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("[0-9]" * 6)) if folder.is_dir() else []
