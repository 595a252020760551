"""The labelled images that a site adapts to, from its catalogue or from folders and a labels file."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.catalogue import Split, open_catalogue
from client.data.image import Recipe
from client.data.index import Counts, Plan, index
from client.data.keys import KEY_BYTES, load_key
from client.data.labels import Labels
from client.data.store import Site, open_site
from client.devices import cpu_cores
from common.errors import DataError, NotPreparedError

__all__ = ["Labelled", "NoImagesError", "from_folders", "from_site"]


class NoImagesError(DataError):
    """There is nothing to adapt to."""


@dataclass(frozen=True)
class Labelled:
    """Labelled images of one task.

    Attributes
    ----------
    pixels : ndarray
        ``[N, C, *]`` uint8, prepared as the study wants them.
    labels, patients : ndarray
        ``[N]``: places in ``classes`` and in ``hashes``.
    classes : tuple of str
        In the order of the head.
    hashes : tuple of str
        Keyed hash of every patient, in hex.
    unseen : ndarray
        ``[N]`` bool: theta was not trained on this patient, so that it may be judged on them.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    patients: NDArray[np.int64]
    classes: tuple[str, ...]
    hashes: tuple[str, ...]
    unseen: NDArray[np.bool_]

    def patients_of(self, label: int) -> NDArray[np.int64]:
        """Return the patients that have an image of a class."""
        return np.unique(self.patients[self.labels == label])

    def patients_per_class(self) -> dict[str, int]:
        """Return how many patients every class has."""
        return {name: len(self.patients_of(place)) for place, name in enumerate(self.classes)}


def from_site(folder: Path, recipe: Recipe, classes: Sequence[str], *, took_part: bool) -> Labelled:
    """Return a site's images of some classes.

    Parameters
    ----------
    classes : sequence of str
        In the order of the head; all labels of the site where empty.
    took_part : bool
        Whether theta was trained at this site too: then its training patients may support, and are never judged.
    """
    return _labelled(open_site(folder, recipe), recipe, classes, took_part=took_part)


@contextmanager
def from_folders(
    folders: Sequence[Path],
    labels: Labels,
    recipe: Recipe,
    classes: Sequence[str],
    *,
    site: Path,
    each_a_patient: bool = False,
    progress: Callable[[Counts], None] = lambda _: None,
) -> Iterator[tuple[Labelled, Counts]]:
    """Yield folders' labelled images, indexed into a folder that goes at the end, and what indexing said.

    Patients' hashes are made with the key of the site, so that they are those of its catalogue.
    """
    site.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_key(site / "site.key", new=os.urandom(KEY_BYTES))
    with tempfile.TemporaryDirectory(prefix=".adapting-", dir=site) as name:
        plan = Plan(
            Path(name), folders, [recipe], labels, split=Split(0.0, 0.0), key=key, each_a_patient=each_a_patient,
            leave_out_shared=True, workers=cpu_cores(),
        )  # fmt: skip
        counts = index(plan, progress)
        try:
            found = open_site(Path(name), recipe)
        except NotPreparedError:
            raise NoImagesError(
                f"none of {counts.files} files is an image with a label and a patient: check the folder, and the "
                "labels file's columns (--map); images that name no patient need a column `patient`, or "
                "--each-a-patient"
            ) from None
        yield _labelled(found, recipe, classes, took_part=False), counts


def _labelled(site: Site, recipe: Recipe, classes: Sequence[str], *, took_part: bool) -> Labelled:
    names = tuple(classes) or site.label_names
    if missing := [name for name in names if name not in site.label_names]:
        raise DataError(f"no image has the label {missing[0]!r}; there are: {', '.join(site.label_names)}")
    if len(names) < 2:
        raise DataError("a task needs two classes at least: name more in --task, or label more images")
    place = np.full(len(site.label_names), -1)
    place[[site.label_names.index(name) for name in names]] = np.arange(len(names))
    rows = np.flatnonzero(place[site.labels] >= 0)
    with open_catalogue(site.folder / "catalogue.sqlite") as catalogue:
        query = (
            "SELECT DISTINCT patient FROM image JOIN cached USING (slot) "
            "WHERE recipe = ? AND checksum IS NOT NULL AND aside IS NULL"
        )
        hashes = sorted(p.hex() for (p,) in catalogue.database.execute(query, (recipe.digest,)))  # as the site numbers
    seen = site.on_side(("train",)) if took_part else np.zeros(len(site.labels), np.bool_)
    return Labelled(site.pixels(rows), place[site.labels[rows]], site.patients[rows], names, tuple(hashes), ~seen[rows])
