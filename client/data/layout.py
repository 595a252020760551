"""Pixels without pydicom's decoders, once they have decoded others that are described in the same words.

A decoder looks the description up and checks it anew for every file. That takes longer than native pixels do, and is
a good part of what JPEG-LS takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any

import jpeg_ls
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

from client.data.memo import remember

__all__ = ["Layout", "describe", "known", "known_frames", "learning"]

_PIXELS, _OFFSETS = BaseTag(0x7FE00010), BaseTag(0x7FE00001)
_KEYWORDS = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation",
)  # fmt: skip
_TAGS = tuple(BaseTag(tag_for_keyword(keyword) or 0) for keyword in _KEYWORDS)
_NATIVE = frozenset({uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian})
_JPEG_LS = frozenset(uid.JPEGLSTransferSyntaxes)

_ITEM, _SEGMENT = Struct("<4sL"), Struct(">BBH")
_NEXT, _NO_OFFSETS = b"\xfe\xff\x00\xe0", (b"", bytes(4))
_START_OF_SCAN = 0xDA
#: Longest opening of a JPEG-LS stream that is looked at, in bytes.
_LONGEST = 256

Description = tuple[object, ...]


@dataclass(frozen=True)
class Layout:
    """How values lie in the pixels.

    Attributes
    ----------
    count, shape, dtype : int, tuple of int, dtype
        Frames, and what each one is.
    unused : int
        Bits of every value that are not stored.
    coded : bool
        Whether they lie so in what JPEG-LS decodes.
    """

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    unused: int
    coded: bool


_LAYOUTS: dict[Description, Layout] = {}


def describe(dataset: Dataset) -> Description | None:
    """Return all that decoding depends on but the values; None where it is not simple, or no more as read.

    Of JPEG-LS it is what the stream says before its values; there is one frame in one fragment.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    pixels = dataset.get_item(_PIXELS) if _PIXELS in dataset else None
    if not isinstance(pixels, RawDataElement) or not isinstance(pixels.value, bytes):
        return None
    parts: list[object] = [syntax, dataset.original_encoding, pixels.VR]
    if syntax in _NATIVE:
        parts.append(len(pixels.value))
    elif syntax in _JPEG_LS and _OFFSETS not in dataset and (opening := _opening(_stream(pixels.value))):
        parts.append(opening)
    else:
        return None
    for tag in _TAGS:
        if tag in dataset:
            element = dataset.get_item(tag)
            if not isinstance(element, RawDataElement):
                return None
            parts += (tag, element.VR, element.value)
    return tuple(parts)


def known(description: Description | None) -> Layout | None:
    """Return how values lie, where pydicom has decoded pixels of this description."""
    return None if description is None else _LAYOUTS.get(description)


def learning(
    description: Description | None, dataset: Dataset, decoded: Iterator[NDArray[np.generic]], count: int
) -> Iterator[NDArray[np.generic]]:
    """Yield the frames that pydicom decodes, and note how they lie where they do so as they are."""
    for values in decoded:
        if (
            description is not None
            and values.ndim == 2
            and values.dtype.kind in "iu"
            and dataset.BitsAllocated == 8 * values.itemsize
        ):
            coded = dataset.file_meta.TransferSyntaxUID in _JPEG_LS
            unused = int(dataset.BitsAllocated - dataset.BitsStored)
            layout = Layout(count, values.shape, values.dtype, unused, coded)
            if _lies_so(dataset, layout, values):
                remember(_LAYOUTS, description, layout)
        yield values


def known_frames(dataset: Dataset, layout: Layout, chosen: range) -> Iterator[NDArray[np.generic]]:
    """Yield the chosen frames, not to be changed: what pydicom would."""
    value = dataset.get_item(_PIXELS).value
    values = jpeg_ls.decode_pixel_data(_stream(value))[0] if layout.coded else value
    stored = np.frombuffer(values, layout.dtype).reshape(layout.count, *layout.shape)
    limits = np.iinfo(layout.dtype)
    low, high = limits.min >> layout.unused, limits.max >> layout.unused
    for number in chosen:
        frame = stored[number]
        # Bits that are not stored can be anything (PS3.5, 8.1.1), but mostly continue the number.
        if layout.unused and (frame.min() < low or frame.max() > high):
            frame = np.right_shift(np.left_shift(frame, layout.unused), layout.unused)
        yield frame


def _lies_so(dataset: Dataset, layout: Layout, values: NDArray[np.generic]) -> bool:
    if layout.coded:
        # pydicom mends signs by rules that are not repeated here.
        return layout.dtype.kind == "u" and np.array_equal(next(known_frames(dataset, layout, range(1))), values)
    return len(dataset.PixelData) == layout.count * values.nbytes


def _stream(value: bytes) -> bytes:
    """Return the one fragment of encapsulated pixels without a table of offsets (PS3.5, A.4); nothing of others."""
    if len(value) < 2 * _ITEM.size:
        return b""
    tag, length = _ITEM.unpack_from(value)
    at = _ITEM.size + length
    if tag != _NEXT or value[_ITEM.size : at] not in _NO_OFFSETS or len(value) < at + _ITEM.size:
        return b""
    tag, length = _ITEM.unpack_from(value, at)
    at += _ITEM.size
    return value[at:] if tag == _NEXT and at + length == len(value) else b""


def _opening(stream: bytes) -> bytes | None:
    """Return a JPEG-LS stream up to its first value (ITU-T T.87, annex C)."""
    at = 2
    while at + _SEGMENT.size <= min(len(stream), _LONGEST):
        start, marker, length = _SEGMENT.unpack_from(stream, at)
        if start != 0xFF:
            return None
        at += 2 + length
        if marker == _START_OF_SCAN:
            return stream[:at]
    return None
