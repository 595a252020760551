"""Rules that choose replies which have many others near them: Krum and Multi-Krum.

Each needs all replies, ``[n, D]`` in float64, in memory. Distances are sums over squared differences: the shorter
way over inner products, |a|^2 + |b|^2 - 2ab, loses them where vectors are long and close together.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["krum", "krum_needs", "krum_scores", "multi_krum"]


def krum_needs(tolerated: int, selected: int = 1) -> int:
    """Return how many vectors Krum needs (2f + 3), and Multi-Krum, which averages m <= n - f - 2 of them."""
    return max(2 * tolerated + 3, selected + tolerated + 2)


def krum_scores(rows: NDArray[np.float64], tolerated: int) -> NDArray[np.float64]:
    """Return each vector's score: the sum of squared distances to the n - f - 2 other vectors nearest to it.

    Parameters
    ----------
    rows : ndarray
        One vector per site ``[n, D]``.
    tolerated : int
        f; n must be at least 2f + 3. With fewer, a score would say little or, of no neighbour at all, nothing.

    Returns
    -------
    ndarray
        ``[n]``.

    References
    ----------
    Blanchard, El Mhamdi, Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent,
    NeurIPS 2017, section 4, s(i); Proposition 4.2 asks for 2f + 2 < n.
    """
    count = len(rows)
    if count < krum_needs(tolerated):
        raise ValueError(f"{count} vectors with f = {tolerated} are fewer than 2f + 3")
    distances = np.full((count, count), np.inf)  # a vector is no neighbour of its own
    with np.errstate(over="ignore"):  # infinitely far is far enough
        for i in range(count):
            for j in range(i):
                distances[i, j] = distances[j, i] = np.square(rows[i] - rows[j]).sum()
        scores: NDArray[np.float64] = np.sort(distances, axis=1)[:, : count - tolerated - 2].sum(axis=1)
    return scores


def krum(rows: NDArray[np.float64], tolerated: int) -> NDArray[np.float64]:
    """Return the vector with the smallest score; of equal ones the first in the order of the sites.

    Parameters and reference as in `krum_scores`. The result ``[D]`` is one site's own vector.
    """
    best: NDArray[np.float64] = rows[krum_scores(rows, tolerated).argmin()].copy()
    return best


def multi_krum(rows: NDArray[np.float64], tolerated: int, selected: int) -> NDArray[np.float64]:
    """Return the mean of the ``selected`` vectors with the smallest scores, all with the same weight.

    Parameters
    ----------
    rows : ndarray
        One vector per site ``[n, D]``.
    tolerated : int
        f; n must be at least 2f + 3.
    selected : int
        m, at most n - f - 2. Scores are computed once, over all vectors.

    Returns
    -------
    ndarray
        ``[D]``, added in the order of the sites.

    References
    ----------
    Blanchard et al. 2017, Multi-Krum. The bound on m: Damaskinos, El Mhamdi, Guerraoui, Guirguis, Rouault: AggregaThor,
    MLSys 2019.
    """
    if len(rows) < krum_needs(tolerated, selected):
        raise ValueError(
            f"{len(rows)} vectors with f = {tolerated} and m = {selected} are fewer than m + f + 2 or 2f + 3"
        )
    best = np.sort(krum_scores(rows, tolerated).argsort(kind="stable")[:selected])
    total = np.zeros(rows.shape[1], np.float64)
    for index in best:
        total += rows[index]
    return total / selected
