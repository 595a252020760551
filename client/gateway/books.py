"""The audit log of a running gateway, and how much of a day's bytes each study has left."""

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client.gateway.audit import AuditLog, Entry, Event, read_lines
from common.errors import AuditError, EgressError, StorageError

__all__ = ["Books"]


class Books:
    """What left, written down before it leaves.

    Parameters
    ----------
    path : Path
        The audit log.
    key : Ed25519PrivateKey
        The site's identity.
    daily : int
        Bytes that may leave for one study in a day (UTC). Answers that are errors count and always may.
    clock : callable
        The time, in UTC.

    Attributes
    ----------
    head : Head
        The last line that is on the disk.

    Raises
    ------
    AuditError, StorageError
        As `client.gateway.audit.AuditLog` raises them.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey, daily: int, clock: Callable[[], datetime]) -> None:
        self._path, self._key, self._daily, self._clock = path, key, daily, clock
        self._log: AuditLog | None = AuditLog(path, key, clock())
        self.head = self._log.head
        self._sent: Counter[tuple[str, str]] = Counter()
        for line in reversed(read_lines(path)[0]):  # what the log says was sent counts on after a restart
            try:
                entry = Entry.model_validate_json(line)
            except ValidationError:
                self.close()
                raise AuditError("the audit log was changed: `wardround-site audit verify` says where") from None
            if entry.at[:10] != self._day():
                break
            if entry.event.outcome == "sent":
                self._sent[self._day(), entry.event.study] += entry.event.size

    @property
    def broken(self) -> bool:
        """Whether the last line could not be written."""
        return self._log is None

    def write(self, event: Event) -> None:
        """Write a line. Only then may what it is about go out.

        Raises
        ------
        StorageError
            It is not safely on the disk. The log is opened anew with the next line.
        """
        if self._log is None:
            self._log = AuditLog(self._path, self._key, self._clock())
        try:
            self.head = self._log.append(event, self._clock())
        except StorageError:
            self.close()
            raise

    def reserve(self, study: str, size: int, *, error: bool = False) -> None:
        """Take bytes from the day's.

        Raises
        ------
        EgressError
            There are not so many left.
        """
        key = (self._day(), study)
        if self._sent[key] + size > self._daily and not error:
            raise EgressError(
                f"the study {study[:12]} may send {self._daily} bytes a day, and has sent {self._sent[key]}: start the "
                "gateway with a higher --daily-bytes, or wait until tomorrow (UTC)",
                "daily-bytes",
            )
        self._sent[key] += size

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _day(self) -> str:
        return f"{self._clock():%Y-%m-%d}"
