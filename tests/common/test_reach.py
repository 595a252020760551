"""How far theta can move: never further than is claimed, whatever the gradients are; and nearly as far."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.contract import Vector
from common.reach import reach_of
from common.study import Study
from server.outer import OuterOptimiser

Gradients = Callable[[int, np.random.Generator], NDArray[np.float64]]
D = 12

#: What replies may be made for: to move theta as far as it goes, or to upset the optimiser's memory.
HOSTILE: dict[str, Gradients] = {
    "growing": lambda t, _: np.full(D, 1e-7 * (0.999 / 0.9) ** t),
    "growing, each at its own rate": lambda t, _: 1e-7 * np.linspace(1.0, 1.5, D) ** t,
    "constant": lambda t, _: np.ones(D),
    "one spike": lambda t, _: np.full(D, 1e3 if t == 9 else 1e-4),
    "turning": lambda t, _: np.full(D, (-1.0) ** (t // 7)),
    "noise": lambda t, generator: generator.normal(size=D) * 10.0 ** generator.integers(-12, 8),
    "nothing": lambda t, _: np.zeros(D),
    "tiny": lambda t, generator: generator.normal(size=D) * 1e-30,
    "huge": lambda t, generator: generator.normal(size=D) * 1e30,
}

OUTERS: list[dict[str, Any]] = [
    {"outer.optimiser": "adam", "outer.rate": 0.007, "outer.clip": 1.0},
    {"outer.optimiser": "adam", "outer.rate": 0.3, "outer.clip": 0.0, "outer.schedule": "cosine"},
    {"outer.optimiser": "adamw", "outer.rate": 0.02, "outer.clip": 0.0},
    {"outer.optimiser": "adamw", "outer.rate": 40.0, "outer.clip": 1.0, "outer.schedule": "cosine"},
    {"outer.optimiser": "adamw", "outer.rate": 150.0, "outer.clip": 1.0},
    {"outer.optimiser": "sgd", "outer.rate": 0.1, "outer.clip": 1.0},
    {"outer.optimiser": "sgd", "outer.rate": 0.1, "outer.clip": 1.0, "outer.momentum": 0.9, "outer.schedule": "cosine"},
    {"outer.optimiser": "sgd", "outer.rate": 1.0, "outer.clip": 0.0, "aggregation.max-norm": 5.0},
    {"outer.optimiser": "sgd", "outer.rate": 1.0, "outer.clip": 0.0, "aggregation.max-norm": 0.0},
    {
        "outer.optimiser": "sgd",
        "outer.clip": 0.0,
        "outer.momentum": 0.99,
        "aggregation.max-norm": 5.0,
        "aggregation.rule": "median",
        "aggregation.tolerated": 1,
    },
]


def a_study(**changes: Any) -> Study:
    return Study().override({"study.rounds": 40, "outer.average": 0.9, **changes})


def as_it_counts(study: Study, gradient: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a gradient as the rule of a study lets it through."""
    most = study.aggregation.max_norm
    if study.aggregation.rule == "median":
        return np.clip(gradient, -most, most)
    norm = float(np.sqrt((gradient**2).sum()))
    return gradient * (most / norm) if most and norm > most else gradient


def path(study: Study, start: Vector, gradients: Gradients, seed: int) -> tuple[list[Vector], list[Vector]]:
    """Return the theta before each step and after the last, and what would be published then."""
    outer, generator = OuterOptimiser(study.outer, start, study.study.rounds), np.random.default_rng(seed)
    thetas, published = [outer.theta.copy()], [outer.published.copy()]
    for t in range(study.study.rounds):
        outer.step(as_it_counts(study, gradients(t, generator)))
        thetas.append(outer.theta.copy())
        published.append(outer.published.copy())
    return thetas, published


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("outer", OUTERS, ids=lambda o: f"{o['outer.optimiser']} {o.get('outer.rate', '')}")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_theta_of_a_run_is_out_of_reach(kind: str, outer: dict[str, Any], dtype: str) -> None:
    study = a_study(**outer, **{"wire.dtype": dtype})
    reach = reach_of(study)
    start = np.linspace(-3, 5, D).astype(dtype)
    with np.errstate(over="ignore"):
        thetas, published = path(study, start, HOSTILE[kind], 0)
    for steps, theta in enumerate(thetas):
        assert reach.within(theta, steps, start, 0, start, 0)
        assert reach.within(published[steps], steps, start, 0, start, 0)
        for before in {max(0, steps - 1), steps // 2}:
            assert reach.within(theta, steps, thetas[before], before, start, before)
            assert reach.within(published[before], steps, start, 0, start, 0)  # the best one is an earlier one


@settings(max_examples=60)
@given(
    outer=st.sampled_from(OUTERS),
    kinds=st.lists(st.sampled_from(sorted(HOSTILE)), min_size=1, max_size=5),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e4]),
    size=st.sampled_from([0.0, 1e-3, 1.0, 1e5]),
    back=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_nor_is_one_whose_coordinator_went_back(
    outer: dict[str, Any], kinds: list[str], scale: float, size: float, back: int, seed: int
) -> None:
    study = a_study(**outer)
    start = (np.random.default_rng(seed).normal(size=D) * size).astype(np.float32)

    def mixed(t: int, generator: np.random.Generator) -> NDArray[np.float64]:
        return HOSTILE[kinds[t // 8 % len(kinds)]](t, generator) * scale

    common = 30 - back

    def parted(t: int, generator: np.random.Generator) -> NDArray[np.float64]:
        usual = mixed(t, generator)
        return usual if t < common else -usual

    with np.errstate(over="ignore"):
        (one, _), (two, _) = (path(study, start, gradients, seed) for gradients in (mixed, parted))
    reach = reach_of(study)
    assert all(np.array_equal(one[t], two[t]) for t in range(common + 1))
    assert reach.within(two[31], 31, one[30], 30, start, common)
    assert all(reach.within(theta, steps, start, 0, start, 0) for steps, theta in enumerate(one))


@pytest.mark.parametrize(
    ("outer", "kind", "reached"),
    [
        ({"outer.optimiser": "adam", "outer.clip": 0.0}, "growing", 0.9),
        ({"outer.optimiser": "adamw", "outer.clip": 0.0}, "growing", 0.9),
        ({"outer.optimiser": "adam", "outer.clip": 0.0}, "constant", 0.7),
        ({"outer.optimiser": "sgd", "outer.momentum": 0.5, "outer.clip": 1.0}, "constant", 0.99),
    ],
)
def test_the_bound_is_nearly_reached_and_a_little_more_is_refused(
    outer: dict[str, Any], kind: str, reached: float
) -> None:
    study = a_study(**outer, **{"outer.rate": 0.01, "wire.dtype": "float64"})
    reach = reach_of(study)
    start = np.full(D, 0.25)
    thetas, _ = path(study, start, HOSTILE[kind], 0)
    last = study.study.rounds
    bound = reach.element[last] if study.outer.optimiser != "sgd" else reach.norm[last] / D**0.5
    assert np.abs(thetas[last] - start).max() > reached * bound
    for towards in (1.0, -1.0):
        further = start.copy()
        further[3] += towards * (1.02 * reach.element[last] + 0.01 * study.outer.optimiser.startswith("adamw"))
        assert not reach.within(further, last, start, 0, start, 0)


def test_the_first_theta_is_the_study_s_and_no_other() -> None:
    for changes in ({}, {"outer.optimiser": "sgd", "outer.clip": 0.0, "aggregation.max-norm": 0.0}):
        reach = reach_of(a_study(**changes))
        start = np.linspace(-1, 1, D).astype(np.float32)
        drawn_elsewhere = np.nextafter(start, np.float32(9))
        assert reach.within(drawn_elsewhere, 0, start, 0, start, 0)
        other = start.copy()
        other[5] += 1e-4
        assert not reach.within(other, 0, start, 0, start, 0)


def test_a_study_of_no_rounds_has_one_theta() -> None:
    start = np.ones(D, np.float32)
    assert reach_of(a_study(**{"study.rounds": 0})).within(start, 0, start, 0, start, 0)
