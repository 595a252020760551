"""Keyed hashes: how a site remembers who is who without remembering anybody."""

import hmac
import os
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

from common.errors import DataError

__all__ = ["KEY_BYTES", "keyed", "keyed_pixels", "load_key"]

#: Length of a site's key.
KEY_BYTES = 32


def keyed(key: bytes, purpose: str, value: str | bytes) -> bytes:
    """Return HMAC-SHA256 of a value under the site's key, cut to 16 bytes; purposes never collide."""
    # Names of files are not always UTF-8: what they hold instead becomes surrogates, and must not raise.
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return hmac.digest(key, purpose.encode() + b"\0" + data, "sha256")[:16]


def keyed_pixels(key: bytes, values: NDArray[np.generic]) -> bytes:
    """Return a keyed hash of an array: equal numbers of one type in one shape have equal ones.

    A keyed universal hash (Poly1305) under a pseudo-random function (`keyed`), after Wegman and Carter: seven times as
    fast as SHA-256 on whole pictures. The inner hash is kept nowhere: a few of them would tell its key.
    """
    values = np.ascontiguousarray(values)
    inner = hmac.digest(key, b"pixels\0", "sha256")
    about = f"{values.dtype.str} {values.shape}\0".encode()
    return keyed(key, "content", about + Poly1305.generate_tag(inner, values.reshape(-1).view(np.uint8).data))


def load_key(path: Path, *, new: bytes | None = None) -> bytes:
    """Return a site's secret key, which is readable by its owner alone.

    Parameters
    ----------
    path : Path
        The key file.
    new : bytes, optional
        The key to write where there is none yet. Without it, there must be one.

    Raises
    ------
    DataError
        The file is missing, or not a key.
    """
    if not path.exists() and new is not None:
        work = path.with_name(path.name + ".partial")
        descriptor = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    if not path.exists():
        raise DataError(
            "there is no site.key in the site's folder: --site names the folder of the site that this is about; if the "
            "key is lost, restore it from its backup, for without it no patient is known again"
        )
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise DataError(
            f"site.key has {len(key)} bytes, not {KEY_BYTES}: restore it from its backup; without it no patient "
            "is known again"
        )
    return key
