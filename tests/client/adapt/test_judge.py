"""Figures, paired gains and reasons on outcomes that are known beforehand."""

import numpy as np
import pytest

from client.adapt.judge import Estimate, Judged, Outcome
from client.adapt.outlook import Point, enough
from client.adapt.verdict import Exit, no_gain, not_better_than_chance, not_familiar, too_few


def outcome(right: list[float], labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Outcome:
    """Return one repeat for each number: that share of each class's images is right."""
    probabilities = []
    for share in right:
        hit = np.concatenate([np.arange((labels == c).sum()) < share * (labels == c).sum() for c in (0, 1)])
        top = np.where(hit, labels, 1 - labels)
        probabilities.append(np.where(np.eye(2)[top] > 0, 0.8, 0.2))
    p = np.stack(probabilities)
    return Outcome(p, p > 0.5, ())


@pytest.fixture
def judged() -> Judged:
    labels = np.repeat([0, 1], [60, 40])
    outcomes = {"good": outcome([0.9, 0.8], labels), "bad": outcome([0.6, 0.6], labels)}
    return Judged(labels, np.arange(100) // 2, outcomes, np.ones(100))


def test_a_figure_of_several_repeats_is_their_mean(judged: Judged) -> None:
    found = judged.figures("good", np.random.default_rng(0))["balanced accuracy"]
    assert found.value == pytest.approx(0.85)
    assert found.low < 0.85 < found.high
    covered, size = judged.coverage("good", np.random.default_rng(0))
    assert covered.value == pytest.approx(0.85)
    assert size == 1


def test_a_gain_is_paired(judged: Judged) -> None:
    gain = judged.gain("good", "bad", np.random.default_rng(0))
    assert gain.value == pytest.approx(0.25)
    assert gain.low > 0.1
    nothing = judged.gain("good", "good", np.random.default_rng(0))
    assert nothing == Estimate(0, 0, 0)


def test_weights_make_classes_alike() -> None:
    labels = np.repeat([0, 1], [90, 10])
    p = np.where(labels[:, None] == 0, [0.9, 0.1], [0.9, 0.1])[None]  # always the first class
    even = Judged(labels, np.arange(100), {"m": Outcome(p, p > 0.5, ())}, 1 / np.array([90, 10])[labels])
    assert even.coverage("m", np.random.default_rng(0))[0].value == pytest.approx(0.5)
    assert even.figures("m", np.random.default_rng(0))["Brier score"].value == pytest.approx((0.02 + 1.62) / 2)


def test_an_interval_holds_its_value_where_chance_only_adds() -> None:
    right = np.concatenate([np.arange(200) < 150, np.arange(200) < 170])  # of two confidences, each as it should be
    sure = np.repeat([0.75, 0.85], 200)
    p = np.stack([sure, 1 - sure], -1)[None]
    of = Judged(1 - right.astype(np.int64), np.arange(400), {"m": Outcome(p, p > 0.5, ())}, np.ones(400))
    error = of.figures("m", np.random.default_rng(0))["expected calibration error"]
    assert error.value == pytest.approx(0, abs=1e-9)
    assert error.low == error.value
    assert error.high > 0.02


def test_reasons_and_their_codes() -> None:
    assert too_few({"a": 5, "b": 9}) == []
    assert [r.code for r in too_few({"a": 2, "b": 9})] == [Exit.TOO_FEW]
    assert "a (2)" in too_few({"a": 2, "b": 9})[0].text
    gains = {"x": Estimate(0.1, 0.01, 0.2), "y": Estimate(0.1, -0.01, 0.2), "z": Estimate(np.nan, np.nan, np.nan)}
    assert [r.text.split(" over ")[1][0] for r in no_gain(gains)] == ["y", "z"]
    assert not_better_than_chance(Estimate(0.7, 0.51, 0.8)) == []
    assert not_better_than_chance(Estimate(0.6, 0.49, 0.8))[0].code == Exit.CHANCE
    assert not_familiar(1.0, expects_grey=True, unlike=0.1) == []
    assert not_familiar(1.0, expects_grey=None, unlike=None) == []
    assert "trained on colour" in not_familiar(1.0, expects_grey=False, unlike=None)[0].text
    assert "trained on grey" in not_familiar(0.0, expects_grey=True, unlike=None)[0].text
    assert "unlike" in not_familiar(0.0, expects_grey=False, unlike=0.3)[0].text


def points(slope: float) -> list[Point]:
    return [Point(k, {"m": 0.5 + slope * np.log(k), "b": 0.5}) for k in (1, 2, 5)]


def test_enough_patients_by_the_stated_rule() -> None:
    # A constant gain of 0.1 with a half width of 0.2 among 10 patients needs more than four times as many.
    assert enough(points(0.0), "m", "b", Estimate(0.1, -0.1, 0.3), 10) in (40, 41)
    assert enough(points(0.05), "m", "b", Estimate(0.1, -0.1, 0.3), 10) in range(20, 40)
    assert enough(points(-0.1), "m", "b", Estimate(0.1, -0.1, 0.3), 10) is None
    assert enough(points(0.0), "m", "b", Estimate(0.0, -0.1, 0.1), 10) is None
    assert enough(points(0.0), "m", "b", Estimate(0.3, 0.1, 0.5), 10) == 10
