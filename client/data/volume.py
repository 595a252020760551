"""The slices of one series as one volume, sorted along their normal, or refused.

Slices belong together where they have one patient, one series, one modality, one shape and one orientation (each
cosine within 0.001), and lie at distinct, even depths: each gap within a tenth of the median gap. Rounded positions
pass that, a missing or a doubled slice does not. That a tilted gantry shifts each slice against the last is not
undone.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.dicom import Frame, read_frames, refusing
from client.data.picture import IDENTIFIERS, Picture, Reading, Reason, Refused
from client.data.windows import contrast, extent, grey, window_names

__all__ = ["read_volume"]

_COSINE = 1e-3
_GAP = 0.1
# What all slices of a volume have in common; a volume of one file has that file's instance too.
_SHARED = tuple(keyword for keyword in IDENTIFIERS if keyword != "path")


def read_volume(paths: Sequence[Path], reading: Reading) -> Picture:
    """Read one CT or MR series: its single-frame files, or its Enhanced multi-frame one.

    Parameters
    ----------
    paths : sequence of Path
        The files of the series, in any order.
    reading : Reading
        All frames are read, whatever it says of them; ``max_values`` bounds the whole volume.

    Returns
    -------
    Picture
        ``values`` ``[D, H, W]`` as decoded; ``shown(window)`` ``[D, H, W]`` under one window for all slices, where
        ``header`` is the window of the middle one; without a window, from the least to the greatest number of the
        volume. `place` is that of the first slice.

    Raises
    ------
    Refused
        One of the files is refused, or they make no volume. So does `shown`.
    """
    frames: list[Frame] = []
    total = 0
    for path in paths:
        for frame in read_frames(path, replace(reading, frames="all", volumes=True)):
            total += frame.values.size
            if total > reading.max_values:
                raise Refused(Reason.TOO_MANY_PIXELS)
            frames.append(frame)
    frames = _sorted(frames)
    first = frames[0]
    return Picture(
        {
            keyword: first.identifiers[keyword]
            for keyword in _SHARED
            if len({frame.identifiers.get(keyword) for frame in frames}) == 1 and keyword in first.identifiers
        },
        refusing(Reason.NOT_A_VOLUME, np.stack, [frame.values for frame in frames]),
        partial(_shown, frames),
        first.header,
        place=first.place,
        volume=True,
    )


def _sorted(frames: list[Frame]) -> list[Frame]:
    placed = [(frame.place, frame) for frame in frames if frame.place is not None]
    if len(placed) < len(frames) or len(placed) < 2:
        raise Refused(Reason.NOT_A_VOLUME)
    same = {
        (
            frame.values.shape,
            frame.values.dtype,
            frame.header.modality,
            frame.rendering.PhotometricInterpretation,
            frame.identifiers.get("PatientID"),
            frame.identifiers.get("SeriesInstanceUID"),
        )
        for frame in frames
    }
    photometric = frames[0].rendering.PhotometricInterpretation
    if len(same) != 1 or frames[0].values.ndim != 2 or photometric == "PALETTE COLOR":
        raise Refused(Reason.NOT_A_VOLUME)
    orientations = np.array([place.orientation for place, _ in placed])
    depths = np.array([place.depth for place, _ in placed])
    order = np.argsort(depths)
    gaps = np.diff(depths[order])
    usual = np.median(gaps)
    if np.ptp(orientations, axis=0).max() > _COSINE or usual <= 0 or np.abs(gaps - usual).max() > _GAP * usual:
        raise Refused(Reason.NOT_A_VOLUME)
    return [frames[i] for i in order]


def _shown(frames: list[Frame], window: str) -> NDArray[np.float32]:
    if window not in window_names():
        raise ValueError(f"there is no window {window!r}: use one of {', '.join(window_names())}")
    return refusing(Reason.NOT_DECODED, _show, frames, window)


def _show(frames: list[Frame], window: str) -> NDArray[np.float32]:
    # Slices have their own rescale (PET, some MR), but one contrast.
    middle = frames[len(frames) // 2].rendering
    extents = np.array([extent(grey(frame.values, frame.rendering), frame.rendering) for frame in frames])
    limits = float(extents[:, 0].min()), float(extents[:, 1].max())
    out = np.empty((len(frames), *frames[0].values.shape), np.float32)
    for shown, frame in zip(out, frames, strict=True):
        shown[:] = contrast(grey(frame.values, frame.rendering), middle, window, limits)
    return out
