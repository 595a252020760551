"""Ratio inversion: a row of the first linear layer's weight gradient over the same row of its bias's is an image.

For one image the row is (something) times the image, and the bias's element the same something. A ReLU unit that fires
for one image alone gives that image exactly; one that fires for several gives a mixture of them. The same holds of an
exact meta-gradient, whose rows have that form too (`simulations.redteam.span`).

References
----------
Geiping, Bauermeister, Droege and Moeller, "Inverting Gradients", 2020, section 4; Boenisch et al., "When the Curious
Abandon Honesty", 2023, for units that fire for one image.
"""

import torch
from torch import Tensor, nn

from simulations.redteam.networks import first_layer
from simulations.redteam.scene import Release, Scene

__all__ = ["ratios"]


def ratios(scene: Scene, release: Release) -> Tensor | None:
    """Return the images ``[R, C, H, W]`` that a release's rows give; None where the first layer is not linear."""
    found = first_layer(scene.network)
    if found is None or not isinstance(found[1], nn.Linear) or found[1].bias is None:
        return None
    gradient = scene.named(release.vector)
    weight, bias = gradient[f"{found[0]}.weight"], gradient[f"{found[0]}.bias"]
    fires = bias != 0
    model = scene.study.model
    images = (weight[fires] / bias[fires, None]).reshape(-1, model.channels, *[model.image_size] * model.dimensions)
    return images if len(images) else torch.zeros(1, *images.shape[1:], dtype=images.dtype)
