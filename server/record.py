"""The folder of a run: its study, a line for every round, evaluation and event, how it stands now, and the result."""

import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from common.canonical import canonical_json
from common.errors import NotPreparedError, RoundError, StorageError, StudyError
from common.paths import home
from common.study import Study
from server.files import write_atomic

__all__ = ["RunRecord", "run_folder"]

#: Logs that a resumed run continues where its checkpoint was.
_CONTINUED = ("history.jsonl", "evaluations.jsonl")
_STATUS_SECONDS = 0.5


def run_folder(run_id: int | str) -> Path:
    """Return the folder of a Flower run."""
    return (home() / "runs" / str(run_id)).absolute()


class RunRecord:
    """The folder of one run, also of one that is resumed.

    ``study.json``
        Every value, and the digest.
    ``history.jsonl``, ``evaluations.jsonl``
        A line a complete round, a line an evaluation.
    ``events.jsonl``
        A line for everything else: who joined, left, was refused, came late; what was tried again, resumed, damaged.
    ``status.json``
        How the run stands, replaced all the time.
    ``checkpoints``
        As `server.checkpoint` writes them.
    ``theta.safetensors``, ``result.json``
        What came out; or ``failure.txt``, why nothing did.

    Parameters
    ----------
    folder : Path
        Made where it is missing.
    study : Study
        What runs.
    resume : bool
        Go on with what is there.

    Raises
    ------
    NotPreparedError
        There is nothing to resume.
    StudyError
        What is there is of another study; the text says which values differ.
    RoundError
        A run that is not to be resumed is there already.
    StorageError
        The folder cannot be written.
    """

    def __init__(self, folder: Path, study: Study, *, resume: bool = False) -> None:
        self.folder = folder
        self._status: dict[str, Any] = {}
        self._said = 0.0
        if resume:
            _same_study(folder, study)
            with _storage(folder):
                (folder / "failure.txt").unlink(missing_ok=True)
                _drop_half_a_line(folder / "events.jsonl")
            return
        if (folder / "study.json").exists():
            raise RoundError(f"{folder} holds a run already: resume it, or start one of another number")
        with _storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "study.json", canonical_json({"digest": study.digest, "study": study.run_config()}))
            for name in (*_CONTINUED, "events.jsonl"):
                (folder / name).write_bytes(b"")

    def round(self, line: Mapping[str, Any]) -> None:
        """Append one complete round."""
        self._append("history.jsonl", line)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Append one evaluation."""
        self._append("evaluations.jsonl", line)

    def event(self, event: str, **about: Any) -> None:
        """Append one event."""
        self._append("events.jsonl", {"event": event, "at": time.time(), **about})

    def evaluations(self) -> list[dict[str, Any]]:
        """Return all evaluations so far."""
        lines = (self.folder / "evaluations.jsonl").read_bytes().splitlines()
        return [json.loads(line) for line in lines]

    def status(self, *, now: bool = True, **changes: Any) -> None:
        """Say how the run stands; with ``now=False``, at most every half second."""
        self._status |= changes
        if not now and time.monotonic() - self._said < _STATUS_SECONDS:
            return
        self._said = time.monotonic()
        about = {"at": time.time(), "pid": os.getpid(), "host": socket.gethostname(), "versions": _versions()}
        part = self.folder / "status.json.part"
        # It is replaced so often that it is not worth flushing to the disk, and no reason for a run to end.
        with suppress(OSError):
            part.write_bytes(canonical_json(self._status | about))
            os.replace(part, self.folder / "status.json")

    def sizes(self) -> dict[str, int]:
        """Return the bytes of the logs that a checkpoint belongs to, after flushing them to the disk."""
        sizes = {}
        with _storage(self.folder):
            for name in _CONTINUED:
                with (self.folder / name).open("ab") as file:
                    os.fsync(file.fileno())
                    sizes[name] = file.tell()
        return sizes

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Cut the logs to what they were at a checkpoint.

        Raises
        ------
        StorageError
            A log is shorter than it was.
        """
        with _storage(self.folder):
            for name in _CONTINUED:
                path = self.folder / name
                if not path.exists() or path.stat().st_size < sizes[name]:
                    raise StorageError(f"{path} is shorter than at the checkpoint: it was damaged; start the run anew")
                os.truncate(path, sizes[name])

    def fail(self, reason: str) -> None:
        """Write why the run ended without a result."""
        with suppress(OSError):  # a full disk may be the very reason
            write_atomic(self.folder / "failure.txt", reason.encode())
        with suppress(StorageError):
            self.event("failed", reason=reason)
        self.status(state="failed")

    def finish(self, result: Mapping[str, Any], theta: Mapping[str, Tensor]) -> None:
        """Write theta, then the result: a run with a result is complete."""
        with _storage(self.folder):
            write_atomic(self.folder / "theta.safetensors", save({n: t.contiguous() for n, t in theta.items()}))
            write_atomic(self.folder / "result.json", json.dumps(result, indent=1, sort_keys=True).encode())
            self.event("finished")

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with _storage(self.folder), (self.folder / name).open("ab") as log:
            log.write(canonical_json(line) + b"\n")


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    """Turn what the disk says into a sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror or error}): make room there, or make it writable, and "
            "resume the run"
        ) from None


def _drop_half_a_line(path: Path) -> None:
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _same_study(folder: Path, study: Study) -> None:
    try:
        there = json.loads((folder / "study.json").read_bytes())["study"]
    except FileNotFoundError:
        raise NotPreparedError(f"there is no run to resume in {folder}: start it without `resume`") from None
    mine = study.run_config()
    if differences := [key for key in sorted({*there, *mine}) if there.get(key) != mine.get(key)]:
        said = "".join(f"\n  {key} was {there.get(key)!r}, is {mine.get(key)!r}" for key in differences)
        raise StudyError(f"the run in {folder} is of another study, so it cannot be resumed with this one:{said}")


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("wardround", "flwr", "torch", "numpy")} | {
        "python": platform.python_version()
    }
