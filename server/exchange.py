"""One exchange with the sites: ask each, wait until a deadline, check every reply before it counts."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.contract import Instruction, Reply, check_reply
from common.errors import ContractError, explain

__all__ = ["Answer", "Refusal", "exchange"]

_TYPES = {"join": "query.join", "train": "train", "evaluate": "evaluate"}

# Sites asked at once: bounds the server's memory, and no real consortium is larger.
_WINDOW = 64
# The first look for replies comes at once, later ones less and less often: a poll is a request over the network.
_FIRST_POLL_SECONDS = 0.005
_LAST_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Answer:
    """A site's reply that passed the contract."""

    site: str
    reply: Reply


@dataclass(frozen=True)
class Refusal:
    """Why a site does not count: an error code and what it means."""

    site: str
    code: int
    reason: str


def exchange(
    grid: Grid,
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
        How long to wait for the sites of one window, by a monotonic clock.
    """
    sites = list(nodes.items())
    for window in (sites[i : i + _WINDOW] for i in range(0, len(sites), _WINDOW)):
        ids = list(grid.push_messages([Message(content, node, _TYPES[instruction.kind]) for _, node in window]))
        # Flower gives no id for a message that it cannot pass on, and no ids at all where they are too large for it.
        asked = zip(ids or [""] * len(window), window, strict=True)
        waiting = {message_id or f"unsent {site}": site for message_id, (site, _) in asked}
        unsent = set(waiting) - set(ids)
        replies: dict[str, Message] = {}
        deadline = time.monotonic() + seconds
        pause = _FIRST_POLL_SECONDS
        while waiting:
            # Failures of Flower's own come from node 1, so a reply is known by what it answers.
            new = {m.metadata.reply_to_message_id: m for m in grid.pull_messages(set(waiting) - set(replies) - unsent)}
            replies |= new
            late = time.monotonic() >= deadline
            for message_id, site in list(waiting.items()):  # in order; what came early waits for its turn
                if message_id not in replies and message_id not in unsent and not late:
                    break
                del waiting[message_id]
                if message_id in unsent:
                    yield Refusal(site, 0, "Flower could not send the message: the site has left, or it is too large")
                    continue
                yield _judge(site, replies.pop(message_id, None), instruction, size, dtype)
            if not new and waiting:
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(1.1 * pause, _LAST_POLL_SECONDS)


def _judge(site: str, message: Message | None, instruction: Instruction, size: int, dtype: str) -> Answer | Refusal:
    if message is None:
        return Refusal(site, 0, "no reply before the deadline")
    if message.has_error():
        # Of the sender's own words only the number under which a site wrote the incident down is taken.
        incident = re.fullmatch(r"incident [0-9a-f]{8}", message.error.reason or "")
        reason = explain(message.error.code) + (f" ({incident[0]})" if incident else "")
        return Refusal(site, message.error.code, reason)
    try:
        return Answer(site, check_reply(message.content, instruction, size=size, dtype=dtype))
    except ContractError as error:
        return Refusal(site, error.code, str(error))
