"""Image sets in npz files as pictures: streamed, so that a set of any size takes the memory of one image."""

import json
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from client.data.picture import Picture, Reading, Reason, Refused

__all__ = ["read_npz"]

_SPLITS = ("train", "val", "test")
_COLOURS, _GREY_AXES, _COLOUR_AXES = 3, 3, 4


def read_npz(path: Path, reading: Reading) -> Iterator[Picture]:
    """Read a set of images with labels.

    The file holds ``images`` uint8 ``[N, H, W]``, ``[N, H, W, 3]`` or, for volumes, ``[N, D, H, W]``, ``labels``
    ``[N]`` or ``[N, 1]``, and where known ``groups`` ``[N]`` and ``label_names``; or MedMNIST's ``train_images``,
    ``train_labels`` and so on, read one after the other. ``label_names`` in a ``.json`` file of the same name come
    first. A group (patient, lesion, smear) is the image's patient; without groups, an image has none.

    Raises
    ------
    Refused
        NOT_AN_IMAGE for another layout, DAMAGED for a file that is no whole npz, TOO_MANY_PIXELS.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = {name.removesuffix(".npy") for name in archive.namelist()}
            whole = {"images", "labels"} <= parts
            names = _names(path, archive if "label_names" in parts else None, reading)
            number = 0
            for prefix in [""] if whole else [f"{s}_" for s in _SPLITS if f"{s}_images" in parts]:
                labels = _small(archive, f"{prefix}labels", reading)
                if labels.dtype.kind not in "iu" or (names and labels.size and labels.min() < 0):
                    raise Refused(Reason.DAMAGED)  # -1 would be the last name
                groups = _small(archive, "groups", reading) if whole and "groups" in parts else None
                for at, values in enumerate(_images(archive, f"{prefix}images", len(labels), reading)):
                    group = {} if groups is None else {"PatientID": str(groups[at])}
                    label = int(labels[at] if labels.ndim == 1 else labels[at].item())
                    volume = values.ndim == _GREY_AXES and values.shape[-1] != _COLOURS
                    yield Picture(
                        group,
                        values,
                        partial(_shown, values),
                        frame=number,
                        label=names[label] if names else str(label),
                        volume=volume,
                    )
                    number += 1
            if number == 0:
                raise Refused(Reason.NOT_AN_IMAGE)
    except Refused:
        raise
    except OSError:
        raise Refused(Reason.NOT_READABLE) from None
    except Exception:  # zipfile, zlib, lzma, json and NumPy raise what they like
        raise Refused(Reason.DAMAGED) from None


def _shown(values: NDArray[np.uint8], window: str) -> NDArray[np.float32]:
    return values.astype(np.float32) / np.float32(255)


def _names(path: Path, archive: zipfile.ZipFile | None, reading: Reading) -> list[str]:
    beside = path.with_suffix(".json")
    if beside.is_file() and not beside.is_symlink() and beside.stat().st_size < reading.max_values:
        names = json.loads(beside.read_text(encoding="utf-8")).get("label_names")
        if isinstance(names, list):
            return [str(name) for name in names]
    return [] if archive is None else [str(name) for name in _small(archive, "label_names", reading)]


@contextmanager
def _opened(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """Give an array's data, shape and type; what is not read of it by the end must not be there."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if fortran or dtype.hasobject:
            raise Refused(Reason.NOT_AN_IMAGE)
        if any(side < 0 for side in shape):
            raise Refused(Reason.DAMAGED)
        yield file, shape, dtype
        if file.read(1):  # the archive's checksum is looked at where the data end
            raise Refused(Reason.DAMAGED)


def _small(archive: zipfile.ZipFile, name: str, reading: Reading) -> NDArray[Any]:
    """Return an array of labels, groups or names."""
    with _opened(archive, name) as (file, shape, dtype):
        size = math.prod(shape) * dtype.itemsize
        if size > reading.max_values:
            raise Refused(Reason.TOO_MANY_PIXELS)
        return np.frombuffer(_exactly(file, size), dtype).reshape(shape)


def _images(archive: zipfile.ZipFile, name: str, count: int, reading: Reading) -> Iterator[NDArray[np.uint8]]:
    with _opened(archive, name) as (file, shape, dtype):
        # A last axis of 1, 2 or 4 is grey, grey with alpha or RGBA, and would pass for a very thin volume.
        odd = len(shape) == _COLOUR_AXES and shape[-1] in (1, 2, 4)
        if dtype != np.uint8 or len(shape) not in (_GREY_AXES, _COLOUR_AXES) or odd or shape[0] != count:
            raise Refused(Reason.NOT_AN_IMAGE)
        size = math.prod(shape[1:])
        if size > reading.max_values:
            raise Refused(Reason.TOO_MANY_PIXELS)
        for _ in range(count):
            yield np.frombuffer(_exactly(file, size), np.uint8).reshape(shape[1:])


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise Refused(Reason.DAMAGED)
    return data
