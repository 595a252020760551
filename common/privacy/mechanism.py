"""The arithmetic of the Gaussian mechanism on a grid of whole numbers: clip, add, noise, and how loud that is.

A vector is clipped to the bound C and put on a grid of C / `STEPS`, towards zero, so that no rounding makes it longer
than C. Noise is a whole number of steps too: what floating-point numbers would tell of the sum in their last bits is
then not there (Mironov, "On significance of the least significant bits for differential privacy", 2012).
"""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

__all__ = [
    "SENSITIVITY",
    "STEPS",
    "Source",
    "Steps",
    "clipped_sum",
    "noised",
    "normal_steps",
    "on_grid",
    "signal_to_noise",
]

#: A vector in steps of the grid.
Steps = NDArray[np.int64]
#: Gives as many bytes as asked for: the operating system's generator, ``os.urandom``, unless a guarantee is forgone.
Source = Callable[[int], bytes]

#: Steps of the grid in one clip bound.
STEPS = 2**16

#: How far one patient more or less moves a mechanism's sum, or each of its sums, in clip bounds.
SENSITIVITY: Mapping[str, float] = {"episode-clip": 2.0, "patient-clip": 1.0}

# Rounding in float64 cannot make up for as much as this.
_SLACK = 1 - 2.0**-40


def on_grid(row: NDArray[np.floating], clip: float) -> Steps:
    """Return a vector ``[D]``, clipped to a Euclidean norm of ``clip``, in steps of ``clip / STEPS``.

    Its norm is at most `STEPS`. A vector that is not finite becomes zero.
    """
    exact: NDArray[np.float64] = row.astype(np.float64)
    with np.errstate(over="ignore"):
        norm = sqrt(float(exact @ exact))
    if not isfinite(norm) or norm == 0:
        return np.zeros(row.shape, np.int64)
    return np.trunc(exact * (STEPS * min(1 / clip, _SLACK / norm))).astype(np.int64)


def clipped_sum(rows: Iterable[NDArray[np.floating]], clip: float, size: int) -> Steps:
    """Return the sum ``[D]`` of clipped vectors, in steps."""
    total = np.zeros(size, np.int64)
    for row in rows:
        total += on_grid(row, clip)
    return total


def normal_steps(size: int, deviation: float, source: Source) -> Steps:
    """Return ``[D]`` rounded draws of a normal distribution, ``deviation`` in steps.

    By the inverse of the distribution function. 128 bits a draw: a sign, and a tail probability of full relative
    precision, or the values far out would have gaps that tell what the noise was added to.
    """
    first, second = np.frombuffer(source(16 * size), "<u8").reshape(2, size)
    tail = (first.astype(np.float64) + ((second >> 1).astype(np.float64) + 0.5) * 2.0**-63) * 2.0**-65
    sign = np.where(second & 1, 1.0, -1.0)
    drawn: Steps = np.rint(sign * deviation * ndtri(tail)).astype(np.int64)
    return drawn


def noised(total: Steps, clip: float, deviation: float, parts: int, source: Source) -> NDArray[np.float64]:
    """Return what is released: the sum with noise, over a constant number of parts.

    Parameters
    ----------
    total : ndarray
        ``[D]``, as `clipped_sum` returns it.
    deviation : float
        Standard deviation of the noise on the sum, in the unit of ``clip``.
    parts : int
        Fixed by the study, never counted: how many there were is a secret.
    """
    steps = total + normal_steps(total.size, deviation * STEPS / clip, source)
    return steps.astype(np.float64) * (clip / STEPS / parts)


def signal_to_noise(parts: int, deviation: float, clip: float, size: int, sites: int = 1) -> float:
    """Return the greatest norm that the signal can have over the norm that the noise has, in the mean over sites.

    Parameters
    ----------
    parts : int
        Clipped vectors in a site's sum. All as long as ``clip`` and all in one direction make the signal.
    deviation : float
        Standard deviation of a site's noise, in the unit of ``clip``.
    size : int
        Elements D of a vector: the noise grows with their root.
    """
    return sqrt(sites / size) * parts * clip / deviation
