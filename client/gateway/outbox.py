"""What has been judged and is to leave: written into the audit log, sent, and tried again while the edge is away."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from flwr.app import Metadata
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node

from client.gateway.audit import Event, Head
from client.gateway.books import Books
from client.gateway.egress import Passed, refusal
from client.gateway.fleet import Upstream, insist
from client.gateway.outgoing import as_flower_sends
from common.errors import FleetError, WardroundError

__all__ = ["Outbox", "push"]

_LONGEST_PAUSE_SECONDS = 20.0


@dataclass(frozen=True)
class _Leaving:
    passed: Passed
    asked: Metadata
    event: Event
    check: Callable[[], None]


class Outbox:
    """Answers on their way out, one after another.

    Parameters
    ----------
    books : Books
        Where everything is written down first.
    push : callable
        Sends an answer; raises `FleetError` where that failed.
    paused : callable
        Whether nothing may leave. What waits then leaves after the pause, if it is still in time.
    say : callable
        Gets a line for the hospital's log.
    """

    def __init__(
        self,
        books: Books,
        push: Callable[[Passed], Awaitable[None]],
        paused: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self.books, self._push, self._paused, self._say = books, push, paused, say
        self._waiting: asyncio.Queue[_Leaving] = asyncio.Queue()

    def send(
        self, passed: Passed, asked: Metadata, study: str, number: int, check: Callable[[], None] = lambda: None
    ) -> None:
        """Let an answer leave that has been judged, and whose bytes are reserved.

        Parameters
        ----------
        passed : Passed
            The answer.
        asked : Metadata
            Of the message that it answers.
        study : str
            Its digest.
        number : int
            The round.
        check : callable
            Called again before the first byte leaves, which can be after a long pause. Raises `WardroundError` where it
            must not leave any more.
        """
        event = Event(
            outcome="sent",
            kind=passed.kind,
            why=f"code-{passed.error}" if passed.error else "",
            study=study,
            digest=passed.root,
            run=asked.run_id,
            round=number,
            size=passed.size,
            norm=passed.norm,
        )
        self._waiting.put_nowait(_Leaving(passed, asked, event, check))

    def error(self, asked: Metadata, code: int, study: str, number: int = 0) -> None:
        """Answer a message with a code."""
        passed = refusal(asked, code, time.time())
        self.books.reserve(study, passed.size, error=True)
        self.send(passed, asked, study, number)

    def refuse(self, asked: Metadata, error: WardroundError, about: Event) -> None:
        """Write down that something was refused, and answer with the error's code."""
        why = getattr(error, "why", "message")
        self._say(f"run {asked.run_id}, round {about.round}: refused ({why}): {error}")
        if self.note(about.model_copy(update={"outcome": "refused", "why": why, "norm": 0.0})):
            self.error(asked, error.code, about.study, about.round)

    def note(self, event: Event) -> bool:
        """Write a line into the audit log; say whether it is on the disk."""
        try:
            self.books.write(event)
        except WardroundError as error:
            self._say(str(error))
            return False
        return True

    async def run(self) -> None:
        """Send what waits, for ever."""
        while True:
            leaving = await self._waiting.get()
            try:
                await self._deliver(leaving)
            except Exception as error:  # the next answer is to leave all the same
                self._say(f"run {leaving.event.run}: an answer was not sent ({type(error).__name__})")
            finally:
                self._waiting.task_done()

    async def finish(self, seconds: float) -> None:
        """Wait until everything has left, but not longer than some seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._waiting.join()

    async def _deliver(self, leaving: _Leaving) -> None:
        written, pause = False, 0.25
        until = leaving.asked.created_at + leaving.asked.ttl
        while time.time() < until:
            if not self._paused():
                try:
                    leaving.check()
                except WardroundError as error:
                    self.refuse(leaving.asked, error, leaving.event)
                    return
                if not written and not self.note(leaving.event):
                    return
                written = True
                try:
                    await self._push(leaving.passed)
                    return
                except FleetError as error:
                    self._say(f"run {leaving.event.run}: {error}")
                    if error.status == 403:
                        return
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)
        self._say(f"run {leaving.event.run}: an answer was not sent in time")


async def push(upstream: Upstream, node: int, passed: Passed, head: Head) -> None:
    """Send an answer as a SuperNode does: the message, then the objects that the SuperLink asks for.

    How long the ClientApp took is not said.

    Parameters
    ----------
    upstream : Upstream
        The way to the edge.
    node : int
        The number of this site's node.
    passed : Passed
        The answer.
    head : Head
        Of the audit log, which has a line for the answer: whoever has seen it finds out if the line is cut off later.

    Raises
    ------
    FleetError
        It was not sent, or not all of it.
    """
    proto, tree = as_flower_sends(passed)
    first = fleet_pb2.PushMessagesRequest(node=Node(node_id=node), messages_list=[proto], message_object_trees=[tree])
    found = await upstream.call(first, fleet_pb2.PushMessagesResponse, str(head))
    kept = True
    for name in found.objects_to_push:
        if name not in passed.objects:
            raise FleetError("the coordinator asks for an object that is not in the answer", 403)
        request = message_pb2.PushObjectRequest(
            node=Node(node_id=node),
            run_id=proto.metadata.run_id,
            object_id=name,
            object_content=passed.objects[name],
            session_id=found.session_id,
        )
        # Each by itself: once the coordinator has looked for the answer, it cannot be announced a second time. One that
        # comes again, because the word that it came was lost, is not kept a second time, and the others must follow.
        kept &= (await insist(upstream, request, message_pb2.PushObjectResponse)).stored
    if not kept:
        raise FleetError("the SuperLink did not keep an object: the answer is sent again")
