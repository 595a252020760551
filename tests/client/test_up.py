"""`wardround-site up`: what it looks at before it starts anything, and what it starts."""

import shutil
import socket
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from client.cli import app
from client.up import _parts
from tests.client.hospitals import prepared, tiny_study
from tests.deploy.test_commands import bare, parse
from tests.ports import free_port
from tests.server.consortium.founded import new_world


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["up", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exit_code == 1, result.output
    assert not result.stdout, "nothing was started"
    return " ".join(result.stderr.split())


def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path) -> None:
    assert "wardround-site init" in refused("--site", tmp_path / "none")
    site = new_world(tmp_path, "st-mary").sites["st-mary"]
    assert "wardround-site index" in refused("--site", site)
    images = Path(shutil.copytree(prepared(tiny_study())[0].folder, tmp_path / "images"))
    free = ["--listen", f"127.0.0.1:{free_port()}", "--health", f"127.0.0.1:{free_port()}"]
    free += ["--node-port", str(free_port())]
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        for option, value in (
            ("--listen", f"127.0.0.1:{taken}"),
            ("--health", f"127.0.0.1:{taken}"),
            ("--node-port", str(taken)),
        ):
            said = refused("--site", site, "--images", images, *free, option, value)
            assert f"nothing can listen at 127.0.0.1:{taken} (Address already in use)" in said
            assert f"{option} takes another address" in said
    assert "--socket takes another" in refused("--site", site, "--images", images, *free, "--socket", "/" + "long" * 50)


def test_every_program_knows_its_options() -> None:
    leaving = ["--proxy", "http://p:3128"]
    parts = _parts(Path("/s"), Path("/i"), "127.0.0.1:1", "127.0.0.1:3", 2, Path("/i/worker/socket"), leaving)
    options: dict[str, Any] = {
        part.name: parse(bare([part.command[0].rpartition("/")[2], *part.command[1:]])) for part in parts
    }
    assert list(options) == ["gateway", "worker", "supernode", "executor"], "the gateway ends last"
    assert options["gateway"].params["proxy"] == "http://p:3128"
    assert options["gateway"].params["health"] == parts[2].command[4] == "127.0.0.1:3", "the SuperNode asks there"
    assert options["worker"].params["site"] == "/i"
    assert options["supernode"].superlink == options["gateway"].params["listen"] == "127.0.0.1:1"
    assert options["executor"].runtime_api_address == f"127.0.0.1:{options['supernode'].port}"
    assert options["supernode"].superexec_auth_secret_file == options["executor"].superexec_auth_secret_file
    for part in parts:
        assert part.environment["FLWR_TELEMETRY_ENABLED"] == "0"
