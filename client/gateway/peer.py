"""Whose process is at the other end of a connection within this machine? Linux says so in ``/proc/net``."""

import ipaddress
import pwd
import sys
from collections.abc import Iterator
from pathlib import Path

from common.errors import FleetError

__all__ = ["owner", "user_number"]

#: A socket that nobody has any more stands there as the superuser's.
_ESTABLISHED = "01"

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def user_number(name: str) -> int:
    """Return the number of a user of this machine, given as a name or a number.

    Raises
    ------
    FleetError
        There is no such user, or this system does not say whose a connection is.
    """
    if not Path(_TABLES[0]).exists():
        raise FleetError("--node-user needs Linux: leave it out, and let no other users on this machine")
    if name.isascii() and name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise FleetError(f"there is no user {name!r} on this machine") from None


def owner(theirs: tuple[str, int], ours: tuple[str, int]) -> int | None:
    """Return the number of the user whose socket is at the other end; None where none is found.

    Parameters
    ----------
    theirs, ours : tuple of str, int
        Addresses and ports of both ends.
    """
    wanted = set(zip(_written(*theirs), _written(*ours), strict=True))
    for table in _TABLES:
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if (fields[1], fields[2]) in wanted and fields[3] == _ESTABLISHED:
                return int(fields[7])
    return None


def _written(host: str, port: int) -> Iterator[str]:
    """Yield an address as the tables write it: 32-bit words in the machine's own order; IPv4 also within IPv6."""
    packed = ipaddress.ip_address(host).packed
    for address in (packed, bytes(10) + b"\xff\xff" + packed) if len(packed) == 4 else (packed,):
        words = [address[start : start + 4] for start in range(0, len(address), 4)]
        step = -1 if sys.byteorder == "little" else 1
        yield f"{''.join(word[::step].hex().upper() for word in words)}:{port:04X}"
