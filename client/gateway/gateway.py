"""The gateway: the SuperLink to the site's node, and the node to the consortium's edge.

Messages are taken whole in both directions. One that comes in is fetched, judged (bundle, study, contract), and only
then shown to the node; one that is to leave is collected, judged and written into the audit log before its first byte
goes out. A message that is not let through, either way, is answered by the gateway itself with an error's code, so that
the run goes on without this site.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
from flwr.proto.node_pb2 import Node
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from client.files import write_whole
from client.gateway.approvals import bundle_bytes, must_be_approved
from client.gateway.audit import Event
from client.gateway.books import Books
from client.gateway.cli import audit_path
from client.gateway.egress import Passed, examine, largest
from client.gateway.fleet import CALLS, Upstream
from client.gateway.inbox import Inbox, Run
from client.gateway.incoming import Handed
from client.gateway.outbox import Outbox, push
from client.gateway.outgoing import Outgoing
from client.gateway.switch import paused, prepare_switch
from client.membership.store import identity, joined
from common.errors import EgressError, FleetError, MembershipError, WardroundError

__all__ = ["Gateway", "Settings"]

Found = TypeVar("Found")

#: How long a node that asks for a message waits for the one that is being fetched; Flower asks again every 3 s.
_PATIENCE_SECONDS = 2.0

#: While a run is on, that is, for a time after its last message: a node that asks when there is no message is not
#: answered at once, for it would sleep 3 s. The edge is asked again instead, until there is one or so long.
_RUN_IS_ON_SECONDS, _AGAIN_SECONDS, _HOLD_SECONDS = 60.0, 0.3, 10.0

#: A SuperNode asks for work every 3 s, or after 20 where it was refused. One that has been silent for so long, and has
#: no message to work on, hangs.
_SILENT_SECONDS = 60.0

#: The same message is shown to a node so often.
_TIMES = 3

#: How long a gateway that is to end goes on sending what was judged.
_FINISH_SECONDS = 3.0

#: Messages that a node may have and not have answered. Flower's works on one.
_UNANSWERED = 8

#: Calls per second that cause one to the edge, and how many may come at once.
_RATE, _BURST = 10.0, 40.0


@dataclass(frozen=True)
class Settings:
    """What a gateway is started with.

    Attributes
    ----------
    site : Path
        The site's folder.
    proxy : str or None
        The hospital's HTTP proxy; None as the environment says.
    daily : int
        Bytes that may leave for one study in a day (UTC).
    """

    site: Path
    proxy: str | None
    daily: int


class Gateway:
    """A gateway that is open between ``async with``.

    Parameters
    ----------
    settings : Settings
        What it was started with.
    say : callable
        Gets a line for the hospital's log. Nothing about a patient is in it.

    Raises
    ------
    MembershipError, AuditError, StorageError
        The site is no member, or its audit log cannot be written.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings, self._site, self._say = settings, settings.site, say
        prepare_switch(self._site)
        self._upstreams = [self._connect()]
        books = Books(audit_path(self._site), identity(self._site), settings.daily, _utc)
        self._out = Outbox(books, self._push, lambda: paused(self._site), say)
        self._node = self._known_node()
        self._told = {self._node}
        self._entering = asyncio.Lock()
        self._inbox = Inbox(self._site, self._out)
        self._handed: dict[str, Handed] = {}
        self._outgoing: dict[str, Outgoing] = {}
        self._fetching: asyncio.Task[Handed | None] | None = None
        self._tokens, self._counted = _BURST, time.monotonic()
        self._last = ""
        self._active = -math.inf
        self._asking, self._heard = 0, time.monotonic()
        self._answers: Mapping[str, Callable[[Any], Awaitable[Proto]]] = {
            "register-node": self._register,
            "unregister-node": self._unregister,
            "activate-node": self._activate,
            "deactivate-node": self._deactivate,
            "send-node-heartbeat": self._heartbeat,
            "pull-messages": self._pull_messages,
            "get-run": self._get_run,
            "get-fab": self._get_fab,
            "pull-object": self._pull_object,
            "confirm-message-received": self._confirm,
            "push-messages": self._push_messages,
            "push-object": self._push_object,
        }

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._out.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._out.finish(_FINISH_SECONDS)
        for task in (self._worker, self._fetching):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, WardroundError):
                    await task
        for upstream in self._upstreams:
            await upstream.close()
        self._out.books.close()

    def health(self) -> bool:
        """Say whether the gateway works: its audit log can be written. One that is paused does what it was told to."""
        return not self._out.books.broken

    def node_works(self) -> bool:
        """Say whether the node asks for work or has some; heartbeats do not count.

        It has some from the message that it took until it announces the answer, and not longer than the message lasts.
        From then on it hands over part after part.
        """
        at_work = [handed.until for question, handed in self._handed.items() if question not in self._outgoing]
        silent = min(time.monotonic() - self._heard, time.time() - max(at_work, default=-math.inf))
        return self._asking > 0 or silent < _SILENT_SECONDS

    async def answer(self, name: str, body: bytes, gone: Callable[[], Awaitable[bool]] | None = None) -> bytes:
        """Return the answer to a call of the node's.

        Parameters
        ----------
        name, body
            The call.
        gone : callable
            Says whether the node has hung up: then nothing is fetched for it any more.

        Raises
        ------
        FleetError
            It is not answered; its status says what the node should do.
        """
        if name not in CALLS:
            raise FleetError("refused: the gateway answers Flower's fleet calls and nothing else", 403)
        try:
            request = CALLS[name].request.FromString(body)
        except DecodeError:
            raise FleetError("refused: the call is not one of Flower's", 400) from None
        with self._hearing(name):
            return await self._answer(name, request, gone)

    async def _answer(self, name: str, request: Proto, gone: Callable[[], Awaitable[bool]] | None) -> bytes:
        if name not in ("pull-object", "push-object"):
            self._slow_down()
        try:
            answer = await self._answers[name](request)
            until = time.monotonic() + _HOLD_SECONDS
            while name == "pull-messages" and not answer.messages_list and self._run_is_on():
                await asyncio.sleep(_AGAIN_SECONDS)
                if time.monotonic() > until or (gone is not None and await gone()):
                    break
                answer = await self._pull_messages(request)
        except WardroundError as error:
            if str(error) != self._last:  # a node asks again and again
                self._last = str(error)
                self._say(self._last)
            raise
        data: bytes = answer.SerializeToString()
        return data

    @contextmanager
    def _hearing(self, name: str) -> Iterator[None]:
        """Note when the node asks for something, and how long it has to wait."""
        asks = name != "send-node-heartbeat"
        self._asking += asks
        try:
            yield
        finally:
            self._asking -= asks
            self._heard = time.monotonic() if asks else self._heard

    # What the node asks about itself.

    async def _register(self, _: Proto) -> Proto:
        return fleet_pb2.RegisterNodeFleetResponse()

    async def _unregister(self, _: Proto) -> Proto:
        return fleet_pb2.UnregisterNodeFleetResponse()

    async def _activate(self, _: Proto) -> Proto:
        upstream = self._refreshed()
        self._forget()
        for handed in list(self._handed.values()):  # a node that starts has forgotten them
            self._give_up(handed, "node-restarted")
        if self._node is not None:
            # Flower takes a node for alive that ended without a word, and would not let it in again for a minute.
            with suppress(FleetError):
                gone = fleet_pb2.DeactivateNodeRequest(node_id=self._node)
                await upstream.call(gone, fleet_pb2.DeactivateNodeResponse)
        node = await self._enter(upstream)
        self._told = {node}
        return fleet_pb2.ActivateNodeResponse(node_id=node)

    async def _enter(self, upstream: Upstream) -> int:
        """Let the node in at the SuperLink, and return its number there."""
        request = fleet_pb2.ActivateNodeRequest(
            public_key=upstream.member.member.node.encode(), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        try:
            found = await upstream.call(request, fleet_pb2.ActivateNodeResponse)
        except FleetError as error:
            raise FleetError(str(error)) from None
        self._node = found.node_id
        write_whole(self._site / "gateway" / "node", str(self._node).encode(), 0o600)
        self._say(f"the node is number {self._node} at {upstream.member.manifest.edge}")
        return self._node

    async def _as_node(self, act: Callable[[Upstream, int], Awaitable[Found]]) -> Found:
        """Do something as this site's node; one that the SuperLink does not know is let in first.

        With new keys a node has a new number, and so it has where the SuperLink's database is a new one. The SuperNode
        goes on with the number that it was told when it started.
        """
        upstream, node = self._refreshed(), self._node or 0
        try:
            return await act(upstream, node)
        except FleetError as error:
            if not error.stranger:
                raise
        async with self._entering:
            if self._node == node:  # nobody else did it in the meantime
                await self._enter(upstream)
        return await act(upstream, self._node or 0)

    async def _deactivate(self, request: fleet_pb2.DeactivateNodeRequest) -> Proto:
        self._must_be_mine(request.node_id)
        for handed in list(self._handed.values()):
            self._give_up(handed, "node-stopped")
        return await self._upstreams[-1].call(
            fleet_pb2.DeactivateNodeRequest(node_id=self._node or 0), fleet_pb2.DeactivateNodeResponse
        )

    async def _heartbeat(self, request: heartbeat_pb2.SendNodeHeartbeatRequest) -> Proto:
        self._must_be_mine(request.node.node_id)

        async def beat(upstream: Upstream, node: int) -> heartbeat_pb2.SendNodeHeartbeatResponse:
            sent = heartbeat_pb2.SendNodeHeartbeatRequest(
                node=Node(node_id=node), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
            )
            return await upstream.call(sent, heartbeat_pb2.SendNodeHeartbeatResponse)

        try:
            return await self._as_node(beat)
        except FleetError as error:
            # After any status but this one the SuperNode never sends a heartbeat again, also when the edge lets it in.
            raise FleetError(str(error)) from None

    # What comes in.

    async def _pull_messages(self, request: fleet_pb2.PullMessagesRequest) -> Proto:
        self._must_be_mine(request.node.node_id)
        self._forget()
        if self._waiting() is None and len(self._handed) < _UNANSWERED:
            if self._fetching is None:
                self._fetching = asyncio.create_task(self._as_node(self._inbox.fetch))
            fetching = self._fetching
            await asyncio.wait({fetching}, timeout=_PATIENCE_SECONDS)
            if fetching.done() and self._fetching is fetching:
                self._fetching = None
                if handed := fetching.result():
                    self._handed[handed.asked.metadata.message_id] = handed
        handed = self._waiting()
        if handed is None:
            return fleet_pb2.PullMessagesResponse()
        handed.times += 1
        self._active = time.monotonic()
        return fleet_pb2.PullMessagesResponse(messages_list=[handed.proto], message_object_trees=[handed.tree])

    async def _get_run(self, request: run_pb2.GetRunRequest) -> Proto:
        return run_pb2.GetRunResponse(run=self._run_of_node(request.run_id).proto)

    async def _get_fab(self, request: fab_pb2.GetFabRequest) -> Proto:
        run = self._run_of_node(request.run_id)
        if request.hash_str != run.bundle:
            raise FleetError("refused: this is not the bundle of the run", 403)
        content = bundle_bytes(self._site, run.bundle)
        return fab_pb2.GetFabResponse(fab=fab_pb2.Fab(hash_str=run.bundle, content=content))

    async def _pull_object(self, request: message_pb2.PullObjectRequest) -> Proto:
        for handed in self._handed.values():
            if handed.asked.metadata.run_id == request.run_id and request.object_id in handed.objects:
                content = handed.objects[request.object_id]
                return message_pb2.PullObjectResponse(object_found=True, object_available=True, object_content=content)
        return message_pb2.PullObjectResponse()

    async def _confirm(self, request: message_pb2.ConfirmMessageReceivedRequest) -> Proto:
        if handed := self._handed.get(request.message_object_id):
            handed.confirmed = True
            handed.objects.clear()
        return message_pb2.ConfirmMessageReceivedResponse()

    def _run_is_on(self) -> bool:
        return time.monotonic() < self._active + _RUN_IS_ON_SECONDS

    def _waiting(self) -> Handed | None:
        """Return the message that the node has not taken yet."""
        for handed in list(self._handed.values()):
            if not handed.confirmed:
                if handed.times < _TIMES:
                    return handed
                self._give_up(handed, "not-taken")
        return None

    def _forget(self) -> None:
        now = time.time()
        for handed in [handed for handed in self._handed.values() if handed.until < now]:
            self._done(handed)

    def _run_of_node(self, number: int) -> Run:
        if not any(handed.asked.metadata.run_id == number for handed in self._handed.values()):
            raise FleetError("refused: no message of this run was handed to this node", 403)
        return self._inbox.runs[number]

    # What is to leave.

    async def _push_messages(self, request: fleet_pb2.PushMessagesRequest) -> Proto:
        self._must_be_mine(request.node.node_id)
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise FleetError("refused: one message at a time, with its tree of objects", 400)
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        handed = self._handed.get(metadata.reply_to_message_id)
        if handed is None:
            self._out.note(Event(outcome="refused", kind="message", why="unasked"))
            raise FleetError("refused: this answers no message that waits for an answer", 403)
        question = handed.asked.metadata.message_id
        collected = self._outgoing.get(question)
        try:
            if collected is None:
                collected = Outgoing(metadata.message_id, tree, largest(handed.study, handed.asked))
                self._outgoing[question] = collected
            elif collected.root != metadata.message_id:
                raise EgressError("a message has one answer", "second-answer")
        except EgressError as error:
            self._refuse(handed, error)
            raise FleetError(f"refused: {error}", 403) from None
        return fleet_pb2.PushMessagesResponse(
            objects_to_push=sorted(collected.missing), session_id=collected.session, results={collected.root: 0}
        )

    async def _push_object(self, request: message_pb2.PushObjectRequest) -> Proto:
        found = [one for one in self._outgoing.items() if one[1].session == request.session_id]
        if not found:
            return message_pb2.PushObjectResponse(stored=False)
        question, collected = found[0]
        handed = self._handed[question]
        try:
            stored = collected.add(request.session_id, request.object_id, request.object_content)
        except EgressError as error:
            self._refuse(handed, error)
            return message_pb2.PushObjectResponse(stored=False)
        if not collected.missing:
            stored = await self._judge(handed, collected)
        return message_pb2.PushObjectResponse(stored=stored)

    async def _judge(self, handed: Handed, collected: Outgoing) -> bool:
        """Decide about a whole answer; say whether it leaves."""
        self._done(handed)
        asked, study = handed.asked, handed.study

        def must_be_approved_still() -> None:
            must_be_approved(self._site, self._upstreams[-1].member.manifest, handed.bundle, study, _utc())

        try:
            passed = await asyncio.to_thread(examine, study, asked, collected.root, collected.objects, time.time())
            self._out.books.reserve(study.digest, passed.size, error=bool(passed.error))
        except EgressError as error:
            self._refuse(handed, error, collected)
            return False
        self._out.send(passed, asked.metadata, study.digest, asked.instruction.round, must_be_approved_still)
        return True

    def _refuse(self, handed: Handed, error: EgressError, collected: Outgoing | None = None) -> None:
        asked = handed.asked
        self._done(handed)
        about = Event(
            outcome="refused",
            kind=asked.instruction.kind,
            study=handed.study.digest,
            digest=collected.root if collected else "",
            run=asked.metadata.run_id,
            round=asked.instruction.round,
            size=sum(map(len, collected.objects.values())) if collected else 0,
        )
        self._out.refuse(asked.metadata, error, about)

    def _give_up(self, handed: Handed, why: str) -> None:
        """Answer for a node that will not."""
        self._done(handed)
        asked = handed.asked
        self._say(f"run {asked.metadata.run_id}: the node does not answer a message ({why})")
        self._out.error(asked.metadata, ErrorCode.NODE_UNAVAILABLE, handed.study.digest, asked.instruction.round)

    def _done(self, handed: Handed) -> None:
        question = handed.asked.metadata.message_id
        self._handed.pop(question, None)
        self._outgoing.pop(question, None)
        self._active = time.monotonic()

    # The way out.

    async def _push(self, passed: Passed) -> None:
        await self._as_node(lambda upstream, node: push(upstream, node, passed, self._out.books.head))

    def _connect(self) -> Upstream:
        member = joined(self._site, _utc())
        return Upstream(member, self._settings.proxy, lambda: paused(self._site))

    def _refreshed(self) -> Upstream:
        """Return the way out, with the keys, certificate and manifest that the site has now."""
        try:
            member = joined(self._site, _utc())
            if member.kit != self._upstreams[-1].member.kit:
                self._upstreams.append(self._connect())
                self._say(f"manifest epoch {member.manifest.epoch}: keys and certificate were read anew")
        except MembershipError as error:
            raise FleetError(str(error)) from None
        return self._upstreams[-1]

    def _must_be_mine(self, node: int) -> None:
        """Check that a number is one that this site's node was told."""
        if node not in self._told:
            raise FleetError("refused: this is not the number of this site's node: start the SuperNode anew", 401)

    def _known_node(self) -> int | None:
        with suppress(OSError, ValueError):
            return int((self._site / "gateway" / "node").read_text())
        return None

    def _slow_down(self) -> None:
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + _RATE * (now - self._counted))
        self._counted = now
        if self._tokens < 1:
            raise FleetError("too many calls: the gateway takes some per second")
        self._tokens -= 1


def _utc() -> datetime:
    return datetime.now(UTC)
