"""Figures against scikit-learn, plain loops, by hand, and on probabilities whose calibration is known."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as oracle

from common.figures import (
    FIGURES,
    _area,
    auroc,
    balanced_accuracy,
    bootstrap,
    brier,
    error_of_perfect,
    expected_calibration_error,
    interval,
    log_loss,
    one_vs_rest,
    replicates,
    sensitivity_at,
    specificity_at,
)
from tests.common.plain import plain_figures


def made(generator: np.random.Generator, n: int = 60, classes: int = 3, ties: bool = True) -> tuple[Any, Any]:
    p = generator.dirichlet(np.ones(classes), n)
    if ties:
        p = np.round(p, 1) + 1e-3
        p /= p.sum(-1, keepdims=True)
    return p, np.concatenate([np.arange(classes), generator.integers(0, classes, n - classes)])


def points(score: Any, positive: Any) -> tuple[Any, Any]:
    false, true, _ = oracle.roc_curve(positive, score, drop_intermediate=False)
    return true, false


def best_sensitivity(score: Any, positive: Any, specificity: float) -> Any:
    true, false = points(score, positive)
    return true[1 - false >= specificity - 1e-9].max()


def best_specificity(score: Any, positive: Any, sensitivity: float) -> Any:
    true, false = points(score, positive)
    return (1 - false)[true >= sensitivity - 1e-9].max()


ORACLES: dict[str, Callable[[Any, Any], Any]] = {
    "balanced accuracy": lambda p, y: oracle.balanced_accuracy_score(y, p.argmax(-1)),
    "AUROC": lambda p, y: np.mean([oracle.roc_auc_score(y == c, p[:, c]) for c in range(p.shape[1])]),
    "sensitivity at specificity 0.9": lambda p, y: np.mean(
        [best_sensitivity(p[:, c], y == c, 0.9) for c in range(p.shape[1])]
    ),
    "specificity at sensitivity 0.9": lambda p, y: np.mean(
        [best_specificity(p[:, c], y == c, 0.9) for c in range(p.shape[1])]
    ),
    "Brier score": lambda p, y: sum(oracle.brier_score_loss(y == c, p[:, c]) for c in range(p.shape[1])),
    "log loss": lambda p, y: oracle.log_loss(y, p, labels=range(p.shape[1])),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("ties", [True, False])
def test_figures_are_those_of_scikit_learn(name: str, classes: int, ties: bool) -> None:
    p, y = made(np.random.default_rng(classes), classes=classes, ties=ties)
    assert FIGURES[name](p, y) == pytest.approx(ORACLES[name](p, y), abs=1e-12)


@pytest.mark.parametrize("name", FIGURES)
def test_a_weight_is_so_many_copies(name: str) -> None:
    generator = np.random.default_rng(5)
    p, y = made(generator)
    counts = generator.integers(0, 4, (6, len(y))).astype(float)
    copied = [FIGURES[name](np.repeat(p, c.astype(int), 0), np.repeat(y, c.astype(int))) for c in counts]
    np.testing.assert_allclose(FIGURES[name](p, y, counts), copied, atol=1e-12)


@given(arrays(np.int64, 12, elements=st.integers(0, 4)), arrays(np.int64, 12, elements=st.integers(0, 1)))
@settings(max_examples=60)
def test_auroc_is_the_probability_of_the_right_order(score: Any, y: Any) -> None:
    p = np.stack([4 - score, score], -1) / 4
    pairs = [float(a > b) + (a == b) / 2 for a in score[y == 1] for b in score[y == 0]]
    if pairs:
        assert auroc(p, y) == pytest.approx(np.mean(pairs))
    else:
        assert np.isnan(auroc(p, y))


def test_a_class_that_is_not_there_is_left_out_of_a_mean() -> None:
    p, y = made(np.random.default_rng(1))
    here = y < 2
    per_class = one_vs_rest(p[here], y[here], None, lambda t, f: t[..., -1])
    np.testing.assert_array_equal(np.isnan(per_class), [False, False, True])
    assert auroc(p[here], y[here]) == pytest.approx(
        np.mean([oracle.roc_auc_score(y[here] == c, p[here, c]) for c in range(2)])
    )
    assert balanced_accuracy(p[here], y[here]) == pytest.approx(
        np.mean([(p[here].argmax(-1) == y[here])[y[here] == c].mean() for c in range(2)])
    )


@given(st.integers(2, 4), st.integers(1, 12), st.data())
@settings(max_examples=150)
def test_figures_of_an_episode_are_those_of_a_plain_loop(classes: int, n: int, data: st.DataObject) -> None:
    """Few images, many ties, and classes that may be missing, as in an episode."""
    p = data.draw(arrays(np.int64, (n, classes), elements=st.integers(0, 4))) + 1.0
    p /= p.sum(-1, keepdims=True)
    y = data.draw(arrays(np.int64, n, elements=st.integers(0, classes - 1)))
    want = plain_figures(p, y)
    for name, figure in (
        ("balanced", balanced_accuracy),
        ("auroc", auroc),
        ("ece", expected_calibration_error),
    ):
        assert figure(p, y) == pytest.approx(want[name], abs=1e-12, nan_ok=True), name
    assert balanced_accuracy(p, y) == pytest.approx(
        oracle.recall_score(y, p.argmax(-1), labels=sorted(set(y.tolist())), average="macro")
    )


def test_one_class_alone_has_no_auroc() -> None:
    p = np.array([[0.2, 0.8], [0.6, 0.4]])
    assert np.isnan(auroc(p, np.array([1, 1])))
    assert balanced_accuracy(p, np.array([1, 1])) == 0.5


def test_rounding_takes_no_auroc_beyond_one() -> None:
    """These ties' shares of 77 add up to 1.0000000000000002."""
    ties = [6, 2, 4, 1, 13, 12, 39]
    score = np.concatenate([[1.0], np.repeat(np.linspace(0.5, 0, len(ties)), ties)])
    per_class = one_vs_rest(np.stack([1 - score, score], -1), (score == 1).astype(int), None, _area)
    assert per_class.max() == 1


def test_a_perfect_and_a_useless_score() -> None:
    y = np.array([0, 1, 1, 0])
    right = np.eye(2)[y]
    flat = np.full((4, 2), 0.5)
    assert [float(f(right, y)) for f in (auroc, sensitivity_at, specificity_at, brier)] == [1, 1, 1, 0]
    assert [float(f(flat, y)) for f in (auroc, sensitivity_at, specificity_at, brier)] == [0.5, 0, 0, 0.5]


def test_calibration_error_by_hand() -> None:
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.7, 0.3], [0.4, 0.6]])
    y = np.array([0, 1, 0, 0])
    # bins (0.9, 1]: two images, half right; (0.6, 0.7]: one, right; (0.5, 0.6]: one, wrong
    assert expected_calibration_error(p, y) == pytest.approx((2 * abs(0.5 - 0.95) + (1 - 0.7) + 0.6) / 4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_calibration_error_of_known_calibration(temperature: float) -> None:
    """True probabilities are drawn; what is reported of them is sharpened or flattened by a known amount."""
    generator = np.random.default_rng(3)
    truth = generator.uniform(0.01, 0.99, 100_000)
    y = (generator.random(len(truth)) < truth).astype(int)
    odds = (truth / (1 - truth)) ** (1 / temperature)
    reported = odds / (1 + odds)
    top, of_top = np.maximum(reported, 1 - reported), np.maximum(truth, 1 - truth)
    expected = np.abs(top - of_top).mean()  # the map is monotone, so no bin cancels (but in its corners)
    got = expected_calibration_error(np.stack([1 - reported, reported], -1), y)
    assert got == pytest.approx(expected, abs=0.006)


def test_a_calibrated_small_sample_stays_below_the_stated_bias() -> None:
    generator = np.random.default_rng(4)
    n, errors = 100, []
    for _ in range(200):
        p1 = generator.random(n)
        y = (generator.random(n) < p1).astype(int)
        errors.append(expected_calibration_error(np.stack([1 - p1, p1], -1), y))
    assert 0.03 < np.mean(errors) < 0.4 * np.sqrt(10 / n)


def test_a_replicate_draws_patients_whole() -> None:
    patients = np.array(["a", "a", "b", "c", "c", "c"])
    weights = np.concatenate(list(replicates(patients, 500, np.random.default_rng(0))))
    assert weights.shape == (500, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    np.testing.assert_array_equal(weights[:, 3], weights[:, 5])
    np.testing.assert_array_equal(weights[:, [0, 2, 3]].sum(-1), 3)
    np.testing.assert_allclose(weights[:, [0, 2, 3]].mean(0), 1, atol=0.15)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    patients = np.arange(7)
    whole = np.concatenate(list(replicates(patients, 11, np.random.default_rng(0))))
    monkeypatch.setattr("common.figures._CHUNK", 21)
    parts = list(replicates(patients, 11, np.random.default_rng(0)))
    assert [len(p) for p in parts] == [3, 3, 3, 2]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Forty patients of three images each that agree: a bootstrap over images would be far too narrow."""
    generator = np.random.default_rng(6)
    inside = 0
    for _ in range(200):
        patients = np.repeat(np.arange(40), 3)
        right = np.repeat(generator.random(40) < 0.7, 3)
        p = np.where(right[:, None], [0.1, 0.9], [0.9, 0.1])
        y = np.ones(len(patients), int)
        low, high = interval(bootstrap(partial(balanced_accuracy, p, y), patients, 300, generator))
        inside += low <= 0.7 <= high
    assert 0.88 < inside / 200 <= 0.99


def test_an_interval_leaves_out_what_is_not_a_number() -> None:
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1, 1)
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_log_loss_is_finite() -> None:
    assert log_loss(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-np.log(1e-12))


def test_perfect_probabilities_of_few_images_show_what_is_said() -> None:
    generator = np.random.default_rng(8)
    p = generator.dirichlet(np.ones(3), 80)
    errors = []
    for _ in range(300):
        y = np.array([generator.choice(3, p=row) for row in p])
        errors.append(expected_calibration_error(p, y))
    assert error_of_perfect(p, None, generator, draws=300) == pytest.approx(np.mean(errors), rel=0.05)
