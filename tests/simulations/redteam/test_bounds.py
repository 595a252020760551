"""Bounds against the Gaussian mechanism's own curve, limits against the binomial distribution."""

from math import sqrt

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from common.privacy.accounting import deltas, epsilon
from common.privacy.statement import rounds_of
from simulations.redteam.bounds import Bound, at_least, at_most, bound_of_a_round, bound_of_the_study
from simulations.redteam.figures import Trials, area, identified, rates
from simulations.redteam.settings import attacked
from tests.simulations.redteam.scenes import TINY


@pytest.mark.parametrize("noise", [0.5, 1.1, 4.0])
def test_the_bound_is_the_gaussian_mechanisms_curve(noise: float) -> None:
    mu = 1 / noise
    bound = bound_of_a_round(attacked(TINY, "linear, first order", "episode-clip", 1.0, noise, 0.5))
    assert bound is not None
    for wrong in (0.001, 0.01, 0.1, 0.5, 0.9):
        exact = ndtr(ndtri(wrong) + mu)
        assert exact <= bound.true_positives(wrong) <= exact + 2e-3
    assert ndtr(mu / sqrt(2)) <= bound.area <= ndtr(mu / sqrt(2)) + 2e-3
    assert bound.advantage == pytest.approx(2 * ndtr(mu / 2) - 1, abs=1e-9)


def test_one_pair_bounds_both_ways() -> None:
    bound = Bound(((1.0, 0.05),))
    assert bound.true_positives(0.0) == pytest.approx(0.05)
    assert bound.true_positives(0.1) == pytest.approx(np.e * 0.1 + 0.05)
    assert bound.true_positives(0.9) == pytest.approx(1 - (1 - 0.05 - 0.9) / np.e)
    assert bound.true_positives(1.0) == 1.0
    meet = (1 - np.exp(-1.0) * 0.95 - 0.05) / (np.e - np.exp(-1.0))  # where both lines are equal
    assert bound.advantage == pytest.approx(bound.true_positives(meet) - meet)


def test_nothing_is_bounded_without_a_guarantee() -> None:
    assert bound_of_a_round(attacked(TINY, "linear, first order", "none", 1.0, 1.1, 0.5)) is None


@pytest.mark.parametrize(("hits", "trials"), [(1, 10), (5, 10), (10, 10), (3, 200)])
def test_limits_are_those_of_clopper_and_pearson(hits: int, trials: int) -> None:
    assert binom.sf(hits - 1, trials, at_least(hits, trials)) == pytest.approx(0.05)
    if hits < trials:
        assert binom.cdf(hits, trials, at_most(hits, trials)) == pytest.approx(0.05)
    assert at_least(0, trials) == 0
    assert at_most(trials, trials) == 1


def test_the_area_counts_pairs_of_different_releases() -> None:
    generator = np.random.default_rng(0)
    releases = [(generator.integers(0, 5, 3).astype(float), generator.integers(0, 5, 4).astype(float)) for _ in "abc"]
    pairs = [
        (a > b) + 0.5 * (a == b)
        for i, (inside, _) in enumerate(releases)
        for j, (_, outside) in enumerate(releases)
        if i != j
        for a in inside
        for b in outside
    ]
    assert area(Trials(releases)) == pytest.approx(np.mean(pairs))


def test_an_attack_above_its_bound_is_broken_and_one_below_is_not() -> None:
    bound = bound_of_a_round(attacked(TINY, "linear, first order", "episode-clip", 1.0, 1.1, 0.5))
    generator = np.random.default_rng(1)

    def trials(shift: float) -> Trials:
        return Trials([(generator.normal(shift, 1, 8), generator.normal(0, 1, 8)) for _ in range(200)])

    honest = rates(trials(0.5), bound)
    assert [f.name for f in honest] == ["AUC", "TPR at 1.0% FPR", "TPR at 0.1% FPR", "advantage"]
    assert honest[0].value == pytest.approx(ndtr(0.5 / sqrt(2)), abs=0.03)
    assert not any(f.broken for f in honest)
    assert [f.broken for f in rates(trials(4.0), bound)] == [True] * 4
    assert not any(f.broken for f in rates(trials(4.0), None))
    assert identified([1.0] * 30, 100, bound).broken
    assert not identified([0.0] * 29 + [1.0], 100, bound).broken


@pytest.mark.parametrize("sampling", [1.0, 0.3])
def test_the_studys_bound_is_of_all_rounds(sampling: float) -> None:
    """Without sampling it is the curve of one Gaussian mechanism with the root of the rounds times mu."""
    study = attacked(TINY, "linear, first order", "episode-clip", 1.0, 4.0, sampling)
    bound = bound_of_the_study(study)
    assert bound is not None
    mu = sqrt(study.study.rounds) / 4.0
    for wrong in (0.01, 0.1, 0.5):
        exact = ndtr(ndtri(wrong) + mu)
        if sampling == 1:
            assert exact <= bound.true_positives(wrong) <= exact + 2e-3
        else:
            assert wrong < bound.true_positives(wrong) < exact - 0.01
    longer = bound_of_the_study(study.override({"study.rounds": 40}))
    assert longer is not None
    assert longer.area > bound.area + 0.05
    assert bound_of_the_study(attacked(TINY, "linear, first order", "none", 1.0, 1.1, 0.5)) is None
    cost = epsilon([rounds_of(study)], 1e-5)
    assert deltas(rounds_of(study), [cost]) == [pytest.approx(1e-5, rel=0.2)]
