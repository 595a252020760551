"""The mean: float64, weights, and a vector of memory."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation import Mean


def test_the_mean_is_added_in_float64() -> None:
    mean = Mean(2)
    for value in (2.0**24, 1.0, 1.0, 1.0):  # float32 would lose every 1
        mean.add(np.array([value, -value], np.float32))
    np.testing.assert_array_equal(mean.result(), [(2**24 + 3) / 4, -(2**24 + 3) / 4])
    assert mean.count == 4
    assert mean.result().dtype == np.float64


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(1e-6, 1e6)), min_size=1, max_size=6))
def test_the_weighted_mean_is_exact_to_rounding(pairs: list[tuple[float, float]]) -> None:
    mean = Mean(1)
    for value, weight in pairs:
        mean.add(np.array([value], np.float32), weight)
    truth = sum(Fraction(v) * Fraction(w) for v, w in pairs) / sum(Fraction(w) for _, w in pairs)
    scale = max(abs(v) for v, _ in pairs)
    assert abs(float(Fraction(float(mean.result()[0])) - truth)) <= scale * 1e-14
