"""One program at a time changes a site."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import DataError

__all__ = ["alone"]


@contextmanager
def alone(site: Path) -> Iterator[None]:
    """Keep every other program that changes this site out; a killed one keeps nobody out.

    Raises
    ------
    DataError
        Another one is at work.
    """
    descriptor = os.open(site / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError("another program is indexing this site: wait until it has ended") from None
        yield
    finally:
        os.close(descriptor)
