"""The span attack: whose image lies in the row space of the first layer's meta-gradient.

The gradient of a linear layer is a sum of (something) times (its input) over the images. Differentiating through inner
steps keeps that form, also for the images of the support set. So the rows of the first layer's exact meta-gradient are
combinations of the query images with first-order MAML, and of query and support images with MAML. As long as there are
fewer of them than rows, an image lies in that space if it was used, and does not if it was not: no optimiser, no
training, milliseconds.

It extends the analysis of ranks of Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", 2021, to
meta-gradients.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from simulations.redteam.networks import first_layer
from simulations.redteam.scene import Release, Scene

__all__ = ["rank", "span_scores"]


def span_scores(scene: Scene, release: Release, x: Tensor, y: Tensor) -> NDArray[np.float64]:
    """Return ``[N]`` minus the share of an image that lies outside of the row space: 0 is "used".

    Parameters
    ----------
    x, y : Tensor
        Candidate images ``[N, C, H, W]`` as networks take them, and their labels.
    """
    basis = _basis(scene, release)
    if basis is None:
        return np.zeros(len(x))
    inputs = _inputs(scene, x.double())
    outside = inputs - inputs @ basis.T @ basis
    share: NDArray[np.float64] = (outside.flatten(1).norm(dim=1) / inputs.flatten(1).norm(dim=1)).numpy()
    return -share


def rank(scene: Scene, release: Release) -> int:
    """Return the numerical rank of the first layer's meta-gradient: how many inputs it is made of, if it is few.

    Rounding the numbers of a matrix G moves no singular value by more than eps/2 times the Frobenius norm of G (Weyl's
    inequality). What is below twice that is no direction, which leaves room for the engine's own rounding. The usual
    bound, eps times the larger side times the largest singular value, hides small directions of images with thousands
    of numbers.
    """
    gradient = _rows(scene, release)
    if gradient is None:
        return 0
    kind = torch.float32 if scene.study.wire.dtype == "float32" else torch.float64
    return int(torch.linalg.matrix_rank(gradient, atol=torch.finfo(kind).eps * float(gradient.norm()), rtol=0.0))


def _rows(scene: Scene, release: Release) -> Tensor | None:
    found = first_layer(scene.network)
    return None if found is None else scene.named(release.vector)[f"{found[0]}.weight"].flatten(1)


def _basis(scene: Scene, release: Release) -> Tensor | None:
    """Return an orthonormal basis ``[R, inputs]`` of the row space, as many directions as there can be images."""
    gradient = _rows(scene, release)
    if gradient is None:
        return None
    spec = scene.study.episodes
    images = spec.ways * (spec.shots + spec.queries) * spec.per_round
    most = min(images, *gradient.shape)
    basis: Tensor = torch.linalg.svd(gradient, full_matrices=False).Vh[:most]
    return basis


def _inputs(scene: Scene, x: Tensor) -> Tensor:
    """Return what the first layer sees of each image: one row of all pixels, or a row for every patch."""
    found = first_layer(scene.network)
    assert found is not None
    layer = found[1]
    if isinstance(layer, torch.nn.Linear):
        return x.flatten(1)[:, None]
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)  # type: ignore[arg-type]
