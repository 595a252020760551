"""A site's folder: keyed catalogue, pixel cache, secret key; written once, then opened read-only."""

import hmac
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.image import Recipe, SourceImage, preprocess
from common.canonical import canonical_json
from common.errors import DataError, NotPreparedError

__all__ = ["Site", "create_site", "open_site"]

_SCHEMA = """
CREATE TABLE image (
    slot INTEGER PRIMARY KEY,
    patient BLOB NOT NULL,
    label TEXT NOT NULL,
    modality TEXT NOT NULL,
    split TEXT NOT NULL CHECK (split IN ('train', 'test'))
) STRICT
"""


@dataclass(frozen=True)
class Site:
    """An opened site folder.

    Attributes
    ----------
    folder : Path
        Where it is.
    index, name : int, str
        Its number, and the name that the study knows it by.
    pixels : ndarray
        ``[N, C, *]`` uint8, memory-mapped.
    labels : ndarray
        ``[N]`` index into ``label_names``.
    patients : ndarray
        ``[N]`` number of the patient within this site.
    is_test : ndarray
        ``[N]`` bool: the image's patient is in the test split.
    """

    folder: Path
    index: int
    name: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]
    patients: NDArray[np.int64]
    is_test: NDArray[np.bool_]

    @cached_property
    def _key(self) -> bytes:
        return (self.folder / "site.key").read_bytes()

    def generator(self, *purpose: object) -> np.random.Generator:
        """Return the site's own randomness for one purpose.

        It is a pseudo-random function of the site's secret key and the purpose: unknown outside, the same again
        when a round is repeated, independent between purposes.
        """
        seed = _keyed(self._key, b"generator", canonical_json(purpose))
        return np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "big")))


def create_site(
    folder: Path,
    images: Iterable[SourceImage],
    *,
    index: int,
    name: str,
    key: bytes,
    recipe: Recipe,
    test_fraction: float,
) -> int:
    """Write a site folder and return its number of images; nothing is left behind on failure.

    Parameters
    ----------
    folder : Path
        Must not exist yet; it appears whole or not at all.
    images : iterable of SourceImage
        Taken one by one: memory does not grow with their number.
    index, name : int, str
        The site's number and name.
    key : bytes
        32 secret bytes. Patients are stored as keyed hashes only.
    recipe : Recipe
        How pixels are prepared.
    test_fraction : float
        Share of patients in the test split, by keyed hash: a patient's side never changes as data are added.

    Raises
    ------
    DataError
        There is no image at all, or one has the wrong number of dimensions.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with (
            (work / "pixels.raw").open("wb") as pixels,
            closing(sqlite3.connect(work / "catalogue.sqlite")) as database,
            database,
        ):
            database.execute(_SCHEMA)
            count = 0
            for image in images:
                pixels.write(preprocess(image, recipe).tobytes())
                patient = _keyed(key, b"patient", image.patient.encode())[:16]
                fraction = int.from_bytes(_keyed(key, b"split", patient)[:8], "big") / 2**64
                split = "test" if fraction < test_fraction else "train"
                row = (count, patient, image.label, image.modality, split)
                database.execute("INSERT INTO image VALUES (?, ?, ?, ?, ?)", row)
                count += 1
        if count == 0:
            raise DataError(f"site {name} has no images: check the data source and the partition")
        (work / "site.key").touch(mode=0o600)
        (work / "site.key").write_bytes(key)
        about = {"index": index, "name": name, "shape": [count, *recipe.shape]}
        (work / "site.json").write_text(json.dumps(about))
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return count


def open_site(folder: Path) -> Site:
    """Open a site folder.

    Raises
    ------
    NotPreparedError
        There is no such folder.
    """
    try:
        about = json.loads((folder / "site.json").read_text())
    except FileNotFoundError:
        raise NotPreparedError(
            "this site has no images prepared for this study: run `wardround-lab prepare STUDY` first"
        ) from None
    pixels = np.memmap(folder / "pixels.raw", np.uint8, "r", shape=tuple(about["shape"]))
    with closing(sqlite3.connect(f"file:{folder / 'catalogue.sqlite'}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT label, patient, split = 'test' FROM image ORDER BY slot").fetchall()
    names, labels = np.unique([row[0] for row in rows], return_inverse=True)
    _, patients = np.unique([row[1].hex() for row in rows], return_inverse=True)
    is_test = np.array([row[2] for row in rows], dtype=np.bool_)
    return Site(folder, about["index"], about["name"], pixels, labels, tuple(map(str, names)), patients, is_test)


def _keyed(key: bytes, purpose: bytes, value: bytes) -> bytes:
    return hmac.digest(key, purpose + b"\0" + value, "sha256")
