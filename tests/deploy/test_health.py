"""The question that units, containers and pods ask."""

import os
import subprocess
import sys

import pytest
from flwr.supercore.grpc_health import run_health_server_grpc_no_tls

from deploy import health
from deploy.health import ask
from tests.ports import free_ports


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Return the exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["health", *arguments])
    with pytest.raises(SystemExit) as end:
        health._main()
    return end.value.code


def test_flower_s_own_service_is_understood_and_no_proxy_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    assert ask(address, seconds=60) == "UNAVAILABLE"
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server = run_health_server_grpc_no_tls(address)
    assert ask(address, seconds=60) == "SERVING"
    assert not asked(monkeypatch, address)
    server.stop(None).wait()
    assert asked(monkeypatch, address)
    assert capsys.readouterr().out.split() == ["SERVING", "UNAVAILABLE"]


def test_a_process_that_starts_is_waited_for_and_one_that_ended_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_AGAIN_SECONDS", 0.0)
    answers = ["UNAVAILABLE", "NOT_SERVING", "SERVING", "UNAVAILABLE", "NOT_SERVING"]
    monkeypatch.setattr(health, "ask", lambda *_: answers.pop(0))
    assert not asked(monkeypatch, "127.0.0.1:1", "--wait", str(os.getpid()))
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert asked(monkeypatch, "127.0.0.1:1", "--wait", str(ended.pid))
    assert asked(monkeypatch, "127.0.0.1:1")
    assert not answers
