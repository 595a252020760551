"""Membership by the angle between an image's own gradient and the meta-gradient.

An image that was used has pulled the meta-gradient its way, or, through the inner loop, pushed it the other way: with
convolutions and the second order, members were seen to have the *smaller* cosine. So which side means "member" is
learned from the first rounds (`simulations.redteam.membership`).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.meta import Batch, Episodes, unflatten
from simulations.redteam.scene import Release, Scene

__all__ = ["cosine_scores"]


def cosine_scores(scene: Scene, release: Release, x: Tensor, y: Tensor) -> NDArray[np.float64]:
    """Return ``[N]`` cosines of the images' gradients at theta with the meta-gradient.

    Parameters
    ----------
    x, y : Tensor
        Candidate images ``[N, C, H, W]`` as networks take them, and their labels.
    """
    session = scene.sessions[release.site]
    theta = unflatten(torch.tensor(release.theta), session.theta)
    alone = Batch(x[:, None], y[:, None], None)
    people = Episodes(alone, Batch(x[:, None][:, :0], y[:, None][:, :0], None), y[:, None])
    rows = torch.stack([row.gradient for row in session.engine.patient_gradients(theta, people)])
    target = torch.tensor(release.vector)
    return torch.nn.functional.cosine_similarity(rows, target[None], dim=1).double().numpy()
