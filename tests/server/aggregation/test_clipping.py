"""Centred clipping against lists of floats, over rounds that sites miss; what a hostile site can move."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation.clipping import CentredClipping, clipped_mean, norm
from tests.server.aggregation.replies import Rows, majority, some_rows, spoilt


def clipped_by_hand(rows: list[list[float]], centre: list[float], radius: float, iterations: int) -> list[float]:
    for _ in range(iterations):
        moves = []
        for row in rows:
            away = [x - v for x, v in zip(row, centre, strict=True)]
            length = math.hypot(*away)
            share = min(1.0, radius / length) if length else 1.0
            moves.append([share * a for a in away])
        centre = [v + math.fsum(m[d] for m in moves) / len(rows) for d, v in enumerate(centre)]
    return centre


@settings(max_examples=60)
@given(some_rows(least=majority, whole=False), st.floats(1e-2, 1e7), st.integers(1, 4), st.data())
def test_clipping_is_that_of_the_paper(
    case: tuple[Rows, int], radius: float, iterations: int, data: st.DataObject
) -> None:
    rows, _ = case
    width = rows.shape[1]
    centre = data.draw(st.lists(st.floats(-1e6, 1e6), min_size=width, max_size=width))
    given_centre = np.array(centre)
    ours = clipped_mean(rows, given_centre, radius, iterations)
    truth = clipped_by_hand(rows.tolist(), centre, radius, iterations)
    np.testing.assert_allclose(ours, truth, rtol=1e-9, atol=1e-6)
    np.testing.assert_array_equal(given_centre, centre)
    shift = np.arange(1.0, width + 1)
    np.testing.assert_allclose(
        clipped_mean(rows + shift, given_centre + shift, radius, iterations), ours + shift, atol=1e-5
    )
    order = list(data.draw(st.permutations(range(len(rows)))))
    np.testing.assert_allclose(clipped_mean(rows[order], given_centre, radius, iterations), ours, rtol=1e-9, atol=1e-6)


@settings(max_examples=60)
@given(some_rows(least=majority, whole=False), st.floats(1e-2, 1e3), st.integers(1, 4), st.data())
def test_a_hostile_site_moves_a_clipped_mean_by_its_share_of_the_radius(
    case: tuple[Rows, int], radius: float, iterations: int, data: st.DataObject
) -> None:
    rows, tolerated = case
    changed, honest = spoilt(data.draw, rows, tolerated)
    centre = rows[honest].mean(axis=0)
    one, other = (clipped_mean(r, centre, radius, 1) for r in (rows, changed))
    slack = 1e-9 * (1 + abs(centre).max())
    assert norm(one - other) <= 2 * tolerated * radius / len(rows) + slack
    assert norm(clipped_mean(changed, centre, radius, iterations) - centre) <= iterations * radius + slack


def test_the_norm_of_a_float32_vector_is_computed_in_float64() -> None:
    assert norm(np.array([3e30, 4e30], np.float32)) == pytest.approx(5e30, rel=1e-7)  # its squares overflow
    assert norm(np.array([3e-30, 4e-30], np.float32)) == pytest.approx(5e-30, rel=1e-7)
    assert norm(np.array([1e200, 0.0])) == np.inf


def test_what_is_near_the_centre_counts_in_full() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 10.0]])
    np.testing.assert_array_equal(clipped_mean(rows, np.zeros(2), 1.0, 1), [1 / 3, 2 / 3])
    np.testing.assert_array_equal(clipped_mean(rows, np.zeros(2), 100.0, 1), [1 / 3, 11 / 3])
    np.testing.assert_array_equal(clipped_mean(np.ones((3, 2)), np.ones(2), 1.0, 3), [1, 1])  # no distance at all


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_centre_and_momenta_are_kept_across_rounds(beta: float) -> None:
    generator = np.random.default_rng(5)
    rule = CentredClipping(3, radius=0.7, iterations=2, momentum=beta)
    there = [["a", "b", "c"], ["a", "c", "d"], ["b", "c", "d"], ["a", "b", "c"]]
    centre, momenta = [0.0] * 3, dict[str, list[float]]()
    for sites in there:
        rows = generator.normal(1, 1, (len(sites), 3))
        for site, row in zip(sites, rows.tolist(), strict=True):
            before = momenta.get(site, row)  # the first momentum is the first gradient
            momenta[site] = [(1 - beta) * g + beta * m for g, m in zip(row, before, strict=True)]
        centre = clipped_by_hand([momenta[site] for site in sites], centre, 0.7, 2)
        np.testing.assert_allclose(rule.step(sites, rows), centre, rtol=1e-12)
    assert set(rule.state()) == {"centre"} | ({f"momentum.{s}" for s in "abcd"} if beta else set())
