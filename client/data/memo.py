"""What a process keeps of the files before, since those that follow are mostly of the same series."""

from typing import TypeVar

__all__ = ["remember"]

_MOST = 32

K = TypeVar("K")
V = TypeVar("V")


def remember(known: dict[K, V], key: K, value: V) -> None:
    """Keep a value for the files that follow; all is forgotten before it becomes much."""
    if len(known) >= _MOST:
        known.clear()
    known[key] = value
