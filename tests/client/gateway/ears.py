"""Listeners on this machine, to whom a bundle could hand something over."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

from tests.client.gateway.trickster import PIXELS

__all__ = ["FOLDERS", "Ears", "ears"]

#: Where a file of one process is seen by another.
FOLDERS = {"file in /tmp": "/tmp", "file in /dev/shm": "/dev/shm"}


@dataclass
class Ears:
    """What listens, and the ways to it as the bundle takes them."""

    ways: dict[str, tuple[str, Any]]
    open: dict[str, socket.socket] = field(default_factory=dict)

    def heard(self) -> set[str]:
        """Return the ways by which the pixels came."""
        found = {name for name, (kind, where) in self.ways.items() if kind == "file" and Path(where).exists()}
        for name, one in self.open.items():
            with suppress(BlockingIOError):
                if one.type == socket.SOCK_DGRAM:
                    data = one.recv(99)
                else:
                    with one.accept()[0] as caller:
                        data = caller.recv(99)
                assert data == PIXELS
                found.add(name)
        return found


@contextmanager
def ears() -> Iterator[Ears]:
    """Listen for the pixels in every way that another program of this machine can."""
    token = token_hex(4)
    ways: dict[str, tuple[str, Any]] = {
        "tcp": ("tcp", ("127.0.0.1", 0)),
        "udp": ("udp", ("127.0.0.1", 0)),
        "socket file": ("tcp", f"/tmp/wardround-{token}"),
        "abstract socket": ("tcp", f"\0wardround-{token}"),
    }
    with ExitStack() as stack:
        heard = Ears({name: ("file", f"{folder}/wardround-{token}-x") for name, folder in FOLDERS.items()})
        for name, (kind, where) in ways.items():
            family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
            one = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
            heard.open[name] = stack.enter_context(one)
            one.setblocking(False)
            one.bind(where)
            if kind == "tcp":
                one.listen()
            heard.ways[name] = (kind, where if isinstance(where, str) else one.getsockname())
        try:
            yield heard
        finally:
            for kind, where in heard.ways.values():
                if kind == "file" or (isinstance(where, str) and where[0] == "/"):
                    Path(where).unlink(missing_ok=True)
