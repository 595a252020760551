"""A SuperLink and a SuperNode in memory, on either side of a gateway that is real."""

import io
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import Message as Proto

import client.gateway.gateway as room
from client.gateway.approvals import decide, find, note_bundle, note_study
from client.gateway.fleet import CALLS
from client.gateway.gateway import Gateway, Settings
from client.membership import Joined, store
from common.canonical import sha256_hex
from common.contract import Instruction, pack_instruction, pack_reply
from common.errors import FleetError
from common.study import Study
from server.consortium import members
from tests.client.hospitals import enter_run
from tests.server.consortium.founded import NOW, World, new_world

__all__ = ["RUN", "STUDY", "D", "Link", "NodeDouble", "Setup", "bundle", "honest", "project", "question", "set_up"]

D = 50
RUN = 7
NODE = 1001
STUDY = Study.from_run_config({"study.id": "small", "sites.quorum": 2})
TYPES = {"join": "query.join", "train": "train", "evaluate": "evaluate"}
Found = TypeVar("Found", bound=Proto)


def project(study: Study = STUDY, clientapp: str = "client.app:app") -> bytes:
    """Return a bundle's ``pyproject.toml``."""
    config = re.sub(r"^\[", "[tool.flwr.app.config.", study.toml(), flags=re.MULTILINE)
    return (
        '[project]\nname = "x"\nversion = "1"\n[tool.flwr.app]\npublisher = "p"\n[tool.flwr.app.components]\n'
        f'serverapp = "server.app:app"\nclientapp = "{clientapp}"\n'
        f'[tool.flwr.app.config]\nresume = ""\ntrack = ""\n{config}'
    ).encode()


def bundle(study: Study = STUDY, **more: bytes) -> bytes:
    """Return a bundle as Flower makes it; ``more`` are files beside ``client/app.py``."""
    files = {"pyproject.toml": project(study), "client/app.py": b"print('hello')\n"}
    files |= {name.replace("__", "/"): data for name, data in more.items()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def question(kind: Any = "train", number: int = 1, study: Study = STUDY, node: int = NODE) -> Message:
    """Return a message as the coordinator's SuperLink keeps it."""
    enter_run()
    theta = None if kind == "join" else np.linspace(-1, 1, D, dtype=np.float32)
    instruction = Instruction(kind, study.digest, number, 1, "a" * 64)
    message = Message(pack_instruction(instruction, theta), node, TYPES[kind], group_id=str(number))
    message.metadata.__dict__["_run_id"] = RUN
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@dataclass
class Link:
    """Stands where the way to the edge would: keeps what a SuperLink keeps, and can be away or refuse."""

    member: Joined
    fab: bytes
    paused: Any
    waiting: list[Message] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    arrived: dict[str, bytes] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    slow: dict[str, int] = field(default_factory=dict)  # objects that the ServerApp is still sending, once
    away: int = 0
    refuses: bool = False  # as the edge does with a certificate that is not in the manifest
    number: int = NODE
    deaf: int = 0  # to the words that so many objects came
    forgetful: bool = False  # like a SuperLink that keeps its state in a file
    override: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, message: Message) -> Message:
        self.waiting.append(message)
        self.objects |= {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        return message

    def answers(self) -> list[Message]:
        """Return the answers that arrived whole."""
        found = []
        for root in self.roots:
            with suppress(KeyError):
                answer = inflate_object_from_contents(root, dict(self.arrived))
                assert isinstance(answer, Message)
                found.append(answer)
        return found

    async def call(self, request: Proto, response: type[Found], head: str = "") -> Found:
        if head:
            self.heads.append(head)
        name = next(name for name, call in CALLS.items() if call.request is type(request))
        if self.paused():
            raise FleetError("nothing leaves this site")
        if self.away:
            self.away -= 1
            raise FleetError("the edge cannot be reached")
        if self.refuses:
            raise FleetError("this certificate is not in the manifest", 403)
        asking: Any = request
        if hasattr(request, "node") and asking.node.node_id != self.number:
            raise FleetError("the SuperLink does not know this site's node", stranger=True)
        self.calls.append(name)
        answer = self._answer(request)
        assert isinstance(answer, response)
        if self.deaf and name == "push-object":
            self.deaf -= 1
            raise FleetError("the line broke")
        return answer

    async def close(self) -> None:
        pass

    def _answer(self, request: Any) -> Proto:  # noqa: PLR0911, PLR0912 (one for each call)
        match request:
            case fleet_pb2.ActivateNodeRequest():
                return fleet_pb2.ActivateNodeResponse(node_id=self.number)
            case fleet_pb2.DeactivateNodeRequest():
                return fleet_pb2.DeactivateNodeResponse()
            case heartbeat_pb2.SendNodeHeartbeatRequest():
                return heartbeat_pb2.SendNodeHeartbeatResponse(success=True)
            case fleet_pb2.PullMessagesRequest():
                if not self.waiting:
                    return fleet_pb2.PullMessagesResponse()
                message = self.waiting.pop(0)
                proto = message_to_proto(message)
                proto.content.CopyFrom(message_to_proto(Message(RecordDict(), reply_to=message)).content)
                if self.forgetful:
                    proto.metadata.ClearField("src_task_id")
                tree = get_object_tree(message)
                return fleet_pb2.PullMessagesResponse(messages_list=[proto], message_object_trees=[tree])
            case run_pb2.GetRunRequest():
                run = run_pb2.Run(run_id=request.run_id, fab_hash=sha256_hex(self.fab), fab_id="p/x", fab_version="1")
                for key, value in self.override.items():
                    run.override_config[key].sint64 = value
                return run_pb2.GetRunResponse(run=run)
            case fab_pb2.GetFabRequest():
                fab = fab_pb2.Fab(hash_str=request.hash_str, content=self.fab)
                return fab_pb2.GetFabResponse(fab=fab)
            case message_pb2.PullObjectRequest():
                content = self.objects.get(request.object_id)
                there = content is not None and self.slow.pop(request.object_id, 0) == 0
                return message_pb2.PullObjectResponse(
                    object_found=content is not None,
                    object_available=there,
                    object_content=content if content and there else b"",
                )
            case message_pb2.ConfirmMessageReceivedRequest():
                return message_pb2.ConfirmMessageReceivedResponse()
            case fleet_pb2.PushMessagesRequest():
                (tree,), (proto,) = request.message_object_trees, request.messages_list
                assert not proto.content.items
                missing = {one.object_id for one in iterate_object_tree(tree)} - set(self.arrived)
                if tree.object_id in self.roots:  # the coordinator has looked for it: it cannot be announced again
                    missing = set()
                self.roots += [] if tree.object_id in self.roots else [tree.object_id]
                return fleet_pb2.PushMessagesResponse(objects_to_push=missing, session_id="s")
            case message_pb2.PushObjectRequest():
                stored = request.object_id not in self.arrived
                self.arrived[request.object_id] = request.object_content
                return message_pb2.PushObjectResponse(stored=stored)
        raise AssertionError(request)


@dataclass
class NodeDouble:
    """Calls a gateway as a SuperNode does."""

    gateway: Gateway
    node: Node = field(default_factory=lambda: Node(node_id=NODE))

    async def call(self, name: str, **fields: Any) -> Any:
        request, response = CALLS[name]
        return response.FromString(await self.gateway.answer(name, request(**fields).SerializeToString()))

    async def begin(self) -> None:
        await self.call("register-node", public_key=b"anything")
        found = await self.call("activate-node", public_key=b"anything", heartbeat_interval=98765.4321)
        self.node = Node(node_id=found.node_id)

    async def take(self) -> Message | None:
        """Return the next message as the ClientApp gets it; None where there is none."""
        found = await self.call("pull-messages", node=self.node)
        if not found.messages_list:
            return None
        told = message_from_proto(found.messages_list[0])
        objects = {}
        for tree in iterate_object_tree(found.message_object_trees[0]):
            run = told.metadata.run_id
            got = await self.call("pull-object", node=self.node, run_id=run, object_id=tree.object_id)
            assert got.object_available
            objects[tree.object_id] = got.object_content
        message_id = told.metadata.message_id
        await self.call("confirm-message-received", node=self.node, run_id=RUN, message_object_id=message_id)
        message = inflate_object_from_contents(message_id, objects)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = message_id
        return message

    async def announce(self, reply: Message) -> tuple[Any, dict[str, bytes]]:
        """Begin to send an answer; return what the gateway said, and the answer's objects."""
        proto = message_to_proto(reply)
        proto.metadata.message_id = reply.object_id
        if reply.has_content():
            proto.content.Clear()
        said = await self.call(
            "push-messages",
            node=self.node,
            messages_list=[proto],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[1.25],
        )
        return said, {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}

    async def push(self, session: str, name: str, data: bytes) -> bool:
        got = await self.call(
            "push-object", node=self.node, run_id=RUN, object_id=name, object_content=data, session_id=session
        )
        return bool(got.stored)

    async def send(self, reply: Message) -> bool:
        """Send an answer; say whether the gateway took all of it."""
        said, objects = await self.announce(reply)
        assert set(said.objects_to_push) == set(objects)
        return all([await self.push(said.session_id, name, data) for name, data in objects.items()])


@dataclass
class Setup:
    """A site that has joined, its gateway's surroundings, and what its gateway says."""

    world: World
    site: Path
    fab: bytes
    links: list[Link]
    said: list[str]

    @property
    def link(self) -> Link:
        return self.links[-1]

    def gateway(self, *, daily: int = 2**30) -> Gateway:
        return Gateway(Settings(self.site, None, daily), self.said.append)

    def approve(self, *, size: int = D) -> None:
        decide(self.site, note_bundle(self.site, self.fab, NOW), "approved", NOW)
        decide(self.site, note_study(self.site, STUDY, NOW), "approved", NOW, size)

    def reject(self, digest: str) -> None:
        decide(self.site, find(self.site, digest), "rejected", NOW)


def set_up(folder: Path, monkeypatch: pytest.MonkeyPatch, *, approved: bool = True) -> Setup:
    """Return a site whose coordinator has admitted `STUDY` and `bundle()`."""
    world = new_world(folder, "st-mary")
    fab = bundle()
    setup = Setup(world, world.sites["st-mary"], fab, [], [])
    manifest = members.allow(world.authority.manifest(), [sha256_hex(fab)], [STUDY], NOW)
    store.update(setup.site, world.authority.publish(manifest), NOW)

    def link(member: Joined, _proxy: str | None, pause: Any) -> Link:
        setup.links.append(Link(member, fab, pause))
        return setup.links[-1]

    monkeypatch.setattr(room, "Upstream", link)
    monkeypatch.setattr(room, "_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(room, "_HOLD_SECONDS", 0.0)
    monkeypatch.setattr(room, "_PATIENCE_SECONDS", 60.0)  # however slow the disk is
    if approved:
        setup.approve()
    return setup


def honest(message: Message, **change: Any) -> Message:
    """Return the answer of a site that keeps to the study."""
    instruction = Instruction(**dict(message.content["instruction"]))  # type: ignore[arg-type]
    scalars = {"site": 2} if instruction.kind == "join" else {"loss": 0.75, "accuracy": 0.5}
    vector = np.linspace(-1, 1, D, dtype=np.float32) if instruction.kind == "train" else None
    content = pack_reply(instruction, scalars, vector)
    content.update(change.get("records", {}))
    return Message(content, reply_to=message)
