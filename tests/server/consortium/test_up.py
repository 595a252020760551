"""`wardround-study up`: what it looks at before it starts anything, and that it follows the manifest."""

import asyncio
import socket
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
from typer.testing import CliRunner

from common.consortium import Member
from common.errors import ServiceError
from deploy.supervise import House
from server.cli import app
from server.consortium import members, up
from server.consortium.edge import Edge, write_edge
from server.consortium.superlink import superlink_command
from tests.deploy.test_commands import parse
from tests.ports import free_port
from tests.server.consortium.founded import NOW, enrol, new_request, new_world
from tests.server.consortium.test_edge import needs_nginx


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["up", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exit_code == 1, result.output
    assert not result.stdout, "nothing was started"
    return " ".join(result.stderr.split())


@needs_nginx
def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "wardround-study found" in refused("--consortium", tmp_path / "none")
    folder = new_world(tmp_path, "st-mary").authority.folder
    free = {option: f"127.0.0.1:{free_port()}" for option in ("--superlink", "--health", "--listen")}
    with socket.create_server(("127.0.0.1", 0)) as server:
        for option in free:
            addresses = free | {option: f"127.0.0.1:{server.getsockname()[1]}"}
            said = refused("--consortium", folder, *(word for pair in addresses.items() for word in pair))
            assert f"{option} takes another address" in said
    assert "not an address" in refused("--consortium", folder, "--listen", "nowhere")
    monkeypatch.setattr("server.consortium.up.shutil.which", lambda *_, **__: None)
    assert "apt install nginx" in refused("--consortium", folder)


def test_the_superlink_answers_for_its_health_where_it_is_told(tmp_path: Path) -> None:
    edge = Edge(tmp_path, "127.0.0.1:1", "127.0.0.1:2")
    program, *arguments = superlink_command(edge, tmp_path / "state.db", tmp_path / "secret", "127.0.0.1:3")
    options = parse([Path(program).name, *arguments])
    assert (options.port, options.health_server_address) == (2, "127.0.0.1:3")


class Watched:
    """Stands where the running processes would, and notes what is done to them."""

    def __init__(self) -> None:
        self.ready = {"superlink": asyncio.Event(), "edge": asyncio.Event()}
        self.events: list[tuple[str, str, str]] = []
        self.hung_up: list[str] = []

    def say(self, *event: str) -> None:
        self.events.append(cast(tuple[str, str, str], event))

    def hang_up(self, name: str) -> None:
        self.hung_up.append(name)

    async def until(self, part: str, event: str) -> str:
        """Wait for an event, and return its text."""
        async with asyncio.timeout(60):
            while True:
                for found in self.events:
                    if found[:2] == (part, event):
                        self.events.remove(found)
                        return found[2]
                await asyncio.sleep(0.01)


def test_a_change_of_the_manifest_reaches_edge_and_superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "_LOOK_SECONDS", 0.01)
    authority = new_world(tmp_path, "st-mary").authority
    edge = Edge(tmp_path / "edge", "127.0.0.1:1", "127.0.0.1:2")
    write_edge(authority, edge, NOW)
    known: set[str] = set()
    trouble = ["it is away"]

    def register(_: Edge, sites: tuple[Member, ...]) -> list[str]:
        if trouble:
            raise ServiceError(trouble.pop())
        new = [one.site for one in sites if one.site not in known]
        known.update(new)
        return new

    monkeypatch.setattr("server.consortium.superlink.register_nodes", register)

    async def change() -> None:
        house = Watched()
        task = asyncio.create_task(up._follow(authority.folder, edge, authority.manifest(), cast(House, house)))
        await asyncio.sleep(0)
        assert not house.events, "the SuperLink is not ready yet"
        house.ready["superlink"].set()
        assert await house.until("coordinator", "failed") == "it is away"
        assert await house.until("superlink", "registered") == "manifest epoch 2, new: st-mary"

        enrol(authority, new_request("uni-2")[0])
        async with asyncio.timeout(60):
            while '"uni-2";' not in (edge.folder / "nginx.conf").read_text():
                await asyncio.sleep(0.01)
        assert not house.hung_up, "the edge does not listen yet, and the signal would end it"
        house.ready["edge"].set()
        assert await house.until("edge", "reloaded") == "manifest epoch 3"
        assert await house.until("superlink", "registered") == "manifest epoch 3, new: uni-2"

        authority.publish(members.remove(authority.manifest(), "st-mary", NOW))
        assert await house.until("superlink", "registered") == "manifest epoch 4, new: nobody"
        assert '"st-mary";' not in (edge.folder / "nginx.conf").read_text()
        assert house.hung_up == ["edge", "edge"]

        monkeypatch.setattr(up, "_RENEW", timedelta())
        (edge.folder / "superlink.pem").unlink()
        await house.until("superlink", "renewed")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(change())
