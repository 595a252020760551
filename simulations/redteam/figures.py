"""What attacks reach: rates and areas with their limits, each beside the bound that the guarantee puts on it.

Candidates of one release share its noise and are not independent: limits count one trial for every release.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulations.redteam.bounds import Bound, at_least, at_most

__all__ = ["Figure", "Trials", "area", "identified", "mean", "rates"]

#: False-positive rates at which true positives are counted.
LEVELS = (0.01, 0.001)
# A fifth of the releases teaches where a single threshold lies.
_LEARN = 5


@dataclass(frozen=True)
class Figure:
    """One number that an attack reached.

    Attributes
    ----------
    name : str
        What it is.
    value : float
        The figure.
    low, high : float
        Its one-sided 95 % limits.
    bound : float or None
        What it is at most if the guarantee holds; None without one.
    broken : bool
        It is proven to be above the bound: the guarantee does not hold.
    """

    name: str
    value: float
    low: float
    high: float
    bound: float | None
    broken: bool


@dataclass(frozen=True)
class Trials:
    """Scores of patients who were there and of patients who were not, a pair of arrays for each release."""

    releases: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]

    @property
    def usable(self) -> "Trials":
        """Those releases in which there were both."""
        return Trials([pair for pair in self.releases if all(map(len, pair))])

    def side(self, which: int) -> NDArray[np.float64]:
        return np.concatenate([pair[which] for pair in self.releases])


def rates(trials: Trials, bound: Bound | None) -> list[Figure]:
    """Return AUC, true-positive rates at `LEVELS` and the advantage of one threshold; empty where nobody was there."""
    there = trials.usable.releases
    few = len(there) // _LEARN
    if few == 0:
        return []
    first, rest = Trials(there[:few]), Trials(there[few:])
    count = len(rest.releases)
    inside, outside = rest.side(0), rest.side(1)
    value = area(rest)
    figures = [_figure("AUC", value, at_least(value * count, count), at_most(value * count, count), bound, 0.0)]
    for level in LEVELS:
        threshold = np.sort(outside)[::-1][int(level * len(outside))]
        figures.append(_rate(f"TPR at {level:.1%} FPR", inside, outside, threshold, count, bound))
    threshold = (np.median(first.side(0)) + np.median(first.side(1))) / 2
    right, wrong = float((inside > threshold).mean()), float((outside > threshold).mean())
    low = at_least(right * count, count, 0.025) - at_most(wrong * count, count, 0.025)
    high = at_most(right * count, count, 0.025) - at_least(wrong * count, count, 0.025)
    most = None if bound is None else bound.advantage
    figures.append(Figure("advantage", right - wrong, low, high, most, most is not None and low > most))
    return figures


def area(trials: Trials) -> float:
    """Return the area under the curve of rates over pairs of *different* releases, ties one half.

    Two candidates of the same release are no such pair: their scores share its noise, and what tells them apart is
    the exchange of one for the other, which costs a patient more than their being there.
    """
    wins, pairs = _wins(trials.side(0), trials.side(1))
    if len(trials.releases) > 1:
        for inside, outside in trials.releases:
            own, many = _wins(inside, outside)
            wins, pairs = wins - own, pairs - many
    return wins / pairs


def identified(shares: Sequence[float], candidates: int, bound: Bound | None) -> Figure:
    """Return how often a reconstruction was nearest to its image among so many candidates, the mean over releases.

    Without the patient the image is one of many alike, and is picked with chance 1 / candidates. So, with them, at most
    as often as a test of that false-positive rate has true positives.

    Parameters
    ----------
    shares : sequence of float
        Of the images looked for in each release.
    """
    value, count = float(np.mean(shares)), len(shares)
    low, high = at_least(value * count, count), at_most(value * count, count)
    most = None if bound is None else bound.true_positives(1 / candidates)
    return Figure(f"identified among {candidates}", value, low, high, most, most is not None and low > most)


def mean(name: str, values: Sequence[float]) -> Figure:
    """Return a mean over releases that no guarantee bounds, with normal limits."""
    value = float(np.mean(values))
    half = 1.645 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return Figure(name, value, value - half, value + half, None, broken=False)


def _rate(
    name: str,
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    threshold: float,
    count: int,
    bound: Bound | None,
) -> Figure:
    value, wrong = float((inside > threshold).mean()), float((outside > threshold).mean())
    # The threshold was chosen by these scores: the rate that it really has may be as large as its upper limit.
    return _figure(name, value, at_least(value * count, count), at_most(value * count, count), bound, wrong, count)


def _figure(
    name: str, value: float, low: float, high: float, bound: Bound | None, wrong: float, count: int | None = None
) -> Figure:
    if bound is None:
        return Figure(name, value, low, high, None, broken=False)
    most = bound.area if count is None else bound.true_positives(at_most(wrong * count, count))
    return Figure(name, value, low, high, most, low > most)


def _wins(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> tuple[float, int]:
    """Return how many pairs have the larger score inside, ties one half, and how many pairs there are."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, "left") + np.searchsorted(ordered, inside, "right")
    return float(below.sum()) / 2, len(inside) * len(outside)
