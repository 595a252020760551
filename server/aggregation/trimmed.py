"""Rules that look at every coordinate by itself: the median and the trimmed mean.

Each needs all replies, ``[n, D]`` in float64, in memory. With n >= 2f + 1 vectors, f of them arbitrary, every
coordinate of the result lies within the range of the other n - f.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["median", "trimmed_mean", "trimmed_needs"]

# Columns sorted at once: bounds the memory beside the replies.
_COLUMNS = 1 << 16


def trimmed_needs(tolerated: int) -> int:
    """Return how many vectors a rule needs that takes a majority, of which ``tolerated`` are hostile: 2f + 1."""
    return 2 * tolerated + 1


def trimmed_mean(rows: NDArray[np.float64], tolerated: int) -> NDArray[np.float64]:
    """Return the mean of each coordinate without its f largest and its f smallest values.

    It takes the number f, never a share of n: a share of a small n rounds to nothing, and nothing is then trimmed.

    Parameters
    ----------
    rows : ndarray
        One vector per site ``[n, D]``.
    tolerated : int
        f; n must be at least 2f + 1.

    Returns
    -------
    ndarray
        ``[D]``. The order of the sites does not change a bit of it.

    References
    ----------
    Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates,
    ICML 2018, Definition 2 (coordinate-wise trimmed mean), with beta = f / n.
    """
    if len(rows) < trimmed_needs(tolerated):
        raise ValueError(f"{len(rows)} vectors with f = {tolerated} are fewer than 2f + 1")
    return _mean_of_middle(rows, tolerated)


def median(rows: NDArray[np.float64], tolerated: int) -> NDArray[np.float64]:
    """Return the median of each coordinate: the middle value, or the mean of the two middle ones.

    Parameters
    ----------
    rows : ndarray
        One vector per site ``[n, D]``.
    tolerated : int
        f; n must be at least 2f + 1. The result is the same for each f that n allows.

    Returns
    -------
    ndarray
        ``[D]``. The order of the sites does not change a bit of it.

    References
    ----------
    Yin et al. 2018, Definition 1 (coordinate-wise median).
    """
    if len(rows) < trimmed_needs(tolerated):
        raise ValueError(f"{len(rows)} vectors with f = {tolerated} are fewer than 2f + 1")
    return _mean_of_middle(rows, (len(rows) - 1) // 2)


def _mean_of_middle(rows: NDArray[np.float64], cut: int) -> NDArray[np.float64]:
    out = np.empty(rows.shape[1], np.float64)
    for start in range(0, rows.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        out[part] = np.sort(rows[:, part], axis=0)[cut : len(rows) - cut].mean(axis=0)
    return out
