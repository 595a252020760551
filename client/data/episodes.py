"""Episodes from a site's images: N classes, K support and Q query images each, no patient on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.augment import SYMMETRIES, transform
from client.data.store import Site
from common import study
from common.errors import DataError
from common.meta.episodes import Batch, Episodes
from common.pixels import CENTRE, SPREAD

__all__ = ["ByPatient", "Pool", "draw", "make_pool", "network_input"]

# How often an episode is begun anew when patients with several classes leave a class with one side only.
_TRIES = 50


@dataclass(frozen=True)
class ByPatient:
    """The images of one class, by patient; three arrays, so that many patients cost little.

    Attributes
    ----------
    patients : ndarray
        ``[P]``, ascending.
    starts : ndarray
        ``[P + 1]``: the p-th patient's images are ``slots[starts[p]:starts[p + 1]]``.
    slots : ndarray
        ``[N]``, which image of the site.
    """

    patients: NDArray[np.int64]
    starts: NDArray[np.int64]
    slots: NDArray[np.int64]

    def of(self, place: int) -> NDArray[np.int64]:
        """Return the images of the patient at some place of ``patients``."""
        return self.slots[self.starts[place] : self.starts[place + 1]]

    def place(self, patient: int) -> int | None:
        """Return the place of a patient, None where it has no image of this class."""
        place = int(np.searchsorted(self.patients, patient))
        return place if place < len(self.patients) and self.patients[place] == patient else None


@dataclass(frozen=True)
class Pool:
    """The images that episodes are drawn from: by class, by patient.

    Attributes
    ----------
    classes : tuple of int
        Places in the study's class list of the classes on offer; each has at least two patients.
    images : tuple of ByPatient
        Of each of these classes.
    """

    classes: tuple[int, ...]
    images: tuple[ByPatient, ...]


def make_pool(
    site: Site,
    classes: Sequence[str],
    first: int,
    splits: Sequence[str],
    *,
    among: NDArray[np.bool_] | None = None,
) -> Pool:
    """Collect the images of some classes.

    Parameters
    ----------
    classes : sequence of str
        Class names; those that the site does not have, or has from one patient only, are left out.
    first : int
        Place of ``classes[0]`` in the study's class list.
    splits : sequence of str
        Some of `SPLITS`: the sides whose patients are on offer.
    among : ndarray, optional
        ``[P]``: which patients are on offer at all.
    """
    usable = site.on_side(splits)
    if among is not None:
        usable = usable & among[site.patients]
    kept, images = [], []
    for place, name in enumerate(classes, first):
        if name not in site.label_names:
            continue
        slots = np.flatnonzero(usable & (site.labels == site.label_names.index(name)))
        slots = slots[np.argsort(site.patients[slots], kind="stable")]
        patients, starts = np.unique(site.patients[slots], return_index=True)
        if len(patients) >= 2:
            kept.append(place)
            images.append(ByPatient(patients, np.append(starts, len(slots)), slots))
    return Pool(tuple(kept), tuple(images))


def draw(
    site: Site,
    pool: Pool,
    spec: study.Episodes,
    count: int,
    generator: np.random.Generator,
    *,
    augment: bool = False,
) -> Episodes:
    """Draw episodes.

    A class with fewer than K + Q images gives what it has; a pool with fewer classes than ways gives episodes of
    fewer ways. The rest is padding, marked in the masks.

    Parameters
    ----------
    spec : common.study.Episodes
        Ways, shots (K), queries (Q) and the label mode.
    count : int
        Number of episodes T.
    generator : numpy.random.Generator
        The site's own.
    augment : bool
        Turn and mirror images as ``spec.augment`` says: for training, never for evaluation.

    Returns
    -------
    Episodes
        Images float32 ``[T, ways * K, C, *]`` and ``[T, ways * Q, C, *]``.

    Raises
    ------
    DataError
        Fewer than two classes have two patients each, or patients cannot be kept apart.
    """
    if len(pool.classes) < 2:
        raise DataError(
            f"episodes need two classes with two patients each, this site offers {len(pool.classes)} here: "
            "add labelled patients, or leave this site out"
        )
    fixed = spec.labels == "fixed"
    ways = len(spec.class_names) if fixed else spec.ways
    sides = (ways * spec.shots, ways * spec.queries)
    slots = [np.zeros((count, size), np.int64) for size in sides]
    labels = [np.zeros((count, size), np.int64) for size in sides]
    masks = [np.zeros((count, size), np.bool_) for size in sides]
    classes = np.full((count, ways), -1, np.int64)
    for t in range(count):
        if fixed:
            chosen = np.arange(len(pool.classes))
            way_of = np.array(pool.classes)
            classes[t] = np.arange(ways)
        else:
            chosen = generator.choice(len(pool.classes), min(ways, len(pool.classes)), replace=False)
            way_of = generator.permutation(ways)[: len(chosen)]
            classes[t, way_of] = np.array(pool.classes)[chosen]
        picked = _split([pool.images[c] for c in chosen], spec.shots, spec.queries, generator)
        for side in (0, 1):
            at = np.concatenate([parts[side] for parts in picked])
            ways_at = np.repeat(way_of, [len(parts[side]) for parts in picked])
            slots[side][t, : len(at)], labels[side][t, : len(at)] = at, ways_at
            masks[side][t, : len(at)] = True
    support, query = (_batch(site, s, y, m) for s, y, m in zip(slots, labels, masks, strict=True))
    if augment and spec.augment != "none":
        per_class = generator.integers(SYMMETRIES, size=(count, ways))
        for side, batch in enumerate((support, query)):
            if spec.augment == "image":
                transform(batch.x, generator.integers(SYMMETRIES, size=labels[side].shape))
            else:
                transform(batch.x, np.take_along_axis(per_class, labels[side], axis=1))
    return Episodes(support, query, torch.from_numpy(classes))


def _split(
    classes: Sequence[ByPatient], shots: int, queries: int, generator: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return each class's support and query slots; a patient is on one side in all classes."""
    for _ in range(_TRIES):
        side_of: dict[int, int] = {}
        empty = np.zeros(0, np.int64)
        picked = [(empty, empty)] * len(classes)
        for at in sorted(range(len(classes)), key=lambda i: len(classes[i].patients)):  # the rarest chooses first
            images = classes[at]
            sides: tuple[list[int], list[int]] = ([], [])
            for patient, side in side_of.items():
                if (place := images.place(patient)) is not None:
                    sides[side].append(place)
            taken = {*sides[0], *sides[1]}
            # So many, drawn without looking at the rest, have enough that are free.
            count = min(len(images.patients), shots + queries + len(taken))
            order = generator.choice(len(images.patients), count, replace=False).tolist()
            free = [place for place in order if place not in taken]
            wanted = max(0, min(shots, max(1, len(images.patients) // 2)) - len(sides[0]))
            support = sides[0] + free[:wanted]
            query = (sides[1] + free[wanted:])[:queries]
            for places, side in ((support, 0), (query, 1)):
                side_of |= dict.fromkeys(images.patients[places].tolist(), side)
            picked[at] = (_take(images, support, shots, generator), _take(images, query, queries, generator))
        if all(len(a) and len(b) for a, b in picked):
            return picked
    raise DataError(
        "patients have so many classes in common that no episode keeps them apart: use fewer ways or add patients"
    )


def _take(images: ByPatient, places: list[int], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return up to ``count`` slots: one image of every patient first, then second ones, and so on."""
    if len(places) >= count:
        starts, ends = images.starts[places[:count]], images.starts[np.array(places[:count], np.int64) + 1]
        return images.slots[generator.integers(starts, ends)]
    shuffled = [generator.permutation(images.of(place)) for place in places]
    depth = max((len(s) for s in shuffled), default=0)
    turns = [int(s[d]) for d in range(min(depth, count)) for s in shuffled if d < len(s)]
    return np.array(turns[:count], np.int64)


def _batch(site: Site, slots: NDArray[np.int64], labels: NDArray[np.int64], mask: NDArray[np.bool_]) -> Batch:
    return Batch(network_input(site.pixels(slots)), torch.from_numpy(labels), torch.from_numpy(mask))


def network_input(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Return prepared pixels ``[*, C, *]`` as a network takes them: float32, about zero mean and unit deviation."""
    x = pixels.astype(np.float32)  # by NumPy: PyTorch would wake threads for it
    x -= np.float32(CENTRE)
    x /= np.float32(SPREAD)
    return torch.from_numpy(x)
