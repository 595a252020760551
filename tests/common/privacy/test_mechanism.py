"""Clipping never lets more through than it says, and noise is what its name says."""

from math import sqrt
from os import urandom

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kstest, norm

from common.privacy.mechanism import STEPS, clipped_sum, noised, normal_steps, on_grid, signal_to_noise

ROWS = arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e150, 1e150) | st.floats(-1e3, 1e3))


@given(ROWS, st.floats(1e-6, 1e6))
def test_a_clipped_vector_is_never_longer_than_the_bound(row: np.ndarray, clip: float) -> None:
    steps = on_grid(row, clip)
    assert sum(int(step) ** 2 for step in steps) <= STEPS**2
    norm_ = float(np.linalg.norm(row))
    if norm_ > 1e-3 * clip:
        back = steps * (clip / STEPS)
        assert np.abs(back - row * min(1, clip / norm_)).max() <= 1.001 * clip / STEPS


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-15, 1 - 1e-15, 3.0, 1e-3])
def test_vectors_at_the_bound_stay_within_it(scale: float) -> None:
    generator = np.random.default_rng(1)
    for size in (1, 2, 3, 1000, 100_000):
        row = generator.normal(size=size)
        row *= 0.7 * scale / np.linalg.norm(row)
        steps = on_grid(row, 0.7)
        length = sqrt(sum(int(step) ** 2 for step in steps))
        assert length <= STEPS
        assert length >= min(scale, 1) * STEPS - sqrt(size)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_what_is_not_finite_counts_nothing(bad: float) -> None:
    rows = [np.array([1.0, bad, 0.0]), np.array([0.0, 3.0, 4.0])]
    total = clipped_sum(rows, 1.0, 3)
    assert np.array_equal(total, on_grid(rows[1], 1.0))
    assert np.array_equal(total, [0, int(0.6 * STEPS), int(0.8 * STEPS)])


def test_rows_of_float32_are_clipped_in_float64() -> None:
    row = np.full(300_000, 1e18, np.float32)  # the norm overflows float32
    assert sqrt(float((on_grid(row, 1.0) ** 2).sum())) == pytest.approx(STEPS, rel=0.01)


def test_noise_is_normal_and_whole() -> None:
    deviation = 2.5 * STEPS
    draws = normal_steps(200_000, deviation, urandom)
    assert draws.dtype == np.int64
    assert kstest(draws / deviation, norm.cdf).pvalue > 1e-6
    assert np.corrcoef(draws[1:], draws[:-1])[0, 1] == pytest.approx(0, abs=0.02)
    assert not np.array_equal(draws, normal_steps(200_000, deviation, urandom))


def drawn(deviation: float, random: bytes) -> int:
    return int(normal_steps(1, deviation, lambda _: random)[0])


def test_noise_reaches_far_and_has_no_gaps_there() -> None:
    """The bytes of rare draws, made by hand: beyond six deviations neighbouring draws are less than a step apart."""
    deviation = 2.2 * STEPS
    for tail in (1e-12, 1e-16, 1e-20, 1e-30):
        whole = int(tail * 2**129)
        draws = []
        for change in (0, 1 << max(0, whole.bit_length() - 50)):
            first, second = divmod(whole + change, 2**64)
            draws.append(drawn(deviation, np.array([first, second & ~1], "<u8").tobytes()))
        assert draws[0] == pytest.approx(-deviation * norm.ppf(tail), rel=1e-6)
        assert abs(draws[0] - draws[1]) <= 1
    ends = [b"\0" * 16, b"\xff" * 16, b"\xff" * 8 + b"\0" * 8, b"\0" * 8 + b"\xff" * 8]
    assert [drawn(1.0, end) for end in ends] == [13, 0, 0, -9]


def test_what_is_released_is_the_sum_with_noise_over_a_constant() -> None:
    total = np.array([STEPS, -3, 0], np.int64)
    silent = noised(total, 2.0, 0.0, 4, urandom)
    assert np.array_equal(silent, np.array([2.0, -3 * 2 / STEPS, 0.0]) / 4)
    many = np.array([noised(total, 2.0, 0.5, 4, urandom) for _ in range(4000)])
    assert many.mean(0) == pytest.approx(silent, abs=0.01)
    assert many.std(0) == pytest.approx(0.5 / 4, rel=0.06)
    grid = many * 4 * STEPS / 2.0
    assert np.array_equal(grid, np.rint(grid))


def test_signal_to_noise_is_what_a_simulation_gives() -> None:
    parts, clip, deviation, size, sites = 4, 0.5, 2.0, 10_000, 9
    row = np.full(size, 1.0)
    total = clipped_sum([row] * parts, clip, size)
    noisy = np.mean([noised(total, clip, deviation, parts, urandom) for _ in range(sites)], axis=0)
    clean = total * (clip / STEPS / parts)
    measured = np.linalg.norm(clean) / np.linalg.norm(noisy - clean)
    assert signal_to_noise(parts, deviation, clip, size, sites) == pytest.approx(measured, rel=0.05)
