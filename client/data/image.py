"""From a picture as a display shows it to the pixels that a study's network takes."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from common.canonical import canonical_json
from common.errors import DataError
from common.study import Model

__all__ = ["Recipe", "prepare"]

#: New pixels of a row that are computed at once, and most multiplications of one product of matrices.
_BAND, _SMALL = 4, 2**18


@dataclass(frozen=True)
class Recipe:
    """How pixels are prepared for a study; its digest names the cache.

    Attributes
    ----------
    channels, size, dimensions : int
        Channels (1 or 3), side length in pixels, and 2 or 3 axes.
    window : str
        ``header``, or one of `client.data.windows`.
    """

    channels: int
    size: int
    dimensions: int = 2
    window: str = "header"

    @classmethod
    def of(cls, model: Model) -> "Recipe":
        """Return how a study's network wants its pixels."""
        return cls(model.channels, model.image_size, model.dimensions, model.window)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one prepared image: ``(C, size, size)`` or ``(C, size, size, size)``."""
        return (self.channels, *[self.size] * self.dimensions)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        return _digest(self)

    @property
    def nbytes(self) -> int:
        """Bytes of one prepared image."""
        return math.prod(self.shape)


@cache
def _digest(recipe: Recipe) -> str:
    return sha256(canonical_json(vars(recipe))).hexdigest()[:16]


def prepare(shown: NDArray[np.float32], recipe: Recipe, *, volume: bool = False) -> NDArray[np.uint8]:
    """Return a picture as the study's network takes it: uint8 of the recipe's shape.

    Grey becomes colour by repetition and colour becomes grey by its mean; side lengths are changed by antialiased
    linear interpolation along every axis, aspect ratio given up. Rounded once, at the end.

    Parameters
    ----------
    shown : ndarray
        ``[H, W]``, ``[H, W, 3]`` or, of a volume, ``[D, H, W]``; 0 to 1.
    recipe : Recipe
        What is wanted.
    volume : bool
        Whether the first axis is depth; the shape alone does not tell a volume three pixels wide from colour.

    Raises
    ------
    DataError
        The picture has not the recipe's number of dimensions.
    """
    if volume != (recipe.dimensions == 3):
        raise DataError(
            f"the study wants {recipe.dimensions}-D images: set model.dimensions, or choose another data source"
        )
    if volume or shown.ndim == 2:
        channels = [shown]
    elif recipe.channels == 1:
        channels = [shown.mean(-1, dtype=np.float32)]
    else:
        channels = list(np.moveaxis(shown, -1, 0))
    small = np.stack([_resized(channel, recipe.size) for channel in channels])
    out: NDArray[np.uint8] = (small.clip(0, 1) * 255).round().astype(np.uint8)
    return np.broadcast_to(out, recipe.shape)


def _resized(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return ``[H, W]`` or ``[D, H, W]`` with all sides of one length."""
    if image.ndim == 3:
        slices = np.stack([_resized(plane, size) for plane in image])
        # Along the depth as if it were the rows of one very wide picture, whose columns stay.
        return _resampled(slices.reshape(len(slices), -1).T, size).T.reshape(size, size, size)
    return _resampled(_resampled(image, size).T, size).T


def _resampled(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return ``[H, W]`` with rows of another length: what Pillow's `BILINEAR` gives, in half the time.

    As there, sums are of float64 and each pass ends in float32.
    """
    if image.shape[1] == size:
        return image
    bands = _bands(image.shape[1], size)
    out = np.empty((len(image), size), np.float32)
    # Small products are not shared out to threads, which workers have no cores for, and take little memory.
    step = max(1, _SMALL // max(weights.size for _, _, weights in bands))
    for start in range(0, len(image), step):
        rows = image[start : start + step].astype(np.float64)
        for ours, theirs, weights in bands:
            out[start : start + step, ours] = rows[:, theirs] @ weights
    return out


@lru_cache(64)
def _bands(length: int, size: int) -> tuple[tuple[slice, slice, NDArray[np.float64]], ...]:
    """Return which pixels of a new row are made of which ones of the old row, and with which weights.

    A triangle lies around the place of every new pixel, as wide as two new pixels, or as two old ones if they are
    wider; its weights are scaled to have a sum of 1.
    """
    scale = length / size
    reach = max(scale, 1.0)
    middles = (np.arange(size) + 0.5) * scale
    lows = np.maximum((middles - reach + 0.5).astype(np.int64), 0)
    highs = np.minimum((middles + reach + 0.5).astype(np.int64), length)
    bands = []
    for start in range(0, size, _BAND):
        ours = slice(start, min(start + _BAND, size))
        theirs = slice(int(lows[start]), int(highs[ours.stop - 1]))
        old = np.arange(theirs.start, theirs.stop)[:, None]
        weights = np.maximum(1 - np.abs((old - middles[ours] + 0.5) * (1 / reach)), 0)
        weights[(old < lows[ours]) | (old >= highs[ours])] = 0
        bands.append((ours, theirs, weights / weights.sum(0)))
    return tuple(bands)
