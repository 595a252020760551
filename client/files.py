"""Files at a site that are there whole or not at all, and secrets that nobody else can read."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from common.consortium.keys import exposed
from common.errors import MembershipError, StorageError

__all__ = ["flush_folder", "read_secret", "write_whole"]


def flush_folder(folder: Path) -> None:
    """Put a folder's names on the disk, as ``fsync`` on a file does with its bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file durably, whole or not at all, with no moment in which its mode is another.

    Raises
    ------
    StorageError
        It cannot be written.
    """
    work = path.with_name(path.name + ".partial")
    try:
        with suppress(FileNotFoundError):
            work.unlink()
        descriptor = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(work, path)
        flush_folder(path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; check the disk and its permissions") from None


def read_secret(path: Path) -> bytes:
    """Read a private key, and refuse one that others could have read.

    Raises
    ------
    MembershipError
        The file is missing, is no plain file, belongs to somebody else, or has a mode other than 0600.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise MembershipError(f"{path} cannot be read: {error.strerror}", "missing-key") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or exposed(status.st_mode):
            raise MembershipError(
                f"{path} must be a plain file that only the user of this process can read (its mode is "
                f"{status.st_mode & 0o777:04o}): if nobody has read it, `chown` it and `chmod 600` it; "
                "otherwise make new keys with `wardround-site rotate`",
                "exposed-key",
            )
        return file.read()
