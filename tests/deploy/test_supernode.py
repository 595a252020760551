"""A SuperNode ends where its gateway says that it hangs. That a real one does: tests/simulations/test_localnet.py."""

import asyncio
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from client.gateway.health import answering
from common.environment import flower_environment
from deploy import supernode
from deploy.supernode import HANGS, watch
from tests.ports import free_ports

BRISK = "import deploy.supernode as one; one._LOOK_SECONDS = 0.1; one._main()"


class EndedError(Exception):
    """Instead of the end of the process."""


@pytest.mark.parametrize(
    "once", [["SERVING"], ["UNAVAILABLE"], ["NOT_SERVING", "SERVING"], ["NOT_SERVING", "DEADLINE_EXCEEDED"]]
)
def test_it_ends_when_it_hangs_twice_in_a_row(monkeypatch: pytest.MonkeyPatch, once: list[str]) -> None:
    answers = [*once, "NOT_SERVING", "NOT_SERVING", "SERVING"]

    def end(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(supernode, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(supernode, "ask", lambda *asked: answers.pop(0) if asked == ("a:1", "node") else "")
    monkeypatch.setattr("deploy.supernode.os._exit", end)
    with pytest.raises(EndedError, match=str(HANGS)):
        watch("a:1")
    assert answers == ["SERVING"]


def test_all_but_the_gateway_is_for_flower(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flowers = ["--insecure", "--superlink", "127.0.0.1:9095", "--port", "9094", "--node-config", 'worker="/a b"']
    got: list[str] = []
    monkeypatch.setattr(supernode, "watch", got.append)
    monkeypatch.setattr(supernode, "flower_supernode", lambda: got.extend(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["supernode", "127.0.0.1:9097", *flowers])
    supernode._main()
    assert sorted(got) == sorted(["127.0.0.1:9097", *flowers])
    assert sys.argv[1:] == flowers
    for wrong in ([], flowers[:1]):
        monkeypatch.setattr(sys, "argv", ["supernode", *wrong])
        with pytest.raises(SystemExit, match="2"):
            supernode._main()
    assert "required: gateway" in capsys.readouterr().err


def test_flower_s_program_runs_meanwhile(tmp_path: Path) -> None:
    own, *others = free_ports(3)
    health, nobody = (f"127.0.0.1:{port}" for port in others)

    async def story() -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", BRISK, health, "--insecure", "--superlink", nobody, "--isolation", "process"]
        command += ["--port", str(own)]
        start = partial(subprocess.run, command, capture_output=True, text=True, timeout=120, check=False)
        async with answering(health, {"node": lambda: False}):
            return await asyncio.to_thread(start, env=flower_environment(FLWR_HOME=str(tmp_path), NO_PROXY="*"))

    done = asyncio.run(story())
    assert done.returncode == HANGS
    assert "Starting Flower SuperNode" in done.stdout + done.stderr
    assert "the SuperNode hangs" in done.stderr
