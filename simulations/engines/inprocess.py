"""A Grid inside one process: the real apps, real serialisation, no network; faults on request.

Every message is deflated into Flower's objects and inflated again, as on the wire. It costs milliseconds, so it
serves tests and sweeps, and gives the same bits as the other engines.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.study import Study

__all__ = ["Fault", "InProcessGrid", "run_in_process", "transmit"]

#: Called with (site number, message) before a site runs: "drop" loses the reply, "crash" answers as Flower does
#: for a lost node, an int delays the reply by so many pulls, None lets it run.
Fault = Callable[[int, Message], str | int | None]


def transmit(message: Message) -> tuple[Message, int]:
    """Return a message as the other side gets it, and its size on the wire in bytes."""
    with no_object_id_recompute():  # as Flower's own transports do
        contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
        root = message.object_id
    size = sum(map(len, contents.values()))
    received = cast(Message, inflate_object_from_contents(root, contents))
    received.metadata.__dict__["_message_id"] = message.metadata.message_id
    return received, size


@dataclass
class InProcessGrid(Grid):
    """Virtual sites that run one after another, when their reply is asked for.

    Parameters
    ----------
    client : ClientApp
        Runs for every site.
    run_config : mapping
        The study.
    sites : int
        Number of sites; site i has ``partition-id`` i.
    fault : Fault or None
        Decides what goes wrong.
    names : sequence of str
        Authenticated names, as a deployment has; empty as in Flower's simulation.
    """

    client: ClientApp
    run_config: Mapping[str, Any]
    sites: int
    fault: Fault | None = None
    names: Sequence[str] = ()
    run_id: int = 1
    #: Bytes on the wire of every message and reply so far: (site, kind, bytes down, bytes up).
    traffic: list[tuple[int, str, int, int]] = field(default_factory=list)
    #: Seconds that sites have computed so far, inside of `pull_messages`.
    computing_seconds: float = 0.0
    _pending: dict[str, Message] = field(default_factory=dict)
    _delayed: dict[str, tuple[int, Message]] = field(default_factory=dict)

    def set_run(self, run: Run) -> None:
        self.run_id = run.run_id

    @property
    def run(self) -> Run:
        return Run.create_empty(self.run_id)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [_FIRST_NODE + i for i in range(self.sites)]

    def get_nodes(self) -> Iterable[NodeInfo]:
        names = self.names or [""] * self.sites
        return [NodeInfo(node_id=n, name=name) for n, name in zip(self.get_node_ids(), names, strict=True)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex
            ids.append(message.metadata.message_id)
            self._pending[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        for key in [k for k in wanted if k in self._delayed]:
            pulls, reply = self._delayed.pop(key)
            if pulls <= 0:
                return [reply]
            self._delayed[key] = (pulls - 1, reply)
        # One site at a time: no more than one reply is held here.
        for key in [k for k in wanted if k in self._pending]:
            answer, delay = self._run(self._pending.pop(key))
            if answer is not None and delay:
                self._delayed[key] = (delay, answer)
            elif answer is not None:
                return [answer]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        return [reply for _ in range(len(waiting)) for reply in self.pull_messages(waiting)]

    def _run(self, message: Message) -> tuple[Message | None, int]:
        site = message.metadata.dst_node_id - _FIRST_NODE
        fault = self.fault(site, message) if self.fault else None
        if fault == "drop":
            return None, 0
        if fault == "crash":
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            return reply, 0
        received, down = transmit(message)
        context = Context(
            self.run_id,
            message.metadata.dst_node_id,
            {"partition-id": site, "num-partitions": self.sites},
            RecordDict(),
            dict(self.run_config),
        )
        began = time.monotonic()
        answer = self.client(received, context)
        self.computing_seconds += time.monotonic() - began
        reply, up = transmit(answer)
        self.traffic.append((site, message.metadata.message_type, down, up))
        return reply, fault if isinstance(fault, int) else 0


_FIRST_NODE = 1000


def run_in_process(
    study: Study,
    *,
    server: ServerApp | None = None,
    client: ClientApp | None = None,
    fault: Fault | None = None,
    run_id: int | None = None,
    resume: int | None = None,
) -> tuple[int, InProcessGrid]:
    """Run a study on its prepared virtual sites, or go on with the run ``resume``.

    Returns
    -------
    tuple of int and InProcessGrid
        The run's id (its folder is `server.record.run_folder` of it) and the grid with its traffic.
    """
    from client.app import app as client_app
    from server.app import app as server_app

    run_id = uuid4().int >> 65 if run_id is None else run_id
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 1
    config = study.run_config() | ({} if resume is None else {"resume": str(resume)})
    grid = InProcessGrid(client or client_app, config, study.data.sites, fault, run_id=run_id)
    (server or server_app)(grid, Context(run_id, SUPERLINK_NODE_ID, {}, RecordDict(), dict(config)))
    return run_id if resume is None else resume, grid
