"""How like two images are, and what a reconstruction gained over an attacker who saw nothing."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.pixels import CENTRE, SPREAD

__all__ = ["Likeness", "as_shown", "judge", "nearest", "psnr", "ssim"]

#: Decibels of an exact copy, in the precision of the wire.
EXACT = 100.0
_WINDOW, _SIGMA = 11, 1.5


@dataclass(frozen=True)
class Likeness:
    """How well one image was reconstructed.

    Attributes
    ----------
    psnr, psnr_gain : float
        Decibels, and decibels above the better of two baselines: the mean of images of the same kind, and what the same
        attack made of the answer of a site that never saw the image.
    ssim_gain : float
        The same for structural similarity (-1 to 1).
    place : int
        Which reconstruction it is.
    """

    psnr: float
    psnr_gain: float
    ssim_gain: float
    place: int


def as_shown(x: Tensor) -> Tensor:
    """Return images as networks take them as values of 0 to 1."""
    return x.double().mul(SPREAD).add(CENTRE).div(255).clamp(0, 1)


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in decibels of images ``[*, C, H, W]`` of 0 to 1, at most `EXACT`."""
    error = (first - second).square().mean((-3, -2, -1))
    return (-10 * error.clamp_min(10 ** (-EXACT / 10)).log10()).clamp_max(EXACT)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean structural similarity ``[N]`` of images ``[N, C, H, W]`` of 0 to 1.

    A Gaussian window of 11 x 11 pixels and deviation 1.5, inside of the image; channels by themselves.

    References
    ----------
    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    2004, equation 13.
    """
    side = min(_WINDOW, *first.shape[-2:])
    line = torch.exp(-((torch.arange(side, dtype=first.dtype) - (side - 1) / 2) ** 2) / (2 * _SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x.reshape(-1, 1, *x.shape[-2:]), window)

    a, b = mean(first), mean(second)
    aa, bb, ab = mean(first * first) - a * a, mean(second * second) - b * b, mean(first * second) - a * b
    c, d = 0.01**2, 0.03**2
    out = (2 * a * b + c) * (2 * ab + d) / ((a * a + b * b + c) * (aa + bb + d))
    return out.mean((-3, -2, -1)).reshape(len(first), -1).mean(1)


def judge(target: Tensor, found: Tensor, elsewhere: Tensor, mean: Tensor) -> Likeness:
    """Return how like a target ``[C, H, W]`` the best of some reconstructions ``[R, C, H, W]`` is.

    The best one is chosen with the target in hand, and so is the best of those that the same attack found
    ``elsewhere``: what choosing alone gains is in the baseline too.
    """
    best = int(psnr(found, target).argmax())
    other = elsewhere[int(psnr(elsewhere, target).argmax())]
    reached, *baselines = (float(psnr(image, target)) for image in (found[best], other, mean))
    alike, *plain = ssim(torch.stack([found[best], other, mean]), target.expand(3, *target.shape)).tolist()
    return Likeness(reached, reached - max(baselines), alike - max(plain), best)


def nearest(candidates: Tensor, found: Tensor) -> int:
    """Return which of some candidates ``[N, C, H, W]`` is nearest to any reconstruction ``[R, C, H, W]``."""
    distances = torch.cdist(candidates.flatten(1), found.flatten(1))
    return int(np.argmin(distances.min(1).values.numpy()))
