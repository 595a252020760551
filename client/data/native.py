"""Native pixels without pydicom's decoder, once it has decoded others that are described in the same words.

The decoder looks the description up and checks it anew for every file, which takes longer than the pixels do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

from client.data.memo import remember

__all__ = ["Layout", "describe", "known", "learning", "native_frames"]

_PIXELS = BaseTag(0x7FE00010)
_KEYWORDS = (
    "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation",
)  # fmt: skip
_TAGS = tuple(BaseTag(tag_for_keyword(keyword) or 0) for keyword in _KEYWORDS)
_SYNTAXES = frozenset({uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian})

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
    """

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    unused: int


_LAYOUTS: dict[Description, Layout] = {}


def describe(dataset: Dataset) -> Description | None:
    """Return all that decoding depends on but the pixels; None where they are not native, or no more as read."""
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    pixels = dataset.get_item(_PIXELS) if _PIXELS in dataset else None
    if syntax not in _SYNTAXES or not isinstance(pixels, RawDataElement) or not isinstance(pixels.value, bytes):
        return None
    parts: list[object] = [syntax, dataset.original_encoding, pixels.VR, len(pixels.value)]
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
            and len(dataset.PixelData) == count * values.nbytes
        ):
            unused = int(dataset.BitsAllocated - dataset.BitsStored)
            remember(_LAYOUTS, description, Layout(count, values.shape, values.dtype, unused))
        yield values


def native_frames(dataset: Dataset, layout: Layout, chosen: range) -> Iterator[NDArray[np.generic]]:
    """Yield the chosen frames, read-only: what pydicom would."""
    stored = np.frombuffer(dataset.get_item(_PIXELS).value, layout.dtype).reshape(layout.count, *layout.shape)
    limits = np.iinfo(layout.dtype)
    low, high = limits.min >> layout.unused, limits.max >> layout.unused
    for number in chosen:
        values = stored[number]
        # Bits that are not stored can be anything (PS3.5, 8.1.1), but mostly continue the number.
        if layout.unused and (values.min() < low or values.max() > high):
            values = np.right_shift(np.left_shift(values, layout.unused), layout.unused)
        yield values
