"""Whether images are of the kind that theta was trained on, as far as a site can tell.

No statistic of the training sites' images leaves them, so a site compares with what theta itself implies, and with its
own labelled images:

- Colour. Grey pictures in a network of three colours give the first filters the same gradient in every channel; so a
  theta whose first filters moved alike in all three was trained on grey, any other on colour.
- Distance. In theta's features, an image is as far away as the nearest class's mean, by the covariance within classes
  (Mahalanobis). What is farther than 99 % of the labelled patients' images, each measured without its own patients, is
  called unlike them. It says nothing about whether the labelled images themselves are what theta knows.

References
----------
Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", 2018,
equations 1 and 2 (there with all layers; here the covariance is shrunk: Ledoit and Wolf, 2004).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from client.adapt.trained import Trained
from client.calibration import patient_weights

__all__ = ["Familiar", "fit_familiar", "grey_share", "trained_on_grey"]

Array = NDArray[np.float64]

#: Share of the labelled patients' images that counts as like them.
_SHARE = 0.99
#: Channels that differ by no more are grey, whatever compression did to them.
_GREY = 3
#: Filters that moved apart by less than this share of how far they moved, moved alike.
_ALIKE = 1e-3


@dataclass(frozen=True)
class Familiar:
    """Where a site's labelled images lie in theta's features.

    Attributes
    ----------
    centres : ndarray
        ``[C, F]``.
    precision : ndarray
        ``[F, F]``, the inverse of the covariance within classes.
    threshold : float
        The largest distance of an image that is like them.
    """

    centres: Array
    precision: Array
    threshold: float

    def distances(self, features: Array) -> Array:
        """Return ``[N]``: the squared Mahalanobis distance to the nearest class."""
        apart = features[:, None] - self.centres
        return np.asarray(np.einsum("ncf,fg,ncg->nc", apart, self.precision, apart, optimize=True).min(-1))

    def unlike(self, features: Array) -> NDArray[np.bool_]:
        """Return ``[N]``: which images are unlike the labelled ones."""
        return self.distances(features) > self.threshold


def fit_familiar(
    features: Array, labels: NDArray[np.int64], patients: NDArray[np.int64], fold: NDArray[np.int64]
) -> Familiar:
    """Fit to labelled images' features ``[N, F]``; ``fold`` ``[N]`` keeps patients whole.

    The threshold is the smallest distance that is not exceeded by 99 % of patients and one more; of fewer than 99
    patients it is the largest distance, so that of n patients like them about one in n + 1 is called unlike.
    """
    apart = np.empty(len(features))
    for k in np.unique(fold):
        left_out = fold == k
        centres, precision = _gaussians(features[~left_out], labels[~left_out])
        apart[left_out] = Familiar(centres, precision, 0.0).distances(features[left_out])
    order = np.argsort(apart)
    weights = patient_weights(patients)[order]
    reached = np.flatnonzero(np.cumsum(weights) >= _SHARE * (weights.sum() + 1))
    return Familiar(*_gaussians(features, labels), float(apart[order][reached[0] if len(reached) else -1]))


def grey_share(pixels: NDArray[np.uint8]) -> float:
    """Return the share of images ``[N, C, *]`` that are grey in all pixels; one channel is always grey."""
    span = pixels.max(1).astype(np.int16) - pixels.min(1)
    return float((span.reshape(len(span), -1).max(-1) <= _GREY).mean())


def trained_on_grey(trained: Trained) -> bool | None:
    """Return whether theta was trained on grey pictures; None where it cannot be told."""
    for name, after in trained.theta.items():
        if after.dim() >= 4 and after.shape[1] == 3:
            moved = (after - trained.initial[name]).double()
            size = float(moved.norm())
            if size == 0:
                return None
            return float((moved - moved.mean(1, keepdim=True)).norm()) < _ALIKE * size
        if after.dim() >= 4:
            return None
    return None


def _gaussians(features: Array, labels: NDArray[np.int64]) -> tuple[Array, Array]:
    classes = np.unique(labels)
    centres = np.stack([features[labels == c].mean(0) for c in classes])
    within = features - centres[np.searchsorted(classes, labels)]
    model = LedoitWolf(assume_centered=True).fit(within + _jitter(within))
    return centres, np.asarray(model.precision_, np.float64)


def _jitter(within: Array) -> Array:
    """Return noise too small to matter: features that never vary would leave the covariance without an inverse."""
    scale = 1e-4 * (float(within.std()) or 1.0)
    noise = torch.randn(within.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return np.asarray(scale * noise.numpy())
