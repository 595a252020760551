"""Membership by the angle between an image's own gradient and the meta-gradient.

An image that was used as query has pulled the meta-gradient its way. One that was used as support has, through the
inner steps, taken from it what it pulls: its angle is the larger one. And how large angles are at all differs more
between rounds and between classes than between members and others. So every cosine is compared with those of images of
the same class that the attacker has, under the same meta-gradient; which side means "member" is for `shadow` to say.

References
----------
Watson, Guo, Cormode and Sablayrolles, "On the Importance of Difficulty Calibration in Membership Inference Attacks",
2022: scores are told apart after subtracting what they are for an image like this one that was not there.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.episodes import network_input
from common.meta import Batch, Episodes, unflatten
from simulations.redteam.oracle import labels_of, unseen
from simulations.redteam.scene import Release, Scene

__all__ = ["cosine_scores"]

#: The attacker's own images that others are compared with.
_OWN = 48


def cosine_scores(scene: Scene, release: Release, x: Tensor, y: Tensor) -> NDArray[np.float64]:
    """Return ``[N]``: how much larger the cosine of an image's gradient at theta with the meta-gradient is than usual.

    Parameters
    ----------
    x, y : Tensor
        Candidate images ``[N, C, H, W]`` as networks take them, and their labels.
    """
    elsewhere = scene.sessions[(release.site + 1) % len(scene.sessions)]
    places = unseen(elsewhere)
    places = places[:: max(1, len(places) // _OWN)]
    known = torch.from_numpy(labels_of(elsewhere, places))
    own = _cosines(scene, release, network_input(elsewhere.site.pixels(places)), known)
    usual = torch.full((len(scene.study.episodes.class_names),), float(own.mean() if len(own) else 0), dtype=own.dtype)
    for label in set(known.tolist()):
        usual[label] = own[known == label].mean()
    scores: NDArray[np.float64] = (_cosines(scene, release, x, y) - usual[y]).numpy()
    return scores


def _cosines(scene: Scene, release: Release, x: Tensor, y: Tensor) -> Tensor:
    session = scene.sessions[release.site]
    theta = unflatten(torch.tensor(release.theta), session.theta)
    alone = Batch(x[:, None], y[:, None], None)
    people = Episodes(alone, Batch(x[:, None][:, :0], y[:, None][:, :0], None), y[:, None])
    rows = [row.gradient for row in session.engine.patient_gradients(theta, people)]
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    target = torch.tensor(release.vector)
    return torch.nn.functional.cosine_similarity(torch.stack(rows), target[None], dim=1).double()
