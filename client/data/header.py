"""The header of a common DICOM file, taken apart fast: what is not plain is left to pydicom, which takes its time.

A header has some fifty elements and pydicom spends several microseconds on each, more than on reading half a megabyte
of pixels. Here is only what is the same for every file: elements of known length, one after the other.
"""

import os
import re
from functools import cache, lru_cache
from struct import Struct
from typing import BinaryIO

from pydicom import Dataset, uid
from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, empty_value_for_VR
from pydicom.dataset import FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.values import convert_string

__all__ = ["plain_dataset", "text"]

#: Longest header that is looked at here, in bytes.
_LONGEST = 2**14
_ELEMENT, _LENGTH, _ITEM = Struct("<HH2sH"), Struct("<L"), Struct("<4sL")
_SHORT = {
    vr.encode(): vr
    for vr in (
        "AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM",
        "UI", "UL", "US",
    )
}  # fmt: skip
_LONG = {vr.encode(): vr for vr in ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")}
_TEXTS = frozenset({"AE", "CS", "LO", "PN", "SH", "UI", None})
_UNDEFINED = 0xFFFFFFFF
_SYNTAX, _CHARACTERS, _PIXELS = 0x00020010, 0x00080005, 0x7FE00010
_AFTER_META = 0x00030000
_NEXT, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"

#: Printable ASCII that means the same in every character set of DICOM, and neither separates values nor groups.
_ASCII = re.compile(rb"[ -<>-\[\]-}]*\0*")

_Elements = dict[BaseTag, DataElement | RawDataElement]


def plain_dataset(file: BinaryIO) -> Dataset | None:
    """Return what pydicom reads of a file from its start; None where the file is not of the plainest kind.

    That is: a preamble, little endian, no element of undefined length but compressed pixels, and nothing after the
    pixels.
    """
    head = file.read(_LONGEST)
    meta = _scanned(head, 132, _AFTER_META, implicit=False)
    if meta is None or head[128:132] != b"DICM" or any(tag >> 16 != 2 for tag in meta[0]):
        return None
    syntax = meta[0].get(BaseTag(_SYNTAX))
    file_meta = None if syntax is None else _META.get(syntax.value or b"")
    if file_meta is None:
        return None
    implicit = file_meta.TransferSyntaxUID.is_implicit_VR
    # Some files are explicit and say that they are implicit.
    if implicit and head[meta[1] + 4 : meta[1] + 6].isalpha():
        return None
    scanned = _scanned(head, meta[1], _PIXELS, implicit=implicit)
    pixels = None if scanned is None else _pixels(file, head, scanned[1], file_meta.TransferSyntaxUID)
    if scanned is None or pixels is None:
        return None
    elements = scanned[0]
    characters = elements.get(BaseTag(_CHARACTERS))
    try:
        encoding = default_encoding if characters is None else list(_encodings(characters.value))
    except ValueError:
        return None
    elements[pixels.tag] = pixels
    dataset = Dataset(elements)
    dataset.set_original_encoding(implicit, True, encoding)
    dataset.file_meta = file_meta
    return dataset


def text(dataset: Dataset, keyword: str) -> str:
    """Return an element's text without what fills it up; ``""`` where there is none."""
    element = dataset.get_item(_tag(keyword))
    if element is None:
        return ""
    if isinstance(element, RawDataElement) and element.VR in _TEXTS and isinstance(element.value, bytes):  # noqa: SIM102
        if _ASCII.fullmatch(element.value):
            return element.value.decode("ascii").strip(" \0")
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip(" \0")


@cache
def _tag(keyword: str) -> BaseTag:
    """Return a keyword's tag as pydicom takes it without a conversion."""
    return BaseTag(tag_for_keyword(keyword) or 0)


def _meta(syntax: str) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.UID(syntax)
    return meta


#: By what a header says; never changed, since datasets share it.
_META = {
    syntax.encode() + b"\0" * (len(syntax) % 2): _meta(syntax)
    for syntax in (
        uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, *uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes,
        *uid.JPEG2000TransferSyntaxes, *uid.RLETransferSyntaxes,
    )
}  # fmt: skip


def _scanned(head: bytes, at: int, end: int, *, implicit: bool) -> tuple[_Elements, int] | None:
    """Return the elements before the first tag that is not below ``end``, and where that one begins."""
    elements: _Elements = {}
    while at + 12 <= len(head):
        group, number, code, length = _ELEMENT.unpack_from(head, at)
        tag = group << 16 | number
        if tag >= end:
            return elements, at
        start, vr = at + 8, None
        if implicit:
            (length,) = _LENGTH.unpack_from(head, at + 4)
        elif (vr := _SHORT.get(code)) is None:
            if (vr := _LONG.get(code)) is None:
                return None
            (length,) = _LENGTH.unpack_from(head, start)
            start += 4
        at = start + length
        if at > len(head):  # so is one of undefined length
            return None
        key = BaseTag(tag)
        value = head[start:at] if length else empty_value_for_VR(vr, raw=True)
        elements[key] = RawDataElement(key, vr, length, value, start, implicit, True)  # type: ignore[arg-type]
    return None


def _pixels(file: BinaryIO, head: bytes, at: int, syntax: uid.UID) -> RawDataElement | None:
    """Return the pixels whose element begins at a place, where they are the last thing in the file."""
    implicit = syntax.is_implicit_VR
    group, number, code, _ = _ELEMENT.unpack_from(head, at)
    start = at + (8 if implicit else 12)
    (length,) = _LENGTH.unpack_from(head, start - 4)
    if group << 16 | number != _PIXELS or not length or (not implicit and code not in {b"OB", b"OW"}):
        return None
    if syntax.is_encapsulated != (length == _UNDEFINED):
        return None
    if not syntax.is_encapsulated and start + length != os.fstat(file.fileno()).st_size:
        return None
    file.seek(start)
    value = _items(file.read()) if syntax.is_encapsulated else file.read(length)
    if value is None or (length != _UNDEFINED and len(value) != length):
        return None
    vr = None if implicit else code.decode()
    return RawDataElement(BaseTag(_PIXELS), vr, length, value, start, implicit, True)


def _items(content: bytes) -> bytes | None:
    """Return what comes before the delimiter of a sequence of items, where nothing comes after it (PS3.5, A.4)."""
    at = 0
    while at + 8 <= len(content):
        tag, length = _ITEM.unpack_from(content, at)
        if tag == _DELIMITER:
            return content[:at] if not length and at + 8 == len(content) else None
        if tag != _NEXT:
            return None
        at += 8 + length
    return None


@lru_cache(32)
def _encodings(characters: bytes | None) -> list[str]:
    return list(convert_encodings(convert_string(characters or b"", True)))
