"""The audit log: one line for each thing that left this site or was refused. Lines are chained and signed.

Every line holds the SHA-256 of the line before it and is signed with the site's identity, so that a change, a deletion
or another order is found. That lines were cut from the end is found by whoever has seen a later head: the number and
hash of a line. The log is written before anything is let out; where it cannot be written, nothing may be.
"""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from client.files import flush_folder
from common.canonical import canonical_json, sha256_hex
from common.errors import AuditError, SignatureError, StorageError
from common.signing import public_pem, sign, verify

__all__ = ["AuditLog", "Entry", "Event", "Head", "check", "read_lines"]

_PURPOSE = "audit"

#: Longest line that is read, in bytes; those that are written have some hundred.
_LONGEST = 4096

Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
Hex = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Event(_Strict):
    """Something that left, was let in, or was refused. There is no room for text: nothing about a patient can be in it.

    Attributes
    ----------
    outcome : {"sent", "refused", "admitted", "repaired"}
        ``admitted``: a bundle was handed to the node. ``repaired``: the process was killed while it wrote a line; what
        it had written of it was removed.
    kind : str
        What it was, in a word: ``train``, ``evaluate``, ``join``, ``error``, ``code``.
    why : str
        The reason of a refusal in a word.
    study, digest : str
        Digest of the study, and of what was to leave; empty where there is none.
    run, round, size : int
        Flower's run, the round, and the number of bytes.
    norm : float
        Euclidean norm of the vector in it.
    """

    outcome: Literal["sent", "refused", "admitted", "repaired"]
    kind: Word
    why: Word | Literal[""] = ""
    study: Hex = ""
    digest: Hex = ""
    run: Annotated[int, Field(ge=0, lt=2**64)] = 0
    round: Annotated[int, Field(ge=0, lt=2**31)] = 0
    size: Annotated[int, Field(ge=0, lt=2**53)] = 0
    norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class Entry(_Strict):
    """One line of the log.

    Attributes
    ----------
    seq : int
        Counted from 1.
    at : str
        When, in UTC.
    previous : str
        SHA-256 of the line before; of the identity's public key for the first.
    """

    seq: Annotated[int, Field(ge=1)]
    at: Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}[.][0-9]{6}Z$")]
    event: Event
    previous: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")] = "0" * 128

    def line(self) -> bytes:
        """Return the one text of this entry, without the line's end."""
        return canonical_json(self.model_dump())

    def unsigned(self) -> dict[str, object]:
        """Return what the signature is made over."""
        return self.model_dump(exclude={"signature"})


@dataclass(frozen=True)
class Head:
    """The last line of a log: its number and its SHA-256. Written ``17:9f3c...``."""

    seq: int
    digest: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a head.

        Raises
        ------
        AuditError
            The text is not one.
        """
        match = re.fullmatch(r"([0-9]{1,15}):([0-9a-f]{64})", text.strip())
        if match is None:
            raise AuditError("a head is written NUMBER:SHA256, as `wardround-site audit verify` prints it", "head")
        return cls(int(match[1]), match[2])


def _first(key: Ed25519PublicKey) -> Head:
    return Head(0, sha256_hex(public_pem(key)))


class AuditLog:
    """A log that is open for writing, by one process at a time.

    Parameters
    ----------
    path : Path
        The log's file; made where there is none.
    key : Ed25519PrivateKey
        The site's identity.
    now : datetime
        The time, for the case that an unfinished line must be removed.

    Raises
    ------
    AuditError
        Another process writes there, or the last line is not this site's.
    StorageError
        The file cannot be opened or made.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey, now: datetime) -> None:
        self._key, self._broken = key, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _no_log(error) from None
        try:
            self._open(path, now)
        except BaseException:
            os.close(self._file)
            raise

    def _open(self, path: Path, now: datetime) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AuditError("another process writes this audit log: there can be one gateway only", "busy") from None
        try:
            flush_folder(path.parent)
            self._end, last = _tail(self._file)
            torn = os.fstat(self._file).st_size != self._end
            if torn:
                os.ftruncate(self._file, self._end)
        except OSError as error:
            raise _no_log(error) from None
        public = self._key.public_key()
        self._head = _first(public)
        if last:
            entry = _parse(last, 0)
            _must_be_signed(entry, public, entry.seq)
            self._head = Head(entry.seq, sha256_hex(last))
        if torn:
            self.append(Event(outcome="repaired", kind="line"), now)

    @property
    def head(self) -> Head:
        """The last line that is on the disk."""
        return self._head

    def append(self, event: Event, now: datetime) -> Head:
        """Write a line and flush it to the disk. Only then may what it is about go out.

        Raises
        ------
        StorageError
            The line is not safely on the disk. Nothing more is written until the log is opened anew.
        """
        if self._broken:
            raise StorageError("the audit log could not be written before: nothing leaves until it is opened anew")
        entry = Entry(
            seq=self._head.seq + 1, at=f"{now:%Y-%m-%dT%H:%M:%S.%f}Z", event=event, previous=self._head.digest
        )
        line = entry.model_copy(update={"signature": sign(self._key, _PURPOSE, entry.unsigned()).hex()}).line()
        data = line + b"\n"
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            # A flush that failed once says nothing the second time: what is on the disk is known after opening anew.
            self._broken = True
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise _no_log(error) from None
        self._end += len(data)
        self._head = Head(entry.seq, sha256_hex(line))
        return self._head

    def close(self) -> None:
        """Let another process write."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: Path) -> tuple[list[bytes], bool]:
    """Return a log's lines, and whether an unfinished one follows.

    Raises
    ------
    StorageError
        There is no log, or it cannot be read.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise _no_log(error) from None
    return lines, bool(rest)


def check(
    lines: Iterable[bytes], key: Ed25519PublicKey, witnessed: Iterable[Head] = ()
) -> Iterator[tuple[Entry, Head]]:
    """Yield the entries of a log, each with the head that it makes, as far as they hold.

    Parameters
    ----------
    lines : iterable of bytes
        Without their ends.
    key : Ed25519PublicKey
        The site's identity.
    witnessed : iterable of Head
        Heads that somebody else has seen.

    Raises
    ------
    AuditError
        A line was changed, left out, moved or made by somebody else, or the log ends before a head that was seen.
    """
    head = _first(key)
    seen: dict[int, str] = {}
    for one in witnessed:
        if seen.setdefault(one.seq, one.digest) != one.digest:
            raise AuditError(f"two different heads were seen for line {one.seq}: the log was rewritten", "rewritten")
    for line in lines:
        entry = _parse(line, head.seq + 1)
        if entry.seq != head.seq + 1 or entry.previous != head.digest:
            raise AuditError(
                f"line {head.seq + 1} does not follow the one before it: a line was changed, left out or moved", "chain"
            )
        _must_be_signed(entry, key, entry.seq)
        head = Head(entry.seq, sha256_hex(line))
        if seen.pop(head.seq, head.digest) != head.digest:
            raise AuditError(f"line {head.seq} is not the one that was seen: the log was rewritten", "rewritten")
        yield entry, head
    seen.pop(0, None)
    if seen:
        raise AuditError(
            f"the log ends at line {head.seq}, and line {max(seen)} was seen: lines were cut from its end", "cut"
        )


def _must_be_signed(entry: Entry, key: Ed25519PublicKey, number: int) -> None:
    try:
        verify(key, _PURPOSE, entry.unsigned(), bytes.fromhex(entry.signature))
    except SignatureError:
        raise AuditError(f"line {number} was not signed by this site, or was changed", "signature") from None


def _parse(line: bytes, number: int) -> Entry:
    try:
        entry = Entry.model_validate_json(line)
        if len(line) <= _LONGEST and entry.line() == line:
            return entry
    except (ValidationError, ValueError):
        pass
    where = f"line {number}" if number else "the last line"
    raise AuditError(f"{where} is not a line of an audit log, or was changed", "format")


def _tail(file: int) -> tuple[int, bytes]:
    """Return where the last whole line ends, and that line; empty where there is none."""
    size = os.fstat(file).st_size
    start = max(0, size - 2 * _LONGEST)
    data = os.pread(file, size - start, start)
    end = data.rfind(b"\n") + 1
    if not end:
        if start:
            raise AuditError("the end of the log is not a line of an audit log", "format")
        return 0, b""
    return start + end, data[data.rfind(b"\n", 0, end - 1) + 1 : end - 1]


def _no_log(error: OSError) -> StorageError:
    return StorageError(
        f"the audit log cannot be written or read ({error.strerror}): nothing leaves this site before it can"
    )
