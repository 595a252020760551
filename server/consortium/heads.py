"""Heads of the sites' audit logs, as the edge saw them: a site that cuts or rewrites its log contradicts one of them.

With every answer the gateway says the number and the hash of the last line that is on its disk. nginx writes that into
its log, and here it is kept for good, one line a head: an earlier head has to be a line of every later log.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.canonical import canonical_json
from common.errors import AuditError
from server.files import flush

__all__ = ["Head", "contradictions", "heads_in", "keep", "kept"]

_HEAD = re.compile(r"([0-9]{1,15}):([0-9a-f]{64})")


@dataclass(frozen=True)
class Head:
    """The last line of a site's audit log, when an answer left.

    Attributes
    ----------
    site : str
        By its certificate.
    at : str
        When the edge saw it.
    seq, digest
        The line's number and its SHA-256.
    """

    site: str
    at: str
    seq: int
    digest: str

    def __str__(self) -> str:
        """Return the head as `wardround-site audit verify` takes it."""
        return f"{self.seq}:{self.digest}"


def heads_in(log: Iterable[bytes]) -> Iterator[Head]:
    """Yield the heads in the lines of the edge's ``access.log``; what has none, or is no such line, is passed over."""
    for line in log:
        try:
            call = json.loads(line)
            match = _HEAD.fullmatch(call["head"])
            if match and call["site"]:
                yield Head(str(call["site"]), str(call["time"]), int(match[1]), match[2])
        except (ValueError, KeyError, TypeError):  # half a line, or one of an older version
            continue


def kept(path: Path) -> list[Head]:
    """Return all heads that were kept, in the order in which they came.

    Raises
    ------
    AuditError
        The file was damaged.
    """
    try:
        return [Head(**json.loads(line)) for line in path.read_bytes().splitlines()]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise AuditError(f"{path} was damaged: put back the last good copy, and read the edge's logs again") from None


def keep(path: Path, seen: Iterable[Head]) -> list[Head]:
    """Add heads to those that are kept, durably, each once; return all of them.

    Raises
    ------
    AuditError
        As `kept` raises it.
    """
    known = kept(path)
    there = {(head.site, head.seq, head.digest) for head in known}
    new = []
    for head in seen:
        if (head.site, head.seq, head.digest) not in there:
            there.add((head.site, head.seq, head.digest))
            new.append(head)
    with path.open("ab") as file:
        file.write(b"".join(canonical_json(asdict(head)) + b"\n" for head in new))
    flush(path)
    return [*known, *new]


def contradictions(heads: Sequence[Head]) -> list[str]:
    """Say in a sentence each where one site's heads cannot be of one log: they went back, or a line is another one.

    Parameters
    ----------
    heads : sequence of Head
        Of any sites, in the order in which they came.
    """
    found = []
    last: dict[str, Head] = {}
    for head in heads:
        before = last.get(head.site)
        if before and head.seq <= before.seq:
            found.append(
                f"{head.site}: line {head.seq} came on {head.at}, after line {before.seq} on {before.at}: "
                "its audit log was cut, rewritten, or replaced by an older one"
            )
        last[head.site] = head
    return found
