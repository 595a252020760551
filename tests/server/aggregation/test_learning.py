"""What the rules promise: sites that are alike learn as well with f liars among them as without, to two points.

A logistic regression over two Gaussian classes stands for the network: whole trainings take milliseconds.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.study import Aggregation
from server.aggregation import Aggregator
from tests.server.aggregation.replies import a_plan

Array = NDArray[np.float64]

SIZE, SITES, LIARS, ROUNDS, BATCH = 20, 7, 2, 150, 64
MEANS = np.random.default_rng(5).normal(size=SIZE)
MEANS *= 2 / np.linalg.norm(MEANS)  # the best accuracy that can be had is that of a normal deviate below 2: 97.7 %
DRIFT = np.random.default_rng(6).normal(size=SIZE)

ATTACKS: Mapping[str, Callable[[Array], Array]] = {
    "a million times": lambda honest: 1e6 * honest,
    "signs flipped": lambda honest: -honest,
    "drift": lambda honest: 5 * DRIFT / np.linalg.norm(DRIFT),
}
_MORE: Mapping[str, Mapping[str, Any]] = {
    "mean": {},
    "median": {"tolerated": LIARS},
    "trimmed-mean": {"tolerated": LIARS},
    "krum": {"tolerated": LIARS},
    "multi-krum": {"tolerated": LIARS, "selected": 3},
    "centred-clipping": {"tolerated": LIARS, "radius": 0.1, "iterations": 3, "momentum": 0.5},
}
#: Without a bound on a reply's norm: the rule alone has to hold.
PLANS = {rule: a_plan(rule, max_norm=0.0, **more) for rule, more in _MORE.items()}


def draw(generator: np.random.Generator, count: int) -> tuple[Array, Array]:
    labels = generator.choice([-1.0, 1.0], count)
    return labels[:, None] * MEANS + generator.normal(size=(count, SIZE)), labels


def accuracy(plan: Aggregation, attack: Callable[[Array], Array] | None, batch: int = BATCH) -> float:
    generator = np.random.default_rng(7)
    sites = [f"hospital-{i}" for i in range(SITES)]
    aggregator = Aggregator(plan, SIZE, sites)
    theta = np.zeros(SIZE)
    for _ in range(ROUNDS):
        aggregator.begin(sites)
        for i, site in enumerate(sites):
            x, y = draw(generator, batch)
            honest = -(x * (y / (1 + np.exp(np.clip(y * (x @ theta), -50, 50))))[:, None]).mean(axis=0)
            aggregator.add(site, attack(honest) if attack and i < LIARS else honest)
        theta -= 0.5 * aggregator.result()
    x, y = draw(np.random.default_rng(8), 20_000)
    return float((y * (x @ theta) > 0).mean())


@pytest.mark.parametrize("rule", [rule for rule in PLANS if rule != "mean"])
def test_a_robust_rule_loses_at_most_two_points_to_any_attack(rule: str) -> None:
    clean = accuracy(PLANS[rule], None)
    assert clean > 0.95
    costs = {name: clean - accuracy(PLANS[rule], attack) for name, attack in ATTACKS.items()}
    assert max(costs.values()) <= 0.02, costs


def test_the_same_drift_breaks_the_mean() -> None:
    assert accuracy(PLANS["mean"], None) > 0.95
    assert accuracy(PLANS["mean"], ATTACKS["drift"]) < 0.85


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_what_a_drift_costs_falls_with_the_noise_of_the_honest_sites(rule: str) -> None:
    noisy, clean = (accuracy(PLANS[rule], ATTACKS["drift"], batch) for batch in (BATCH // 4, BATCH))
    assert noisy < clean - 0.02
