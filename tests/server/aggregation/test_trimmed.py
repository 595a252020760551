"""Median and trimmed mean against sorted lists; f hostile sites stay within the range of the others."""

import statistics
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation.trimmed import median, trimmed_mean
from tests.server.aggregation.replies import Rows, majority, some_rows, spoilt


@settings(max_examples=60)
@given(some_rows(least=majority, whole=False))
def test_the_median_is_the_median_of_each_coordinate(case: tuple[Rows, int]) -> None:
    rows, tolerated = case
    truth = [statistics.median(column) for column in rows.T.tolist()]
    np.testing.assert_array_equal(median(rows, tolerated), truth)


@settings(max_examples=60)
@given(some_rows(least=majority, whole=False))
def test_the_trimmed_mean_is_the_mean_of_what_is_left(case: tuple[Rows, int]) -> None:
    rows, tolerated = case
    for column, ours in zip(rows.T.tolist(), trimmed_mean(rows, tolerated), strict=True):
        left = list(map(Fraction, column))
        for _ in range(tolerated):
            left.remove(max(left))
            left.remove(min(left))
        truth = sum(left) / len(left)
        assert abs(float(Fraction(float(ours)) - truth)) <= float(max(map(abs, left))) * 1e-14


def test_columns_are_independent_of_how_many_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(2).normal(size=(7, 23))
    whole = median(rows, 2), trimmed_mean(rows, 2)
    before = rows.copy()
    monkeypatch.setattr("server.aggregation.trimmed._COLUMNS", 5)
    np.testing.assert_array_equal(median(rows, 2), whole[0])
    np.testing.assert_array_equal(trimmed_mean(rows, 2), whole[1])
    np.testing.assert_array_equal(rows, before)


@pytest.mark.parametrize("rule", [median, trimmed_mean])
@settings(max_examples=60)
@given(case=some_rows(least=majority, whole=False), data=st.data())
def test_the_order_of_sites_changes_no_bit(
    rule: Callable[[Rows, int], Rows], case: tuple[Rows, int], data: st.DataObject
) -> None:
    rows, tolerated = case
    order = data.draw(st.permutations(range(len(rows))))
    np.testing.assert_array_equal(rule(rows[list(order)], tolerated), rule(rows, tolerated))


@pytest.mark.parametrize("rule", [median, trimmed_mean])
@settings(max_examples=60)
@given(case=some_rows(least=majority, whole=False), data=st.data())
def test_hostile_sites_stay_within_the_range_of_the_others(
    rule: Callable[[Rows, int], Rows], case: tuple[Rows, int], data: st.DataObject
) -> None:
    rows, tolerated = case
    rows, honest = spoilt(data.draw, rows, tolerated)
    low, high = rows[honest].min(axis=0), rows[honest].max(axis=0)
    ulp = 1e-14 * np.maximum(abs(low), abs(high))
    result = rule(rows, tolerated)
    assert (result >= low - ulp).all()
    assert (result <= high + ulp).all()


def test_the_trimmed_mean_trims_however_few_the_sites() -> None:
    """A share of 0.2 of four sites is none; Flower's rule then answers 250,000.75."""
    rows = np.array([[1.0], [1e6], [2.0], [0.0]])
    np.testing.assert_array_equal(trimmed_mean(rows, 1), [1.5])
    np.testing.assert_array_equal(trimmed_mean(rows[:3], 1), [2.0])
    np.testing.assert_array_equal(median(rows, 1), [1.5])


@pytest.mark.parametrize("rule", [median, trimmed_mean])
@pytest.mark.parametrize("tolerated", [1, 2, 5])
def test_no_majority_no_median(rule: Callable[[Rows, int], Rows], tolerated: int) -> None:
    with pytest.raises(ValueError, match="fewer than 2f"):
        rule(np.zeros((2 * tolerated, 3)), tolerated)
    np.testing.assert_array_equal(rule(np.ones((2 * tolerated + 1, 3)), tolerated), np.ones(3))
