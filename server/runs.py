"""Find a run's folder and read what it holds, also while the run writes there."""

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.canonical import canonical_json, sha256_hex
from common.errors import StudyError
from common.paths import home
from common.study import Study

__all__ = ["ENDED", "Tail", "find_run", "is_gone", "lines", "natural", "printable", "read_json", "recorded_study"]

#: States in which nothing more happens by itself.
ENDED = ("finished", "failed", "stopped")


def find_run(name: str) -> Path:
    """Return the folder of a run.

    Parameters
    ----------
    name : str
        The run's id, the path of its folder, or ``latest``: the run that was started last.

    Raises
    ------
    StudyError
        There is no such run.
    """
    runs = home() / "runs"
    if name == "latest":
        started = [(file.stat().st_mtime_ns, file.parent) for file in runs.glob("*/study.json")]
        if not started:
            raise StudyError(f"there is no run in {runs} yet")
        return max(started)[1]
    for folder in (runs / name, Path(name)):
        if (folder / "study.json").is_file():
            return folder
    raise StudyError(f"there is no run {name}: give a run's id (a folder in {runs}), the path of its folder, or latest")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file that is replaced whole; empty where the file is not there or holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def recorded_study(folder: Path) -> Study:
    """Return the study that a run was made with.

    Raises
    ------
    StudyError
        The record is damaged or was changed, or belongs to another version of wardround.
    """
    record = read_json(folder / "study.json")
    config = record.get("study")
    if not isinstance(config, dict) or record.get("digest") != sha256_hex(canonical_json(config)):
        raise StudyError(f"{folder / 'study.json'} does not match its own digest: it was changed, or is damaged")
    try:
        return Study.from_run_config(config)
    except StudyError as error:
        raise StudyError(f"the run in {folder} was made with another version of wardround: {error}") from None


@dataclass
class Tail:
    """Reads a file of JSON lines that grows: every call returns what is new.

    A last line that is only half there is left for the next call; a line that is no JSON object is left out.
    """

    path: Path
    _offset: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:
                self._offset = 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                with suppress(ValueError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Return the objects in a file of JSON lines; a half-written last one is left out."""
    return iter(Tail(path))


def is_gone(status: Mapping[str, Any]) -> bool:
    """Say whether the process that wrote a status no longer runs; of another host's processes nobody knows."""
    pid, host = status.get("pid"), status.get("host")
    if not isinstance(pid, int) or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's process
    # After a reboot, the number soon belongs to another process: one that started later than the status was written.
    started = _started(pid)
    return started is not None and started > status.get("at", started) + 2


def _started(pid: int) -> float | None:
    """Return when a process started, in Unix seconds, where the system says so (Linux)."""
    with suppress(OSError, ValueError, IndexError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        return int(boot[1]) + ticks / os.sysconf("SC_CLK_TCK") if boot else None
    return None


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key: hospital-2 before hospital-10."""
    return [
        (int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)
    ]


def printable(text: object) -> str:
    """Return text from outside, a site's name or a reason, without what could steer a terminal or hide."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
