"""A SuperLink of ours on this machine: its processes, Flower's commands to it, and a run that is watched to its end."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common.environment import flower_environment, tool
from common.errors import RoundError
from server.runs import read_json

__all__ = ["APP", "Control", "free_ports", "running", "until"]

#: The Flower app: the folder that a bundle is built from.
APP = Path(common.__file__).parents[1]

_POLL_SECONDS = 0.1
#: How long a run says nothing before Flower itself is asked whether it still lives; asking starts a Python process.
_ASK_SECONDS = 20.0
_STOP_SECONDS = 10.0

Progress = Callable[[dict[str, Any]], None]


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens at, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@contextmanager
def running(log: Path, environment: Mapping[str, str], *command: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process, and at the end stop it and all that it started in its session.

    Parameters
    ----------
    log : Path
        Gets what they say.
    environment : mapping
        Their whole environment.
    command : str
        What to start.
    """
    with log.open("wb") as out:
        one = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield one
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(one.pid, number)
            with suppress(subprocess.TimeoutExpired):
                one.wait(_STOP_SECONDS)


def until(condition: Callable[[], object], seconds: float, why: Callable[[], str]) -> None:
    """Wait until something is so.

    Raises
    ------
    RoundError
        It was not so in time; ``why`` is in the text.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RoundError(f"nothing happened for {seconds:.0f} s: {why()}")
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Control:
    """Flower's commands to one SuperLink.

    Attributes
    ----------
    home : Path
        Their ``FLWR_HOME``, with what `write_connection` wrote.
    """

    home: Path

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a command and return its answer.

        Raises
        ------
        RoundError
            The command failed.
        """
        done = self._run(*arguments, "--format", "json")
        with suppress(ValueError):
            answer: dict[str, Any] = json.loads(done.stdout)
            if answer.get("success"):
                return answer
        raise RoundError(f"flwr {arguments[0]} failed:\n{(done.stdout + done.stderr).strip()[-4000:]}")

    def run(self, plan: Path, *options: str) -> int:
        """Start a run of this app with a study file, and return its number."""
        return int(self.flwr("run", str(APP), "here", "--run-config", str(plan), *options)["run-id"])

    def follow(self, run_id: int, folder: Path, progress: Progress, *, since: float) -> None:
        """Wait until a run has finished.

        Parameters
        ----------
        run_id : int
            The run's number.
        folder : Path
            Where it is recorded: that of an earlier run, where it goes on with one.
        progress : callable
            Called with every line of the run's history.
        since : float
            When it was started (seconds since 1970): an earlier failure in the same folder is not its.

        Raises
        ------
        RoundError
            It ended in another way; the reason is in the text.
        """
        history, status, failure = (folder / name for name in ("history.jsonl", "status.json", "failure.txt"))
        seen, signs, heard = 0, (0.0, 0), time.monotonic()
        while read_json(status).get("state") != "finished":
            if history.exists():
                lines = history.read_bytes().split(b"\n")[:-1]
                for line in lines[seen:]:
                    progress(json.loads(line))
                seen = len(lines)
            if failure.exists() and failure.stat().st_mtime > since:
                raise RoundError(failure.read_text())
            now = (status.stat().st_mtime if status.exists() else 0.0, seen)
            if now != signs:
                signs, heard = now, time.monotonic()
            elif time.monotonic() - heard > _ASK_SECONDS:
                heard = time.monotonic()
                state = self._state(run_id)
                # Asking takes seconds, in which it may have ended as it should.
                if state.startswith("finished") and read_json(status).get("state") != "finished":
                    raise RoundError(f"the run ended without a result ({state}):\n{self._log(run_id)}")
            time.sleep(_POLL_SECONDS)

    def _state(self, run_id: int) -> str:
        return str(self.flwr("list", "here", "--run-id", str(run_id))["runs"][0]["status"])

    def _log(self, run_id: int) -> str:
        return self._run("log", str(run_id), "here", "--show").stdout[-4000:]

    def _run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [tool("flwr"), *arguments],
            env=flower_environment(FLWR_HOME=str(self.home), HOME=str(self.home)),
            cwd=APP, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
