"""Prepared pixels, memory-mapped: one file a recipe, a picture's slot says where in it."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.catalogue import Catalogue
from client.data.image import Recipe
from common.errors import DataError

__all__ = ["PixelCache", "caches", "evict", "mapped", "verify"]


@dataclass(frozen=True)
class PixelCache:
    """The pixels of one recipe, open for writing.

    Attributes
    ----------
    folder : Path
        Its folder in the site's ``cache``.
    recipe : Recipe
        How the pixels were prepared.
    descriptor : int
        Of the open file.
    """

    folder: Path
    recipe: Recipe
    descriptor: int

    @classmethod
    def open(cls, site: Path, recipe: Recipe) -> "PixelCache":
        """Open a site's cache for a recipe; make it where there is none."""
        folder = site / "cache" / recipe.digest
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "recipe.json.partial"
        partial.write_text(json.dumps(vars(recipe)))
        os.replace(partial, folder / "recipe.json")
        return cls(folder, recipe, os.open(folder / "pixels.raw", os.O_RDWR | os.O_CREAT, 0o600))

    def missing(self, catalogue: Catalogue, unit: bytes) -> bool:
        """Whether a file's or series' pictures are not all here."""
        query = (
            "SELECT 1 FROM image WHERE unit = ? AND NOT EXISTS "
            "(SELECT 1 FROM cached WHERE recipe = ? AND cached.slot = image.slot) LIMIT 1"
        )
        return catalogue.database.execute(query, (unit, self.recipe.digest)).fetchone() is not None

    def check(self, catalogue: Catalogue) -> None:
        """Have the catalogue forget what it says is here, where the file was removed or cut off."""
        (last,) = catalogue.database.execute(
            "SELECT max(slot) FROM cached WHERE recipe = ? AND checksum IS NOT NULL", (self.recipe.digest,)
        ).fetchone()
        if os.fstat(self.descriptor).st_size < (last or 0) * self.recipe.nbytes:
            catalogue.database.execute("DELETE FROM cached WHERE recipe = ?", (self.recipe.digest,))

    def write(self, catalogue: Catalogue, slot: int, pixels: bytes | None) -> None:
        """Write a picture, or that it has not this recipe's dimensions; it counts when the transaction ends."""
        if pixels is not None:
            self._put(slot, pixels)
        catalogue.database.execute(
            "INSERT OR REPLACE INTO cached (slot, recipe, checksum) VALUES (?, ?, ?)",
            (slot, self.recipe.digest, None if pixels is None else zlib.crc32(pixels)),
        )

    def wipe(self, slot: int) -> None:
        """Overwrite a picture that is not to be known any more."""
        if (slot - 1) * self.recipe.nbytes < os.fstat(self.descriptor).st_size:
            self._put(slot, bytes(self.recipe.nbytes))

    def trim(self, slots: int) -> None:
        """Cut off what lies behind the last slot: pictures of a file that was refused, or of a run that was killed."""
        if os.fstat(self.descriptor).st_size > slots * self.recipe.nbytes:
            os.ftruncate(self.descriptor, slots * self.recipe.nbytes)

    def sync(self) -> None:
        """Make what was written durable; before the catalogue says that it is there."""
        os.fdatasync(self.descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def _put(self, slot: int, data: bytes) -> None:
        at = (slot - 1) * self.recipe.nbytes
        while data:  # the system may write less than asked
            written = os.pwrite(self.descriptor, data, at)
            data, at = data[written:], at + written


def caches(site: Path) -> list[Recipe]:
    """Return the recipes for which a site has a cache."""
    return sorted((_recipe(p) for p in (site / "cache").glob("*/recipe.json")), key=lambda recipe: recipe.digest)


def mapped(site: Path, recipe: Recipe, slots: int) -> NDArray[np.uint8]:
    """Return the pixels ``[slots, C, *]`` of slots 1, 2, ..., memory-mapped and read-only.

    Raises
    ------
    DataError
        The file is shorter than the catalogue says.
    """
    path = site / "cache" / recipe.digest / "pixels.raw"
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < slots * recipe.nbytes:
            raise DataError("the pixel cache is shorter than its catalogue says: run `wardround-site verify`")
        pages = mmap(file.fileno(), slots * recipe.nbytes, access=ACCESS_READ)
    return np.frombuffer(pages, np.uint8).reshape(slots, *recipe.shape)


def verify(site: Path, catalogue: Catalogue) -> Iterator[tuple[str, int]]:
    """Yield recipe and slot of every cached picture whose bytes are not those that were written."""
    recipes = {recipe.digest: recipe for recipe in caches(site)}
    rows = catalogue.database.execute("SELECT DISTINCT recipe FROM cached ORDER BY recipe").fetchall()
    for (digest,) in rows:
        path = site / "cache" / digest / "pixels.raw"
        size = recipes[digest].nbytes if digest in recipes else 0
        with path.open("rb") if path.exists() else nullcontext() as file:
            query = "SELECT slot, checksum FROM cached WHERE recipe = ? AND checksum IS NOT NULL ORDER BY slot"
            for slot, checksum in catalogue.database.execute(query, (digest,)):
                if file is not None:
                    file.seek((slot - 1) * size)
                if file is None or not size or zlib.crc32(file.read(size)) != checksum:
                    yield digest, slot


def evict(site: Path, catalogue: Catalogue, recipe: Recipe) -> None:
    """Remove a recipe's cache; indexing for it again brings it back."""
    with catalogue.transaction():
        catalogue.database.execute("DELETE FROM cached WHERE recipe = ?", (recipe.digest,))
    shutil.rmtree(site / "cache" / recipe.digest, ignore_errors=True)


def _recipe(path: Path) -> Recipe:
    try:
        return Recipe(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise DataError(
            "a recipe in the site's cache folder is damaged: remove that cache folder and index again"
        ) from None
