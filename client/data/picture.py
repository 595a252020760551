"""What a reader makes of a file: pictures, or a reason from a closed list why there are none."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["IDENTIFIERS", "Header", "Picture", "Place", "Reader", "Reading", "Reason", "Refused"]

#: What labels can be joined on, the coarsest first; ``path`` is relative to the folder that is indexed.
IDENTIFIERS = (
    "PatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "AccessionNumber",
    "path",
)


class Reason(StrEnum):
    """Why a file or a picture is set aside. The list is closed: no text of a file is ever part of a reason."""

    NOT_READABLE = "cannot be opened"
    TOO_LARGE = "the file is larger than the limit"
    NOT_AN_IMAGE = "no kind of file that is read here"
    DAMAGED = "damaged: its structure cannot be parsed"
    SOP_CLASS = "holds no pictures (by its SOP class)"
    TRANSFER_SYNTAX = "unknown transfer syntax"
    NO_PIXELS = "has no pixels"
    TOO_MANY_PIXELS = "declares or inflates to more pixels than the limit"
    NOT_DECODED = "its pixels cannot be decoded as its header says"
    TOO_SLOW = "reading took longer than the limit"
    CRASHED = "a decoder crashed on it"
    NOT_DEIDENTIFIED = "its header names a patient, or does not say that identity was removed"
    BURNED_IN = "may show a patient's name in the picture"
    NOT_A_VOLUME = "its slices do not make one volume"
    NOT_FOR_STUDY = "has not the number of dimensions of any study"


class Refused(Exception):  # noqa: N818
    """A reader sets a file aside; it carries a reason and, on purpose, nothing else."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes
    ----------
    frames : str
        Which frames of a multi-frame file: ``all``, ``middle``, or ``k`` as in ``5``: every fifth from the first.
    volumes : bool
        Whether a CT or MR series is one 3-D picture instead of many 2-D ones.
    require_deidentified : bool
        Refuse files that do not say that identity was removed, or whose pixels may show it.
    max_file_bytes, max_values : int
        Largest file, and most numbers (rows x columns x samples) of one decoded frame or volume.
    """

    frames: str = "all"
    volumes: bool = False
    require_deidentified: bool = False
    max_file_bytes: int = 2**31
    max_values: int = 2**27

    def chosen(self, count: int) -> range:
        """Return the frames to read of a file that has ``count`` of them."""
        if self.frames == "all":
            return range(count)
        return range(count // 2, count // 2 + 1) if self.frames == "middle" else range(0, count, int(self.frames))


@dataclass(frozen=True)
class Header:
    """The only header values that are kept, and what the header says about de-identification.

    Attributes
    ----------
    modality, manufacturer, scanner, body_part : str
        From an allow-list of tags, cleaned; ``""`` where unknown.
    exposed : tuple of str
        Keywords of identifying attributes (PS3.15, table E.1-1) that have a value; never the values.
    notes : tuple of str
        From ``identity-removed`` (the file says so), ``burned-in`` (it says that text is burned into the pixels),
        ``burned-in-unknown`` (it does not say, and its modality often has such text) and ``face`` (a CT or MR of
        the head).
    """

    modality: str = ""
    manufacturer: str = ""
    scanner: str = ""
    body_part: str = ""
    exposed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a slice lies in its patient (PS3.3 C.7.6.2).

    Attributes
    ----------
    orientation : tuple of float
        Six direction cosines: along a row, along a column.
    depth : float
        Position along the normal of the slice, in mm.
    """

    orientation: tuple[float, ...]
    depth: float


@dataclass(frozen=True)
class Picture:
    """One picture in a worker's memory, before anything is stored.

    Attributes
    ----------
    identifiers : mapping
        Of `IDENTIFIERS`, those that the file has, in clear. They never leave the worker but as keyed hashes.
    values : ndarray
        The numbers that were decoded, before any display transformation: equal pictures have equal ones.
    shown : callable
        From a window's name (``header``, or of `client.data.windows`) to the picture as a display shows it: float32
        ``[H, W]`` or ``[H, W, 3]``, or a volume ``[D, H, W]``; 0 to 1, larger is brighter.
    header : Header
        What is kept of the file's header.
    frame : int
        Place in the file, from 0.
    label : str or None
        The class, where the file itself says so.
    place : Place or None
        For the slices of a series.
    volume : bool
        Whether the first axis is depth.
    """

    identifiers: Mapping[str, str]
    values: NDArray[np.generic]
    shown: Callable[[str], NDArray[np.float32]]
    header: Header = field(default_factory=Header)
    frame: int = 0
    label: str | None = None
    place: Place | None = None
    volume: bool = False


class Reader(Protocol):
    """Reads one kind of file."""

    def __call__(self, path: Path, reading: Reading) -> Iterator[Picture]:
        """Yield a file's pictures, one at a time in memory.

        Raises
        ------
        Refused
            With the reason; the file's other pictures are not used either.
        """
