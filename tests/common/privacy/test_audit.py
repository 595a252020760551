"""The audit's bound holds as often as it says, and comes close to the truth."""

import numpy as np
import pytest
from scipy.stats import binomtest

from common.privacy.audit import _at_most, mu_at_least


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (9, 10), (10, 10), (17, 800)])
def test_the_interval_is_scipys(hits: int, trials: int) -> None:
    theirs = binomtest(hits, trials).proportion_ci(0.95, "exact").high
    assert _at_most(hits, trials, 0.025) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0, 2.0])
def test_the_bound_is_below_the_truth_and_near_it(mu: float) -> None:
    generator = np.random.default_rng(3)
    bounds = []
    for _ in range(200):
        without, with_patient = generator.normal(0, 1, 2000), generator.normal(mu, 1, 2000)
        bounds.append(mu_at_least(without.tolist(), with_patient.tolist()))
    assert np.mean(np.array(bounds) > mu) <= 0.05
    assert np.mean(bounds) > mu - 0.25


def test_certainty_is_bounded_by_the_number_of_trials() -> None:
    few, many = (mu_at_least([0.0] * n, [1.0] * n) for n in (100, 10_000))
    assert 3 < few < many < 10
