"""Messages to the sites and back: ask each, wait until a deadline, check every reply before it counts."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import islice

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.contract import Instruction, Reply, check_reply
from common.errors import ContractError, explain
from server.patience import parts_until

__all__ = ["Answer", "Exchange", "Note", "Refusal"]

_TYPES = {"join": "query.join", "train": "train", "evaluate": "evaluate"}

# Messages handed to Flower at once: one request holds them all.
_WINDOW = 64
# Replies that may lie here before it is their turn: with the one in hand, all the vectors that memory holds.
_AHEAD = 8
# The first look for replies comes at once, later ones less and less often: a look is a request over the network, and
# costs the SuperLink about 10 ms.
_FIRST_POLL_SECONDS = 0.005
_SOON_POLL_SECONDS = 0.2
_LAST_POLL_SECONDS = 1.0
# A clock that is further behind is wrong.
_BEHIND_SECONDS = 5.0

#: Called with what happens besides answers: an event's name and what is known of it.
Note = Callable[..., None]


@dataclass(frozen=True)
class Answer:
    """A site's reply that passed the contract."""

    site: str
    reply: Reply


@dataclass(frozen=True)
class Refusal:
    """Why a site does not count: an error code, a word for the kind of reason, and a sentence."""

    site: str
    code: int
    why: str
    reason: str


@dataclass(frozen=True)
class _Asked:
    """A message that no reply was taken for, and until when one is looked for."""

    site: str
    instruction: Instruction
    until: float


class Exchange:
    """All messages of one run.

    A reply counts for the one message that it answers, once. One that comes after its deadline, or again, is noted and
    dropped, and so is one that nobody asked for.

    Parameters
    ----------
    grid : Grid
        Flower's, or one that behaves like it.
    note : Note
        Gets ``late``, ``duplicate`` and ``unasked`` replies.

    Attributes
    ----------
    transport_seconds, waiting_seconds : float
        Time spent so far in Flower's calls, and for sites: in pauses between the calls, and while sites computed inside
        of one.
    """

    def __init__(self, grid: Grid, note: Note = lambda *_, **__: None) -> None:
        self.grid, self._note = grid, note
        self.transport_seconds = self.waiting_seconds = 0.0
        self._late: dict[str, _Asked] = {}

    def ask(
        self,
        nodes: Mapping[str, int],
        instruction: Instruction,
        content: RecordDict,
        *,
        size: int,
        dtype: str,
        seconds: float,
    ) -> Iterator[Answer | Refusal]:
        """Ask some sites and yield what became of each, in the order of ``nodes``.

        Parameters
        ----------
        nodes : mapping
            Site names and Flower node ids, in the order in which results are wanted.
        instruction, content
            What is asked, and the message's content; all sites get the same.
        size, dtype
            The vector that a training reply must hold.
        seconds : float
            How long to wait for all of them, by a monotonic clock.
        """
        sent = self._push(nodes, instruction, content, seconds)
        waiting = dict(sent)
        until = time.monotonic() + seconds
        held: dict[str, Message | ContractError] = {}
        pause = _FIRST_POLL_SECONDS
        while waiting:
            late, came = time.monotonic() >= until, False
            for message_id in list(waiting if late else islice(waiting, _AHEAD)):
                if message_id not in waiting:
                    continue
                came |= message_id not in held and self._pull(message_id, instruction, sent, waiting, held, until)
                # In order: what came early waits for its turn, and at the end of time whose turn it is has had it.
                while waiting and ((first := next(iter(waiting))) in held or (late and first == message_id)):
                    site = waiting.pop(first)
                    if first not in held:  # Flower delivers for as long again: `ttl` below
                        self._late[first] = _Asked(site, instruction, until + seconds)
                    yield _judge(site, held.pop(first, None), instruction, size, dtype)
            if waiting and not came:
                rest = min(pause, max(0.0, until - time.monotonic()))
                time.sleep(rest)
                self.waiting_seconds += rest
                # Twice as long each time, then a tenth of what was waited already.
                waited = seconds - (until - time.monotonic())
                pause = min(2 * pause, max(_SOON_POLL_SECONDS, waited / 10), _LAST_POLL_SECONDS)
        self._collect_late()

    def _push(
        self, nodes: Mapping[str, int], instruction: Instruction, content: RecordDict, seconds: float
    ) -> dict[str, str]:
        """Send the messages and return the sites by message id, in their order."""
        sent: dict[str, str] = {}
        sites = list(nodes.items())
        for window in (sites[i : i + _WINDOW] for i in range(0, len(sites), _WINDOW)):
            clock = time.time() - time.monotonic()  # the messages' own, should the time be set while they are sent
            messages = [Message(content, node, _TYPES[instruction.kind], ttl=2 * seconds) for _, node in window]
            try:
                with self._transport():
                    ids = list(self.grid.push_messages(messages))
            except httpx.HTTPStatusError as error:
                if not _is_behind(error.response, clock + time.monotonic()):
                    raise
                ids = []
            # Flower gives no id for a message that it cannot pass on, and no ids at all where they are too large.
            for message_id, (site, _) in zip(ids or [""] * len(window), window, strict=True):
                sent[message_id or f"{_UNSENT}{site}"] = site
        return sent

    def _pull(
        self,
        message_id: str,
        instruction: Instruction,
        sent: Mapping[str, str],
        waiting: Mapping[str, str],
        held: dict[str, Message | ContractError],
        until: float,
    ) -> bool:
        """Look for one message's reply; keep it where it answers one that waits. Return whether anything came.

        One id at a time: Flower inflates all replies that it finds, and one that cannot be inflated would take the
        others with it.
        """
        if message_id.startswith(_UNSENT):
            held[message_id] = ContractError(
                "Flower could not send the message: the site has left, it is too large, or this machine's clock is "
                "behind the SuperLink's",
                "unsent",
            )
            return True
        with self._transport(), parts_until(until):
            try:
                replies = list(self.grid.pull_messages([message_id]))
            except (httpx.HTTPError, ConnectionError):
                raise  # the coordinator's own Flower is gone, which is no site's fault
            except Exception as error:
                held[message_id] = ContractError(f"the reply cannot be read ({type(error).__name__})", "unreadable")
                return True
        for message in replies:
            # Failures of Flower's own come from node 1, so a reply is known by what it answers.
            answers = message.metadata.reply_to_message_id
            if answers in waiting and answers not in held:
                held[answers] = message
            elif asked := self._late.pop(answers, None):
                self._note_of("late", asked.site, asked.instruction)
            elif answers in sent:
                self._note_of("duplicate", sent[answers], instruction)
            else:
                self._note_of("unasked", "", instruction)
        return bool(replies)

    def _collect_late(self) -> None:
        """Take replies of earlier messages off Flower, note them and drop them; give up on the old ones."""
        for message_id, asked in list(self._late.items()):
            if message_id in self._late:
                self._pull(message_id, asked.instruction, {}, {}, {}, 0.0)
            if asked.until < time.monotonic():
                self._late.pop(message_id, None)

    def _note_of(self, event: str, site: str, instruction: Instruction) -> None:
        about = {"kind": instruction.kind, "round": instruction.round, "attempt": instruction.attempt}
        self._note(event, site=site, **about)

    @contextmanager
    def _transport(self) -> Iterator[None]:
        began, computed = time.monotonic(), self._computed()
        try:
            yield
        finally:
            at_sites = self._computed() - computed
            self.waiting_seconds += at_sites
            self.transport_seconds += time.monotonic() - began - at_sites

    def _computed(self) -> float:
        """Return how long sites have computed inside of calls to the grid, as in a simulation in one process."""
        return float(getattr(self.grid, "computing_seconds", 0.0))


_UNSENT = "unsent "


def _is_behind(flower: httpx.Response, ours: float) -> bool:
    """Say whether our time is behind the SuperLink's: for that, a message may be over when it is sent."""
    try:
        theirs = parsedate_to_datetime(flower.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return False
    return theirs - ours > _BEHIND_SECONDS


def _judge(
    site: str, message: Message | ContractError | None, instruction: Instruction, size: int, dtype: str
) -> Answer | Refusal:
    if message is None:
        return Refusal(site, 0, "no-reply", "no reply before the deadline")
    if isinstance(message, ContractError):
        return Refusal(site, 0, message.why, str(message))
    if message.has_error():
        # Of the sender's own words only the number under which a site wrote the incident down is taken.
        incident = re.fullmatch(r"incident [0-9a-f]{8}", message.error.reason or "")
        reason = explain(message.error.code) + (f" ({incident[0]})" if incident else "")
        return Refusal(site, message.error.code, "error", reason)
    try:
        return Answer(site, check_reply(message.content, instruction, size=size, dtype=dtype))
    except ContractError as error:
        return Refusal(site, error.code, error.why, str(error))
