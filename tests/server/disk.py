"""Disks that fail while a run goes on; a program of its own, in a mount namespace of its own where it needs one.

``python -m tests.server.disk NAME...`` plays some troubles and prints, as JSON, what became of each run.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message

from common.errors import WardroundError
from common.study import Study
from server.checkpoint import latest
from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from tests.server.scripted import Scripted, a_study

__all__ = ["PAGE", "ROUND", "TROUBLES", "a_long_study"]

PAGE = 4096
#: The trouble begins while the sites train in this round.
ROUND = 5
_LARGE = 64 << 20


@dataclass
class Trouble:
    """What goes wrong with a run's disk, and how it is put right.

    Attributes
    ----------
    mounts : tuple of str
        Folders of the run that are disks of their own.
    begin, end : callable
        Get the run's folder.
    """

    mounts: tuple[str, ...]
    begin: Callable[[Path], None]
    end: Callable[[Path], None]


def a_long_study() -> Study:
    """Return a study of which one checkpoint takes 83 pages of arrays and one of state."""
    return a_study({"study.rounds": 12, "model.width": 32, "sites.held-out": "", "data.sites": 3})


def _mount(path: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(path)], check=True)


def _full(mount: str, pages: int) -> Trouble:
    """Leave so many pages free."""

    def begin(folder: Path) -> None:
        ballast = folder / mount / "ballast"
        ballast.write_bytes(b"")
        with ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(PAGE))
            except OSError:
                pass
            file.truncate(max(0, ballast.stat().st_size - pages * PAGE))

    def end(folder: Path) -> None:
        (folder / mount / "ballast").unlink()

    return Trouble(("", "checkpoints"), begin, end)


def _read_only(mount: str) -> Trouble:
    def remount(option: str) -> Callable[[Path], None]:
        return lambda folder: _mount(folder / mount, "-o", f"remount,{option}")

    return Trouble(("", "checkpoints") if mount else ("",), remount("ro"), remount("rw"))


def _limited(size: int) -> Trouble:
    """Let no file grow beyond so many bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(soft: int) -> Callable[[Path], None]:
        return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return Trouble((), limit(size), limit(hard))


TROUBLES = {
    "no file may be large": _limited(100_000),
    "no page left": _full("checkpoints", 0),
    "half an array": _full("checkpoints", 40),
    "room for the arrays and not for the state": _full("checkpoints", 83),
    "no room for the logs": _full("", 0),
    "read-only": _read_only(""),
    "checkpoints read-only": _read_only("checkpoints"),
}


def _play(trouble: Trouble, run_id: int) -> dict[str, Any]:
    study, folder = a_long_study(), run_folder(run_id)
    for mount in trouble.mounts:
        (folder / mount).mkdir(parents=True)
        _mount(folder / mount, "-t", "tmpfs", "-o", f"size={_LARGE}", "none")
    begun = False

    def fault(site: int, message: Message) -> None:
        nonlocal begun
        number = message.content.config_records["instruction"]["round"]
        if not begun and message.metadata.message_type == "train" and number == ROUND:
            begun = True
            trouble.begin(folder)

    def attempt(resume: int | None) -> dict[str, Any]:
        try:
            # What the run prints may be no JSON.
            with redirect_stdout(sys.stderr):
                run_in_process(study, client=Scripted(study), fault=fault, run_id=run_id, resume=resume)
        except WardroundError as error:
            warnings: list[str] = []
            kept = latest(folder / "checkpoints", warnings.append)
            return {
                "error": type(error).__name__,
                "text": str(error),
                "kept": kept.round if kept else None,
                "warnings": warnings,
                "parts": [path.name for path in (folder / "checkpoints").glob(".*")],
            }
        return {"theta": (folder / "theta.safetensors").read_bytes().hex()}

    first = attempt(None)
    again = attempt(run_id)
    trouble.end(folder)
    last = attempt(run_id)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return {"folder": str(folder), "first": first, "again": again, "last": last, "rounds": [x["round"] for x in lines]}


if __name__ == "__main__":
    print(json.dumps({name: _play(TROUBLES[name], 1 + list(TROUBLES).index(name)) for name in sys.argv[1:]}))
