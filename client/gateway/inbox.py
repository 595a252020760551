"""What the coordinator asks of this site: fetched, judged, and only then to be shown to the node."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Metadata
from flwr.common.serde import run_from_proto
from flwr.proto import fab_pb2, fleet_pb2, message_pb2, run_pb2
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node

from client.gateway.approvals import approved_study, must_be_approved, note_bundle, note_study
from client.gateway.audit import Event
from client.gateway.bundle import read_bundle, run_config
from client.gateway.fleet import Upstream, insist
from client.gateway.incoming import Handed, metadata_of, names, open_message
from client.gateway.outbox import Outbox
from common.canonical import sha256_hex
from common.errors import ClockError, ContractError, FleetError, WardroundError
from common.study import Study

__all__ = ["Inbox", "Run"]

_RUNS = 64

#: Bytes of a message beside its theta.
_BESIDE = 2**20

#: This site's clock may be so many seconds behind the coordinator's: as Flower has it.
_BEHIND_SECONDS = 305.0


@dataclass(frozen=True)
class Run:
    """A run of Flower's: as it came, the SHA-256 of its bundle, and the study that both make."""

    proto: run_pb2.Run
    bundle: str
    study: Study


class Inbox:
    """Messages to this site.

    Parameters
    ----------
    site : Path
        The site's folder.
    out : Outbox
        By which a message that is refused is answered.

    Attributes
    ----------
    runs : dict
        Those that were asked for, by their number.
    """

    def __init__(self, site: Path, out: Outbox) -> None:
        self._site, self._out = site, out
        self.runs: dict[int, Run] = {}
        self._admitted: set[int] = set()

    async def fetch(self, upstream: Upstream, node: int) -> Handed | None:
        """Take the next message for this site, and return it if the node may see it.

        Raises
        ------
        FleetError
            The edge could not be asked.
        """
        ask = fleet_pb2.PullMessagesRequest(node=Node(node_id=node))
        found = await upstream.call(ask, fleet_pb2.PullMessagesResponse)
        if not found.messages_list:
            return None
        proto, study = found.messages_list[0], ""
        try:
            metadata = metadata_of(proto, node)
        except ContractError as error:  # nobody can be answered
            self._out.note(Event(outcome="refused", kind="message", why=error.why))
            return None
        try:
            if len(found.messages_list) != 1 or len(found.message_object_trees) != 1:
                raise ContractError("the coordinator sends one message at a time, with its tree of objects", "tree")
            _must_be_of_now(metadata)
            run = await self._run(upstream, node, metadata.run_id)
            study = run.study.digest
            return await self._take(upstream, node, run, metadata, proto, found.message_object_trees[0])
        except WardroundError as error:
            if isinstance(error, FleetError) and error.status == 403:
                return None  # the run is over
            refusal = error
        except Exception as error:  # whatever it is, the run must not wait for this site
            refusal = WardroundError(f"an unexpected {type(error).__name__}")
        self._out.refuse(metadata, refusal, Event(outcome="refused", kind="message", study=study, run=metadata.run_id))
        return None

    async def _run(self, upstream: Upstream, node: int, number: int) -> Run:
        """Return a run, with the bundle kept and the study known."""
        if number in self.runs:
            return self.runs[number]
        asked = run_pb2.GetRunRequest(node=Node(node_id=node), run_id=number)
        proto = (await insist(upstream, asked, run_pb2.GetRunResponse)).run
        run = run_from_proto(proto)
        want = fab_pb2.GetFabRequest(node=Node(node_id=node), hash_str=run.fab_hash, run_id=number)
        content = (await insist(upstream, want, fab_pb2.GetFabResponse)).fab.content
        if run.run_id != number or sha256_hex(content) != run.fab_hash:
            raise ContractError("the bundle that was sent is not the one that the run names", "bundle")
        note_bundle(self._site, content, _utc())
        study = Study.from_run_config(run_config(read_bundle(content), run.override_config))
        note_study(self._site, study, _utc())
        if len(self.runs) >= _RUNS:
            self.runs.pop(next(iter(self.runs)))
        self.runs[number] = Run(proto, run.fab_hash, study)
        return self.runs[number]

    async def _take(
        self, upstream: Upstream, node: int, run: Run, metadata: Metadata, proto: ProtoMessage, tree: ObjectTree
    ) -> Handed:
        """Take a message's objects, where it may be shown to the node."""
        number = metadata.run_id
        received = message_pb2.ConfirmMessageReceivedRequest(
            node=Node(node_id=node), run_id=number, message_object_id=metadata.message_id
        )
        try:
            must_be_approved(self._site, upstream.member.manifest, run.bundle, run.study, _utc())
        except WardroundError:
            with suppress(FleetError):
                await upstream.call(received, message_pb2.ConfirmMessageReceivedResponse)
            raise
        study, size = approved_study(self._site, run.study.digest)
        objects: dict[str, bytes] = {}
        left = 8 * size + _BESIDE
        for name in names(tree):
            want = message_pb2.PullObjectRequest(node=Node(node_id=node), run_id=number, object_id=name)
            found = await self._object(upstream, want, metadata.created_at + metadata.ttl)
            objects[name] = found.object_content
            left -= len(found.object_content)
            if left < 0:
                raise ContractError("the message has more bytes than any of its study", "size")
        await insist(upstream, received, message_pb2.ConfirmMessageReceivedResponse)
        asked = await asyncio.to_thread(open_message, metadata, objects, study, size)
        if number not in self._admitted:
            self._out.books.write(
                Event(outcome="admitted", kind="code", study=study.digest, digest=run.bundle, run=number)
            )
            self._admitted.add(number)
        return Handed(proto, tree, asked, study, run.bundle, objects)

    async def _object(
        self, upstream: Upstream, want: message_pb2.PullObjectRequest, until: float
    ) -> message_pb2.PullObjectResponse:
        """Fetch an object; one that the ServerApp has announced and is still sending is waited for."""
        pause = 0.1
        while True:
            found = await insist(upstream, want, message_pb2.PullObjectResponse)
            if found.object_available:
                return found
            if not found.object_found or time.time() + pause > until:
                raise ContractError("an object of the message is not there", "object")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2.0)


def _must_be_of_now(metadata: Metadata) -> None:
    """Check that a message was not made at a time that has yet to come."""
    if (ahead := metadata.created_at - time.time()) > _BEHIND_SECONDS:
        raise ClockError(
            f"the message was made {ahead:.0f} s ahead of this site's clock: the coordinator's clock is wrong, or this "
            "one (`wardround-site doctor` says by how much it is apart from the edge's)"
        )


def _utc() -> datetime:
    return datetime.now(UTC)
