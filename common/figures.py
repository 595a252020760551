"""How good predicted probabilities are: discrimination, calibration, and intervals by a bootstrap over patients.

Every figure takes probabilities ``[N, C]``, labels ``[N]`` and, where asked for, non-negative weights ``[..., N]`` of
the images; it returns ``[...]``. A bootstrap replicate is a row of weights: how often each image was drawn. So a
thousand replicates are one call, and two models are compared on the same ones.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BINS",
    "FIGURES",
    "Figure",
    "auroc",
    "balanced_accuracy",
    "bootstrap",
    "brier",
    "calibration_gaps",
    "error_of_perfect",
    "expected_calibration_error",
    "interval",
    "log_loss",
    "one_vs_rest",
    "replicates",
    "sensitivity_at",
    "specificity_at",
]

Array = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]


class Figure(Protocol):
    """A figure of probabilities ``[N, C]``, labels ``[N]`` and weights ``[..., N]``."""

    def __call__(self, probabilities: Array, labels: Labels, weights: Array | None = None) -> Array: ...


#: Equal-width bins of the expected calibration error.
BINS = 10
#: Fixed specificity, or sensitivity, at which the other one is read off the ROC curve.
_FIXED = 0.9
#: A weight sum in floating point may miss a bound by this much.
_ROUNDING = 1e-9
#: Weights that a chunk of bootstrap replicates may hold.
_CHUNK = 2_000_000


def balanced_accuracy(probabilities: Array, labels: Labels, weights: Array | None = None) -> Array:
    """Return the mean over the classes that are there of the share of their images whose top class is right."""
    w = _weights(labels, weights)
    hit = probabilities.argmax(-1) == labels
    member = _member(probabilities, labels)
    with np.errstate(invalid="ignore"):
        return _mean_of_defined((w @ (member * hit[:, None])) / (w @ member))


def auroc(probabilities: Array, labels: Labels, weights: Array | None = None) -> Array:
    """Return the mean over classes of the area under the one-vs-rest ROC curve.

    A tie of a positive and a negative image counts one half. A class that no image, or every image, has is left out;
    not a number where that leaves none.
    """
    return _mean_of_defined(one_vs_rest(probabilities, labels, weights, _area))


def sensitivity_at(
    probabilities: Array, labels: Labels, weights: Array | None = None, specificity: float = _FIXED
) -> Array:
    """Return the mean over classes of the largest sensitivity whose specificity is at least the one given.

    The threshold is read off the ROC curve of these very images: a threshold that was fixed beforehand does worse.
    """

    def best(true: Array, false: Array) -> Array:
        return np.asarray(np.where(1 - false >= specificity - _ROUNDING, true, 0).max(-1))

    return _mean_of_defined(one_vs_rest(probabilities, labels, weights, best))


def specificity_at(
    probabilities: Array, labels: Labels, weights: Array | None = None, sensitivity: float = _FIXED
) -> Array:
    """Return the mean over classes of the largest specificity whose sensitivity is at least the one given."""

    def best(true: Array, false: Array) -> Array:
        return np.asarray(np.where(true >= sensitivity - _ROUNDING, 1 - false, 0).max(-1))

    return _mean_of_defined(one_vs_rest(probabilities, labels, weights, best))


def brier(probabilities: Array, labels: Labels, weights: Array | None = None) -> Array:
    """Return the mean over images of ``sum_c (p_c - y_c)^2``, between 0 and 2.

    References
    ----------
    Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950, equation 2.
    """
    return _mean(np.square(probabilities - _member(probabilities, labels)).sum(-1), _weights(labels, weights))


def log_loss(probabilities: Array, labels: Labels, weights: Array | None = None) -> Array:
    """Return the mean over images of the negative logarithm of the probability of their class, at least 1e-12."""
    chosen = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    return _mean(-np.log(chosen), _weights(labels, weights))


def calibration_gaps(probabilities: Array, labels: Labels, weights: Array | None = None, bins: int = BINS) -> Array:
    """Return ``[..., bins]``: how much more often than its probability says the top class is right, by bin.

    The top probability is sorted into bins of equal width over ``(0, 1]``, closed on the right; each bin's gap is
    weighed by its share of the images.
    """
    w = _weights(labels, weights)
    top = probabilities.max(-1)
    gap = (probabilities.argmax(-1) == labels) - top
    where = np.clip(np.ceil(top * bins - _ROUNDING).astype(int) - 1, 0, bins - 1)
    member = (where[:, None] == np.arange(bins)).astype(float)
    return np.asarray((w @ (member * gap[:, None])) / w.sum(-1)[..., None])


def expected_calibration_error(
    probabilities: Array, labels: Labels, weights: Array | None = None, bins: int = BINS
) -> Array:
    """Return the sum of the sizes of `calibration_gaps`.

    It is biased upwards: perfect probabilities of N images score about ``0.4 sqrt(bins / N)`` at most, so a small N
    proves nothing; `error_of_perfect` says how much it is.

    References
    ----------
    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3 (there with 15 bins).
    """
    return np.asarray(np.abs(calibration_gaps(probabilities, labels, weights, bins)).sum(-1))


def error_of_perfect(
    probabilities: Array, weights: Array | None, generator: np.random.Generator, *, draws: int = 20
) -> float:
    """Return the expected calibration error that these probabilities show where they are perfect.

    Labels are drawn from them. It is what so small a sample cannot tell from zero.

    References
    ----------
    Bröcker and Smith, "Increasing the Reliability of Reliability Diagrams", 2007 (consistency resampling).
    """
    edges = np.cumsum(probabilities, -1)
    drawn = []
    for _ in range(draws):
        labels = (generator.random(len(edges))[:, None] * edges[:, -1:] > edges).sum(-1)
        drawn.append(float(expected_calibration_error(probabilities, labels, weights)))
    return float(np.mean(drawn))


#: What a report shows, by name.
FIGURES: dict[str, Figure] = {
    "balanced accuracy": balanced_accuracy,
    "AUROC": auroc,
    f"sensitivity at specificity {_FIXED:g}": sensitivity_at,
    f"specificity at sensitivity {_FIXED:g}": specificity_at,
    "Brier score": brier,
    "log loss": log_loss,
    "expected calibration error": expected_calibration_error,
}


def one_vs_rest(
    probabilities: Array, labels: Labels, weights: Array | None, summary: Callable[[Array, Array], Array]
) -> Array:
    """Return ``[..., C]``: a summary of every class's ROC curve, not a number where a class has none.

    Parameters
    ----------
    summary : callable
        Given true and false positive rates ``[..., D + 1]`` at the D distinct scores from the highest down, after the
        point (0, 0).
    """
    w = _weights(labels, weights)
    out = []
    for c in range(probabilities.shape[-1]):
        order = np.argsort(-probabilities[:, c], kind="stable")
        scores, positive = probabilities[order, c], labels[order] == c
        last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of every run of equal scores
        rates = []
        for which in (positive, ~positive):
            total = np.cumsum(w[..., order] * which, -1)[..., last]
            total = np.concatenate([np.zeros((*total.shape[:-1], 1)), total], -1)
            with np.errstate(invalid="ignore"):
                rates.append(total / total[..., -1:])
        undefined = np.isnan(rates[0][..., -1]) | np.isnan(rates[1][..., -1])
        out.append(np.where(undefined, np.nan, summary(*rates)))
    return np.stack(out, -1)


def replicates(patients: ArrayLike, count: int, generator: np.random.Generator) -> Iterator[Array]:
    """Yield ``count`` bootstrap replicates, in chunks ``[b, N]`` of weights.

    Patients are drawn with replacement, with all their images: images of one patient are not independent.

    Parameters
    ----------
    patients : array_like
        ``[N]``, whose every image is.
    """
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    people = int(index.max()) + 1
    chunk = max(1, _CHUNK // len(index))
    for start in range(0, count, chunk):
        drawn = generator.multinomial(people, np.full(people, 1 / people), min(chunk, count - start))
        yield drawn[:, index].astype(float)


def bootstrap(
    figure: Callable[[Array | None], Array], patients: ArrayLike, count: int, generator: np.random.Generator
) -> Array:
    """Return ``count`` bootstrap values of a figure of weights, or of the difference of two figures."""
    return np.concatenate([figure(w) for w in replicates(patients, count, generator)])


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap values; those that are not a number are left out.

    References
    ----------
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, equation 13.5.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _area(true: Array, false: Array) -> Array:
    area = (np.diff(false, axis=-1) * (true[..., 1:] + true[..., :-1]) / 2).sum(-1)
    return np.asarray(np.minimum(area, 1))  # rounding may pass it, and a contract that expects a share refuses that


def _weights(labels: Labels, weights: Array | None) -> Array:
    return np.ones(len(labels)) if weights is None else weights


def _member(probabilities: Array, labels: Labels) -> Array:
    return np.asarray(labels[:, None] == np.arange(probabilities.shape[-1]), float)


def _mean(values: Array, weights: Array) -> Array:
    return np.asarray(weights @ values / weights.sum(-1))


def _mean_of_defined(values: Array) -> Array:
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, values, 0).sum(-1) / defined.sum(-1))
