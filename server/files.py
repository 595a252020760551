"""Files that are there whole or not at all."""

import os
from pathlib import Path

__all__ = ["flush", "write_atomic", "write_durably"]


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file and flush it to the disk; ``mode`` is that of a new file, less the umask."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
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


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file whole or not at all, durably."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # one that a crash left keeps its mode
    write_durably(part, data, mode)
    os.replace(part, path)
    flush(path.parent)
