"""Krum and Multi-Krum against exact fractions; how far f hostile sites can move them."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregation.krum import krum, krum_needs, krum_scores, multi_krum
from tests.server.aggregation.replies import Rows, some_rows, spoilt


def scores_by_hand(rows: Rows, tolerated: int) -> list[Fraction]:
    vectors = [[Fraction(x) for x in row] for row in rows.tolist()]
    scores = []
    for i, a in enumerate(vectors):
        others = [b for j, b in enumerate(vectors) if j != i]
        far = sorted(sum(((x - y) ** 2 for x, y in zip(a, b, strict=True)), Fraction()) for b in others)
        scores.append(sum(far[: len(vectors) - tolerated - 2], Fraction()))
    return scores


@settings(max_examples=60)
@given(some_rows(least=krum_needs))
def test_krum_is_the_vector_of_the_smallest_score(case: tuple[Rows, int]) -> None:
    rows, tolerated = case
    scores = scores_by_hand(rows, tolerated)
    assert krum_scores(rows, tolerated).tolist() == scores
    np.testing.assert_array_equal(krum(rows, tolerated), rows[scores.index(min(scores))])  # the first of equal ones


@settings(max_examples=60)
@given(some_rows(least=lambda f: krum_needs(f) + 2), st.integers(1, 4))
def test_multi_krum_is_the_mean_of_the_smallest_scores(case: tuple[Rows, int], selected: int) -> None:
    rows, tolerated = case
    selected = min(selected, len(rows) - tolerated - 2)
    scores = scores_by_hand(rows, tolerated)
    best = sorted(range(len(rows)), key=lambda i: (scores[i], i))[:selected]
    truth = [float(sum(Fraction(rows[i, d]) for i in best) / selected) for d in range(rows.shape[1])]
    np.testing.assert_array_equal(multi_krum(rows, tolerated, selected), truth)
    np.testing.assert_array_equal(multi_krum(rows, tolerated, 1), krum(rows, tolerated))


@settings(max_examples=60)
@given(some_rows(least=krum_needs, whole=False), st.data())
def test_the_order_of_sites_matters_to_krum_among_equal_scores_alone(
    case: tuple[Rows, int], data: st.DataObject
) -> None:
    rows, tolerated = case
    order = list(data.draw(st.permutations(range(len(rows)))))
    scores = krum_scores(rows, tolerated)
    np.testing.assert_array_equal(krum_scores(rows[order], tolerated), scores[order])
    if (scores == scores.min()).sum() == 1:
        np.testing.assert_array_equal(krum(rows[order], tolerated), krum(rows, tolerated))


@settings(max_examples=60)
@given(some_rows(least=krum_needs, whole=False), st.data())
def test_hostile_sites_move_krum_no_further_than_the_others_are_apart(
    case: tuple[Rows, int], data: st.DataObject
) -> None:
    """A chosen vector has an honest one among its neighbours, and no greater score than an honest one can have."""
    rows, tolerated = case
    rows, honest = spoilt(data.draw, rows, tolerated)
    apart = max(math.dist(rows[i], rows[j]) for i in honest for j in honest)
    reach = math.sqrt(len(rows) - tolerated - 2) * apart * (1 + 1e-9) + 1e-9
    chosen = krum(rows, tolerated)
    assert min(math.dist(chosen, rows[i]) for i in honest) <= reach
    assert any(np.array_equal(chosen, row) for row in rows)
    most = len(rows) - tolerated - 2
    mean_of_chosen = multi_krum(rows, tolerated, most)
    assert min(math.dist(mean_of_chosen, rows[i]) for i in honest) <= reach + apart


@pytest.mark.parametrize("tolerated", [1, 2, 4])
def test_krum_needs_two_f_and_three(tolerated: int) -> None:
    """With fewer, a rule that goes on takes at least one neighbour: two hostile twins are then the nearest of all."""
    for count in range(1, 2 * tolerated + 3):
        with pytest.raises(ValueError, match="fewer than 2f"):
            krum(np.zeros((count, 2)), tolerated)
        with pytest.raises(ValueError, match="fewer than m"):
            multi_krum(np.zeros((count, 2)), tolerated, 1)
    twins = np.array([[0.0], [1.0], [2.5], [9.0], [9.0]])
    with pytest.raises(ValueError, match="fewer than 2f"):
        krum(twins, 2)
    np.testing.assert_array_equal(krum(np.ones((2 * tolerated + 3, 2)), tolerated), [1, 1])


def test_multi_krum_averages_no_more_than_it_can_trust() -> None:
    rows = np.random.default_rng(3).normal(size=(7, 2))
    assert multi_krum(rows, 2, 3).shape == (2,)
    with pytest.raises(ValueError, match=r"7 vectors with f = 2 and m = 4 are fewer than m \+ f \+ 2"):
        multi_krum(rows, 2, 4)


def test_distances_of_long_vectors_that_are_close_together_are_right() -> None:
    generator = np.random.default_rng(4)
    rows = 40.0 + generator.normal(0, 0.01, (5, 2000)).astype(np.float32).astype(np.float64)
    short = rows.astype(np.float32)
    inner = short @ short.T
    squares = np.diag(inner)
    lost = squares[:, None] + squares[None] - 2 * inner  # in float32, over inner products
    truth = np.array([[math.dist(a, b) ** 2 for b in rows] for a in rows])
    assert np.abs(lost - truth).max() > 1  # where the truth is about 0.4
    scores = [sum(sorted(line)[1:3]) for line in truth]
    np.testing.assert_allclose(krum_scores(rows, 1), scores, rtol=1e-12)
    # Inner products lose them in float64 too.
    far = 2.0**40 + np.arange(5.0)[:, None] ** 2 * np.ones((5, 3))
    np.testing.assert_array_equal(krum_scores(far, 1), [3 * s for s in (1 + 16, 1 + 9, 9 + 16, 25 + 49, 49 + 144)])
