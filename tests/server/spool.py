"""A Grid over a folder: coordinator and sites are processes of their own, so that each can be killed for real.

A message is a file in its node's folder, a reply a file under the message's id; both are whole or not there. A node is
online while its process lives, as with Flower's heartbeats; one that is stopped lives.
"""

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.study import Study
from tests.processes import alive
from tests.server.scripted import Scripted

__all__ = ["SpoolGrid", "alive", "coordinate", "serve"]

_POLL_SECONDS = 0.005


class SpoolGrid(Grid):
    """The coordinator's side."""

    def __init__(self, folder: Path, run_id: int) -> None:
        self.folder, self.run_id = folder, run_id
        for name in ("nodes", "messages", "replies"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def set_run(self, run: Run) -> None:
        pass

    @property
    def run(self) -> Run:
        return Run.create_empty(self.run_id)

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_nodes(self) -> Iterable[NodeInfo]:
        files = sorted((self.folder / "nodes").glob("*"))
        return [NodeInfo(node_id=int(file.name)) for file in files if alive(int(file.read_text() or 0))]

    def get_node_ids(self) -> Iterable[int]:
        return [info.node_id for info in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex
            ids.append(message.metadata.message_id)
            folder = self.folder / "messages" / str(message.metadata.dst_node_id)
            folder.mkdir(exist_ok=True)
            _put(folder / f"{time.time_ns()}-{ids[-1]}", message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            file = self.folder / "replies" / message_id
            if file.exists():
                replies.append(_get(file))
                file.unlink()
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def serve(folder: Path, site: int, study: Study) -> None:
    """Be a site: answer messages in their order, for ever."""
    _enter(1)
    client = Scripted(study)
    node = 1000 + site
    (folder / "messages" / str(node)).mkdir(parents=True, exist_ok=True)
    (folder / "nodes").mkdir(exist_ok=True)
    (folder / "nodes" / str(node)).write_text(str(os.getpid()))
    context = Context(1, node, {"partition-id": site}, RecordDict(), dict(study.run_config()))
    while True:
        for file in sorted((folder / "messages" / str(node)).glob("[0-9]*")):
            message = _get(file)
            _put(folder / "replies" / message.metadata.message_id, client(message, context))
            file.unlink()
        time.sleep(_POLL_SECONDS)


def coordinate(folder: Path, study: Study, run_id: int, resume: bool, arm: Callable[[], None] | None = None) -> None:
    """Be the coordinator: run the real ServerApp, or go on with its run; ``arm`` sets a trap before."""
    from server.app import app

    _enter(run_id)
    if arm:
        arm()
    config = dict(study.run_config()) | ({"resume": str(run_id)} if resume else {})
    app(SpoolGrid(folder, run_id), Context(run_id, SUPERLINK_NODE_ID, {}, RecordDict(), config))


def _enter(run_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 1


def _put(file: Path, message: Message) -> None:
    with no_object_id_recompute():
        contents = {key: value.deflate() for key, value in get_all_nested_objects(message).items()}
        data = pickle.dumps((message.object_id, contents, message.metadata.message_id))
    part = file.with_name(f".{file.name}")
    part.write_bytes(data)
    os.replace(part, file)


def _get(file: Path) -> Message:
    root, contents, message_id = pickle.loads(file.read_bytes())
    message = cast(Message, inflate_object_from_contents(root, contents))
    message.metadata.__dict__["_message_id"] = message_id
    return message
