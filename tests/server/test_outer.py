"""The outer optimiser and the mean that it is given."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.contract import Vector
from common.study import Outer
from server.aggregation import Mean
from server.outer import OuterOptimiser

plain = partial(Outer, clip=0.0)
START = np.random.default_rng(0).normal(0, 1, 11)
GRADIENTS = np.random.default_rng(1).normal(0, 1, (5, 11))


def steps(outer: Outer) -> list[Vector]:
    optimiser = OuterOptimiser(outer, START, len(GRADIENTS))
    out = []
    for gradient in GRADIENTS:
        optimiser.step(gradient)
        out.append(optimiser.theta.copy())
    return out


def test_sgd_with_momentum_is_what_the_formula_says() -> None:
    theta, velocity = START.copy(), np.zeros(11)
    for ours, gradient in zip(steps(plain(optimiser="sgd", rate=0.1, momentum=0.9)), GRADIENTS, strict=True):
        velocity = 0.9 * velocity + gradient
        theta = theta - 0.1 * velocity
        np.testing.assert_allclose(ours, theta, rtol=1e-12)


@pytest.mark.parametrize("decay", [False, True])
def test_adam_is_what_the_paper_says(decay: bool) -> None:
    # Kingma and Ba, "Adam", 2015, algorithm 1; Loshchilov and Hutter, "Decoupled weight decay", 2019, algorithm 2.
    theta, m, v = START.copy(), np.zeros(11), np.zeros(11)
    ours = steps(plain(optimiser="adamw" if decay else "adam", rate=0.01))
    for t, gradient in enumerate(GRADIENTS, 1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        theta = theta * (1 - 0.01 * 0.01 * decay)
        theta = theta - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(ours[t - 1], theta, rtol=1e-10)


def test_cosine_lets_the_rate_fall_to_zero() -> None:
    theta = START.copy()
    ours = steps(plain(optimiser="sgd", rate=0.2, schedule="cosine"))
    for t, gradient in enumerate(GRADIENTS):
        theta = theta - 0.2 * 0.5 * (1 + math.cos(math.pi * t / 5)) * gradient
        np.testing.assert_allclose(ours[t], theta, rtol=1e-12)


def test_a_long_gradient_is_shortened_and_no_other() -> None:
    theta = START.copy()
    for ours, gradient in zip(steps(Outer(optimiser="sgd", rate=0.1, clip=3.0)), GRADIENTS, strict=True):
        length = math.sqrt(math.fsum(gradient**2))
        theta = theta - 0.1 * gradient * min(1.0, 3.0 / length)
        np.testing.assert_allclose(ours, theta, rtol=1e-12)
    assert {np.linalg.norm(gradient) > 3 for gradient in GRADIENTS} == {True, False}


def test_the_published_theta_is_the_weighted_mean_of_all_but_the_first() -> None:
    optimiser = OuterOptimiser(plain(average=0.8), START, 5)
    np.testing.assert_array_equal(optimiser.published, START)
    seen = []
    for gradient in GRADIENTS:
        optimiser.step(gradient)
        seen.append(optimiser.theta.copy())
        weights = [0.8 ** (len(seen) - i) for i in range(1, len(seen) + 1)]
        np.testing.assert_allclose(optimiser.published, np.average(seen, axis=0, weights=weights), rtol=1e-12)
    last = OuterOptimiser(plain(), START, 5)
    last.step(GRADIENTS[0])
    np.testing.assert_array_equal(last.published, last.theta)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_theta_keeps_its_type_and_the_start_is_not_touched(dtype: str) -> None:
    start: Vector = START.astype(dtype)
    optimiser = OuterOptimiser(plain(), start, 1)
    np.testing.assert_array_equal(optimiser.theta, start)
    optimiser.step(GRADIENTS[0])
    assert optimiser.theta.dtype == dtype
    np.testing.assert_array_equal(start, START.astype(dtype))


@settings(max_examples=60)
@given(arrays(np.float32, st.tuples(st.integers(1, 8), st.just(3)), elements=st.floats(-1e6, 1e6, width=32)))
def test_the_mean_is_that_of_exact_sums(vectors: Vector) -> None:
    mean = Mean(3)
    for vector in vectors:
        mean.add(vector)
    assert mean.count == len(vectors)
    exact = [math.fsum(column) / len(vectors) for column in vectors.astype(float).T]
    np.testing.assert_allclose(mean.result(), exact, rtol=1e-12, atol=1e-9)
    assert mean.result().dtype == np.float64


def test_small_numbers_beside_large_ones_are_kept() -> None:
    mean = Mean(1)
    for value in (1e8, 1.0, -1e8):
        mean.add(np.array([value], np.float32))
    assert mean.result()[0] == pytest.approx(1 / 3)  # in float32 the one would be gone


def test_a_step_is_in_thetas_type() -> None:
    optimiser = OuterOptimiser(plain(optimiser="sgd", rate=1.0), np.zeros(1, np.float32), 1)
    optimiser.step(np.array([1 / 3]))
    assert optimiser.theta[0] == -np.float32(1 / 3)
    assert optimiser.theta.dtype == np.float32
