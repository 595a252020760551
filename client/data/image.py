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

#: New pixels that are computed at once, and most multiplications of one product of matrices.
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
    small = np.array([_resized(channel, recipe.size) for channel in channels])
    out: NDArray[np.uint8] = (small.clip(0, 1) * 255).round().astype(np.uint8)
    return out if len(out) == recipe.channels else np.broadcast_to(out, recipe.shape)


def _resized(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return ``[H, W]`` or ``[D, H, W]`` with all sides of one length."""
    if image.ndim == 3:
        slices = np.stack([_resized(plane, size) for plane in image])
        return _resampled(slices.reshape(len(slices), -1), size).reshape(size, size, size)
    return _resampled(_resampled(image, size).T, size).T


def _resampled(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return ``[H, W]`` with columns of another length: what Pillow's `BILINEAR` gives but for rounding, and faster."""
    if len(image) == size:
        return image
    bands = _bands(len(image), size)
    out = np.empty((size, image.shape[1]), np.float32)
    # Small products are not shared out to threads, for which workers have no cores.
    step = max(1, _SMALL // max(weights.size for _, _, weights in bands))
    for start in range(0, image.shape[1], step):
        columns = slice(start, start + step)
        for new, old, weights in bands:
            np.matmul(weights, image[old, columns], out=out[new, columns])
    return out


@lru_cache(64)
def _bands(length: int, size: int) -> tuple[tuple[slice, slice, NDArray[np.float32]], ...]:
    """Return which pixels of a new column are made of which ones of the old column, and with which weights.

    A triangle lies around the place of every new pixel, as wide as two new pixels, or as two old ones if those are
    wider; its weights are scaled to have a sum of 1.
    """
    scale = length / size
    reach = max(scale, 1.0)
    middles = (np.arange(size) + 0.5) * scale
    bands = []
    for start in range(0, size, _BAND):
        new = slice(start, min(start + _BAND, size))
        old = slice(max(int(middles[start] - reach), 0), min(int(middles[new.stop - 1] + reach) + 1, length))
        distances = np.arange(old.start, old.stop) + 0.5 - middles[new, None]
        weights = np.maximum(1 - np.abs(distances) / reach, 0)
        bands.append((new, old, (weights / weights.sum(1, keepdims=True)).astype(np.float32)))
    return tuple(bands)
