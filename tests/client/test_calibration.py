"""Calibrators on logits whose miscalibration is known; conformal coverage; what is written is read back."""

import json
from math import inf
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import norm

from client.calibration import (
    Calibration,
    Isotonic,
    Temperature,
    calibrate,
    conformal_sets,
    conformal_thresholds,
    for_mix,
    from_json,
    in_mix,
    patient_weights,
)
from common.errors import DataError
from common.figures import expected_calibration_error


def drawn(n: int, seed: int, classes: int = 3, images: int = 1) -> tuple[Any, Any, Any]:
    """Return calibrated logits, labels and patients; the images of a patient are nearly the same."""
    generator = np.random.default_rng(seed)
    logits = np.repeat(generator.normal(0, 1.5, (n, classes)), images, 0)
    labels = np.repeat([generator.choice(classes, p=softmax(row)) for row in logits[::images]], images)
    return log_softmax(logits, -1), labels, np.repeat(np.arange(n), images)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_temperature_finds_the_known_one(true: float) -> None:
    logits, labels, _ = drawn(20_000, 1)
    found = Temperature.fit(logits * true, labels, np.ones(len(labels)))
    assert found.value == pytest.approx(true, rel=0.03)
    np.testing.assert_allclose(Temperature(true)(logits * true), softmax(logits, -1))


def test_temperature_is_the_minimum_of_the_weighted_loss() -> None:
    logits, labels, patients = drawn(60, 2, images=2)
    weights = patient_weights(patients) * (1 + np.arange(len(labels)) % 3)

    def loss(value: float) -> Any:
        return -sum(w * log_softmax(x / value)[y] for w, x, y in zip(weights, logits, labels, strict=True))

    found = Temperature.fit(logits, labels, weights).value
    assert loss(found) <= min(loss(found * 1.01), loss(found / 1.01), loss(1.0))


def test_isotonic_mends_what_no_temperature_can() -> None:
    """The first class's odds are doubled, then everything is sharpened: scikit-learn's fit is the oracle of the map."""
    logits, labels, patients = drawn(3000, 3, classes=2)
    bent = 2 * (logits + np.array([np.log(4), 0]))
    generator = np.random.default_rng(0)
    got = calibrate(bent, labels, patients, 0.9, generator)
    assert isinstance(got.calibrator, Isotonic)
    assert got.losses["isotonic"] < got.losses["temperature"] < got.losses["none"]
    fresh, fresh_labels, _ = drawn(20_000, 4, classes=2)
    fresh_bent = 2 * (fresh + np.array([np.log(4), 0]))
    assert expected_calibration_error(got.probabilities(fresh_bent), fresh_labels) < 0.03
    assert expected_calibration_error(softmax(fresh_bent, -1), fresh_labels) > 0.08


def test_few_patients_are_calibrated_by_temperature() -> None:
    chosen = []
    for seed in range(20):
        logits, labels, patients = drawn(30, seed)
        found = calibrate(4 * logits, labels, patients, 0.9, np.random.default_rng(seed))
        chosen.append(isinstance(found.calibrator, Temperature))
        assert found.losses["temperature"] < found.losses["none"]
    assert np.mean(chosen) > 0.6


def test_probabilities_are_probabilities() -> None:
    logits, labels, patients = drawn(40, 5)
    fits = [kind.fit(logits, labels, patient_weights(patients)) for kind in (Temperature, Isotonic)]
    for calibrator in fits:
        p = calibrator(np.array([[50.0, 0, 0], [0, 0, 0], [-1e4, 3, 2]]))
        assert (p >= 0).all()
        np.testing.assert_allclose(p.sum(-1), 1)


def test_an_interval_holds_the_calibrated_probability_as_often_as_it_says() -> None:
    """Sixty patients calibrate; the truth is what the known temperature gives."""
    inside, total = 0, 0
    point = np.array([[1.0, 0.2, -0.5]])
    for seed in range(50):
        logits, labels, patients = drawn(60, 100 + seed)
        found = calibrate(2 * logits, labels, patients, 0.9, np.random.default_rng(seed))
        if isinstance(found.calibrator, Temperature):
            low, high = found.intervals(2 * point)[:, 0, 0]
            assert low <= found.probabilities(2 * point)[0, 0] <= high
            inside, total = inside + (low <= softmax(point, -1)[0, 0] <= high), total + 1
    assert total > 30
    assert 0.85 < inside / total <= 1


def test_the_threshold_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    labels = np.array([0, 0, 1, 0])  # scores 0.1, 0.4, 0.3, 0.2 of four patients; with the new one, five
    people = np.arange(4)
    alike, whole = (1.0, 1.0), conformal_thresholds
    assert whole(p, labels, people, 0.6, alike) == pytest.approx((0.3, 0.3))
    assert whole(p, labels, people, 0.8, alike) == pytest.approx((0.4, 0.4))
    assert whole(p, labels, people, 0.81, alike) == (inf, inf)
    # the first two images are one patient's: scores 0.1 and 0.4 have half the weight each, and there are 3 + 1 patients
    assert whole(p, labels, np.array([0, 0, 1, 2]), 0.6, alike) == pytest.approx((0.3, 0.3))
    assert whole(p, labels, np.array([0, 0, 1, 2]), 0.63, alike) == pytest.approx((0.4, 0.4))
    # the second class is three times as frequent there: mass 1, 2, 5, 6 of 6 + 1, or of 6 + 3 for one of that class
    assert whole(p, labels, people, 0.6, (1.0, 3.0)) == pytest.approx((0.3, 0.4))
    assert whole(p, labels, people, 0.7, (1.0, 3.0)) == pytest.approx((0.3, inf))
    np.testing.assert_array_equal(conformal_sets(p, (0.5, 0.5)), [[1, 0], [1, 0], [0, 1], [1, 0]])
    assert conformal_sets(p, (inf, inf)).all()
    np.testing.assert_array_equal(conformal_sets(p[:2], (0.3, 0.6)), [[1, 0], [0, 1]])


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_coverage_is_what_was_asked_for(images: int, coverage: float) -> None:
    """Over 400 draws of 49 patients and a new one: within the binomial interval; the classifier is a bad one."""
    hits = []
    for seed in range(400):
        logits, labels, patients = drawn(50, 1000 + seed, images=images)
        p, last = softmax(5 * logits, -1), patients == 49
        thresholds = conformal_thresholds(p[~last], labels[~last], patients[~last], coverage, (1.0, 1.0, 1.0))
        hits.append(conformal_sets(p[last], thresholds)[0, labels[last][0]])
    assert abs(np.mean(hits) - coverage) < 3 * np.sqrt(coverage * (1 - coverage) / 400) + 1 / 50


def shifted(n: int, share: float, generator: np.random.Generator) -> tuple[Any, Any]:
    """Return labels of patients of whom such a share has the disease, and logits that are right for one half."""
    labels = (generator.random(n) < share).astype(int)
    x = generator.normal(0, np.where(labels == 1, 2.0, 1.0))
    return labels, np.stack([norm.logpdf(x, 0, 1), norm.logpdf(x, 0, 2)], -1)


def test_probabilities_of_equal_classes_are_read_for_patients_of_whom_they_are_not() -> None:
    labels, logits = shifted(40_000, 0.1, np.random.default_rng(0))
    equal = softmax(logits, -1)
    assert expected_calibration_error(equal, labels) > 0.1
    assert expected_calibration_error(in_mix(equal, (1.8, 0.2)), labels) < 0.015
    labels, logits = shifted(2000, 0.5, np.random.default_rng(1))
    fitted = calibrate(logits, labels, np.arange(2000), 0.9, np.random.default_rng(1))
    there = for_mix(fitted, logits, labels, np.arange(2000), (0.9, 0.1))
    np.testing.assert_allclose(there.odds, (0.9 / (1 - labels.mean()), 0.1 / labels.mean()))
    labels, logits = shifted(40_000, 0.1, np.random.default_rng(2))
    assert expected_calibration_error(there.probabilities(logits), labels) < 0.03
    low, high = there.intervals(logits[:50])
    assert (low <= there.probabilities(logits[:50])).all()
    assert (there.probabilities(logits[:50]) <= high).all()


def test_coverage_is_what_was_asked_for_also_in_another_mix() -> None:
    """One half of 100 patients to calibrate on has the disease, one in ten of those to come, over 1000 draws."""
    hits, plain = [], []
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        labels, logits = shifted(100, 0.5, generator)
        thresholds = conformal_thresholds(softmax(logits, -1), labels, np.arange(100), 0.8, (1.0, 1.0))
        fitted = Calibration(Temperature(1.0), (), {}, thresholds, 0.8, 100, (1.0, 1.0))
        new, theirs = shifted(1, 0.1, generator)
        hits.append(for_mix(fitted, logits, labels, np.arange(100), (0.9, 0.1)).sets(theirs)[0, new[0]])
        plain.append(fitted.sets(theirs)[0, new[0]])
    assert abs(np.mean(hits) - 0.8) < 3 * np.sqrt(0.16 / 1000) + 0.02
    assert np.mean(plain) > 0.86  # a set for one half says too much there


def test_what_is_written_is_read_back() -> None:
    for n, kind in ((40, Temperature), (1000, Isotonic)):
        logits, labels, patients = drawn(n, 7, classes=2)
        bent = logits + np.array([np.log(8), 0]) * (kind is Isotonic)
        found = calibrate(bent, labels, patients, 0.9, np.random.default_rng(1))
        assert isinstance(found.calibrator, kind)
        again = from_json(json.loads(json.dumps(found.json())))
        assert again == found
    lone = Calibration(Temperature(1.0), (Temperature(2.0),), {}, (inf, 0.5), 0.9, 3, (0.5, 1.5))
    assert from_json(json.loads(json.dumps(lone.json(), allow_nan=False))) == lone


def test_one_patient_calibrates_nothing() -> None:
    with pytest.raises(DataError, match="two patients"):
        calibrate(np.zeros((3, 2)), np.array([0, 1, 0]), np.zeros(3, int), 0.9, np.random.default_rng(0))
