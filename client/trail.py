"""Which thetas a site was shown, round by round, and the last one itself.

By the list, sites can find out that the coordinator sent them different ones. By the last theta, a site can tell that
the next one is further away than the study's outer step leads. ::

    thetas/51ab....txt     a line for each: round and digest, or ``join``
    thetas/51ab....last    the round, and the numbers of the last one

Nothing waits for the disk, and the last theta is written over: one that is damaged or torn counts as none, and the
distance from the study's first theta is judged without it.
"""

import os
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.contract import Vector
from common.errors import StorageError

__all__ = ["Seen", "last_seen", "note_join", "note_theta", "studies_of", "thetas_of"]

_HEAD = struct.Struct(">II")  # checksum, round
_JOIN = "join"


@dataclass(frozen=True)
class Seen:
    """The theta that a site was shown last.

    Attributes
    ----------
    round : int
        Of which round it was.
    theta : ndarray
        ``[D]``.
    joined : bool
        The coordinator has asked the site to join since then: a run began, or went on from a checkpoint.
    """

    round: int
    theta: Vector
    joined: bool


def last_seen(site: Path, study: str, size: int, dtype: str) -> Seen | None:
    """Return the theta of a study that a site was shown last; None where there is none, or it is damaged."""
    try:
        data = _last(site, study).read_bytes()
        joined = _last_line(site, study) == _JOIN
    except OSError:
        return None
    if len(data) != _HEAD.size + size * np.dtype(dtype).itemsize:
        return None
    checksum, number = _HEAD.unpack_from(data)
    if zlib.crc32(data[_HEAD.size :], number) != checksum:
        return None
    return Seen(number, np.frombuffer(data, dtype, offset=_HEAD.size), joined)


def note_theta(site: Path, study: str, number: int, digest: str, theta: Vector) -> None:
    """Write down that a site was shown a theta, as a round's.

    Raises
    ------
    StorageError
        It cannot be written.
    """
    line = f"{number} {digest}\n".encode()
    try:
        # The list first: killed in between, the last theta is an earlier one, from which more steps lead here.
        if _append(site, study, line):
            file = os.open(_last(site, study), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.writev(file, [_HEAD.pack(zlib.crc32(theta.data, number), number), theta.data])
            finally:
                os.close(file)
    except OSError as error:
        raise StorageError(f"the list of thetas cannot be written ({error.strerror}): is there space?") from None


def note_join(site: Path, study: str) -> None:
    """Write down that a site that was shown a theta before was asked to join.

    Raises
    ------
    StorageError
        It cannot be written.
    """
    try:
        if _list(site, study).exists():
            _append(site, study, f"{_JOIN}\n".encode())
    except OSError as error:
        raise StorageError(f"the list of thetas cannot be written ({error.strerror}): is there space?") from None


def studies_of(site: Path) -> list[str]:
    """Return the digests of the studies that a site was shown thetas of."""
    return sorted(path.stem for path in (site / "thetas").glob("*.txt"))


def thetas_of(site: Path, study: str) -> dict[int, list[str]]:
    """Return the digests of the thetas that a site was shown, by round: more than one where a round came again."""
    found: dict[int, list[str]] = {}
    with suppress(FileNotFoundError):
        for line in _list(site, study).read_text().splitlines():
            number, _, digest = line.partition(" ")
            if digest and digest not in found.setdefault(int(number), []):
                found[int(number)].append(digest)
    return found


def _append(site: Path, study: str, line: bytes) -> bool:
    """Append a line, unless it is the last one already; say whether it was."""
    path, flags = _list(site, study), os.O_RDWR | os.O_APPEND | os.O_CREAT
    try:
        file = os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o700)
        file = os.open(path, flags, 0o600)
    try:
        end = os.lseek(file, 0, os.SEEK_END)
        start = max(0, end - len(line) - 1)
        if (b"\n" + os.pread(file, end - start, start)).endswith(b"\n" + line):
            return False
        os.write(file, line)
    finally:
        os.close(file)
    return True


def _last_line(site: Path, study: str) -> str:
    with _list(site, study).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 256))
        return file.read().rstrip(b"\n").rpartition(b"\n")[2].decode()


def _list(site: Path, study: str) -> Path:
    return site / "thetas" / f"{study}.txt"


def _last(site: Path, study: str) -> Path:
    return site / "thetas" / f"{study}.last"
