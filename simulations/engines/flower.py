"""Flower's simulation engine (Ray): `flwr run` on a SuperLink of our own that ends with us."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.environment import flower_environment, tool
from common.errors import RoundError
from common.paths import home
from common.study import Study
from server.consortium.superlink import write_connection
from server.record import run_folder
from server.resume import resumed_plan
from simulations.engines.control import Control, free_ports, running, until

__all__ = ["SuperLink", "run_on_flower", "superlink"]

_START_SECONDS = 60.0


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink in simulation mode.

    Attributes
    ----------
    process : subprocess.Popen
        Leads its own process group.
    folder : Path
        Its ``FLWR_HOME``: configuration, state and log.
    port : int
        On 127.0.0.1.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    port: int


@contextmanager
def superlink() -> Iterator[SuperLink]:
    """Start a SuperLink for simulations on a free port of this machine; stop it and all it started at the end.

    It is not waited for: it starts while the caller prepares data.
    """
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flower-", dir=home(), ignore_cleanup_errors=True) as name:
        folder = Path(name)
        [port] = free_ports(1)
        write_connection(folder, f"127.0.0.1:{port}", None)
        command = [tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--database", str(folder / "state.db")]
        command += ["--disable-runtime-dependency-installation"]
        environment = flower_environment(FLWR_HOME=str(folder), WARDROUND_HOME=str(home().absolute()))
        helpers: set[_Process] = set()
        try:
            with running(folder / "superlink.log", environment, *command) as process:
                try:
                    yield SuperLink(process, folder, port)
                finally:
                    helpers = _descendants(process.pid)
        finally:
            # A simulation that was still running has sessions of its own, and Ray's agents outlive it by minutes.
            for helper in helpers & set(_parents()):
                with suppress(ProcessLookupError):
                    os.kill(helper.pid, signal.SIGKILL)


def run_on_flower(
    study: Study,
    link: SuperLink,
    *,
    concurrent: int = 2,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
    resume: int | None = None,
) -> int:
    """Run a study with ``flwr run`` and return the run's id; its folder is `server.record.run_folder` of it.

    Parameters
    ----------
    study : Study
        Its virtual sites must be prepared.
    link : SuperLink
        Where it runs.
    concurrent : int
        CPU cores; one site runs per core at a time.
    progress : callable
        Called with every new line of the run's history.
    resume : int or None
        Go on with this run; it keeps its id and its folder.

    Raises
    ------
    RoundError
        The run failed; the reason and the end of the log are in the text.
    """
    until(lambda: _is_up(link), _START_SECONDS, lambda: _said(link))
    began, control = time.time(), Control(link.folder)
    plan = link.folder / "study.toml"
    plan.write_text(study.toml() if resume is None else resumed_plan(study, resume))
    sites = f"num-supernodes={study.data.sites} client-resources-num-cpus=1 init-args-num-cpus={concurrent}"
    run_id = control.run(plan, "--federation-config", sites)
    number = run_id if resume is None else resume
    control.follow(run_id, run_folder(number), progress, since=began)
    return number  # Ray takes seconds more to end


def _is_up(link: SuperLink) -> bool:
    if link.process.poll() is not None:
        raise RoundError(f"Flower's SuperLink did not start:\n{_said(link)}")
    with suppress(OSError), socket.create_connection(("127.0.0.1", link.port), timeout=1):
        return True
    return False


def _said(link: SuperLink) -> str:
    return (link.folder / "superlink.log").read_text(errors="replace")[-2000:]


class _Process(NamedTuple):
    """A process, told apart from a later one of the same number by when it started."""

    pid: int
    started: str


def _parents() -> dict[_Process, int]:
    """Return every process of this machine and its parent's number; nothing where there is no ``/proc`` (macOS)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[_Process(int(stat.parent.name), fields[19])] = int(fields[1])
    return parents


def _descendants(pid: int) -> set[_Process]:
    parents = _parents()
    family: set[_Process] = set()
    while more := {p for p, parent in parents.items() if parent in {pid, *(f.pid for f in family)}} - family:
        family |= more
    return family
