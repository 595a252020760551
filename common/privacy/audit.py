"""What an attacker's scores prove about a mechanism: a lower bound on its mu, to hold against the mu that it claims."""

from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv, ndtri

__all__ = ["mu_at_least"]


def mu_at_least(without: Sequence[float], with_patient: Sequence[float], error: float = 0.05) -> float:
    """Return a mu that a Gaussian mechanism has at least, but for a chance of ``error``.

    A threshold, chosen by the first fifth of the trials, tells the rest of them apart. Both kinds of mistakes are
    bounded from above by Clopper and Pearson's interval, and no mechanism of a smaller mu lets anybody make so few.

    Parameters
    ----------
    without, with_patient : sequence of float
        An attacker's score in every trial, without one patient and with; higher scores say "with".

    References
    ----------
    Dong, Roth and Su, "Gaussian differential privacy", 2022, for mu and its trade-off; Nasr et al., "Tight auditing of
    differentially private machine learning", USENIX Security 2023, for bounding it.
    """
    calm, loud = np.asarray(without, np.float64), np.asarray(with_patient, np.float64)
    few = [max(1, len(scores) // 5) for scores in (calm, loud)]
    threshold = (np.median(calm[: few[0]]) + np.median(loud[: few[1]])) / 2
    false = _at_most(int((calm[few[0] :] > threshold).sum()), len(calm) - few[0], error / 2)
    missed = _at_most(int((loud[few[1] :] <= threshold).sum()), len(loud) - few[1], error / 2)
    return max(0.0, float(-ndtri(false) - ndtri(missed)))


def _at_most(hits: int, trials: int, error: float) -> float:
    """Return Clopper and Pearson's upper bound on a probability."""
    return 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, 1 - error))
