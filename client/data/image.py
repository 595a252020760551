"""One image on its way from a file into the pixel cache."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import DataError

__all__ = ["Recipe", "SourceImage", "preprocess"]


@dataclass(frozen=True)
class SourceImage:
    """What a reader makes of one image.

    Attributes
    ----------
    pixels : ndarray
        uint8 ``[H, W]`` or ``[H, W, 3]``, or a volume ``[D, H, W]`` where ``volume``; larger is brighter.
    patient : str
        The patient, lesion or smear that must never be on two sides. Only its keyed hash is stored.
    label : str
        The class.
    modality : str
        DICOM modality, or ``""``.
    volume : bool
        Whether the first axis of a 3-D array is depth.
    """

    pixels: NDArray[np.uint8]
    patient: str
    label: str
    modality: str = ""
    volume: bool = False


@dataclass(frozen=True)
class Recipe:
    """How pixels are prepared for a study; its digest names the cache.

    Attributes
    ----------
    channels, size, dimensions : int
        Channels (1 or 3), side length in pixels, and 2 or 3 axes.
    """

    channels: int
    size: int
    dimensions: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one prepared image: ``(C, size, size)`` or ``(C, size, size, size)``."""
        return (self.channels, *[self.size] * self.dimensions)


def preprocess(image: SourceImage, recipe: Recipe) -> NDArray[np.uint8]:
    """Return an image as the study's network takes it: uint8 of the recipe's shape.

    Grey becomes colour by repetition and colour becomes grey by its mean; the side lengths are changed by linear
    interpolation (with antialiasing in 2-D), aspect ratio given up.

    Raises
    ------
    DataError
        The image has not the study's number of dimensions.
    """
    pixels = image.pixels
    if image.volume != (recipe.dimensions == 3):
        raise DataError(
            f"the study wants {recipe.dimensions}-D images: set model.dimensions, or choose another data source"
        )
    x = torch.from_numpy(np.ascontiguousarray(pixels)).float()
    colour = x.dim() == recipe.dimensions + 1
    x = x.movedim(-1, 0) if colour else x.unsqueeze(0)
    if x.shape[0] != recipe.channels:
        x = x.mean(0, keepdim=True).expand(recipe.channels, *x.shape[1:])
    if tuple(x.shape) != recipe.shape:
        mode = "bilinear" if recipe.dimensions == 2 else "trilinear"
        x = torch.nn.functional.interpolate(
            x.unsqueeze(0),
            size=recipe.shape[1:],
            mode=mode,
            align_corners=False,
            antialias=recipe.dimensions == 2,
        )[0]
    out: NDArray[np.uint8] = x.round().clamp(0, 255).to(torch.uint8).numpy()
    return out
