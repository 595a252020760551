"""Processes that start at once, because whoever forks them has imported everything already; and those that run."""

import multiprocessing
from contextlib import suppress
from pathlib import Path

__all__ = ["CONTEXT", "alive", "command_of", "processes"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.deploy.players", "tests.server.spool", "server.app", "torch._dynamo"]  # an optimiser wants the last
)


def alive(process: int) -> bool:
    """Return whether a process lives; a stopped one does, a dead one that nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def command_of(process: int) -> str:
    """Return a process's command, with a blank after each word; nothing for one that has gone."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def processes(*words: str) -> list[int]:
    """Return the processes whose commands have all of some words, but for the leashes between them and a supervisor."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and all(word in command_of(int(entry.name)) for word in words):
            found.append(int(entry.name))
    return [process for process in found if "leash.py" not in command_of(process)]
