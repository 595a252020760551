"""What a worker does with one file or series: read it, forget who it is, prepare its pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.dicom import read_dicom, series_of
from client.data.image import Recipe, prepare
from client.data.keys import keyed, keyed_pixels
from client.data.npz import read_npz
from client.data.picture import Header, Picture, Reader, Reading, Reason, Refused
from client.data.pictures import read_picture
from client.data.volume import read_volume
from common.errors import DataError

__all__ = ["Entry", "Task", "Work", "read", "survey"]


@dataclass(frozen=True)
class Task:
    """One file, or the files of one series.

    Attributes
    ----------
    paths : tuple of Path
        In clear, in memory only.
    name : str
        Of a single file, relative to the folder that is indexed.
    """

    paths: tuple[Path, ...]
    name: str


@dataclass(frozen=True)
class Work:
    """How a site's files are read; the same for all of them.

    Attributes
    ----------
    key : bytes
        The site's secret.
    reading : Reading
        What is read of a file.
    recipes : tuple of Recipe
        What pixels are prepared for.
    """

    key: bytes
    reading: Reading
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True)
class Entry:
    """A picture as it may leave the worker: nobody is in it.

    Attributes
    ----------
    identifiers : dict of str to bytes
        Keyed hashes of `client.data.picture.IDENTIFIERS`.
    content : bytes
        Keyed hash of the decoded values: equal pictures have equal ones.
    header, frame, label
        As in `client.data.picture.Picture`.
    pixels : tuple of bytes or None
        For each recipe; None where the picture has not its number of dimensions.
    """

    identifiers: dict[str, bytes]
    content: bytes
    header: Header
    frame: int
    label: str | None
    pixels: tuple[bytes | None, ...]


def read(work: Work, task: Task) -> Iterator[Entry | Reason]:
    """Yield a task's pictures; a reason, if there is one, comes last and takes back all before it."""
    try:
        reader = _reader(task.paths[0], work.reading)
        if work.reading.volumes and reader is read_dicom:
            yield _entry(work, task, read_volume(task.paths, work.reading))
        else:
            for picture in reader(task.paths[0], work.reading):
                yield _entry(work, task, picture)
    except Refused as refusal:
        yield refusal.reason
    except MemoryError:
        yield Reason.TOO_MANY_PIXELS
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # whatever the libraries raise can quote the file, and some panic with no Exception
        yield Reason.DAMAGED


def survey(work: Work, task: Task) -> Iterator[bytes | Reason]:
    """Yield the keyed hash of the series that a file belongs to; a reason where it is of none."""
    try:
        path = task.paths[0]
        if _reader(path, work.reading) is read_dicom and (series := series_of(path, work.reading)):
            yield keyed(work.key, "SeriesInstanceUID", series)
    except Refused as refusal:
        yield refusal.reason


def _entry(work: Work, task: Task, picture: Picture) -> Entry:
    hashes = {kind: keyed(work.key, kind, value) for kind, value in picture.identifiers.items()}
    if len(task.paths) == 1:
        hashes["path"] = keyed(work.key, "path", task.name)
    shown = {window: picture.shown(window) for window in {recipe.window for recipe in work.recipes}}
    pixels = tuple(_prepared(shown[recipe.window], recipe, volume=picture.volume) for recipe in work.recipes)
    if pixels and not any(pixels):
        raise Refused(Reason.NOT_FOR_STUDY)
    return Entry(
        hashes,
        keyed_pixels(work.key, picture.values),
        picture.header,
        picture.frame,
        picture.label,
        pixels,
    )


def _prepared(shown: NDArray[np.float32], recipe: Recipe, *, volume: bool) -> bytes | None:
    try:
        return prepare(shown, recipe, volume=volume).tobytes()
    except DataError:
        return None


def _reader(path: Path, reading: Reading) -> Reader:
    """Choose by content, not by name."""
    try:
        if path.stat().st_size > reading.max_file_bytes:
            raise Refused(Reason.TOO_LARGE)
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        raise Refused(Reason.NOT_READABLE) from None
    if start[128:] == b"DICM":
        return read_dicom
    if start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")):
        return read_picture
    if start.startswith(b"PK\x03\x04") and path.suffix.lower() == ".npz":
        return read_npz
    return read_dicom  # old files have no preamble; it refuses what is no DICOM
