"""From a network's logits to probabilities that mean what they say, and to sets with a coverage that was asked for.

All of it is fitted on logits that cross-validation gave to patients whom the model had not seen. Patients count alike,
however many images they have. Those patients have a mix of classes of their own, often as many of each; probabilities
can be read for another mix, that of the patients whom the model will see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.isotonic import IsotonicRegression

from common.errors import DataError
from common.figures import log_loss

__all__ = [
    "Calibration",
    "Isotonic",
    "Temperature",
    "calibrate",
    "conformal_sets",
    "conformal_thresholds",
    "for_mix",
    "from_json",
    "in_mix",
    "patient_weights",
]

Array = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]

#: Temperatures that are looked at: logits are divided by at most, and multiplied by at most, this.
_HOTTEST = 100.0
#: Refits on patients drawn with replacement that an interval is read off.
_REFITS = 100
_FOLDS = 5


class Calibrator(Protocol):
    """From logits ``[..., C]`` to probabilities of that shape."""

    def __call__(self, logits: Array) -> Array: ...


@dataclass(frozen=True)
class Temperature:
    """Logits divided by one number.

    References
    ----------
    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 9.
    """

    value: float

    def __call__(self, logits: Array) -> Array:
        return np.asarray(softmax(logits / self.value, -1))

    @classmethod
    def fit(cls, logits: Array, labels: Labels, weights: Array) -> "Temperature":
        """Return the temperature of the smallest log loss."""
        rows = np.arange(len(labels))

        def loss(log_value: float) -> float:
            return -float(weights @ log_softmax(logits / np.exp(log_value), -1)[rows, labels])

        limit = float(np.log(_HOTTEST))
        found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-4})
        return cls(float(np.exp(found.x)))


@dataclass(frozen=True)
class Isotonic:
    """Each class's own rising map of its probability, then normalised.

    Attributes
    ----------
    knots : tuple
        For each class, probabilities before and after; straight lines between.

    References
    ----------
    Zadrozny and Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates", 2002,
    sections 3 and 5 (one against all).
    """

    knots: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]

    def __call__(self, logits: Array) -> Array:
        raw = softmax(logits, -1)
        mapped = np.stack([np.interp(raw[..., c], *knots) for c, knots in enumerate(self.knots)], -1)
        return np.asarray(mapped / mapped.sum(-1, keepdims=True))

    @classmethod
    def fit(cls, logits: Array, labels: Labels, weights: Array) -> "Isotonic":
        """Return the maps of least squares, kept off 0 and 1 by what so few patients can tell."""
        raw, floor = softmax(logits, -1), 1 / (weights.sum() + 2)
        knots = []
        for c in range(raw.shape[-1]):
            model = IsotonicRegression(y_min=floor, y_max=1 - floor, out_of_bounds="clip")
            model.fit(raw[:, c], labels == c, sample_weight=weights)
            knots.append((tuple(map(float, model.X_thresholds_)), tuple(map(float, model.y_thresholds_))))
        return cls(tuple(knots))


@dataclass(frozen=True)
class Calibration:
    """How one adapted model's logits are read.

    Attributes
    ----------
    calibrator : Temperature or Isotonic
        The one that scored better.
    refits : tuple
        The same, fitted on patients drawn with replacement.
    losses : mapping
        Cross-validated log loss (nats) of ``none``, ``temperature`` and ``isotonic``.
    thresholds : tuple of float
        Of the conformal sets, one a class.
    coverage : float
        Asked of the conformal sets.
    patients : int
        How many it was fitted on.
    odds : tuple of float
        How many times as frequent each class is among those to be predicted as among those it was fitted on; one a
        class.
    """

    calibrator: Temperature | Isotonic
    refits: tuple[Temperature | Isotonic, ...]
    losses: Mapping[str, float]
    thresholds: tuple[float, ...]
    coverage: float
    patients: int
    odds: tuple[float, ...]

    def probabilities(self, logits: Array) -> Array:
        """Return calibrated probabilities ``[N, C]``."""
        return in_mix(self.calibrator(logits), self.odds)

    def intervals(self, logits: Array, level: float = 0.95) -> Array:
        """Return ``[2, N, C]``: between which values a probability lies when other patients calibrate.

        It says how sure the calibration is, not how different a model other support patients would give.
        """
        drawn = np.stack([in_mix(refit(logits), self.odds) for refit in self.refits])
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
        best = self.probabilities(logits)
        return np.stack([np.minimum(low, best), np.maximum(high, best)])

    def sets(self, logits: Array) -> NDArray[np.bool_]:
        """Return ``[N, C]``: which classes are in an image's conformal set. It may be empty."""
        return conformal_sets(self.probabilities(logits), self.thresholds)

    def json(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "method": type(self.calibrator).__name__.lower(),
            "calibrator": _plain(self.calibrator),
            "refits": [_plain(refit) for refit in self.refits],
            "log_loss": dict(self.losses),
            "conformal": {
                "thresholds": [None if threshold == inf else threshold for threshold in self.thresholds],
                "coverage": self.coverage,
            },
            "patients": self.patients,
            "odds": list(self.odds),
        }


def from_json(value: Mapping[str, Any]) -> Calibration:
    """Return what `Calibration.json` wrote."""
    kind = _temperature if value["method"] == "temperature" else _isotonic
    return Calibration(
        kind(value["calibrator"]),
        tuple(kind(refit) for refit in value["refits"]),
        value["log_loss"],
        tuple(inf if threshold is None else float(threshold) for threshold in value["conformal"]["thresholds"]),
        float(value["conformal"]["coverage"]),
        int(value["patients"]),
        tuple(map(float, value["odds"])),
    )


def calibrate(
    logits: Array,
    labels: Labels,
    patients: NDArray[np.integer[Any]],
    coverage: float,
    generator: np.random.Generator,
    *,
    refits: int = _REFITS,
) -> Calibration:
    """Fit temperature and isotonic maps, keep the one whose log loss is smaller on patients left out of its fit.

    Parameters
    ----------
    logits : ndarray
        ``[N, C]``, of images whose patients the model that gave them had not seen.
    labels, patients : ndarray
        ``[N]``.
    coverage : float
        How often a conformal set shall hold the truth, 0 to 1.
    generator : numpy.random.Generator
        Deals patients into folds and draws them for the refits.
    refits : int
        What an interval is read off; 0 where none is asked for.
    """
    people, index = np.unique(patients, return_inverse=True)
    if len(people) < 2:
        raise DataError("calibration needs two patients at least: label more")
    weights = patient_weights(patients)
    fold = generator.permutation(len(people))[index] % min(_FOLDS, len(people))
    losses = {"none": float(log_loss(softmax(logits, -1), labels, weights))}
    for kind in (Temperature, Isotonic):
        held_out = np.empty_like(logits)
        for k in range(fold.max() + 1):
            fit = fold != k
            held_out[~fit] = kind.fit(logits[fit], labels[fit], weights[fit])(logits[~fit])
        losses[kind.__name__.lower()] = float(log_loss(held_out, labels, weights))
    best = Temperature if losses["temperature"] <= losses["isotonic"] else Isotonic
    calibrator = best.fit(logits, labels, weights)
    drawn_fits = []
    for _ in range(refits):
        drawn = weights * generator.multinomial(len(people), np.full(len(people), 1 / len(people)))[index]
        kept = drawn > 0
        drawn_fits.append(best.fit(logits[kept], labels[kept], drawn[kept]))
    odds = np.ones(logits.shape[-1])
    thresholds = conformal_thresholds(calibrator(logits), labels, patients, coverage, odds)
    return Calibration(calibrator, tuple(drawn_fits), losses, thresholds, coverage, len(people), tuple(odds.tolist()))


def for_mix(
    calibration: Calibration,
    logits: Array,
    labels: Labels,
    patients: NDArray[np.integer[Any]],
    mix: Sequence[float],
) -> Calibration:
    """Return a calibration for patients of another mix of classes than those that it was fitted on.

    Parameters
    ----------
    logits, labels, patients : ndarray
        What it was fitted on; every class is there.
    mix : sequence of float
        Each class's share of the patients to be predicted.
    """
    weights = patient_weights(patients)
    odds = np.asarray(mix) * weights.sum() / np.bincount(labels, weights, logits.shape[-1])
    p = in_mix(calibration.calibrator(logits), odds)
    thresholds = conformal_thresholds(p, labels, patients, calibration.coverage, odds)
    return replace(calibration, odds=tuple(odds.tolist()), thresholds=thresholds)


def in_mix(probabilities: Array, odds: Sequence[float] | Array) -> Array:
    """Return probabilities ``[..., C]`` for patients among whom each class is so many times as frequent.

    References
    ----------
    Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities", 2002,
    equation 2.4.
    """
    mixed = probabilities * np.asarray(odds)
    return np.asarray(mixed / mixed.sum(-1, keepdims=True))


def conformal_thresholds(
    probabilities: Array,
    labels: Labels,
    patients: NDArray[np.integer[Any]],
    coverage: float,
    odds: Sequence[float] | Array,
) -> tuple[float, ...]:
    """Return the thresholds of `conformal_sets` for a new patient's image; infinite where patients are too few.

    The score of an image is one minus its class's probability. Each patient's images share the weight of one patient,
    times the odds of their class, and the new patient counts as one of the class in question whose score is infinite:
    the coverage is at least the one asked for when patients of a class are exchangeable, and classes are so many times
    as frequent among the new ones.

    References
    ----------
    Sadinle, Lei and Wasserman, "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels", 2019 (the score);
    Lee, Barber and Willett, "Distribution-free inference with hierarchical data", 2023 (the patients' weights);
    Podkopaev and Ramdas, "Distribution-free uncertainty quantification for classification under label shift", 2021
    (the odds); with one image a patient and odds of one it is split conformal prediction as in Angelopoulos and Bates,
    "A Gentle Introduction to Conformal Prediction", 2021, equation 1.
    """
    scores = 1 - probabilities[np.arange(len(labels)), labels]
    weights = patient_weights(patients) * np.asarray(odds)[labels]
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[order])
    out = []
    for new in odds:
        enough = reached >= (coverage - 1e-12) * (weights.sum() + new)
        out.append(float(scores[order][enough.argmax()]) if enough.any() else inf)
    return tuple(out)


def conformal_sets(probabilities: Array, thresholds: Sequence[float]) -> NDArray[np.bool_]:
    """Return ``[N, C]``: the classes whose probability is at least one minus their threshold."""
    return np.asarray(1 - probabilities <= np.asarray(thresholds))


def patient_weights(patients: NDArray[np.integer[Any]]) -> Array:
    """Return ``[N]``: one, shared by all images of a patient."""
    _, index, count = np.unique(patients, return_inverse=True, return_counts=True)
    return np.asarray(1 / count[index])


def _plain(calibrator: Temperature | Isotonic) -> Any:
    return calibrator.value if isinstance(calibrator, Temperature) else calibrator.knots


def _temperature(value: Any) -> Temperature | Isotonic:
    return Temperature(float(value))


def _isotonic(value: Any) -> Temperature | Isotonic:
    return Isotonic(tuple((tuple(map(float, x)), tuple(map(float, y))) for x, y in value))
