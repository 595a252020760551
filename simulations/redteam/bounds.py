"""What a guarantee leaves an attacker: bounds on rates, AUC and advantage; and what so many trials prove.

A release is (epsilon, delta)-private for many pairs at once, one delta for every epsilon. Each pair bounds how often a
test says "yes" of a patient who was there, given how often it says so of one who was not; the bound is the least.
"""

from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from common.privacy.accounting import deltas, epsilon
from common.privacy.gaussian import delta_of
from common.privacy.statement import rounds_of
from common.study import Study

__all__ = ["Bound", "at_least", "at_most", "bound_of_a_round", "bound_of_the_study"]

_CELLS = 20_000  # of the integral under the curve


@dataclass(frozen=True)
class Bound:
    """What (epsilon, delta)-privacy, for each of some pairs, leaves to a test of "was this patient there".

    Attributes
    ----------
    pairs : tuple of (float, float)
        Each an epsilon and a delta that hold together, patients added or removed.
    """

    pairs: tuple[tuple[float, float], ...]

    def true_positives(self, false_positives: float) -> float:
        """Return the largest rate of right alarms that goes with a rate of false ones.

        Both directions of the definition: of the test, and of its opposite.

        References
        ----------
        Kairouz, Oh and Viswanath, "The composition theorem for differential privacy", 2015, theorem 2.1.
        """
        return float(self._curve(np.array([false_positives]))[0])

    @property
    def area(self) -> float:
        """The largest area under the curve of rates (AUC).

        The curve is concave, so that sums of its values at the middles of cells are never too small.
        """
        return float(self._curve((np.arange(_CELLS) + 0.5) / _CELLS).mean())

    @property
    def advantage(self) -> float:
        """The largest difference between the two rates: where a pair's two lines meet."""
        return min(1.0, *((exp(e) - 1 + 2 * d) / (exp(e) + 1) for e, d in self.pairs))

    def _curve(self, false_positives: NDArray[np.float64]) -> NDArray[np.float64]:
        least = np.ones_like(false_positives)
        for e, d in self.pairs:
            least = np.minimum(least, exp(e) * false_positives + d)
            least = np.minimum(least, 1 - exp(-e) * (1 - d - false_positives))
        return least


def bound_of_a_round(study: Study) -> Bound | None:
    """Return what one answer leaves to be told of a patient's being in that round; None without a guarantee.

    In the round or not is the patient's own coin. With the coins of all others fixed, a patient who is in the round
    moves a sum with noise by 1 / z of its deviation at most (`docs/privacy.md`, both mechanisms), whatever q is: that
    many patients are not in most rounds is what the study's epsilon has in addition. Those who are in a round are no
    better off than this.
    """
    if not study.privacy.guaranteed:
        return None
    mu = 1 / study.privacy.noise
    most = max(4.0, mu * (mu / 2 + 8))
    return Bound(tuple((float(e), delta_of(float(e), mu)) for e in np.linspace(0, most, 200)))


def bound_of_the_study(study: Study) -> Bound | None:
    """Return what all answers together leave to be told of a patient's being in the data; None without a guarantee.

    It is the study's epsilon, at every delta at once: over all rounds, the coins of a patient among what is secret. It
    is not comparable with `bound_of_a_round`, which is of a patient who is known to be in the data.
    """
    if not study.privacy.guaranteed:
        return None
    rounds = rounds_of(study)
    most = min(60.0, max(4.0, epsilon([rounds], 1e-6)))
    grid = [float(e) for e in np.linspace(0, most, 200)]
    return Bound(tuple(zip(grid, deltas(rounds, grid), strict=True)))


def at_least(hits: float, trials: float, error: float = 0.05) -> float:
    """Return Clopper and Pearson's lower limit on a probability; one-sided, wrong with a chance of ``error``."""
    return 0.0 if hits <= 0 else float(betaincinv(hits, trials - hits + 1, error))


def at_most(hits: float, trials: float, error: float = 0.05) -> float:
    """Return Clopper and Pearson's upper limit on a probability; one-sided, wrong with a chance of ``error``."""
    return 1.0 if hits >= trials else float(betaincinv(hits + 1, trials - hits, 1 - error))
