"""A consortium of one site, for malicious bundles: Flower's processes, and this one is the ServerApp of every run."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from client.gateway.audit import Event, check, read_lines
from client.gateway.cli import audit_path
from client.membership import joined, reach, store
from common.canonical import sha256_hex
from common.contract import Instruction, pack_instruction
from common.environment import flower_environment, tool
from common.study import Study
from deploy.health import ask
from server.consortium import members
from server.consortium.edge import Edge, write_edge
from simulations.engines.control import APP, running, until
from simulations.namespaces import HERE, Host, cable, closed, impossible, namespace
from tests.client.gateway import trickster, warm
from tests.client.gateway.doubles import project
from tests.client.gateway.trickster import NUMBERS, TRICKS
from tests.ports import free_ports
from tests.server.consortium.founded import NOW, new_world

__all__ = ["ROUNDS", "STUDY", "Here", "Run", "bundle", "walled"]

STUDY = Study.from_run_config({"study.id": "trap", "sites.quorum": 2, "aggregation.max-norm": 10.0})
ROUNDS = {trick: number for number, trick in enumerate(TRICKS, 1)}

_WAIT = 120.0
#: Of SuperNode and executor, within a network for measurements (RFC 2544), which no real one is.
_ADDRESSES = ("198.18.94.1", "198.18.94.2")


def bundle(ways: Mapping[str, Any], more: bytes = b"") -> bytes:
    """Return the bundle, as `flwr run` would build it."""
    files = {
        "pyproject.toml": project(STUDY, clientapp="trickster:app"),
        "trickster.py": Path(trickster.__file__).read_bytes() + more,
        "ways.json": json.dumps(ways).encode(),
    }
    return build_fab_from_files(files)[0]


@dataclass
class Run:
    """A run of which this process is the ServerApp."""

    grid: HttpGrid
    run_id: int
    task_id: int

    def ask(self, trick: str) -> Message:
        """Ask the one site to train, in the round that makes the bundle do a trick, and return what arrives."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, SUPERLINK_NODE_ID, self.task_id
        instruction = Instruction("train", STUDY.digest, ROUNDS[trick], 1, "a" * 64)
        (node,) = self.grid.get_node_ids()
        question = Message(pack_instruction(instruction, NUMBERS), node, "train", group_id=str(ROUNDS[trick]))
        (message_id,) = self.grid.push_messages([question])
        replies: list[Message] = []

        def arrived() -> bool:
            self.grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            replies.extend(self.grid.pull_messages([message_id]))
            return bool(replies)

        until(arrived, _WAIT, lambda: f"no answer to {trick!r}")
        assert replies[0].metadata.reply_to_message_id == message_id
        return replies[0]


class Here:
    """A consortium of one site, with Flower's own processes."""

    def __init__(self, folder: Path, fabs: list[bytes]) -> None:
        self.folder, (self.port, self.door, self.health, self.runtime) = folder, free_ports(4)
        world = new_world(folder, "st-mary", edge=f"localhost:{self.port}")
        self.site, self.home = world.sites["st-mary"], folder / "coordinator"
        self.keys = Edge(folder / "edge", "127.0.0.1:9", f"localhost:{self.port}")
        write_edge(world.authority, self.keys, NOW)
        manifest = members.allow(world.authority.manifest(), [sha256_hex(fab) for fab in fabs], [STUDY], NOW)
        store.update(self.site, world.authority.publish(manifest), NOW)
        self.trust = (self.keys.folder / "authority.pem").read_bytes()
        self.version = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]

    def process(self, name: str, *command: str, before: Host = (), home: Path | None = None) -> Any:
        own = home or self.folder / name
        if home is None:
            own.mkdir()
        near = ",".join(("localhost", "127.0.0.1", *_ADDRESSES))
        environment = flower_environment(FLWR_HOME=str(own), HOME=str(own), NO_PROXY=near)
        return running(self.folder / f"{name}.log", environment, *before, *command)

    @contextmanager
    def started(self, cell: Host) -> Iterator[None]:
        """Start everything; the executor within a cell, which reaches nothing but the SuperNode, where there is one."""
        keys = self.keys.folder
        host = _ADDRESSES[0] if cell else "127.0.0.1"
        superlink = [
            *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth"),
            *("--ssl-ca-certfile", str(keys / "authority.pem"), "--ssl-certfile", str(keys / "superlink.pem")),
            *("--ssl-keyfile", str(keys / "superlink.key"), "--disable-runtime-dependency-installation"),
            *("--database", str(self.home / "state.db"), "--isolation", "process"),
        ]
        gateway = [tool("wardround-site"), "gateway", "--site", str(self.site), "--listen", f"127.0.0.1:{self.door}"]
        gateway += ["--health", f"127.0.0.1:{self.health}"]
        node = [tool("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{self.door}"]
        node += ["--isolation", "process", "--host", host, "--port", str(self.runtime)]
        executor = [sys.executable, warm.__file__, f"{host}:{self.runtime}"]
        inside = Path("/tmp/flower") if cell else None
        with ExitStack() as stack:
            stack.enter_context(self.process("coordinator", *superlink))
            stack.enter_context(self.process("gateway", *gateway))
            member = joined(self.site, NOW)
            until(lambda: reach(member).finding.state == "ok", _WAIT, lambda: self.log("coordinator"))
            with self.client(ControlHttpClient) as control:
                control.RegisterNode(RegisterNodeRequest(public_key=member.member.node.encode(), name="st-mary"))
            until(lambda: ask(f"127.0.0.1:{self.health}") == "SERVING", _WAIT, lambda: self.log("gateway"))
            stack.enter_context(self.process("node", *node))
            stack.enter_context(self.process("executor", *executor, before=cell, home=inside))
            until(lambda: "the node is number" in self.log("gateway"), _WAIT, lambda: self.log("node"))
            yield

    @contextmanager
    def client(self, kind: type[Any]) -> Iterator[Any]:
        one = kind.from_server_address(f"localhost:{self.port}", False, self.trust, self.version)
        try:
            yield one
        finally:
            one.close()

    @contextmanager
    def run(self, fab: bytes) -> Iterator[Run]:
        """Start a run of a bundle, and be its ServerApp."""
        with self.client(ControlHttpClient) as control, self.client(RuntimeHttpClient) as runtime:
            control.StartRun(StartRunRequest(fab=Fab(hash_str=sha256_hex(fab), content=fab)))
            task = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        grid = HttpGrid(f"localhost:{self.port}", False, self.trust, token=task.token)
        try:
            found = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
            grid.set_run(run_from_proto(found.run))
            yield Run(grid, found.run.run_id, found.task_id)
        finally:
            grid.close()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6000:]

    def events(self, number: int = 0) -> list[Event]:
        """Return the audit log's lines about a round; all of them for 0."""
        entries = check(read_lines(audit_path(self.site))[0], store.identity(self.site).public_key())
        return [entry.event for entry, _ in entries if number in (0, entry.event.round)]


@contextmanager
def walled() -> Iterator[Host]:
    """Make the cell of the executor: a network of its own with a cable to the SuperNode, and a /tmp of its own."""
    if impossible():
        yield HERE
        return
    number = os.getpid()
    with namespace(f"wardround-{number}") as cell:
        cable(HERE, cell, (f"wr{number}", "node"), (f"{_ADDRESSES[0]}/30", f"{_ADDRESSES[1]}/30"))
        yield (*cell, *closed(Path(sys.prefix), APP))
