"""DICOM files: read as the standard says, or refused.

What a file holds is untrusted. Its size, its kind, its transfer syntax and the shapes that it declares (also in its
compressed streams) are checked before anything is decoded. Whatever pydicom or a decoder raises becomes a `Refused`;
what they warn of or log is dropped, since it quotes the file.

One decoder per transfer syntax, so that a file has the same pixels at every site. Real-world value mappings, overlays
and presentation states are not applied. Labels join on PatientID as it is written: its issuer is not made part of it,
since a patient whose issuer only some files name would become two. The price is that two patients of two issuers can
become one, which costs images but never puts a patient on two sides.
"""

import logging
import math
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import generate_frames
from pydicom.filereader import _read_file_meta_info, read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options
from pydicom.tag import BaseTag

from client.data import jpeg
from client.data.deid import header_of, identity_refusal
from client.data.header import plain_dataset, text
from client.data.layout import describe, known, known_frames, learning
from client.data.picture import IDENTIFIERS, Header, Picture, Place, Reading, Reason, Refused
from client.data.windows import functional_groups, rendering, show, window_names

__all__ = ["SOP_CLASSES", "TRANSFER_SYNTAXES", "Frame", "read_dicom", "read_frames", "refusing", "series_of"]

#: Transfer syntaxes that are read, and the decoder of each; native ones need none.
TRANSFER_SYNTAXES = {
    uid.ImplicitVRLittleEndian: "",
    uid.ExplicitVRLittleEndian: "",
    uid.DeflatedExplicitVRLittleEndian: "",
    uid.ExplicitVRBigEndian: "",
    uid.JPEGBaseline8Bit: "libjpeg-turbo",
    uid.JPEGExtended12Bit: "libjpeg-turbo",
    uid.JPEGLossless: "libjpeg-turbo",
    uid.JPEGLosslessSV1: "libjpeg-turbo",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
    uid.RLELossless: "pylibjpeg",
}

#: Storage SOP classes that hold pictures; 1.2.840.10008.5.1.4.1.1 is left out of each (PS3.4 table B.5-1, PS3.6 A).
SOP_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{leaf}"
    for leaf in (
        "1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1",  # CR, DX, mammography, intra-oral
        "2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "128", "128.1", "130", "20", "5",  # CT, MR, PET, NM
        "3", "3.1", "6", "6.1", "6.2", "6.3",  # ultrasound, photoacoustic; retired ones too
        "7", "7.1", "7.2", "7.3", "7.4",  # secondary capture
        "12.1", "12.1.1", "12.2", "12.2.1", "12.3",  # XA, XRF
        "13.1.1", "13.1.2", "13.1.3", "13.1.4", "13.1.5", "14.1", "14.2",  # 3-D X-ray, breast, IVOCT
        "30", "66.4", "481.1", "481.2", "481.23", "481.24",  # parametric map, segmentation, RT image and dose
        "77.1.1", "77.1.1.1", "77.1.2", "77.1.2.1", "77.1.3", "77.1.4", "77.1.4.1",  # scopes, microscopes, photographs
        "77.1.6", "77.1.7", "77.1.8", "77.1.9",  # whole slides, dermoscopy, confocal microscopy
        "77.1.5.1", "77.1.5.2", "77.1.5.4", "77.1.5.5", "77.1.5.6", "77.1.5.7", "81.1", "82.1",  # ophthalmology
    )
)  # fmt: skip

# What no file may have said: a log of the host's process is no place for it, and these libraries quote values.
for _name in ("pydicom", "pylibjpeg", "openjpeg", "rle", "jpeg_ls"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

for _syntax in jpeg.DECODER_DEPENDENCIES:
    get_decoder(_syntax).add_plugin("libjpeg-turbo", (jpeg.__name__, jpeg.decode.__name__))

# A dataset without a preamble starts with group 2 or 8, in either byte order.
_FIRST_GROUPS = {b"\x02\x00", b"\x08\x00", b"\x00\x08"}
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PIXEL_TAGS = tuple(BaseTag(tag_for_keyword(keyword) or 0) for keyword in _PIXELS)
_PHOTOMETRICS = {
    1: {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"},
    3: {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"},
}
_START_OF_FRAME = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7)

T = TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """A decoded frame and what its file says about it.

    Attributes
    ----------
    values : ndarray
        As decoded: ``[H, W]``, or ``[H, W, 3]`` in RGB.
    rendering : Dataset
        Of `client.data.windows.rendering`.
    identifiers, header, number, place
        As in `Picture`.
    """

    values: NDArray[np.generic]
    rendering: Dataset
    identifiers: dict[str, str]
    header: Header
    number: int
    place: Place | None


def read_dicom(path: Path, reading: Reading) -> Iterator[Picture]:
    """Yield the frames of a DICOM file that ``reading.frames`` asks for; a `Reader`.

    Raises
    ------
    Refused
        With the reason, and no text of the file anywhere in it; so does a picture's `shown`.
    """
    for frame in read_frames(path, reading):
        shown = partial(_shown, frame.values, frame.rendering)
        yield Picture(frame.identifiers, frame.values, shown, frame.header, frame.number, place=frame.place)


def read_frames(path: Path, reading: Reading) -> Iterator[Frame]:
    """Yield decoded frames, for those who show them in their own way."""
    dataset, header, identifiers = refusing(Reason.DAMAGED, _opened, path, reading)
    chosen, decoded = refusing(Reason.NOT_DECODED, _decoding, dataset, reading)

    def frame(number: int) -> Frame:
        place = _place(dataset, number) if reading.volumes else None
        return Frame(next(decoded), rendering(dataset, number), identifiers, header, number, place)

    for number in chosen:
        yield refusing(Reason.NOT_DECODED, frame, number)


def _opened(path: Path, reading: Reading) -> tuple[Dataset, Header, dict[str, str]]:
    refusing(Reason.NOT_READABLE, _check_file, path, reading)
    dataset = _parse(path, reading)
    _check_kind(dataset)
    header = header_of(dataset)
    if reading.require_deidentified and (reason := identity_refusal(header)):
        raise Refused(reason)
    return dataset, header, _identifiers(dataset)


def _decoding(dataset: Dataset, reading: Reading) -> tuple[range, Iterator[NDArray[np.generic]]]:
    """Return which frames are wanted, and what yields them."""
    description = describe(dataset)
    if (layout := known(description)) is not None and math.prod(layout.shape) <= reading.max_values:
        chosen = reading.chosen(layout.count)
        return chosen, known_frames(dataset, layout, chosen)
    count = _check_pixels(dataset, reading)
    chosen = reading.chosen(count)
    return chosen, learning(description, dataset, _decoded(dataset, chosen, count), count)


def series_of(path: Path, reading: Reading) -> str:
    """Return the series that a file belongs to, ``""`` where it does not say.

    Raises
    ------
    Refused
        The file cannot be parsed.
    """
    dataset = refusing(Reason.DAMAGED, _parse, path, reading)
    return refusing(Reason.DAMAGED, _identifiers, dataset).get("SeriesInstanceUID", "")


def refusing(reason: Reason, step: Callable[..., T], *arguments: Any) -> T:
    """Return what a step returns; whatever else it raises than `Refused` becomes one, and it warns nobody.

    A decoder written in Rust panics with a class that is no Exception. The refusal is raised outside of the handler:
    not even its context holds what was raised.
    """
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return step(*arguments)
    except (KeyboardInterrupt, SystemExit, Refused):
        raise
    except BaseException:
        pass
    raise Refused(reason)


def _shown(values: NDArray[np.generic], how: Dataset, window: str) -> NDArray[np.float32]:
    if window not in window_names():
        raise ValueError(f"there is no window {window!r}: use one of {', '.join(window_names())}")
    return refusing(Reason.NOT_DECODED, show, values, how, window)


def _check_file(path: Path, reading: Reading) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Refused(Reason.NOT_READABLE)
    if status.st_size > reading.max_file_bytes:
        raise Refused(Reason.TOO_LARGE)
    path.open("rb").close()


def _parse(path: Path, reading: Reading) -> Dataset:
    with path.open("rb") as file:
        if (plain := plain_dataset(file)) is not None:
            return plain
        file.seek(0)
        whole = file.read(132)[128:] == b"DICM"
        file.seek(0)
        if not whole and file.read(2) not in _FIRST_GROUPS:
            raise Refused(Reason.NOT_AN_IMAGE)
        file.seek(0)
        read_preamble(file, force=True)
        meta = _read_file_meta_info(file)
        syntax = meta.get("TransferSyntaxUID")
        # pydicom inflates without a bound, so it must not come to that.
        if syntax == uid.DeflatedExplicitVRLittleEndian:
            dataset: Dataset = _inflated(file, reading)
        elif whole and syntax in TRANSFER_SYNTAXES:
            dataset = read_dataset(file, syntax.is_implicit_VR, syntax.is_little_endian)
        else:
            file.seek(0)
            dataset = pydicom.dcmread(file, force=not whole)
            meta = dataset.file_meta
    dataset.file_meta = meta
    if not whole and not _plausible(dataset):
        raise Refused(Reason.NOT_AN_IMAGE)
    return dataset


def _inflated(file: BinaryIO, reading: Reading) -> Dataset:
    limit = min(reading.max_file_bytes, 8 * reading.max_values)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflater.decompress(file.read(), limit + 1)
    if len(content) > limit:
        raise Refused(Reason.TOO_MANY_PIXELS)
    if not inflater.eof:
        raise Refused(Reason.DAMAGED)
    return read_dataset(BytesIO(content), is_implicit_VR=False, is_little_endian=True)


def _plausible(dataset: Dataset) -> bool:
    """Return whether what has no preamble is a picture all the same; if so, its transfer syntax is known from then."""
    if dataset.get("SOPClassUID") not in SOP_CLASSES:
        return False
    if "TransferSyntaxUID" not in dataset.file_meta:
        if any(keyword in dataset and dataset[keyword].is_undefined_length for keyword in _PIXELS):
            return False
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return True


def _check_kind(dataset: Dataset) -> None:
    if text(dataset, "SOPClassUID") not in SOP_CLASSES:
        raise Refused(Reason.SOP_CLASS)
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax not in TRANSFER_SYNTAXES:
        raise Refused(Reason.TRANSFER_SYNTAX)
    held = [tag for tag in _PIXEL_TAGS if tag in dataset]
    if len(held) != 1 or not dataset.get_item(held[0]).value:
        raise Refused(Reason.NO_PIXELS if len(held) < 2 else Reason.NOT_DECODED)


def _identifiers(dataset: Dataset) -> dict[str, str]:
    found = {keyword: text(dataset, keyword) for keyword in IDENTIFIERS if keyword != "path"}
    return {keyword: said for keyword, said in found.items() if said}


def _check_pixels(dataset: Dataset, reading: Reading) -> int:
    """Return the number of frames, where what the header declares fits the limits, itself and the streams."""
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
    if rows * columns * samples > reading.max_values:
        raise Refused(Reason.TOO_MANY_PIXELS)
    if dataset.PhotometricInterpretation not in _PHOTOMETRICS[samples]:
        raise Refused(Reason.NOT_DECODED)
    if "PixelData" not in dataset:
        if samples != 1 or dataset.PhotometricInterpretation == "PALETTE COLOR":
            raise Refused(Reason.NOT_DECODED)
    elif samples == 3 and dataset.PixelRepresentation:
        raise Refused(Reason.NOT_DECODED)
    count = int(dataset.get("NumberOfFrames") or 1)
    pixels = dataset[next(keyword for keyword in _PIXELS if keyword in dataset)].value
    if not 1 <= count <= 8 * len(pixels):
        raise Refused(Reason.NOT_DECODED)
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        # pydicom takes the low bits.
        if "PixelData" in dataset and dataset.get("HighBit", dataset.BitsStored - 1) != dataset.BitsStored - 1:
            raise Refused(Reason.NOT_DECODED)
    elif syntax != uid.RLELossless:
        size = _jpeg2000_size if syntax in uid.JPEG2000TransferSyntaxes else _jpeg_size
        offsets = as_pixel_options(dataset).get("extended_offsets")
        streams = generate_frames(pixels, number_of_frames=count, extended_offsets=offsets)
        for _, stream in zip(range(count), streams, strict=False):
            if size(stream) != (rows, columns, samples):
                raise Refused(Reason.NOT_DECODED)
    return count


def _jpeg2000_size(stream: bytes) -> tuple[int, int, int]:
    """Return the rows, columns and samples of a JPEG 2000 codestream (ITU-T T.800, A.5.1)."""
    # In a JP2 file, which PS3.5 does not allow but some write, the codestream comes later.
    start = stream.index(b"\xff\x4f\xff\x51") if stream[4:8] == b"jP  " else 0
    opening, right, bottom, left, top = struct.unpack_from(">I4x4I", stream, start)
    if opening != 0xFF4FFF51:
        raise Refused(Reason.NOT_DECODED)
    return bottom - top, right - left, struct.unpack_from(">H", stream, start + 40)[0]


def _jpeg_size(stream: bytes) -> tuple[int, int, int]:
    """Return the rows, columns and samples of a JPEG or JPEG-LS stream (ITU-T T.81, B.2)."""
    place, size, sequential = 2, (0, 0, 0), False
    while True:
        start, marker, length = struct.unpack_from(">BBH", stream, place)
        if start != 0xFF:
            raise Refused(Reason.NOT_DECODED)
        if marker == 0xFF:  # fill
            place += 1
            continue
        if marker in _START_OF_FRAME:
            size = struct.unpack_from(">HHB", stream, place + 5)
            sequential = marker in {0xC0, 0xC1}
        if marker == 0xDA:
            # What a sequential scan must say: decoders guess differently where it says something else.
            if sequential and stream[place + length - 1 : place + length + 2] != b"\0\x3f\0":
                raise Refused(Reason.NOT_DECODED)
            return size
        place += 2 + length


def _decoded(dataset: Dataset, chosen: range, count: int) -> Iterator[NDArray[np.generic]]:
    """Yield the chosen frames, one at a time in memory."""
    syntax = dataset.file_meta.TransferSyntaxUID
    plugin = TRANSFER_SYNTAXES[syntax]
    indices = None if len(chosen) == count else list(chosen)
    frames = get_decoder(syntax).iter_array(
        dataset, indices=indices, decoding_plugin=plugin, number_of_frames=count, allow_excess_frames=False
    )
    colour = dataset.SamplesPerPixel == 3
    shape = (dataset.Rows, dataset.Columns, 3) if colour else (dataset.Rows, dataset.Columns)
    for values, properties in frames:
        if values.shape != shape or (colour and properties["photometric_interpretation"] != "RGB"):
            raise Refused(Reason.NOT_DECODED)
        yield values


def _place(dataset: Dataset, frame: int) -> Place | None:
    """Return where a frame lies, or None where the header does not say, or says what is no place."""
    sources = [dataset]
    for group in functional_groups(dataset, frame):
        for macro in ("PlaneOrientationSequence", "PlanePositionSequence"):
            sources += list(group.get(macro) or ())[:1]
    orientation = [source.ImageOrientationPatient for source in sources if source.get("ImageOrientationPatient")]
    position = [source.ImagePositionPatient for source in sources if source.get("ImagePositionPatient")]
    if not orientation or not position:
        return None
    axes, origin = np.asarray(orientation[-1], np.float64), np.asarray(position[-1], np.float64)
    if axes.shape != (6,) or origin.shape != (3,) or not (np.isfinite(axes).all() and np.isfinite(origin).all()):
        return None
    row, column = axes[:3], axes[3:]
    if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > 0.01:
        return None
    return Place(tuple(axes.tolist()), float(np.cross(row, column) @ origin))
