"""Files that are there whole or not at all."""

import os
from pathlib import Path

__all__ = ["flush", "write_atomic", "write_durably"]


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Flush a file or a folder's own entries: without the latter, a rename may be lost when the power goes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, durably."""
    part = path.with_name(path.name + ".part")
    write_durably(part, data)
    os.replace(part, path)
    flush(path.parent)
