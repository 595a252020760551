"""Patients into folds, and cross-validation on a support set: which setting, and logits to calibrate on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.adapt.images import Labelled
from client.adapt.methods import Method, Predict, Rows, Setting
from client.calibration import Calibration, Temperature, calibrate, for_mix, patient_weights
from common.figures import log_loss

__all__ = ["Choice", "balancing", "choose", "deal", "draw_shots", "fewest"]

_FOLDS = 4


@dataclass(frozen=True)
class Choice:
    """What a support set says about a method.

    Attributes
    ----------
    setting : Setting
        The one of the smallest cross-validated log loss.
    calibration : Calibration or None
        Fitted on the cross-validated logits of that setting; None where a class has one patient.
    mixed : Calibration or None
        The same for patients of the mix that was asked for.
    predict : callable
        The method, fitted on the whole support set with that setting: logits.
    """

    setting: Setting
    calibration: Calibration | None
    mixed: Calibration | None
    predict: Predict


def choose(
    method: Method,
    images: Labelled,
    support: Rows,
    coverage: float,
    generator: np.random.Generator,
    *,
    mix: Sequence[float] | None = None,
    refits: int = 0,
) -> Choice:
    """Choose a method's setting on a support set alone, and calibrate it there, also for another mix of classes.

    Every class counts alike. The log loss is that after the best temperature: a model that is right and too sure is
    not a bad one, for it is calibrated afterwards.
    """
    folds = min(_FOLDS, fewest(images, support))
    if folds < 2:
        setting = method.settings[0]
        (_, predict), *_ = method.fit(images, support, [setting])
        return Choice(setting, None, None, predict)
    fold = deal(images, support, folds, generator)
    labels, patients = images.labels[support], images.patients[support]
    logits = {setting: np.empty((len(support), len(images.classes))) for setting in method.settings}
    for k in range(folds):
        left_out = fold == k
        for setting, predict in method.fit(images, support[~left_out], method.settings):
            logits[setting][left_out] = predict(support[left_out])
    weights = patient_weights(patients) * balancing(labels)

    def loss(setting: Setting) -> float:
        best = Temperature.fit(logits[setting], labels, weights)
        return float(log_loss(best(logits[setting]), labels, weights))

    setting = min(method.settings, key=loss)
    (_, predict), *_ = method.fit(images, support, [setting])
    fitted = calibrate(logits[setting], labels, patients, coverage, generator, refits=refits)
    mixed = None if mix is None else for_mix(fitted, logits[setting], labels, patients, mix)
    return Choice(setting, fitted, mixed, predict)


def balancing(labels: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return ``[N]`` weights of mean one by which every class counts alike."""
    _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(len(labels) / (len(count) * count[index]))


def fewest(images: Labelled, rows: Rows) -> int:
    """Return how many patients the rarest class has among some rows."""
    pairs = {(int(label), int(who)) for label, who in zip(images.labels[rows], images.patients[rows], strict=True)}
    return min(sum(label == place for label, _ in pairs) for place in range(len(images.classes)))


def deal(images: Labelled, rows: Rows, folds: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return ``[n]`` folds of some rows: patients whole, every class spread as evenly as can be."""
    fold_of: dict[int, int] = {}
    for place in generator.permutation(len(images.classes)):
        own = np.unique(images.patients[rows][images.labels[rows] == place])
        sizes = [sum(fold_of.get(int(who)) == k for who in own) for k in range(folds)]
        for who in generator.permutation([who for who in own.tolist() if who not in fold_of]).tolist():
            # The smallest of this class; among equals the smallest of all, so that no fold is always the first.
            least = min(range(folds), key=lambda k: (sizes[k], sum(v == k for v in fold_of.values())))
            fold_of[who] = least
            sizes[least] += 1
    return np.array([fold_of[int(who)] for who in images.patients[rows]], np.int64)


def draw_shots(
    images: Labelled, shots: int, generator: np.random.Generator, among: NDArray[np.bool_] | None = None
) -> Rows:
    """Return the rows of up to ``shots`` patients of every class, drawn at random; the rarest class draws first.

    ``among`` ``[N]`` says which rows there are to draw from; it keeps patients whole.
    """
    allowed = set(images.patients.tolist() if among is None else images.patients[among].tolist())
    taken: set[int] = set()
    for place in sorted(range(len(images.classes)), key=lambda c: len(images.patients_of(c))):
        own = [who for who in images.patients_of(place).tolist() if who in allowed]
        free = generator.permutation([who for who in own if who not in taken]).tolist()
        taken.update(free[: max(0, shots - sum(who in taken for who in own))])
    return np.flatnonzero(np.isin(images.patients, sorted(taken)))
