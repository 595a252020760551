"""A consortium of three sites on this machine, whose processes a test kills, stops, starves and cuts off."""

import asyncio
import json
import os
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Thread
from typing import Any

from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from client.gateway.approvals import decide, note_bundle, note_study
from client.gateway.audit import Entry, Head, check, read_lines
from client.gateway.cli import audit_path
from client.membership import joined, reach, store
from common.canonical import sha256_hex
from common.meta import flatten
from common.study import Study
from deploy.health import ask
from server.consortium import members
from server.consortium.edge import Edge, write_edge
from server.consortium.heads import heads_in
from server.rounds import initial_theta
from tests.client.gateway.doubles import bundle
from tests.deploy.clock import set_clock
from tests.deploy.players import Orders, Trap, be_coordinator, be_gateway, be_node, be_superlink, brisk
from tests.ports import free_ports
from tests.processes import CONTEXT
from tests.server.consortium.founded import NOW, new_world
from tests.server.consortium.test_edge import nginx

__all__ = ["SITES", "Town", "history", "limited", "town_of", "until"]

SITES = ("hospital-0", "hospital-1", "hospital-2")


def until(condition: Callable[[], object], why: Callable[[], object] = lambda: "", seconds: float = 240) -> None:
    """Wait until something is so; fail after a long time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.02)


class Line:
    """The network between the sites and the edge: what is sent through it can be held, slowed down or lost."""

    def __init__(self, port: int, edge: int) -> None:
        self.port, self.edge = port, edge
        self.seconds = 0.0  # that every piece is late
        self.rate = 0.0  # bytes a second; 0 for any
        self.reset_every = 0  # pieces from one that resets its connection to the next
        self.open = asyncio.Event()
        self.dead = asyncio.Event()
        self._never = asyncio.Event()
        self._connections: set[asyncio.Task[Any] | None] = set()  # else one that nothing wakes is collected as garbage
        self.pieces = 0
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Line":
        self._thread.start()
        self._call(self._begin())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hold(self) -> None:
        """Let nothing through, and lose nothing: a black hole that ends."""
        self._loop.call_soon_threadsafe(self.open.clear)

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self.open.set)

    def forget(self) -> None:
        """Let nothing through any more on the connections that there are, and tell nobody: they are half open."""

        def kill() -> None:
            self.dead.set()
            self.dead = asyncio.Event()

        self._loop.call_soon_threadsafe(kill)

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _begin(self) -> None:
        self.open.set()
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dead, ends, task = self.dead, [writer], asyncio.current_task()
        self._connections.add(task)
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self.edge)
            ends.append(back)
            await asyncio.gather(self._carry(reader, back, dead), self._carry(there, writer, dead))
        for end in ends:
            end.close()
        self._connections.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dead: asyncio.Event) -> None:
        while piece := await reader.read(2**14):
            await asyncio.sleep(self.seconds + (len(piece) / self.rate if self.rate else 0))
            await self.open.wait()
            if dead.is_set():
                await self._never.wait()
            self.pieces += 1
            if self.reset_every and self.pieces % self.reset_every == 0:
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                raise ConnectionResetError
            writer.write(piece)
            await writer.drain()
        writer.write_eof() if writer.can_write_eof() else None


class Town:
    """A consortium whose processes run.

    Attributes
    ----------
    processes : dict
        The last process of each name: ``superlink``, ``coordinator``, ``hospital-0 gateway``, ``hospital-0 node``.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        line, edge, superlink, *doors = free_ports(3 + 2 * len(SITES))
        self.folder, self.study = folder, study
        self.world = new_world(folder, *SITES, edge=f"localhost:{line}")
        self.edge = Edge(folder / "edge", f"127.0.0.1:{edge}", f"127.0.0.1:{superlink}")
        self.line = Line(line, edge)
        self.doors = dict(zip(SITES, doors[::2], strict=True))
        self.asked = {site: f"127.0.0.1:{port}" for site, port in zip(SITES, doors[1::2], strict=True)}
        self.orders, self.order = folder / "orders", Orders()
        self.processes: dict[str, ForkServerProcess] = {}
        self.fab = bundle(study)
        self.rewrite_edge()
        manifest = members.allow(self.world.authority.manifest(), [sha256_hex(self.fab)], [study], NOW)
        signed = self.world.authority.publish(manifest)
        size = flatten(initial_theta(study)).numel()
        for site in self.world.sites.values():
            store.update(site, signed, NOW)
            decide(site, note_bundle(site, self.fab, NOW), "approved", NOW)
            decide(site, note_study(site, study, NOW), "approved", NOW, size)

    # Processes.

    def start(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        process = CONTEXT.Process(target=work, args=arguments, daemon=True)
        process.start()
        self.processes[name] = process

    def kill(self, name: str) -> None:
        process = self.processes[name]
        process.kill()
        process.join()

    def signal(self, name: str, number: int) -> None:
        os.kill(self.processes[name].pid or 0, number)

    def superlink(self) -> None:
        keys, port = self.edge.folder, self.edge.superlink.split(":")[1]
        arguments = ["--host", "127.0.0.1", "--port", port, "--enable-supernode-auth", "--isolation", "process"]
        arguments += ["--ssl-ca-certfile", f"{keys}/authority.pem", "--ssl-certfile", f"{keys}/superlink.pem"]
        arguments += ["--ssl-keyfile", f"{keys}/superlink.key", "--database", str(self.database)]
        self.start("superlink", be_superlink, self.log_of("superlink"), self.clock("superlink"), self.folder, arguments)

    def gateway(self, site: str, change: Callable[[], None] = brisk) -> None:
        log, door = self.log_of(f"{site} gateway"), self.doors[site]
        own = self.clock(site), self.world.sites[site], door, self.asked[site], change
        self.start(f"{site} gateway", be_gateway, log, *own)

    def node(self, site: str, trap: Trap | None = None) -> None:
        self.start(f"{site} node", be_node, self.clock(site), self.doors[site], SITES.index(site), self.study, trap)

    def coordinator(self, resume: int | None = None) -> int:
        """Start the study, or go on with a run; return the run's number."""
        run = self.control("StartRun", StartRunRequest(fab=Fab(hash_str=sha256_hex(self.fab), content=self.fab))).run_id
        arguments = (self.edge.superlink, self.authority, self.study, self.orders, resume)
        log, own = self.log_of("coordinator"), self.clock("coordinator")
        self.start("coordinator", be_coordinator, log, own, *arguments)
        return int(run)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        nginx(self.edge, "-s", "stop")

    # The coordinator's side.

    @property
    def database(self) -> Path:
        return self.folder / "state.db"

    @property
    def authority(self) -> bytes:
        return (self.edge.folder / "authority.pem").read_bytes()

    def rewrite_edge(self) -> None:
        write_edge(self.world.authority, self.edge, NOW)

    def control(self, name: str, request: Any) -> Any:
        """Make a call of Flower's control API."""
        client = ControlHttpClient.from_server_address(
            self.edge.superlink, insecure=False, root_certificates=self.authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli")],
        )  # fmt: skip
        with client._client:
            return getattr(client, name)(request)

    def register(self, site: str) -> None:
        key = joined(self.world.sites[site], datetime.now(UTC)).member.node.encode()
        self.control("RegisterNode", RegisterNodeRequest(public_key=key, name=site))

    def online(self) -> list[str]:
        """Return the names of the nodes that Flower takes for alive."""
        nodes = self.control("ListNodes", ListNodesRequest()).nodes_info
        return sorted(node.name for node in nodes if node.status == "online")

    # A run.

    def reach(
        self, folder: Path, condition: Callable[[dict[str, Any]], object], *, without: str = ""
    ) -> dict[str, Any]:
        """Let rounds begin, one at a time, until one of them is as wanted; return its line of history.

        ``without`` is a site that is not waited for.
        """
        number = len(history(folder))
        while True:
            number += 1
            assert number <= self.study.study.rounds, self.logs()
            self.tell(number=number, without=without)
            until(lambda: len(history(folder)) >= number or self.dead("coordinator"), self.logs)  # noqa: B023
            lines = history(folder)
            assert len(lines) >= number, self.log("coordinator")
            if condition(lines[number - 1]):
                self.tell(without="")
                return lines[number - 1]

    def next_round(self, folder: Path) -> int:
        """Let the next round begin, and do not wait for it; return its number."""
        number = len(history(folder)) + 1
        self.tell(number=number)
        return number

    def tell(self, **changes: Any) -> None:
        """Give the coordinator other orders."""
        self.order = replace(self.order, **changes)
        self.order.give(self.orders)

    def dead(self, name: str) -> bool:
        return not self.processes[name].is_alive()

    # What they say.

    def clock(self, name: str) -> Path:
        return self.folder / f"{name}.clock"

    def set_clocks(self, ahead: float, *names: str) -> None:
        """Set the clocks of ``superlink``, ``coordinator`` or a site's processes, as many seconds ahead of the time."""
        for name in names:
            set_clock(self.clock(name), ahead)

    def log_of(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        return self.log_of(name).read_text(errors="replace")[-5000:]

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{self.log(file.stem)}" for file in sorted(self.folder.glob("*.log")))

    def health(self, site: str) -> str:
        return ask(self.asked[site])

    def sent(self, site: str) -> list[bytes]:
        """Return the lines of a site's audit log about what left."""
        return [line for line in audit_path(self.world.sites[site]).read_bytes().splitlines() if b'"sent"' in line]

    def audit(self, site: str) -> list[Entry]:
        """Return a site's audit log, checked against every head that the edge saw."""
        heads = heads_in((self.edge.folder / "access.log").read_bytes().splitlines())
        seen = [Head(head.seq, head.digest) for head in heads if head.site == site]
        folder = self.world.sites[site]
        lines, _ = read_lines(audit_path(folder))
        assert seen
        return [entry for entry, _ in check(lines, store.identity(folder).public_key(), seen)]


def history(folder: Path) -> list[dict[str, Any]]:
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


@contextmanager
def limited(process: ForkServerProcess, file: Path) -> Iterator[None]:
    """Let a process write no file larger than one is now: for it, the disk is full."""
    before = resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (file.stat().st_size, before[1]))
    yield
    resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, before)


@contextmanager
def town_of(folder: Path, study: Study) -> Iterator[Town]:
    """Start everything but a run, and stop it at the end."""
    town = Town(folder, study)
    with town.line:
        try:
            town.superlink()
            begun = nginx(town.edge)
            assert begun.returncode == 0, begun.stderr
            member = joined(town.world.sites[SITES[0]], NOW)
            until(lambda: reach(member).finding.state == "ok", town.logs)
            for site in SITES:
                town.register(site)
                town.gateway(site)
                town.node(site)
            until(lambda: town.online() == list(SITES), town.logs)
            yield town
        finally:
            town.end()
