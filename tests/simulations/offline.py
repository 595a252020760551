"""A program for `test_flower`: runs studies on Flower's engine and reports every process that this starts.

It runs in a network namespace of its own, so it is a process of its own; Ray must not live in pytest's.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.console import plain_errors
from common.environment import QUIET
from server.record import run_folder
from simulations.engines.flower import run_on_flower, superlink
from tests.client.hospitals import tiny_study

Processes = dict[str, dict[str, Any]]

#: On a busy machine, Ray takes long until its first answer.
STUDY = tiny_study({"sites.join-seconds": 120.0, "sites.deadline-seconds": 120.0})


@plain_errors
def main() -> None:
    """Run a study that works, then one that ends this program with an error."""
    report: dict[str, Any] = {"interfaces": [name for _, name in socket.if_nameindex()], "processes": {}}
    try:
        with watching(report["processes"]), superlink() as link:
            report["folder"] = str(run_folder(run_on_flower(STUDY, link)))
            report["state"] = str(link.folder)
            run_on_flower(tiny_study({"data.seed": 406}), link)  # nobody prepared its sites
    finally:
        print(json.dumps(report))


@contextmanager
def watching(found: Processes) -> Iterator[None]:
    """Note all descendants of this process: command, start, and what is set of `QUIET`."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            look(found)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def look(found: Processes) -> None:
    family = {os.getpid()}
    everyone: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                everyone[int(entry.name)] = (int(fields[1]), fields[19])
    known = {(process["pid"], process["start"]) for process in found.values()}
    size = 0
    while len(family) > size:  # a process whose parent has gone counts through what it was before
        size = len(family)
        family |= {pid for pid, (parent, start) in everyone.items() if parent in family or (pid, start) in known}
    ours = Path(f"/proc/{os.getpid()}/cmdline").read_bytes()
    for pid in family - {os.getpid()}:
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            content = Path(f"/proc/{pid}/environ").read_bytes()
            if not command or not content or command == ours:  # gone, or between fork and exec
                continue
            environment = dict(part.split("=", 1) for part in content.decode().split("\0") if "=" in part)
            before = found.get(f"{pid} {everyone[pid][1]}", {"quiet": {}})["quiet"]
            found[f"{pid} {everyone[pid][1]}"] = {
                "pid": pid,
                "start": everyone[pid][1],
                "command": command.decode().replace("\0", " ").strip()[:200],
                # Ray writes its workers' titles over their environment: what was read before still holds.
                "quiet": {name: environment.get(name, before.get(name)) for name in QUIET},
            }


if __name__ == "__main__":
    sys.exit(main())
