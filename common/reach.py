"""How far theta can have moved since it began: the theta of a round must be one that the study can have led to.

The first theta follows from the study's seed. After that, the outer optimiser moves every number by a step that the
study bounds, whatever the replies were. So a site can refuse a theta that no honest coordinator could have sent,
without knowing what the other sites said. The bounds of a step, number by number:

- Adam moves by at most ``rate * A(t)``. With b1, b2 for its two memories and rho = b1^2 / b2, Cauchy and Schwarz give
  ``A(t) = (1 - b1) / sqrt(1 - b2) * sqrt((1 - rho^t) / (1 - rho)) * sqrt(1 - b2^t) / (1 - b1^t)``: 1 in the first step,
  1.96 in the 75th, 7.27 after thousands. Gradients that grow by b2 / b1 a step reach it, so nothing smaller is right.
- AdamW has the same step, and shrinks theta by ``rate * decay``.
- SGD moves by at most ``rate * G / (1 - momentum)``, with G the norm that a meta-gradient is shortened to, or that of
  the longest reply that counts. Its step has this length as a whole too.

References
----------
Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, section 2.1, bounds one step by
``rate * (1 - b1) / sqrt(1 - b2)`` where only one gradient is not zero.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import inf

import numpy as np
from numpy.typing import NDArray

from common.contract import Vector
from common.study import Study

__all__ = ["Reach", "reach_of"]

Numbers = NDArray[np.float64]

#: PyTorch's own, which `server.outer` leaves as they are.
_BETA1, _BETA2, _DECAY = 0.9, 0.999, 0.01

#: What arithmetic in the wire's precision may add: a share of every step, and roundings of theta's largest number.
_SHARE, _ROUNDINGS = 1e-3, 4
#: Machines draw the first theta alike up to this share of its largest number: their logarithms round differently.
_DRAWN_ALIKE = 1e-5


@dataclass(frozen=True)
class Reach:
    """How far theta can have moved in all steps up to some number, for one study.

    Attributes
    ----------
    element : ndarray
        ``[T + 1]``: the most that any number moves in the first t steps.
    share : ndarray
        ``[T + 1]``: by which share of its first value a number can move besides.
    norm : ndarray
        ``[T + 1]``: the most that theta moves as a whole, Euclidean; infinite where only numbers are bounded.
    """

    element: Numbers
    share: Numbers
    norm: Numbers

    def within(self, theta: Vector, steps: int, other: Vector, others: int, start: Vector, common: int) -> bool:
        """Return whether theta can be that far from another theta of the same study.

        Parameters
        ----------
        theta, other : ndarray
            ``[D]`` each.
        steps, others : int
            How many steps had been taken when they were theta.
        start : ndarray
            The study's first theta ``[D]``.
        common : int
            How many steps they have in common.
        """
        apart = steps + others - 2 * common
        element, share, norm = (_between(part, steps, others, common) for part in (self.element, self.share, self.norm))
        if element == inf:
            return True
        roundings = _ROUNDINGS * float(np.finfo(theta.dtype).eps)
        more = 1 + _SHARE + roundings * max(steps, others)
        largest = float(np.abs(start).max(initial=0))
        slack = (_DRAWN_ALIKE + share * _SHARE) * largest
        slack += roundings * apart * (float(np.abs(other).max(initial=0)) + element)
        with np.errstate(over="ignore"):  # infinite is beyond every bound
            gap = np.abs(theta - other)
            if norm < inf and float(np.linalg.norm(gap)) > more * norm + slack * theta.size**0.5:
                return False
        if share:
            gap -= share * np.abs(start)
        return bool((gap <= more * element + slack).all())


@lru_cache(maxsize=8)
def reach_of(study: Study) -> Reach:
    """Return how far a study's theta can move, step by step."""
    outer, rounds = study.outer, max(study.study.rounds, 1)
    t = np.arange(rounds + 1, dtype=np.float64)
    rate = np.full(rounds + 1, outer.rate)
    if outer.schedule == "cosine":
        rate *= (1 + np.cos(np.pi * (t - 1) / rounds)) / 2
    nothing = np.zeros(rounds + 1)
    if outer.optimiser == "sgd":
        longest, whole = _gradient(study)
        kept = (1 - outer.momentum**t) / (1 - outer.momentum)
        return Reach(_sum(rate * kept, longest), nothing, _sum(rate * kept, whole))
    rho = _BETA1**2 / _BETA2
    most = nothing.copy()
    most[1:] = (1 - _BETA1) / np.sqrt(1 - _BETA2) * np.sqrt((1 - rho ** t[1:]) / (1 - rho))
    most[1:] *= np.sqrt(1 - _BETA2 ** t[1:]) / (1 - _BETA1 ** t[1:])
    far = _sum(t, inf)
    element = _sum(rate * most, 1.0)
    if outer.optimiser == "adam":
        return Reach(element, nothing, far)
    decay = np.where(t > 0, rate * _DECAY, 0.0)
    if decay.max() > 1:  # it would turn theta's sign round, and let it grow
        return Reach(far, nothing, far)
    # No number is ever larger than at first by more than all of Adam's steps together: what is taken off is a share of
    # that.
    larger = np.concatenate([[0.0], element[:-1]])
    return Reach(_sum(rate * most + decay * larger, 1.0), _sum(decay, 1.0), far)


def _gradient(study: Study) -> tuple[float, float]:
    """Return the most that a number of an aggregated meta-gradient can be, and its norm; infinite without a bound.

    Every rule takes means of replies, number by number or whole, or steps towards them: what is bounded of every reply
    is bounded of the result. Norms are not, where every number is chosen by itself.
    """
    if study.outer.clip:
        return study.outer.clip, study.outer.clip
    longest = study.aggregation.max_norm or inf
    return longest, inf if study.aggregation.rule in {"median", "trimmed-mean"} else longest


def _sum(steps: Numbers, longest: float) -> Numbers:
    """Return the sums of so many steps; the one at 0 is that of none."""
    out = np.concatenate([[0.0], np.cumsum(steps[1:])])
    out[1:] *= longest
    return out


def _between(part: Numbers, one: int, two: int, common: int) -> float:
    if max(part[one], part[two]) == inf:
        return 0.0 if one == two == common else inf
    return float(part[one] + part[two] - 2 * part[common])
