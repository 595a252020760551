"""From stored numbers to what a display shows: rescale, window or table, palette, inversion (PS3.3 C.11, C.7.6.3).

Pixel padding (PS3.3 C.7.5.1.1.2) is no part of the picture: it is shown black, also where MONOCHROME1 would make it
white, and does not count for the range of a frame that has no window. Colour profiles are not applied.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing

from client.data.memo import remember

__all__ = [
    "HEADER",
    "WINDOWS",
    "Grey",
    "contrast",
    "extent",
    "functional_groups",
    "grey",
    "rendering",
    "show",
    "window_names",
]

#: The window that the file itself names.
HEADER = "header"

#: Centre and width in HU: customary values, no standard's. After A. Murphy and Y. Baba, "Windowing (CT)",
#: Radiopaedia.org, doi:10.53347/rID-52108; the middle where a range is given. ``angio`` is a customary preset too.
WINDOWS: Mapping[str, tuple[float, float]] = MappingProxyType({
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft-tissue": (50, 400),
    "abdomen": (40, 400),
    "liver": (30, 150),
    "brain": (40, 80),
    "subdural": (75, 215),
    "stroke": (40, 40),
    "bone": (400, 1800),
    "angio": (300, 600),
})  # fmt: skip

_COLOURS = ("Red", "Green", "Blue")
_RENDERING = (
    "Modality", "PhotometricInterpretation", "SamplesPerPixel", "BitsStored", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "RescaleType", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPresentation",
    *(f"{c}PaletteColorLookupTableDescriptor" for c in _COLOURS),
    *(f"{c}PaletteColorLookupTableData" for c in _COLOURS),
    *(f"Segmented{c}PaletteColorLookupTableData" for c in _COLOURS),
)  # fmt: skip
_TAGS = frozenset(tag_for_keyword(keyword) or 0 for keyword in _RENDERING)
_TAGS_AND_CHARACTERS = (tag_for_keyword("SpecificCharacterSet") or 0, *sorted(_TAGS))
_NESTED = frozenset(
    tag_for_keyword(keyword) or 0
    for keyword in (
        "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "FloatPixelData", "DoubleFloatPixelData",
    )
)  # fmt: skip
_VOI = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")
_MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")

_LONGEST_TABLE = 2**16

Grey = tuple[NDArray[np.float64], NDArray[np.bool_] | None]


# What the last files of this process said of how they are shown; and, to each of these, a window and a type of numbers,
# what is shown for the numbers from a first one on. (A header that is held keeps its id.)
_SEEN: dict[tuple[object, ...], Dataset] = {}
_TABLES: dict[tuple[int, str, str], tuple[Dataset, int, NDArray[np.float32]]] = {}


def window_names() -> tuple[str, ...]:
    """Return the names that a study may give a window, ``header`` first."""
    return (HEADER, *WINDOWS)


def rendering(dataset: Dataset, frame: int) -> Dataset:
    """Return the elements that say how a frame is shown, its own functional groups before the shared ones.

    Raises
    ------
    Exception
        Whatever pydicom raises for a header that cannot be read, and ValueError for a rescale that is none.
    """
    said = _said(dataset)
    if said is not None and said in _SEEN:
        return _SEEN[said]
    out = Dataset()
    out.file_meta = dataset.file_meta
    _copy(dataset, out)
    for group in functional_groups(dataset, frame):
        for macro in _MACROS:
            for item in list(group.get(macro) or ())[:1]:
                _copy(item, out)
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        # Bits mean nothing here, but pydicom's window needs a range to map to. (Elements are shared with the file's
        # dataset: they are replaced, never changed.)
        for keyword, value in (("BitsStored", 16), ("PixelRepresentation", 0)):
            out.pop(keyword, None)
            setattr(out, keyword, value)
    if "RescaleSlope" in out or "RescaleIntercept" in out:
        for keyword, neutral in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            if keyword not in out:
                setattr(out, keyword, neutral)
        if not (np.isfinite([out.RescaleSlope, out.RescaleIntercept]).all() and out.RescaleSlope):
            raise ValueError("not a rescale")
    if said is not None:
        remember(_SEEN, said, out)
    return out


def _said(dataset: Dataset) -> tuple[object, ...] | None:
    """Return what `rendering` goes by, to know it again; None where it is not one list of plain values."""
    held = dict(zip(map(int, dataset.keys()), dataset.values(), strict=True))
    if not _NESTED.isdisjoint(held):
        return None
    parts: list[object] = [dataset.file_meta.get("TransferSyntaxUID"), dataset.original_encoding]
    for tag in _TAGS_AND_CHARACTERS:
        if (element := held.get(tag)) is not None:
            if not isinstance(element.value, bytes | str | int | float | None):
                return None
            parts += (tag, element.VR, element.value)
    return tuple(parts)


def functional_groups(dataset: Dataset, frame: int) -> Iterator[Dataset]:
    """Yield the shared functional groups, then the frame's own (PS3.3 C.7.6.16), where there are any."""
    yield from list(dataset.get("SharedFunctionalGroupsSequence") or ())[:1]
    if own := dataset.get("PerFrameFunctionalGroupsSequence"):
        yield own[frame]


def show(stored: NDArray[np.generic], header: Dataset, window: str) -> NDArray[np.float32]:
    """Return a frame as a display shows it: ``[H, W]`` or ``[H, W, 3]``, 0 to 1, larger is brighter.

    Parameters
    ----------
    stored : ndarray
        Decoded ``[H, W]``, or ``[H, W, 3]`` already in RGB.
    header : Dataset
        From `rendering`.
    window : str
        Of `window_names`. A named one holds for CT in HU; everything else is shown as the file says.
    """
    if header.PhotometricInterpretation == "PALETTE COLOR":
        first, entries = _table(header.RedPaletteColorLookupTableDescriptor)
        colours = apply_color_lut(stored.astype(np.int64).clip(first, first + entries - 1), header)[..., :3]
        return _float32(colours / np.iinfo(colours.dtype).max)
    if header.SamplesPerPixel == 1:
        return _through_table(stored, header, window) if stored.dtype.kind in "iu" else _direct(stored, header, window)
    return _float32(stored / (2.0**header.BitsStored - 1))


def _direct(stored: NDArray[np.generic], header: Dataset, window: str) -> NDArray[np.float32]:
    picture = grey(stored, header)
    return contrast(picture, header, window, extent(picture, header))


def _through_table(stored: NDArray[np.generic], header: Dataset, window: str) -> NDArray[np.float32]:
    """Return what `_direct` does, computed once for every number between the least and the greatest, or before."""
    least = int(stored.min())
    count = int(stored.max()) - least + 1
    if count > stored.size:
        return _direct(stored, header, window)
    if (id(header), window, stored.dtype.str) in _TABLES or _windowing(header, window) is not None:
        least, table = _window_table(least, count, stored.dtype, header, window)
        places = _places(stored, least)
    else:
        places = _places(stored, least)
        values, hidden = grey(_numbers(least, least + count, stored.dtype), header)
        there = np.zeros(count, np.bool_)
        there[places] = True
        limits = extent((values[there], None if hidden is None else hidden[there]), header)
        table = contrast((values, hidden), header, window, limits)
    # Every place is in the table: of the modes, `wrap` is the fastest there.
    out: NDArray[np.float32] = np.take(table, places, mode="wrap")
    return out


def _window_table(
    least: int, count: int, dtype: np.dtype[Any], header: Dataset, window: str
) -> tuple[int, NDArray[np.float32]]:
    """Return a first number, and what is shown for it and those after it: the ``count`` from ``least`` on, or more.

    What pictures before had is kept, and this one's added.
    """
    key = (id(header), window, dtype.str)
    _, first, table = _TABLES.get(key, (header, least, np.empty(0, np.float32)))
    end = first + len(table)
    if first <= least and least + count <= end:
        return first, table
    # All steps are monotone: what lies between two pictures' numbers can be shown where they can.
    first, end = min(first, least), max(end, least + count)
    if first >= 0 and end <= _LONGEST_TABLE:
        first = 0  # then a number is its own place
    if end - first > _LONGEST_TABLE:
        first, end = least, least + count
    table = contrast(grey(_numbers(first, end, dtype), header), header, window, (0.0, 0.0))
    if len(table) <= _LONGEST_TABLE:
        remember(_TABLES, key, (header, first, table))
    return first, table


def _numbers(first: int, end: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.arange(first, end).astype(dtype)


def _places(stored: NDArray[np.generic], first: int) -> NDArray[np.unsignedinteger[Any]]:
    """Return how far each number is from the first one."""
    unsigned = stored.dtype.str.replace("i", "u")
    if first == 0:
        return stored.view(unsigned)
    origin = _numbers(first, first + 1, stored.dtype).view(unsigned)
    places: NDArray[np.unsignedinteger[Any]] = stored.view(unsigned) - origin  # modulo 2 ** bits: no overflow
    return places


def grey(stored: NDArray[np.generic], header: Dataset) -> Grey:
    """Return the numbers after the modality table or rescale (HU in a CT), and which of them are padding, if any."""
    indices = stored.astype(np.int64) if "ModalityLUTSequence" in header else stored
    values = np.asarray(apply_modality_lut(indices, header), np.float64)
    hidden = _padding(stored, header)
    if stored.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
        values = np.where(finite, values, 0)
        hidden = ~finite if hidden is None else hidden | ~finite
    return values, hidden


def extent(picture: Grey, header: Dataset) -> tuple[float, float]:
    """Return the least and the greatest number that is shown, or 0 and 1 where there is one bit or all is padding."""
    values, hidden = picture
    visible = values if hidden is None else values[~hidden]
    if header.BitsStored == 1 or not visible.size:
        return 0.0, 1.0
    return float(visible.min()), float(visible.max())


def contrast(picture: Grey, header: Dataset, window: str, limits: tuple[float, float]) -> NDArray[np.float32]:
    """Return shares of white.

    Parameters
    ----------
    picture : tuple
        From `grey`, of any shape.
    header : Dataset
        From `rendering`.
    window : str
        Of `window_names`.
    limits : tuple of float
        What black and white are where there is neither window nor table.
    """
    values, hidden = picture
    values, (low, high) = (_windowing(header, window) or (lambda x: (x, limits)))(values)
    shares = (values - low) / (high - low) if high != low else np.zeros_like(values)
    if not np.isfinite(shares).all():
        raise ValueError("a window that is none")
    shown = _float32(1 - shares if header.PhotometricInterpretation == "MONOCHROME1" else shares)
    if hidden is not None:
        shown[hidden] = 0
    return shown


def _windowing(
    header: Dataset, window: str
) -> Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], tuple[float, float]]] | None:
    """Return what maps rescaled numbers to others and says which of those are black and white; None for no window."""
    if window != HEADER and _in_hu(header):
        named = Dataset()
        named.update({element.tag: element for element in header if element.keyword not in _VOI})
        named.WindowCenter, named.WindowWidth = WINDOWS[window]
        header = named
    tables = header.get("VOILUTSequence")
    if tables and None not in (tables[0].get("LUTDescriptor"), tables[0].get("LUTData")):
        return lambda values: (_look_up(values, header), (0.0, 2.0 ** tables[0].LUTDescriptor[2] - 1))
    if None in (header.get("WindowCenter"), header.get("WindowWidth")):
        return None
    return lambda values: (apply_windowing(values, header), _output_range(header))


def _in_hu(header: Dataset) -> bool:
    rescaled = "RescaleSlope" in header or "ModalityLUTSequence" in header
    return header.get("Modality") == "CT" and rescaled and header.get("RescaleType", "HU") == "HU"


def _look_up(values: NDArray[np.float64], header: Dataset) -> NDArray[np.float64]:
    item = header.VOILUTSequence[0]
    first, entries = _table(item.LUTDescriptor)
    # pydicom indexes with as many bits as an entry has: what lies beyond would wrap round, and a table of more than
    # 256 entries of 8 bits would not fit.
    indices = np.rint(values).clip(first, first + entries - 1).astype(np.int64)
    wide = Dataset()
    wide["LUTData"] = item["LUTData"]
    wide.LUTDescriptor = [entries % 2**16, first, max(item.LUTDescriptor[2], 10)]
    holder = Dataset()
    holder.file_meta = header.file_meta
    holder.VOILUTSequence = [wide]
    return np.asarray(apply_voi(indices, holder), np.float64)


def _output_range(header: Dataset) -> tuple[float, float]:
    """Return what `apply_windowing` maps the ends of the window to."""
    bits = header.BitsStored
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if header.PixelRepresentation else (0.0, 2.0**bits - 1)
    if modality := header.get("ModalityLUTSequence"):
        low, high = 0.0, 2.0 ** modality[0].LUTDescriptor[2] - 1
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope is None or intercept is None:
        return low, high
    return low * float(slope) + float(intercept), high * float(slope) + float(intercept)


def _padding(stored: NDArray[np.generic], header: Dataset) -> NDArray[np.bool_] | None:
    if "PixelPaddingValue" not in header or stored.dtype.kind == "f":
        return None
    ends = [int(header.PixelPaddingValue), int(header.get("PixelPaddingRangeLimit", header.PixelPaddingValue))]
    if header.PixelRepresentation:
        # Some scanners write a negative value with an unsigned VR.
        ends = [end - 2**16 if end >= 2**15 and stored.dtype.itemsize == 2 else end for end in ends]
    numbers = np.asarray(stored, np.int64)
    hidden: NDArray[np.bool_] = (numbers >= min(ends)) & (numbers <= max(ends))
    return hidden if hidden.any() else None


def _table(descriptor: list[int]) -> tuple[int, int]:
    """Return the first stored value that a table maps, and the number of its entries (PS3.3 C.11.1.1)."""
    return int(descriptor[1]), int(descriptor[0]) or 2**16


def _copy(source: Dataset, out: Dataset) -> None:
    for tag in _TAGS & frozenset(map(int, source.keys())):
        if not (element := source[tag]).is_empty:
            out[tag] = element


def _float32(shares: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(shares, np.float32).clip(0, 1)
