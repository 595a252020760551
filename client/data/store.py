"""A site's folder, opened read-only for one study: labels, patients and prepared pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from client.data.cache import mapped
from client.data.catalogue import open_catalogue
from client.data.image import Recipe
from client.data.keys import keyed, load_key
from common.canonical import canonical_json
from common.errors import DataError, NotPreparedError

__all__ = ["SPLITS", "Site", "open_site"]

T = TypeVar("T")

#: The sides that a patient can be on.
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Site:
    """An opened site folder.

    Attributes
    ----------
    folder : Path
        Where it is.
    index, name : int, str
        Its number among virtual sites, and its name.
    cache : ndarray
        ``[S, C, *]`` uint8, memory-mapped: all prepared pixels.
    slots : ndarray
        ``[N]``, where in ``cache`` an image's pixels are. Images that no episode may hold are not among the N.
    labels : ndarray
        ``[N]`` index into ``label_names``.
    patients : ndarray
        ``[N]`` number of the patient within this site.
    split : ndarray
        ``[N]`` index into `SPLITS`: the side of the image's patient.
    keys : tuple of bytes
        ``[P]``, each patient's keyed hash, ascending: unlike the number it is the same whoever else is there.
    """

    folder: Path
    index: int
    name: str
    cache: NDArray[np.uint8]
    slots: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]
    patients: NDArray[np.int64]
    split: NDArray[np.int8]
    keys: tuple[bytes, ...]

    @cached_property
    def _key(self) -> bytes:
        return load_key(self.folder / "site.key")

    def pixels(self, images: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the pixels of some images ``[*]`` as ``[*, C, *]``, in memory."""
        out: NDArray[np.uint8] = self.cache[self.slots[images]]
        return out

    def on_side(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Return ``[N]``: whether an image's patient is in one of these splits."""
        return np.isin(self.split, [SPLITS.index(name) for name in names])

    def generator(self, *purpose: object) -> np.random.Generator:
        """Return the site's own randomness for one purpose.

        It is a pseudo-random function of the site's secret key and the purpose: unknown outside, the same again
        when a round is repeated, independent between purposes.
        """
        seed = keyed(self._key, "generator", canonical_json(purpose))
        return np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "big")))

    def coin(self, patient: int, *purpose: object) -> bytes:
        """Return 16 bytes that are a patient's own for one purpose: they say nothing of who else is there."""
        return keyed(self._key, "coin", self.keys[patient] + canonical_json(purpose))


def open_site(folder: Path, recipe: Recipe) -> Site:
    """Open a site folder for a study.

    Parameters
    ----------
    folder : Path
        As `client.data.index.index` wrote it.
    recipe : Recipe
        How the study wants its pixels.

    Raises
    ------
    NotPreparedError
        There is no catalogue, or no cache for this recipe.
    DataError
        The catalogue or the cache is damaged, or the same picture or patient is on two sides of the split.
    """
    with open_catalogue(folder / "catalogue.sqlite") as catalogue:
        run = catalogue.database.execute
        usable = "FROM image JOIN cached USING (slot) WHERE recipe = ? AND checksum IS NOT NULL AND aside IS NULL"
        rows = run(f"SELECT slot, label, patient, split {usable} ORDER BY slot", (recipe.digest,)).fetchall()
        if not rows:
            raise NotPreparedError(
                "this site has no images prepared for this study: run `wardround-site index --study STUDY` with its "
                "folders, or in simulation `wardround-lab prepare STUDY`"
            )
        if catalogue.setting("leaks") not in ("", "0"):
            raise DataError(
                "this site's split leaks: a picture is on two sides of it; see the report of `wardround-site index`"
            )
        name, number = catalogue.setting("name"), int(catalogue.setting("number"))
    slots, labels, patients, split = zip(*rows, strict=True)
    label_names, keys = sorted(set(labels)), sorted(set(patients))
    return Site(
        folder,
        number,
        name,
        mapped(folder, recipe, slots[-1]),
        np.array(slots, np.int64) - 1,
        _places(labels, label_names),
        tuple(label_names),
        _places(patients, keys),
        np.array([SPLITS.index(side) for side in split], np.int8),
        tuple(keys),
    )


def _places(values: Sequence[T], among: Sequence[T]) -> NDArray[np.int64]:
    place = {value: number for number, value in enumerate(among)}
    return np.array([place[value] for value in values], np.int64)
