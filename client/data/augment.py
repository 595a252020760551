"""Turning and mirroring square images: the eight symmetries of a square."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SYMMETRIES", "transform"]

#: Elements 0 to 3 turn by as many quarters, 4 to 7 mirror first. 0 leaves the image as it is.
SYMMETRIES = 8


def transform(x: Tensor, elements: NDArray[np.int64]) -> None:
    """Turn and mirror every image in place, in the plane of its last two axes.

    Parameters
    ----------
    x : Tensor
        Images ``[T, N, C, *, S, S]``.
    elements : ndarray
        ``[T, N]``, the symmetry of every image, 0 to 7.
    """
    which = torch.from_numpy(elements)
    for element in range(1, SYMMETRIES):
        here = which == element
        images = x[here]
        if element >= SYMMETRIES // 2:
            images = images.flip(-1)
        x[here] = torch.rot90(images, element % (SYMMETRIES // 2), (-2, -1))
