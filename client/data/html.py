"""What pages that hold patients' images have in common: text and pictures inside, and a file of the owner's alone."""

import base64
import io
import os
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError

__all__ = ["png", "text", "write_private"]


def png(pixels: NDArray[np.uint8], side: int) -> str:
    """Return a prepared picture ``[C, H, W]``, or the middle of ``[C, D, H, W]``, as a PNG in base64.

    ``side`` is the longest side that it may have, in pixels.
    """
    plane = pixels[:, pixels.shape[1] // 2] if pixels.ndim == 4 else pixels
    image = Image.fromarray(np.ascontiguousarray(plane[0] if len(plane) == 1 else np.moveaxis(plane, 0, -1)))
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def text(value: str) -> str:
    """Return text from a file as it may stand in HTML, and in its attributes."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value), quote=True)


def write_private(path: Path, page: str) -> None:
    """Write a page: whole or not at all, readable by its owner alone.

    Raises
    ------
    DataError
        The file cannot be written there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with suppress(FileNotFoundError):
            part.unlink()
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(page.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        raise DataError("the page cannot be written there: check that its folder exists and has space") from None
    finally:
        with suppress(OSError):
            part.unlink()
