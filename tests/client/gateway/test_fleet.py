"""The way to the edge over real TLS: one host, no redirect, this site's certificate, and a switch that cuts mid-way."""

import asyncio
import re
import ssl
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest, SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from client.gateway.fleet import Upstream
from client.membership import joined
from common.errors import FleetError
from server.consortium.edge import Edge, write_edge
from tests.ports import free_port
from tests.server.consortium.founded import NOW, World, new_world

BEAT = SendNodeHeartbeatRequest(node=Node(node_id=3), heartbeat_interval=30)
GOOD = SendNodeHeartbeatResponse(success=True).SerializeToString()


@dataclass
class Host:
    """Stands where the edge would: what was sent to it, and what it answers."""

    status: str = "200 OK"
    answer: bytes = GOOD
    headers: str = ""
    ahead: int | None = None  # seconds of its clock, if it says what time it has
    seen: list[str] = field(default_factory=list)
    certificates: list[object] = field(default_factory=list)
    received: int = 0
    slow: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.certificates.append(writer.get_extra_info("peercert"))
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.seen.append(head.decode())
                match = re.search(r"content-length: (\d+)", self.seen[-1], re.IGNORECASE)
                left = int(match[1]) if match else 0
                while left:
                    piece = await reader.read(min(left, 2**15))
                    if not piece:
                        return
                    left -= len(piece)
                    self.received += len(piece)
                    await asyncio.sleep(0.002 * self.slow)
                length = f"content-length: {len(self.answer)}\r\n"
                date = ""
                if self.ahead is not None:
                    now = datetime.now(UTC) + timedelta(seconds=self.ahead)
                    date = f"date: {format_datetime(now, usegmt=True)}\r\n"
                writer.write(f"HTTP/1.1 {self.status}\r\n{length}{date}{self.headers}\r\n".encode() + self.answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def story(world: World, folder: Path, host: Host, tell: Callable[[Upstream], Awaitable[None]], **more: object) -> None:
    async def whole() -> None:
        async with listening(world, folder, host):
            paused = more.get("paused", lambda: False)
            proxy = more.get("proxy")
            upstream = Upstream(joined(world.sites["st-mary"], NOW), proxy, paused)  # type: ignore[arg-type]
            try:
                await tell(upstream)
            finally:
                await upstream.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


@asynccontextmanager
async def listening(world: World, folder: Path, host: Host) -> AsyncIterator[None]:
    port = int(world.authority.manifest().edge.split(":")[1])
    write_edge(world.authority, Edge(folder / "edge", f"127.0.0.1:{port}", "127.0.0.1:9"), NOW)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "edge" / "edge.pem", folder / "edge" / "edge.key")
    context.load_verify_locations(folder / "edge" / "authority.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    server = await asyncio.start_server(host.serve, "127.0.0.1", port, ssl=context)
    async with server:
        yield


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return new_world(tmp_path / "world", "st-mary", edge=f"localhost:{free_port()}")


def test_a_call_shows_the_sites_certificate_and_nothing_but_the_headers_it_needs(world: World, tmp_path: Path) -> None:
    host = Host()

    async def tell(upstream: Upstream) -> None:
        assert (await upstream.call(BEAT, SendNodeHeartbeatResponse)).success

    story(world, tmp_path, host, tell)
    (head,) = host.seen
    assert head.startswith("POST /v1/fleet/send-node-heartbeat HTTP/1.1")
    assert "st-mary" in str(host.certificates)
    headers = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
    assert {name.lower() for name in headers} == {
        "host", "connection", "content-type", "accept", "accept-encoding", "user-agent", "content-length",
        "flwr-public-key", "flwr-timestamp", "flwr-signature",
        "flwr-package-name", "flwr-package-version", "flwr-component-name",
    }  # fmt: skip
    key = bytes_to_public_key(b64decode(headers["flwr-public-key"]))
    assert verify_signature(key, headers["flwr-timestamp"].encode(), b64decode(headers["flwr-signature"]))


@pytest.mark.parametrize(("status", "mine"), [("403 Forbidden", 403), ("412 No", 503), ("500 No", 503)])
def test_a_refusal_is_an_error_with_its_text(world: World, tmp_path: Path, status: str, mine: int) -> None:
    async def tell(upstream: Upstream) -> None:
        with pytest.raises(FleetError, match="revoked") as error:
            await upstream.call(BEAT, SendNodeHeartbeatResponse)
        assert error.value.status == mine
        assert "\x1b" not in str(error.value)

    story(world, tmp_path, Host(status, b"refused: \x1b[2J revoked"), tell)


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        (0, "does not know this site's node"),
        (8, r"\d+ s ahead of the edge's: set"),
        (-400, r"\d+ s behind the edge's"),
    ],
)
def test_a_node_that_is_not_known_and_a_clock_that_is_wrong_are_told_apart(
    world: World, tmp_path: Path, ahead: int, words: str
) -> None:
    async def tell(upstream: Upstream) -> None:
        with pytest.raises(FleetError, match=words) as error:
            await upstream.call(BEAT, SendNodeHeartbeatResponse)
        assert (error.value.status, error.value.stranger) == (503, ahead == 0)

    story(world, tmp_path, Host("401 No", b"Invalid SuperNode authentication", ahead=-ahead), tell)


def test_a_redirect_is_not_followed(world: World, tmp_path: Path) -> None:
    host = Host("307 Elsewhere", b"", f"location: https://{world.authority.manifest().edge}/v1/control/run\r\n")

    async def tell(upstream: Upstream) -> None:
        with pytest.raises(FleetError, match="307"):
            await upstream.call(BEAT, SendNodeHeartbeatResponse)

    story(world, tmp_path, host, tell)
    assert len(host.seen) == 1


@pytest.mark.parametrize(("answer", "words"), [(b"<html>", "in between"), (bytes(17 * 2**20), "more than")])
def test_what_is_no_answer_or_a_huge_one_is_an_error(world: World, tmp_path: Path, answer: bytes, words: str) -> None:
    async def tell(upstream: Upstream) -> None:
        with pytest.raises(FleetError, match=words):
            await upstream.call(BEAT, SendNodeHeartbeatResponse)

    story(world, tmp_path, Host(answer=answer), tell)


def test_a_host_of_another_authority_is_not_trusted(world: World, tmp_path: Path) -> None:
    edge = world.authority.manifest().edge
    other = new_world(tmp_path / "other", edge=edge)
    host = Host()

    async def whole() -> None:
        async with listening(other, tmp_path, host):
            upstream = Upstream(joined(world.sites["st-mary"], NOW), None, lambda: False)
            with pytest.raises(FleetError, match="doctor"):
                await upstream.call(BEAT, SendNodeHeartbeatResponse)
            await upstream.close()

    asyncio.run(whole())
    assert not host.seen


def test_a_pause_cuts_what_is_on_its_way(world: World, tmp_path: Path) -> None:
    host, state = Host(slow=True), {"paused": False}
    whole = PushObjectRequest(node=Node(node_id=3), object_content=bytes(40 * 2**20))

    async def tell(upstream: Upstream) -> None:
        sending = asyncio.create_task(upstream.call(whole, PushObjectResponse))
        while host.received < 2**17:
            await asyncio.sleep(0.001)
        state["paused"] = True
        with pytest.raises(FleetError, match="nothing leaves"):
            await sending
        with pytest.raises(FleetError, match="nothing leaves"):
            await upstream.call(BEAT, SendNodeHeartbeatResponse)

    story(world, tmp_path, host, tell, paused=lambda: state["paused"])
    assert 2**17 <= host.received < 40 * 2**20
    assert len(host.seen) == 1


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_proxy_is_used(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    port, asked, over = free_port(), [], asyncio.Event()
    if by == "environment":
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")

    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.split(" ")[:2])
        name, number = head.split(" ")[1].split(":")
        there, to = await asyncio.open_connection(name, int(number))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while piece := await source.read(2**16):
                sink.write(piece)
            sink.close()

        await asyncio.gather(copy(reader, to), copy(there, writer), return_exceptions=True)
        await asyncio.gather(to.wait_closed(), writer.wait_closed(), return_exceptions=True)
        over.set()

    async def tell(upstream: Upstream) -> None:
        async with await asyncio.start_server(through, "127.0.0.1", port):
            assert (await upstream.call(BEAT, SendNodeHeartbeatResponse)).success
            await upstream.close()
            await over.wait()

    story(world, tmp_path, Host(), tell, proxy=f"http://127.0.0.1:{port}" if by == "option" else None)
    assert asked == [["CONNECT", world.authority.manifest().edge]]


def test_what_is_no_proxy_is_said(world: World) -> None:
    with pytest.raises(FleetError, match="proxy"):
        Upstream(joined(world.sites["st-mary"], NOW), "proxy:x:y", lambda: False)
