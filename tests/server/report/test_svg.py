"""Plots: scales, ticks and lines, and that no name gets into the drawing as anything but text."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report.charts import _binned, _shares, _smooth, roster_chart
from server.report.facts import STATES, History
from server.report.svg import Band, Line, Scale, plot, spread, svg, text, ticks

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, finite)
def test_ticks_are_few_round_and_span_the_values(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    marks = ticks(low, high)
    room = 1e-6 * max(1.0, abs(low), abs(high))
    assert marks[0] <= low + room
    assert marks[-1] >= high - room
    assert 2 <= len(marks) <= 9
    assert len({round(b - a, 9) for a, b in pairwise(marks)}) <= 2  # equal but for rounding


@given(st.lists(st.floats(0, 200), max_size=12))
def test_names_are_moved_apart_and_stay_in_order(wanted: list[float]) -> None:
    places = spread(sorted(wanted), 13, 0, 200)
    assert all(b - a >= 13 - 1e-9 for a, b in pairwise(places))
    assert not places or places[-1] <= 200


def test_a_scale_maps_ends_to_ends() -> None:
    scale = Scale(10, 20, 100, 0)
    assert [scale(10), scale(15), scale(20)] == [100, 50, 0]
    assert Scale(5, 5, 0, 1)(5) == 0  # no span, no crash


def test_a_gap_breaks_a_line_and_a_lonely_point_is_seen() -> None:
    y = np.array([1.0, 2.0, np.nan, 3.0, np.nan, 4.0, 5.0])
    drawing = plot([Line(np.arange(7.0), y, colour="#123456")], label="x", width=300)
    shapes = re.findall(r'<path d="([^"]*)"[^>]*stroke="#123456"', drawing)
    assert [re.sub(r"[^MLh]", "", shape) for shape in shapes] == ["MLMML", "Mh"]


def test_nothing_known_draws_an_empty_plot() -> None:
    nothing = np.full(3, np.nan)
    x = np.arange(3.0)
    drawing = plot([Line(x, nothing, name="a")], [Band(x, nothing, nothing, "#000")], label="x", width=300)
    assert "nan" not in drawing


def test_names_are_text() -> None:
    assert text(0, 0, '<b>&"\x1b') == '<text x="0.0" y="0.0" fill="#5f6368">&lt;b&gt;&amp;&quot;\ufffd</text>'


def test_a_label_is_text() -> None:
    assert svg(1, 2, '"><b>', ["x"]) == '<svg viewBox="0 0 1 2" role="img" aria-label="&quot;&gt;&lt;b&gt;">x</svg>'


def test_smoothing_is_the_mean_of_what_is_known_around() -> None:
    values = np.random.default_rng(0).random((60, 3))
    values[5:20, 1] = np.nan
    values[:, 2] = np.nan
    smooth = _smooth(values)  # over 5 rounds
    for row in range(60):
        near = values[max(row - 2, 0) : row + 3]
        for column in range(2):
            known = near[:, column][np.isfinite(near[:, column])]
            wanted = known.mean() if known.size else np.nan
            assert smooth[row, column] == pytest.approx(wanted, nan_ok=True)
    assert np.isnan(smooth[:, 2]).all()
    assert np.array_equal(_smooth(values[:20]), values[:20], equal_nan=True)  # few rounds stay as they are


@pytest.mark.parametrize(("rounds", "most"), [(1, 10), (7, 10), (10, 10), (103, 10)])
def test_bins_hold_every_round_once(rounds: int, most: int) -> None:
    numbers = np.arange(1, rounds + 1)
    values = np.random.default_rng(1).random((rounds, 2))
    values[0, 0] = np.nan
    x, means = _binned(numbers, values, most)
    assert len(x) == min(rounds, most)
    edges = np.linspace(0, rounds, len(x) + 1).astype(int)
    for k, (start, end) in enumerate(pairwise(edges)):
        assert x[k] == pytest.approx(numbers[start:end].mean())
        assert means[k, 1] == pytest.approx(values[start:end, 1].mean())


@pytest.mark.parametrize("rounds", [1, 3, 500, 501, 10_000])
def test_the_roster_shows_every_failure_and_never_more_than_a_whole(rounds: int) -> None:
    draw = np.random.default_rng(rounds)
    state = draw.choice(len(STATES), p=[0.9, 0.02, 0.02, 0.02, 0.02, 0.02], size=(rounds, 4)).astype(np.int8)
    shares = _shares(state)
    cells = shares.shape[2]
    assert cells == (rounds if rounds <= 500 else 250)
    np.testing.assert_allclose(shares.sum(1), 1)
    edges = np.linspace(0, rounds, cells + 1).astype(int)
    for cell in range(cells):
        for kind in ("silent", "error", "refused"):
            there = (state[edges[cell] : edges[cell + 1]] == STATES.index(kind)).any(0)
            assert ((shares[:, STATES.index(kind), cell] > 0) == there).all()


def test_a_roster_of_one_round_and_unknown_states_draws() -> None:
    none = np.full((1, 2), np.nan, np.float32)
    history = History(
        np.array([1]), ("a", "b"), none, none, np.array([[0, -1]], np.int8), {"at": np.array([np.nan])}, attempts=1
    )
    assert roster_chart(history).count("<path") == 1
