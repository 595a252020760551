"""A hospital's folders for tests, made by hand, and what its site folder holds afterwards."""

import csv
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset

from client.data.image import Recipe
from client.data.index import Counts, Plan, index

KEY = bytes(range(32))
RECIPE = Recipe(1, 8)

#: Everything that two runs must agree on; what is left out of `file` and `meta` counts runs.
_TABLES = {
    "meta": "SELECT key, value FROM meta WHERE key <> 'run' ORDER BY key",
    "file": "SELECT key, root, stamp, unit, reason FROM file ORDER BY key",
    "image": "SELECT * FROM image ORDER BY slot",
    "label": "SELECT * FROM label ORDER BY kind, value, label",
    "cached": "SELECT * FROM cached ORDER BY recipe, slot",
    "wipe": "SELECT * FROM wipe ORDER BY slot",
    "sequence": "SELECT name, seq FROM sqlite_sequence",
}


def grey(number: int, size: int = 8) -> NDArray[np.uint8]:
    """Return a picture like no other."""
    return np.random.default_rng(number).integers(0, 256, (size, size), np.uint8)


def png(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def dicom(path: Path, pixels: NDArray[Any], **values: Any) -> Path:
    """Write a CT image, ``[H, W]`` or ``[N, H, W]``, with some elements."""
    frames, (rows, columns) = pixels.shape[:-2], pixels.shape[-2:]
    kind = uid.CTImageStorage if not frames else uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    number = crc32(f"{path.parent.name}/{path.name}".encode())
    elements: dict[str, Any] = {
        "SOPClassUID": kind,
        "SOPInstanceUID": f"1.2.3.{number}",
        "SeriesInstanceUID": "1.2.1",
        "StudyInstanceUID": "1.2.2",
        "PatientID": "one",
        "Modality": "CT",
        "Rows": rows,
        "Columns": columns,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": pixels.itemsize * 8,
        "BitsStored": pixels.itemsize * 8,
        "HighBit": pixels.itemsize * 8 - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes() + b"\0" * (pixels.nbytes % 2),
    }
    if frames:
        elements["NumberOfFrames"] = frames[0]
    dataset = Dataset()
    for name, value in {**elements, **values}.items():
        setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = uid.UID(dataset.SOPInstanceUID)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, count: int, *, name: str = "1.2.1", patient: str = "one", seed: int = 0) -> list[Path]:
    """Write the slices of one CT series, 2 mm apart, under names that are not in their order."""
    return [
        dicom(
            folder / f"{name}-{(at * 7) % 11:02}.dcm",
            np.full((4, 4), 100 * seed + at, np.int16),
            SeriesInstanceUID=name,
            PatientID=patient,
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[0, 0, 2 * at],
        )
        for at in range(count)
    ]


def table(path: Path, rows: Iterable[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def indexed(folder: Path, *sources: Path, **options: Any) -> Counts:
    """Index into ``folder`` / site."""
    plan: dict[str, Any] = {"recipes": [RECIPE], "key": KEY, **options}
    progress = plan.pop("progress", lambda counts: None)
    return index(Plan(folder / "site", list(sources), **plan), progress)


def rows(site: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(site / "catalogue.sqlite")) as database:
        return database.execute(query, values).fetchall()


def column(site: Path, what: str) -> list[Any]:
    """Return an expression over the pictures, in the order of their slots."""
    return [value for (value,) in rows(site, f"SELECT {what} FROM image ORDER BY slot")]


def snapshot(site: Path) -> dict[str, object]:
    """Return all that is in a site's catalogue and caches, but for the number of runs that it took."""
    tables: dict[str, object] = {name: rows(site, query) for name, query in _TABLES.items()}
    return tables | {str(path.relative_to(site)): path.read_bytes() for path in sorted(site.glob("cache/*/*"))}


def cached(site: Path, recipe: Recipe = RECIPE) -> NDArray[np.uint8]:
    """Return the bytes of a cache, one row a slot."""
    data = np.frombuffer((site / "cache" / recipe.digest / "pixels.raw").read_bytes(), np.uint8)
    return data.reshape(-1, *recipe.shape)
