"""Every method on the same held-out patients, with intervals, and how much one gains over another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.adapt.choose import balancing, choose, deal
from client.adapt.images import Labelled
from client.adapt.methods import Method, Rows, Setting
from client.calibration import Temperature
from common.figures import FIGURES, Figure, balanced_accuracy, bootstrap, error_of_perfect, interval

__all__ = ["GAIN", "Estimate", "Judged", "Outcome", "Split", "judge", "k_fold_splits", "one_split", "summary"]

#: The figure that a gain is measured in.
GAIN = "balanced accuracy"
_REPLICATES = 1000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Rows to adapt on, and rows of other patients to judge on."""

    support: Rows
    held_out: Rows


@dataclass(frozen=True)
class Estimate:
    """A figure, and its 95 % bootstrap interval over patients."""

    value: float
    low: float
    high: float

    def json(self) -> dict[str, float | None]:
        """Return it as JSON takes it; what is not a number becomes None."""
        return {name: None if np.isnan(value) else round(value, 4) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Outcome:
    """What one method said of the held-out images.

    Attributes
    ----------
    probabilities : ndarray
        ``[R, N, C]``, of every repeat, calibrated on the support set.
    sets : ndarray
        ``[R, N, C]`` bool: conformal sets; everything where nothing could be calibrated.
    settings : tuple of Setting
        Chosen in every split.
    """

    probabilities: Array
    sets: NDArray[np.bool_]
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Judged:
    """All methods on the same held-out images, all of patients that the model had not seen.

    Attributes
    ----------
    labels, patients : ndarray
        ``[N]``.
    outcomes : mapping of str to Outcome
        By method.
    weights : ndarray
        ``[N]``, of the images.
    mixed : Judged or None
        The same for patients of the mix of classes that was asked for: probabilities, sets and weights are others.
    replicates : int
        Bootstrap replicates of an interval.
    """

    labels: NDArray[np.int64]
    patients: NDArray[np.int64]
    outcomes: Mapping[str, Outcome]
    weights: Array
    mixed: "Judged | None" = None
    replicates: int = _REPLICATES

    def figures(self, method: str, generator: np.random.Generator) -> dict[str, Estimate]:
        """Return every figure of a method with its interval; of several repeats, the mean of their figures."""
        return {name: self._estimate(partial(self.value, method, f), generator) for name, f in FIGURES.items()}

    def gain(self, method: str, over: str, generator: np.random.Generator) -> Estimate:
        """Return the paired gain in balanced accuracy: both on the same replicates of patients."""

        def difference(weights: Array | None) -> Array:
            return self.value(method, balanced_accuracy, weights) - self.value(over, balanced_accuracy, weights)

        return self._estimate(difference, generator)

    def coverage(self, method: str, generator: np.random.Generator) -> tuple[Estimate, float]:
        """Return how often a conformal set held the truth, and how many classes a set held on average."""
        sets = self.outcomes[method].sets
        hit = sets[:, np.arange(len(self.labels)), self.labels].mean(0)

        def share(weights: Array | None) -> Array:
            w = self.weights if weights is None else weights * self.weights
            return np.asarray(w @ hit / w.sum(-1))

        return self._estimate(share, generator), float(np.average(sets.sum(-1).mean(0), weights=self.weights))

    def error_of_perfect(self, method: str, generator: np.random.Generator) -> float:
        """Return the calibration error that a method's probabilities would show if they were perfect."""
        repeats = self.outcomes[method].probabilities
        return float(np.mean([error_of_perfect(p, self.weights, generator) for p in repeats]))

    def value(self, method: str, figure: Figure, weights: Array | None = None) -> Array:
        """Return a figure of a method: the mean over its repeats."""
        w = self.weights if weights is None else weights * self.weights
        return np.asarray(np.mean([figure(p, self.labels, w) for p in self.outcomes[method].probabilities], 0))

    def _estimate(self, figure: Callable[[Array | None], Array], generator: np.random.Generator) -> Estimate:
        low, high = interval(bootstrap(figure, self.patients, self.replicates, generator))
        value = float(figure(None))
        # A calibration error of patients drawn anew is larger than that of all: chance adds to it and never takes away.
        return Estimate(value, min(low, value), max(high, value))


def one_split(images: Labelled, support: Rows) -> list[list[Split]]:
    """Return the one split that a support set makes: all other patients that theta has not seen are held out."""
    others = ~np.isin(images.patients, images.patients[support]) & images.unseen
    return [[Split(support, np.flatnonzero(others))]]


def k_fold_splits(images: Labelled, folds: int, repeats: int, generator: np.random.Generator) -> list[list[Split]]:
    """Return repeats of K folds over the patients that theta has not seen; all others always support."""
    new, seen = np.flatnonzero(images.unseen), np.flatnonzero(~images.unseen)
    out = []
    for _ in range(repeats):
        fold = deal(images, new, folds, generator)
        out.append([Split(np.concatenate([new[fold != k], seen]), new[fold == k]) for k in range(folds)])
    return out


def judge(
    methods: Mapping[str, Method],
    images: Labelled,
    splits: Sequence[Sequence[Split]],
    coverage: float,
    generator: np.random.Generator,
    *,
    alike: bool,
    mix: Sequence[float] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Judged:
    """Adapt every method on every split's support and note what it says of the held-out images.

    Parameters
    ----------
    splits : sequence
        Repeats of splits. The held-out rows of every repeat are the same ones.
    coverage : float
        Asked of the conformal sets.
    alike : bool
        Whether every class weighs alike in the figures, as in a support set of so many patients each; else every image.
    mix : sequence of float, optional
        Each class's share of the patients that the model will see: also judge it there.
    progress : callable
        Called before each fit with the method's name.
    """
    rows = np.unique(np.concatenate([split.held_out for split in splits[0]]))
    place = {int(row): at for at, row in enumerate(rows)}
    shape = (len(splits), len(rows), len(images.classes))
    outcomes, mixed = {}, {}
    for name, method in methods.items():
        ours, theirs = ((np.zeros(shape), np.ones(shape, np.bool_)) for _ in range(2))
        settings = []
        for repeat, folds in enumerate(splits):
            for split in folds:
                progress(name)
                choice = choose(method, images, split.support, coverage, generator, mix=mix)
                at = [place[int(row)] for row in split.held_out]
                logits = choice.predict(split.held_out)
                raw = Temperature(1.0)(logits)
                for (probabilities, sets), calibration in ((ours, choice.calibration), (theirs, choice.mixed)):
                    probabilities[repeat, at] = raw if calibration is None else calibration.probabilities(logits)
                    if calibration is not None:
                        sets[repeat, at] = calibration.sets(logits)
                settings.append(choice.setting)
        outcomes[name], mixed[name] = (Outcome(*found, tuple(settings)) for found in (ours, theirs))
    labels, patients = images.labels[rows], images.patients[rows]
    weights = balancing(labels)
    there = None
    if mix is not None:
        there = Judged(labels, patients, mixed, weights * np.asarray(mix)[labels] * shape[-1])
    return Judged(labels, patients, outcomes, weights if alike else np.ones(len(rows)), there)


def summary(judged: Judged, generator: np.random.Generator) -> dict[str, Any]:
    """Return all figures of all methods, as JSON takes them."""
    out: dict[str, Any] = {}
    for name in judged.outcomes:
        covered, size = judged.coverage(name, generator)
        figures = {figure: e.json() for figure, e in judged.figures(name, generator).items()}
        out[name] = {
            "figures": figures,
            "calibration error of perfect probabilities": round(judged.error_of_perfect(name, generator), 4),
            "coverage": covered.json(),
            "mean set size": round(size, 3),
        }
    return out
