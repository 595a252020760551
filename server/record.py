"""What a run leaves behind: its study, one line a round, theta, and the result."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from common.canonical import canonical_json
from common.paths import home
from common.study import Study

__all__ = ["RunRecord", "run_folder", "write_atomic"]


def run_folder(run_id: int) -> Path:
    """Return the folder of a Flower run."""
    return home() / "runs" / str(run_id)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, durably."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class RunRecord:
    """The folder of one run.

    Holds ``study.json`` (every value, and the digest), ``history.jsonl`` (one line a round), ``theta.safetensors``
    and ``result.json``.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "study.json", canonical_json({"digest": study.digest, "study": study.run_config()}))
        (folder / "history.jsonl").write_bytes(b"")

    def round(self, line: Mapping[str, Any]) -> None:
        """Append one round."""
        with (self.folder / "history.jsonl").open("ab") as history:
            history.write(canonical_json(line) + b"\n")

    def fail(self, reason: str) -> None:
        """Write why the run ended without a result."""
        write_atomic(self.folder / "failure.txt", reason.encode())

    def finish(self, result: Mapping[str, Any], theta: Mapping[str, Tensor]) -> None:
        """Write theta, then the result: a run with a result is complete."""
        write_atomic(self.folder / "theta.safetensors", save({n: t.contiguous() for n, t in theta.items()}))
        write_atomic(self.folder / "result.json", json.dumps(result, indent=1, sort_keys=True).encode())
