"""Hosts of their own on one machine: Linux network namespaces with a cable between two of them, and closed cells.

A host is what goes in front of a command so that it runs there. Making one takes the superuser's rights, or those that
``unshare --map-root-user --net --mount`` gives to anybody where the kernel lets it.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import NotPreparedError

__all__ = ["HERE", "Host", "cable", "closed", "default_route", "impossible", "namespace"]

Host = tuple[str, ...]

#: The namespace that this process is in.
HERE: Host = ()

#: Runs a command with a /tmp and /dev/shm of its own, in which only some folders of the old /tmp are seen.
_CLOSED = """\
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir /dev/shm/tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm/tmp
while test "$1" != --; do
    mkdir -p "/dev/shm/tmp/${1#/tmp/}" && mount --bind "$1" "/dev/shm/tmp/${1#/tmp/}" || exit 1
    shift
done
shift
mount --move /dev/shm/tmp /tmp && rmdir /dev/shm/tmp && cd / && exec "$@"
"""

_PROBE = "mount -t tmpfs tmpfs /run; ip netns add probe; ip link add probe0 type veth peer name probe1 netns probe"


def impossible(*rights: str) -> str:
    """Return why no namespace can be made here; empty where one can.

    Parameters
    ----------
    rights : str
        Options of unshare's, where more rights are to be had by them.
    """
    try:
        done = subprocess.run(
            ["unshare", *rights, "--net", "--mount", "sh", "-ec", _PROBE],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return (done.stderr.strip() or "it failed without a word") if done.returncode else ""


@contextmanager
def namespace(name: str) -> Iterator[Host]:
    """Make a network namespace in which nothing but the loopback is there; it goes with its last process.

    Raises
    ------
    NotPreparedError
        The kernel or the user's rights do not allow it.
    """
    _ip("netns", "add", name)
    try:
        _ip("-netns", name, "link", "set", "lo", "up")
        yield ("ip", "netns", "exec", name)
    finally:
        _ip("netns", "delete", name)


def cable(one: Host, other: Host, names: tuple[str, str], addresses: tuple[str, str]) -> None:
    """Lay a cable between two hosts.

    Parameters
    ----------
    one, other : Host
        The hosts.
    names : tuple of str
        What the interface is called at each end, at most 15 letters.
    addresses : tuple of str
        Of each end, with the length of the network's prefix; none where it is empty.

    Raises
    ------
    NotPreparedError
        The kernel or the user's rights do not allow it, or a name is taken.
    """
    _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
    for host, name, address in zip((one, other), names, addresses, strict=True):
        where = () if host == HERE else ("-netns", host[-1])
        if where:
            _ip("link", "set", name, "netns", host[-1])
        if address:
            _ip(*where, "address", "add", address, "dev", name)
        _ip(*where, "link", "set", name, "up")


def default_route(host: Host, by: str) -> None:
    """Send everything of a host's that has no other way by a neighbour."""
    _ip("-netns", host[-1], "route", "add", "default", "via", by)


def closed(*keep: Path) -> Host:
    """Return what goes in front of a command so that nobody else sees its files in /tmp and /dev/shm, nor it theirs.

    It is what ``PrivateTmp``, ``TemporaryFileSystem=/dev/shm`` and ``PrivateIPC`` do for a unit of systemd.

    Parameters
    ----------
    keep : Path
        Folders that it needs, which can lie in /tmp.
    """
    inside = [str(path) for path in keep if path.is_relative_to("/tmp")]
    return ("unshare", "--mount", "--ipc", "sh", "-ec", _CLOSED, "sh", *inside, "--")


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        raise NotPreparedError("ip is not installed (on Debian: apt install iproute2)") from None
    if done.returncode:
        raise NotPreparedError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
