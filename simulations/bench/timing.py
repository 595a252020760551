"""Rival computations, each in a process of its own, timed in turns: A B C A B C ...

A process of its own gives each rival its own allocator, threads and peak memory. Turns see the same machine, so
ratios are taken within a round. What other programs took of the CPU meanwhile is measured, and quiet rounds count.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Protocol

__all__ = ["Rival", "Timed", "busy_seconds", "peak_bytes", "quietness", "race", "resident_bytes"]

#: A round is quiet when no call in it met more than this many cores' worth of other programs.
QUIET = 0.1
_PATIENCE = 3  # at most so many times the rounds asked for

_STAT, _STATUS = Path("/proc/stat"), Path("/proc/self/status")


class Rival(Protocol):
    """What runs in a rival's process."""

    def check(self) -> Any:
        """Return what the caller needs to judge the result; it must be picklable."""

    def run(self) -> None:
        """Do what is timed, once, to the end (a GPU's work too)."""

    def peak(self) -> int | None:
        """Return the most memory that two runs need above what was there before, in bytes."""


@dataclass
class Timed:
    """What became of one rival.

    Attributes
    ----------
    missing : str
        Why there is none, else empty.
    check : Any
        What `Rival.check` returned.
    peak : int or None
        Bytes.
    seconds : list of float
        Wall time of every counted round.
    others : list of float
        Cores that other programs kept busy meanwhile.
    """

    missing: str = ""
    check: Any = None
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def ratios(self, other: "Timed") -> list[float]:
        """Return how many times faster than another this was, round by round."""
        return [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]


def busy_seconds() -> float | None:
    """Return the CPU time of all programs since the machine started; None where it cannot be known."""
    if not _STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int | None:
    """Return this process's resident memory without files (libraries); None where it cannot be known."""
    return _status("RssAnon")


def peak_bytes() -> int | None:
    """Return the most that `resident_bytes` ever was; None where it cannot be known."""
    most, files = _status("VmHWM"), _status("RssFile")
    return None if most is None or files is None else most - files  # libraries stay once they are in


def _status(key: str) -> int | None:
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def race(
    rivals: Mapping[str, Callable[[], Rival]],
    rounds: int,
    judge: Callable[[Mapping[str, Timed]], None] = lambda _: None,
) -> dict[str, Timed]:
    """Time some rivals in turns.

    Parameters
    ----------
    rivals : mapping
        Name to a picklable function that makes the rival in its process; it may raise ImportError.
    rounds : int
        Rounds that shall count; the quietest ones, where the machine is never quiet.
    judge
        Called with all checks before anything is timed; it may raise.
    """
    context = multiprocessing.get_context("spawn")  # a forked PyTorch has no threads
    lines: dict[str, Connection] = {}
    processes = []
    out = {}
    try:
        for name, make in rivals.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            lines[name] = here
        for name, line in lines.items():  # one after the other: checks and memory are not disturbed either
            line.send("start")
            out[name] = Timed(**line.recv())
        judge(out)
        running = {name: line for name, line in lines.items() if not out[name].missing}
        tried: list[dict[str, tuple[float, float]]] = []
        while sum(_disturbance(r) <= QUIET for r in tried) < rounds and len(tried) < _PATIENCE * rounds:
            tried.append({name: _turn(line) for name, line in running.items()})
        for turn in sorted(tried, key=_disturbance)[:rounds]:
            for name, (seconds, others) in turn.items():
                out[name].seconds.append(seconds)
                out[name].others.append(others)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return out


def quietness(results: Mapping[str, Timed]) -> float:
    """Return the cores that other programs kept busy: the median over all timed calls."""
    return median(o for timed in results.values() for o in timed.others)


def _disturbance(turn: Mapping[str, tuple[float, float]]) -> float:
    return max(others for _, others in turn.values())


def _turn(line: Connection) -> tuple[float, float]:
    """Return the seconds of one run, and the cores that others kept busy meanwhile."""
    busy = busy_seconds()
    line.send("run")
    seconds, own = line.recv()
    after = busy_seconds()
    others = 0.0 if busy is None or after is None else max(0.0, after - busy - own) / seconds
    return seconds, others


def _serve(line: Connection, make: Callable[[], Rival]) -> None:
    line.recv()
    try:
        rival = make()
        peak = rival.peak()  # first, while nothing else has been allocated
    except ImportError as error:
        line.send({"missing": str(error)})
        return
    line.send({"check": rival.check(), "peak": peak})
    while line.recv():
        cpu, wall = time.process_time(), time.perf_counter()
        rival.run()
        line.send((time.perf_counter() - wall, time.process_time() - cpu))
