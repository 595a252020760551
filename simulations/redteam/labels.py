"""Label leakage: how often each class was in the query set, from the gradient of the head's bias.

That gradient is, for every class, the mean predicted probability minus the class's share of the images. The attacker
puts the predictions for images of their own in its place. Where episodes hold all classes equally often, which the
study says to everybody, there is nothing to tell.

References
----------
Zhao, Mopuri and Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020, for one image; here for shares.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.meta import unflatten
from simulations.redteam.scene import Release, Scene

__all__ = ["class_shares"]


def class_shares(scene: Scene, release: Release, own: Tensor) -> NDArray[np.float64]:
    """Return ``[ways]``, the estimated share of every class among the query images.

    Parameters
    ----------
    own : Tensor
        Images ``[N, C, H, W]`` of the attacker's own, of the same kind.
    """
    session = scene.sessions[release.site]
    theta = unflatten(torch.tensor(release.theta), session.theta)
    with torch.no_grad():
        predicted = session.engine.network.logits(theta, own.to(session.theta["head.bias"].dtype)).softmax(-1).mean(0)
    shares: NDArray[np.float64] = (predicted.double() - scene.named(release.vector)["head.bias"]).numpy()
    return shares
