"""The Gaussian mechanism in closed form: delta, epsilon and mu of one Gaussian with everybody in it.

A sum that one patient moves by at most D, plus Gaussian noise of standard deviation s, has mu = D / s. Several have the
root of the sum of the squares: they are one mechanism with that mu.
"""

from collections.abc import Callable
from math import exp, inf

from scipy.special import log_ndtr, ndtr

__all__ = ["delta_of", "epsilon_of", "mu_of"]


def delta_of(epsilon: float, mu: float) -> float:
    """Return the smallest delta for which a Gaussian mechanism is (epsilon, delta)-private.

    References
    ----------
    Balle and Wang, "Improving the Gaussian mechanism for differential privacy", ICML 2018, theorem 8.
    """
    if mu == 0:
        return 0.0
    return float(ndtr(mu / 2 - epsilon / mu) - exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def epsilon_of(delta: float, mu: float) -> float:
    """Return the smallest epsilon for which a Gaussian mechanism is (epsilon, delta)-private."""
    if delta <= 0:
        return inf if mu else 0.0
    if delta_of(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of(high, mu) > delta:
        high *= 2
    return _turn(lambda epsilon: delta_of(epsilon, mu) > delta, 0.0, high)[1]


def mu_of(epsilon: float, delta: float) -> float:
    """Return the largest mu that is (epsilon, delta)-private: 1 / mu is the noise, in sensitivities."""
    high = 1.0
    while delta_of(epsilon, high) < delta:
        high *= 2
    return _turn(lambda mu: delta_of(epsilon, mu) <= delta, 0.0, high)[0]


def _turn(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Return the neighbouring numbers between which something stops to hold."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high
