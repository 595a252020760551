"""The gateway as a process: what it answers over HTTP, and how it begins and ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from typer.testing import CliRunner

from client.cli import app
from client.gateway.peer import owner, user_number
from client.gateway.serve import _loopback
from common.errors import FleetError
from deploy.health import ask
from tests.ports import free_port
from tests.server.consortium.founded import new_world

ROOT = Path(__file__).parents[3]
PROTOBUF = {"content-type": PROTOBUF_MEDIA_TYPE}


@contextmanager
def started(site: Path, port: int, health: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [sys.executable, "-c", "from client.cli import app; app()", "gateway"]
    command += ["--site", str(site), "--listen", f"127.0.0.1:{port}", "--health", health, *more]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        try:
            for _ in range(1200):
                if ask(health) == "SERVING":
                    break
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            yield process, client
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


@pytest.mark.slow
def test_it_answers_what_it_must_and_ends_when_told(tmp_path: Path) -> None:
    site = new_world(tmp_path, "st-mary", edge=f"localhost:{free_port()}").sites["st-mary"]
    health = f"127.0.0.1:{free_port()}"
    with started(site, free_port(), health) as (process, client):
        for path in (
            "/docs",
            "/health",
            "/v1/control/start-run",
            "/v1/fleet/activate-node",
            "/v1/runtime/acquire-task",
        ):
            assert client.get(path).status_code in (403, 405), path
        assert client.post("/v1/control/start-run", headers=PROTOBUF).status_code == 403
        assert client.post("/v1/fleet/start-run", headers=PROTOBUF).status_code == 403
        assert client.post("/v1/fleet/get-run", headers={"content-type": "text/plain"}).status_code == 415
        assert client.post("/v1/fleet/get-run", headers=PROTOBUF, content=b"\xff").status_code == 400
        large = bytes(6 * 2**20 + 1)
        assert client.post("/v1/fleet/push-object", headers=PROTOBUF, content=large).status_code == 413
        assert client.post("/v1/fleet/register-node", headers=PROTOBUF).status_code == 200
        away = client.post("/v1/fleet/activate-node", headers=PROTOBUF)
        assert (away.status_code, "doctor" in away.text) == (503, True)

        command = [sys.executable, "-c", "from client.cli import app; app()", "gateway", "--site", str(site)]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert second.returncode == 1
        assert "one gateway only" in second.stderr

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr is not None
        said = process.stderr.read().splitlines()
        assert all("Z gateway: " in line for line in said), said
        assert said[-1].endswith("closed")
        assert ask(health) == "UNAVAILABLE"


@pytest.mark.slow
def test_one_user_is_the_node(tmp_path: Path) -> None:
    site = new_world(tmp_path, "st-mary", edge=f"localhost:{free_port()}").sites["st-mary"]
    for user, status in ((os.getuid(), 200), (os.getuid() + 1, 403)):
        with started(site, free_port(), f"127.0.0.1:{free_port()}", "--node-user", str(user)) as (_, client):
            assert client.post("/v1/fleet/register-node", headers=PROTOBUF).status_code == status


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_whose_a_connection_is(host: str, family: socket.AddressFamily) -> None:
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as one,
    ):
        theirs, ours = one.getsockname()[:2], server.getsockname()[:2]
        assert owner(theirs, ours) == os.getuid()
        assert owner((theirs[0], theirs[1] ^ 1), ours) is None
        assert owner(theirs, (ours[0], ours[1] ^ 1)) is None


def test_a_user_is_a_name_or_a_number() -> None:
    assert user_number("root") == user_number("0") == 0
    with pytest.raises(FleetError, match="no user"):
        user_number("nobody-of-this-name")


def test_whoever_is_no_member_has_no_gateway(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["gateway", "--site", str(tmp_path)])
    assert done.exit_code == 1
    assert "wardround-site init" in done.output


@pytest.mark.parametrize("listen", ["0.0.0.0:9095", "10.0.0.1:9095", "[::]:9095", "localhost", "127.0.0.1:0", ""])
def test_it_listens_on_the_loopback_only(listen: str) -> None:
    with pytest.raises(FleetError, match="loopback"):
        _loopback(listen)
    assert _loopback("127.0.0.1:9095") == ("127.0.0.1", 9095)
    assert _loopback("[::1]:9095") == ("::1", 9095)
