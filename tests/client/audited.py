"""What an attacker's scores, with and without a patient, prove about epsilon, and whether that is above the claim."""

import numpy as np
from numpy.typing import NDArray

from common.privacy.accounting import Rounds, epsilon
from common.privacy.audit import mu_at_least
from common.privacy.gaussian import epsilon_of
from common.study import Study

__all__ = ["ERROR", "Scores", "found_out", "proven"]

#: ``[trials, 1]``, or 2 with pairs of rounds.
Scores = NDArray[np.float64]

#: An audit is wrong with this chance, and a test must not be.
ERROR = 1e-5


def proven(loud: Scores, calm: Scores, error: float) -> list[float]:
    """Return the mu that is proven of one round and, where there are pairs, of two together."""
    mus = [mu_at_least(calm[:, 0].tolist(), loud[:, 0].tolist(), error)]
    if loud.shape[1] == 2:
        mus.append(mu_at_least((calm[:, 0] - calm[:, 1]).tolist(), (loud[:, 0] - loud[:, 1]).tolist(), error))
    return mus


def found_out(study: Study, loud: Scores, calm: Scores) -> bool:
    """Return whether an epsilon is proven that is above what the study claims, for one round or for two."""
    plan = study.privacy
    mus = proven(loud, calm, ERROR)
    claims = [epsilon([Rounds(plan.sampling, plan.noise, count)], plan.delta) for count in range(1, len(mus) + 1)]
    return any(epsilon_of(plan.delta, mu) > claim for mu, claim in zip(mus, claims, strict=True))
