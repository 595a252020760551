"""From a picture as a display shows it to the pixels that a study's network takes."""

import math
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.canonical import canonical_json
from common.errors import DataError
from common.study import Model

__all__ = ["Recipe", "prepare"]


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
        return _rows(slices.reshape(len(slices), -1), size).reshape(size, size, size)
    if image.shape == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _rows(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    if len(image) == size:
        return image
    return np.asarray(Image.fromarray(image).resize((image.shape[1], size), Image.Resampling.BILINEAR))
