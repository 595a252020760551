"""Public image sets as labelled arrays: from an npz file, or MedMNIST by name with its published checksum."""

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from numpy.typing import NDArray

from common.errors import DataError
from simulations import medmnist

__all__ = ["LabelledImages", "load"]

_SPLITS = ("train", "val", "test")

# What numpy and zipfile raise for a file that is no npz, or one with some bytes changed.
_UNREADABLE = (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class LabelledImages:
    """Images with one label each, and what must stay together or came from one place.

    Parameters
    ----------
    images
        uint8 ``[N, H, W]`` (grey), ``[N, H, W, 3]`` (RGB) or ``[N, D, H, W]`` (volumes).
    labels
        int64 ``[N]``, index into ``label_names``.
    label_names
        Class names. A class may be without images.
    groups
        str ``[N]``: patient, lesion or smear. Images of one group never part: not over sites, and not over
        support and query. A set that names no groups has one per distinct image content, so that at least
        exact duplicates stay together; images of one patient may then still be in several groups.
    sites
        int64 ``[N]``, index into ``site_names``, or None where the real source is not known.
    site_names
        Names of the real sources, empty without ``sites``.

    Raises
    ------
    DataError
        If the arrays do not fit together.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]
    groups: NDArray[np.str_]
    sites: NDArray[np.int64] | None
    site_names: tuple[str, ...]

    def __post_init__(self) -> None:
        shape, dtype = self.images.shape, self.images.dtype
        # A fourth axis of 1, 2 or 4 is grey, grey with alpha or RGBA, and would pass for a very thin volume.
        unusual = len(shape) == 4 and shape[-1] in (1, 2, 4)
        if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape or unusual:
            raise DataError(
                f"images are {dtype} {list(shape)}; make them uint8 [N, H, W], [N, H, W, 3] or [N, D, H, W], "
                "with at least one image."
            )
        n = shape[0]
        _check_index("labels", self.labels, n, self.label_names)
        if self.sites is not None:
            _check_index("sites", self.sites, n, self.site_names)
        if self.groups.shape != (n,):
            raise DataError(f"groups are {list(self.groups.shape)} for {n} images; give one group per image.")


def load(source: str, *, size: int | None = None, cache: Path | None = None) -> LabelledImages:
    """Load a public set.

    Parameters
    ----------
    source
        ``npz:PATH``, or ``medmnist:NAME`` with a name from ``simulations.medmnist.SETS``.

        An npz file holds either ``images``, ``labels`` and, where known, ``sites``, ``groups``,
        ``label_names`` and ``site_names``, or MedMNIST's ``train_images``, ``train_labels`` and so on. Names
        in a ``.json`` file beside it come first. MedMNIST's three splits are joined: ours are by group, and
        made at the site.
    size
        Side length in pixels. MedMNIST: the published size to take, 28 by default. npz: the size that the
        file must have; nothing is resized here, that is part of a study's preprocessing.
    cache
        Folder of MedMNIST's files under their published names. Default: ``$WARDROUND_CACHE``, then the user's
        cache folder. A file that is there is never fetched; its checksum is verified every time.

    Returns
    -------
    LabelledImages
        All images of the set in the order of the file.

    Raises
    ------
    DataError
        If the source is unknown, a file is missing, damaged or altered, or images have several labels each.
    """
    kind, _, name = source.partition(":")
    if kind == "npz" and name:
        return _load_npz(Path(name).expanduser(), size)
    if kind == "medmnist" and name:
        return _load_medmnist(name, 28 if size is None else size, cache)
    raise DataError(f"the data source {source!r} is not known; write npz:PATH or medmnist:NAME.")


def _load_npz(path: Path, size: int | None) -> LabelledImages:
    arrays, names = _read_npz(path), _read_names(path.with_suffix(".json"))
    if "images" not in arrays:
        arrays = _join_splits(arrays, path)
    images, labels = arrays["images"], _one_label(arrays, path)
    if size is not None and set(_sides(images)) != {size}:
        found = "x".join(map(str, _sides(images)))
        raise DataError(
            f"{path.name} has images of {found} pixels, not of side {size}; leave the size out here, and set "
            "it in the study's preprocessing."
        )
    # Omniglot's `drawers` are no groups: a drawer drew every character of an alphabet once, so such a group
    # would hold one image of every class. No label skew could be made of it, and episodes would differ from
    # the published ones. The numbers also start again in each alphabet, for other people.
    groups = arrays.get("groups")
    sites: NDArray[np.int64] | None = None
    site_names: tuple[str, ...] = ()
    if "sites" in arrays:
        sites = _integers("sites", arrays["sites"], path)
        site_names = names.get("site_names") or _column_names(arrays, "site_names", sites)
    return LabelledImages(
        images=images,
        labels=labels,
        label_names=names.get("label_names") or _column_names(arrays, "label_names", labels),
        groups=_content_groups(images) if groups is None else groups.astype(np.str_),
        sites=sites,
        site_names=site_names,
    )


def _load_medmnist(name: str, size: int, cache: Path | None) -> LabelledImages:
    facts = medmnist.SETS.get(name)
    if facts is None:
        raise DataError(f"MedMNIST has no set {name!r}; it has {', '.join(medmnist.SETS)}.")
    if facts.task == "multi-label":
        raise DataError(f"{name} has several labels an image (multi-label), episodes need one; take another set.")
    if size not in facts.md5:
        sizes = ", ".join(map(str, facts.md5))
        raise DataError(f"{name} is not published with side {size}; take one of {sizes}.")
    path = _fetch(name, size, facts.md5[size], cache)
    arrays = _join_splits(_read_npz(path), path)
    images = arrays["images"]
    return LabelledImages(
        images=images,
        labels=_one_label(arrays, path),
        label_names=facts.label_names,
        groups=_content_groups(images),
        sites=None,
        site_names=(),
    )


def _fetch(name: str, size: int, md5: str, cache: Path | None) -> Path:
    """Return the verified file in the cache, after a download where it is missing."""
    folder = Path(cache or os.environ.get("WARDROUND_CACHE") or pooch.os_cache("wardround")).expanduser()
    path, url = folder / medmnist.file_name(name, size), medmnist.url(name, size)
    try:
        # Only a missing file is pooch's affair: it would quietly replace one with another checksum.
        if not path.exists():
            pooch.retrieve(url, known_hash=f"md5:{md5}", fname=path.name, path=folder)
            return path
    except (OSError, ValueError) as error:  # no network or no space; a download with another checksum
        raise DataError(
            f"{url} could not be fetched ({error}). Try again, or put the file there by hand: {path}."
        ) from error
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if found != md5:
        raise DataError(
            f"the checksum of {path} is md5 {found}, the published one is {md5}: the file is damaged or "
            "altered, and was not used. Delete it and load again."
        )
    return path


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; check the path.") from error
    except _UNREADABLE as error:  # their text would advise to unpickle
        raise DataError(
            f"{path} cannot be read as an npz file of plain arrays ({type(error).__name__}); get it again."
        ) from error


def _read_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the lists of names in the description beside a set, none without the file."""
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        names = {key: facts[key] for key in ("label_names", "site_names") if key in facts}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} does not describe an image set ({error}); repair or remove it.") from error
    if not all(isinstance(value, list) for value in names.values()):
        raise DataError(f"label_names and site_names in {path} must be lists; repair or remove it.")
    return {key: tuple(map(str, value)) for key, value in names.items()}


def _join_splits(arrays: dict[str, NDArray[Any]], path: Path) -> dict[str, NDArray[Any]]:
    keys = [f"{split}_{part}" for part in ("images", "labels") for split in _SPLITS]
    if missing := [key for key in keys if key not in arrays]:
        raise DataError(
            f"{path.name} has neither `images` nor MedMNIST's {', '.join(missing)}; give it one of the two layouts."
        )
    try:
        images = np.concatenate([arrays[key] for key in keys[:3]])
        labels = np.concatenate([arrays[key] for key in keys[3:]])
    except ValueError as error:
        raise DataError(f"the three splits of {path.name} differ in shape; make them alike.") from error
    return {"images": images, "labels": labels}


def _one_label(arrays: dict[str, NDArray[Any]], path: Path) -> NDArray[np.int64]:
    """Return labels ``[N]`` from ``[N]`` or ``[N, 1]``."""
    labels = arrays.get("labels")
    if labels is None:
        raise DataError(f"{path.name} has images and no `labels`; add them.")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            f"{path.name} has labels of shape {list(labels.shape)}: several labels an image (multi-label), "
            "episodes need one. Take another set, or make one label of them."
        )
    return _integers("labels", labels, path)


def _integers(what: str, values: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu":
        raise DataError(f"the {what} of {path.name} are {values.dtype}; they must be integers from 0.")
    return values.astype(np.int64)


def _column_names(arrays: dict[str, NDArray[Any]], key: str, values: NDArray[Any]) -> tuple[str, ...]:
    """Return the names in the file, or the numbers themselves where it has none."""
    if key in arrays:
        return tuple(map(str, arrays[key]))
    return tuple(map(str, range(int(values.max(initial=-1)) + 1)))


def _content_groups(images: NDArray[Any]) -> NDArray[np.str_]:
    """Return one group per distinct image content ``[N]``, named by its digest."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=12).hexdigest() for image in images]
    return np.array(digests, dtype=np.str_)


def _sides(images: NDArray[Any]) -> tuple[int, ...]:
    """Return the side lengths in pixels, without a last axis of colours."""
    return images.shape[1:-1] if images.ndim == 4 and images.shape[-1] == 3 else images.shape[1:]


def _check_index(what: str, values: NDArray[np.int64], n: int, names: tuple[str, ...]) -> None:
    if values.shape != (n,):
        raise DataError(f"{what} are {list(values.shape)} for {n} images; give one per image.")
    low, high = values.min(), values.max()
    if low < 0 or high >= len(names):
        raise DataError(f"{what} go from {low} to {high}, with {len(names)} names; count from 0 and name each one.")
