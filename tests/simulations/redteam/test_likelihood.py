"""The two tests on models' logits: against plain loops, and against the area that normal distributions have."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from simulations.redteam.figures import area
from simulations.redteam.likelihood import lira, rmia
from simulations.redteam.released import trials_of


def test_lira_is_the_ratio_of_two_normal_densities() -> None:
    generator = np.random.default_rng(0)
    inside = generator.random((9, 40)) < 0.5
    inside[:, 0], inside[:, 1], inside[:, 2] = True, False, np.arange(9) == 3
    references = generator.normal(0, 2, 40) + generator.normal(0, 0.5 + inside, (9, 40))
    target = generator.normal(0, 2, 40)
    found = lira(target, references, inside)
    assert np.isnan(found[:2]).all()
    deviation = {}
    for side in (True, False):
        parts = [references[inside[:, p] == side, p] for p in range(40)]
        squares = sum(((part - part.mean()) ** 2).sum() for part in parts if len(part))
        deviation[side] = np.sqrt(squares / sum(len(part) - 1 for part in parts if len(part)))
    for p in range(2, 40):
        value = 0.0
        for side, sign in ((True, 1), (False, -1)):
            part = references[inside[:, p] == side, p]
            value += sign * norm.logpdf(target[p], part.mean(), deviation[side] * np.sqrt(1 + 1 / len(part)))
        assert found[p] == pytest.approx(value)


def test_rmia_is_a_count_of_pairs() -> None:
    generator = np.random.default_rng(1)
    inside = generator.random((7, 20)) < 0.5
    inside[:, 0] = True
    target, references = generator.normal(1, 2, 20), generator.normal(1, 2, (7, 20))
    strangers, usual = generator.normal(1, 2, 15), generator.normal(1, 2, (7, 15))
    found = rmia(target, references, inside, strangers, usual)
    assert np.isnan(found[0])

    def p(logit: float) -> float:
        return 1 / (1 + math.exp(-logit))

    def usually(logits: list[float]) -> float:
        return 0.5 * (1.3 * sum(p(logit) for logit in logits) / len(logits) + 0.7)

    for x in range(1, 20):
        at_x = p(target[x]) / usually([references[m, x] for m in range(7) if not inside[m, x]])
        wins = [at_x >= p(strangers[z]) / usually(list(usual[:, z])) for z in range(15)]
        assert found[x] == pytest.approx(np.mean(wins))


def test_every_model_is_a_trial_and_lira_reaches_the_area_that_there_is() -> None:
    """Patients differ more from each other than with from without, which is what an attack must see through."""
    generator = np.random.default_rng(2)
    inside = generator.random((40, 400)) < 0.5
    logits = generator.normal(0, 3, 400) + inside + generator.normal(0, 1, inside.shape)
    strangers = generator.normal(0, 3, 100) + generator.normal(0, 1, (40, 100))
    found = trials_of(logits, inside, strangers)
    exact = norm.cdf(1 / np.sqrt(2))
    assert [len(part.releases) for part in found.values()] == [40, 40]
    assert exact - 0.02 < area(found["LiRA"]) < exact + 0.01
    assert 0.6 < area(found["RMIA"]) < exact
    guesses = trials_of(logits - inside, inside, strangers)
    assert all(abs(area(part) - 0.5) < 0.02 for part in guesses.values())
