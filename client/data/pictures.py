"""PNG, JPEG and TIFF files as pictures; their metadata are not read."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.data.picture import Picture, Reading, Reason, Refused

__all__ = ["read_picture"]

_FORMATS = ("PNG", "JPEG", "TIFF")
# Pillow's modes whose numbers are taken as they are; the others become RGB.
_BITS, _PHOTOMETRIC = 258, 262  # BitsPerSample and PhotometricInterpretation: TIFF 6.0, section 8
_MODES = ("1", "L", "I;16", "I;16L", "I;16B", "I", "F", "RGB")


def read_picture(path: Path, reading: Reading) -> Iterator[Picture]:
    """Read an image file; of a TIFF of several pages, those that ``reading.frames`` asks for.

    Grey of 8, 12 or 16 bits is shown from black to white over its whole range, 32-bit and floating-point grey from its
    smallest value to its largest. Transparency is dropped; a palette and CMYK become RGB. Orientation tags are not
    applied: annotations and masks were made on the stored pixels.

    Raises
    ------
    Refused
        NOT_AN_IMAGE, TOO_MANY_PIXELS or NOT_DECODED.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(path, formats=_FORMATS)
        except Image.DecompressionBombError:
            raise Refused(Reason.TOO_MANY_PIXELS) from None
        except Exception:
            raise Refused(Reason.NOT_AN_IMAGE) from None
        with image:
            _check_size(image, reading)
            try:
                pages = getattr(image, "n_frames", 1)
            except Exception:
                raise Refused(Reason.NOT_DECODED) from None
            for page in reading.chosen(pages):
                values = _decoded(image, page, reading)
                yield Picture({}, values, partial(_shown, values, _white(image, values)), frame=page)


def _check_size(image: Image.Image, reading: Reading) -> None:
    if image.width * image.height * len(image.getbands()) > reading.max_values:
        raise Refused(Reason.TOO_MANY_PIXELS)


def _decoded(image: Image.Image, page: int, reading: Reading) -> NDArray[np.generic]:
    try:
        image.seek(page)
        _check_size(image, reading)
        if image.mode in _MODES:
            values = np.array(image)
            if not np.isfinite(values).all():
                raise Refused(Reason.NOT_DECODED)
            values = values.astype(values.dtype.newbyteorder("="), copy=False)
            if values.dtype.itemsize > 1 and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
                return -values if values.dtype.kind == "f" else ~values  # white is zero: Pillow knows of 8 bits only
            return values
        if image.mode in {"LA", "La"}:
            return np.array(image.getchannel(0))
        return np.array(image.convert("RGB"))
    except Refused:
        raise
    except Exception:
        raise Refused(Reason.NOT_DECODED) from None


def _white(image: Image.Image, values: NDArray[np.generic]) -> int:
    """Return the number that is shown white; 0 where that depends on the picture."""
    if values.dtype == np.uint16:
        # Pillow gives the 12 bits of some TIFF files as the low ones of 16.
        return 4095 if getattr(image, "tag_v2", {}).get(_BITS) == (12,) else 65535
    return {np.dtype(np.bool_): 1, np.dtype(np.uint8): 255}.get(values.dtype, 0)


def _shown(values: NDArray[np.generic], white: int, window: str) -> NDArray[np.float32]:
    if white:
        return np.asarray(values.astype(np.float32) / np.float32(white))
    low, high = float(values.min()), float(values.max())
    out: NDArray[np.float32] = ((values.astype(np.float64) - low) / ((high - low) or 1.0)).astype(np.float32)
    return out
