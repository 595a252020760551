"""How sure a released theta is of a patient: after it was adapted to images of the attacker's own, as theta is used.

Theta is a start: where labels are shuffled it says nothing of an image before it is adapted. So the attacker adapts it,
as its study does at meta-test time, to a support set of their own, and takes the probability of the image's right class
as a logit: the mean over several support sets, and over all images of a patient.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.episodes import draw, make_pool, network_input
from client.session import Session
from common.meta import Batch, Episodes
from common.meta.autodiff import EAGER
from common.models.network import Theta
from simulations.redteam.oracle import Places, labels_of, unseen

__all__ = ["Own", "own_images", "patient_logits"]

_SETS = 8  # support sets
_CHUNK = 256  # images in one pass


@dataclass(frozen=True)
class Own:
    """What an attacker has of a site's kind: images of its patients who never train.

    Attributes
    ----------
    supports : Episodes
        Support sets, of half of the patients.
    strangers : ndarray
        The images of the other half, whom no model has seen.
    """

    supports: Episodes
    strangers: Places


def own_images(session: Session, generator: np.random.Generator) -> Own:
    """Deal out the patients of a site who never train.

    Raises
    ------
    DataError
        They are too few for an episode.
    """
    site, places = session.site, unseen(session)
    chosen = np.zeros(len(site.keys), np.bool_)
    for label in np.unique(labels_of(session, places)):
        people = np.unique(site.patients[places[labels_of(session, places) == label]])
        chosen[generator.permutation(people)[: (len(people) + 1) // 2]] = True
    spec = session.study.episodes
    pool = make_pool(site, spec.class_names, 0, ("test",), among=chosen)
    return Own(draw(site, pool, spec, _SETS, generator), places[~chosen[site.patients[places]]])


def patient_logits(session: Session, theta: Theta, supports: Episodes, places: Places) -> NDArray[np.float64]:
    """Return ``[P]``: log(p / (1 - p)) of every patient with any of these images, patients ascending.

    Not a number for a patient whose classes are in no support set.
    """
    x, labels = network_input(session.site.pixels(places)), torch.from_numpy(labels_of(session, places))
    dtype = next(iter(theta.values())).dtype
    learner, network = session.engine.learner, session.engine.network
    total, count = torch.zeros(2, len(places), dtype=torch.float64)
    for number in range(supports.n_tasks):
        task = supports.to(torch.device("cpu"), dtype).task(number)
        here = labels[:, None] == task.classes[None]
        asked = here.any(1)
        with torch.no_grad():
            steps = session.study.algorithm.test_steps
            state = learner.adapt(network, theta, task.support, task.classes, steps, EAGER)
            parts = [
                learner.predict(network, state, Batch(part, torch.zeros(len(part), dtype=torch.int64), None))
                for part in torch.split(x[asked].to(dtype), _CHUNK)
            ]
        if parts:
            total[asked] += _logit(torch.cat(parts), here[asked].int().argmax(1))
            count[asked] += 1
    _, patient = np.unique(session.site.patients[places], return_inverse=True)
    sums = (np.bincount(patient, part.numpy()) for part in (total, count))
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.divide(*sums)
    return mean


def _logit(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) ``[N]`` of the right column of scores ``[N, ways]`` before the softmax."""
    scores = scores.double()
    own = scores.gather(1, right[:, None])
    return (own - scores.scatter(1, right[:, None], -torch.inf).logsumexp(1, keepdim=True))[:, 0]
