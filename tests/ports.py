"""Ports for a test's own processes, which hardly anybody takes between the choice and their start.

They lie below those that Linux, as it comes, gives to whoever does not choose, and each of up to 16 processes of
pytest-xdist's has its own.
"""

import os
import socket
from itertools import cycle
from random import Random

__all__ = ["free_port", "free_ports"]

_FIRST, _EACH, _PROCESSES = 12_000, 1_250, 16  # up to 32,000; Linux gives 32,768 and above
_process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
# From a place of its own: another suite may run on this machine.
_begin = Random(os.getpid()).randrange(_EACH)
_candidates = cycle(_FIRST + _process * _EACH + (_begin + i) % _EACH for i in range(_EACH))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens at; a while goes by before it is given again."""
    for port in _candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")


def free_ports(count: int) -> list[int]:
    """Return as many, all different."""
    return [free_port() for _ in range(count)]
