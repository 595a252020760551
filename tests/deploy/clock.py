"""The time of day in a process, which a test sets while the process runs. Clocks that nobody sets go on as they do."""

import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any

__all__ = ["follow", "set_clock"]

_seconds, _nanoseconds = time.time, time.time_ns


def set_clock(path: Path, ahead: float) -> None:
    """Let the processes that follow a file be ahead of the true time by some seconds, from now on."""
    part = path.with_suffix(".part")
    part.write_text(str(ahead))
    part.replace(path)


def follow(path: Path) -> None:
    """Let every reading of the time of day in this process be what a test says in a file."""

    def ahead() -> float:
        with suppress(FileNotFoundError):
            return float(path.read_text())
        return 0.0

    def seconds() -> float:
        return _seconds() + ahead()

    def nanoseconds() -> int:
        return _nanoseconds() + int(ahead() * 1e9)

    class Kind(type):
        def __instancecheck__(cls, one: object) -> bool:
            return isinstance(one, datetime)

    class Day(datetime, metaclass=Kind):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(seconds(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.now(UTC).replace(tzinfo=None)

        today = now

    others = {id(datetime): Day, id(_seconds): seconds, id(_nanoseconds): nanoseconds}
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "") != __name__:
            for name, value in list(vars(module).items()):
                if id(value) in others:
                    setattr(module, name, others[id(value)])
