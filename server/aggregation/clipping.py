"""Centred clipping, with the momentum of every site: what is kept between rounds is part of the rule."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.contract import Vector

__all__ = ["CentredClipping", "clipped_mean", "norm"]


def norm(vector: Vector) -> float:
    """Return the Euclidean norm, computed in float64 in an order that no number of threads changes."""
    with np.errstate(over="ignore"):  # infinite is beyond every bound
        return float(np.sqrt(np.square(vector, dtype=np.float64).sum()))


def clipped_mean(
    rows: NDArray[np.float64], centre: NDArray[np.float64], radius: float, iterations: int
) -> NDArray[np.float64]:
    """Return v after some steps of ``v <- v + 1/n sum_i (x_i - v) min(1, radius / |x_i - v|)``.

    One vector moves v by at most ``radius / n`` in a step, whatever it holds.

    Parameters
    ----------
    rows : ndarray
        x, one vector per site ``[n, D]``; they count in this order.
    centre : ndarray
        v before the first step ``[D]``.
    radius : float
        tau, above 0, in the units of a meta-gradient's norm.
    iterations : int
        Number of steps.

    Returns
    -------
    ndarray
        ``[D]``.

    References
    ----------
    Karimireddy, He, Jaggi: Learning from History for Byzantine Robust Optimization, ICML 2021, equation (CC).
    """
    centre = centre.copy()
    for _ in range(iterations):
        step = np.zeros_like(centre)
        for row in rows:
            away = row - centre
            far = norm(away)
            step += away if far <= radius else away * (radius / far)
        centre += step / len(rows)
    return centre


class CentredClipping:
    """Centred clipping around the last round's aggregate, of the momenta of the sites.

    A site's momentum is ``m = (1 - beta) g + beta m``, its first one its first gradient g. The paper lets the sites
    keep it. Here the server does, from the same gradients: a site stays without memory, and cannot lie about it.
    A site that misses a round keeps its momentum for the next one, and does not count in this one. The centre starts
    at zero, so that the first round is plain clipping.

    The number of hostile sites is in no formula; the paper's Theorem promises most for up to a tenth of the sites.
    Memory: the replies and, with momentum, as much again for every site that has ever replied.

    Parameters
    ----------
    size : int
        D.
    radius, iterations
        As in `clipped_mean`.
    momentum : float
        beta, from 0 (none) to below 1.

    References
    ----------
    Karimireddy et al. 2021, Algorithm 2.
    """

    def __init__(self, size: int, *, radius: float, iterations: int, momentum: float) -> None:
        self._radius, self._iterations, self._beta = radius, iterations, momentum
        self._centre: NDArray[np.float64] = np.zeros(size, np.float64)
        self._momenta: dict[str, NDArray[np.float64]] = {}

    def step(self, sites: Sequence[str], rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the aggregate ``[D]`` of a round's replies ``[n, D]``, one of each of these sites.

        ``rows`` hold the momenta afterwards.
        """
        if self._beta:
            for i, site in enumerate(sites):
                if site in self._momenta:
                    rows[i] = (1 - self._beta) * rows[i] + self._beta * self._momenta[site]
                self._momenta[site] = rows[i].copy()
        self._centre = clipped_mean(rows, self._centre, self._radius, self._iterations)
        return self._centre.copy()

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return what the next round depends on: the centre, and ``momentum.SITE`` of each site, all ``[D]``."""
        return {"centre": self._centre.copy()} | {f"momentum.{site}": m.copy() for site, m in self._momenta.items()}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Go on from an earlier `state`."""
        self._centre = state["centre"].copy()
        prefix = "momentum."
        self._momenta = {key.removeprefix(prefix): m.copy() for key, m in state.items() if key.startswith(prefix)}
