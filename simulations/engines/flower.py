"""Flower's simulation engine (Ray): `flwr run` on a SuperLink of our own that ends with us."""

import json
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
from typing import IO, Any, NamedTuple

import common
from common.environment import flower_environment, tool
from common.errors import RoundError
from common.paths import home
from common.study import Study
from server.record import run_folder
from server.resume import resumed_plan
from server.runs import read_json

__all__ = ["SuperLink", "run_on_flower", "superlink"]

_START_SECONDS = 60.0
_POLL_SECONDS = 0.2
#: How often Flower itself is asked whether the run still lives; asking starts a Python process.
_ASK_SECONDS = 20.0


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

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command against this SuperLink and return its JSON answer.

        Raises
        ------
        RoundError
            The command failed.
        """
        done = subprocess.run(
            [tool("flwr"), *arguments, "--format", "json"],
            env=flower_environment(FLWR_HOME=str(self.folder)),
            capture_output=True,
            text=True,
            check=False,
        )
        with suppress(ValueError):
            answer: dict[str, Any] = json.loads(done.stdout)
            if answer.get("success"):
                return answer
        raise RoundError(f"flwr {arguments[0]} failed:\n{(done.stdout + done.stderr).strip()[-4000:]}")


@contextmanager
def superlink() -> Iterator[SuperLink]:
    """Start a SuperLink for simulations on a free port of this machine; stop it and all it started at the end.

    It is not waited for: it starts while the caller prepares data.
    """
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flower-", dir=home(), ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port = _free_port()
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "lab"\n\n[superlink.lab]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        command = [tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--database", str(folder / "state.db")]
        command += ["--disable-runtime-dependency-installation"]
        with (folder / "superlink.log").open("wb") as log:
            process = _start(command, folder, log)
        try:
            yield SuperLink(process, folder, port)
        finally:
            helpers = _descendants(process.pid)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            # A simulation that was still running has sessions of its own, and Ray's agents outlive it by minutes.
            for helper in helpers & set(_parents()):
                with suppress(ProcessLookupError):
                    os.kill(helper.pid, signal.SIGKILL)


def run_on_flower(
    study: Study,
    link: SuperLink,
    *,
    concurrent: int = 2,
    progress: Callable[[dict[str, Any]], None] | None = None,
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
    _wait_until_up(link)
    began = time.time()
    plan = link.folder / "study.toml"
    plan.write_text(study.toml() if resume is None else resumed_plan(study, resume))
    app = str(Path(common.__file__).parents[1])
    sites = f"num-supernodes={study.data.sites} client-resources-num-cpus=1 init-args-num-cpus={concurrent}"
    run_id = int(link.flwr("run", app, "lab", "--run-config", str(plan), "--federation-config", sites)["run-id"])
    number = run_id if resume is None else resume
    folder, seen, asked = run_folder(number), 0, time.monotonic()
    while read_json(folder / "status.json").get("state") != "finished":
        if (folder / "history.jsonl").exists():
            lines = (folder / "history.jsonl").read_bytes().split(b"\n")[:-1]
            for line in lines[seen:]:
                if progress:
                    progress(json.loads(line))
            seen = len(lines)
        if (failure := folder / "failure.txt").exists() and failure.stat().st_mtime > began:
            raise RoundError(failure.read_text())
        if time.monotonic() - asked > _ASK_SECONDS:
            asked = time.monotonic()
            if (status := _status(link, run_id)).startswith("finished"):
                raise RoundError(f"the run ended without a result ({status}):\n{_log(link, run_id)}")
        time.sleep(_POLL_SECONDS)
    return number  # Ray takes seconds more to end


def _status(link: SuperLink, run_id: int) -> str:
    runs = link.flwr("list", "lab", "--run-id", str(run_id))["runs"]
    return str(runs[0]["status"])


def _log(link: SuperLink, run_id: int) -> str:
    done = subprocess.run(
        [tool("flwr"), "log", str(run_id), "lab", "--show"],
        env=flower_environment(FLWR_HOME=str(link.folder)),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout[-4000:]


def _start(command: list[str], folder: Path, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    environment = flower_environment(FLWR_HOME=str(folder), WARDROUND_HOME=str(home().absolute()))
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _wait_until_up(link: SuperLink) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and link.process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", link.port), timeout=1):
            return
        time.sleep(_POLL_SECONDS)
    log = (link.folder / "superlink.log").read_text(errors="replace")[-2000:]
    raise RoundError(f"Flower's SuperLink did not start:\n{log}")


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
