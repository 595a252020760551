"""Who was in the round: every attack's scores of patients who were, and of as many who were not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.episodes import network_input
from client.session import Session
from simulations.redteam.cosine import cosine_scores
from simulations.redteam.figures import Trials
from simulations.redteam.labels import class_shares
from simulations.redteam.oracle import Places, Truth, labels_of, offered, unseen
from simulations.redteam.scene import Release, Scene
from simulations.redteam.shadow import sides
from simulations.redteam.span import span_scores

__all__ = ["ATTACKS", "Attack", "label_trials", "pictures", "trials_of"]

#: Patients scored of each role in one release, and images looked at of one patient.
MOST, IMAGES = 12, 4

Scores = Callable[[Scene, Release, Tensor, Tensor], NDArray[np.float64]]


@dataclass(frozen=True)
class Attack:
    """A score of images ``[N]``; ``two_sided`` where high scores need not mean "member": the attacker finds out."""

    scores: Scores
    two_sided: bool


ATTACKS: Mapping[str, Attack] = {"span": Attack(span_scores, False), "gradient cosine": Attack(cosine_scores, True)}


def pictures(session: Session, places: Places) -> Tensor:
    """Return a site's images ``[N, C, H, W]`` as its network takes them."""
    return network_input(session.site.pixels(places))


def trials_of(
    scene: Scene, truths: Mapping[Release, Truth], attack: Attack, generator: np.random.Generator
) -> dict[str, Trials]:
    """Return an attack's trials by what patients did in the round.

    A patient's score is the largest over their images. Who is scored is drawn without looking at anybody's score.
    """
    side = sides(scene, attack.scores, generator) if attack.two_sided else {}
    pairs: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for release, truth in truths.items():
        session = scene.sessions[release.site]
        own = offered(session)
        groups = [generator.permutation(people)[:MOST] for people in (*truth.roles.values(), truth.out)]
        images = [own[session.site.patients[own] == patient][:IMAGES] for patient in np.concatenate(groups)]
        if not images:
            continue
        places = np.concatenate(images)
        labels = torch.from_numpy(labels_of(session, places))
        each = attack.scores(scene, release, pictures(session, places), labels)
        starts, ends = np.cumsum([0, *map(len, images)])[:-1], np.cumsum([len(group) for group in groups])[:-1]
        for number, role in enumerate(truth.roles):
            parts = np.split(np.maximum.reduceat(side.get(role, 1.0) * each, starts), ends)
            pairs.setdefault(role, []).append((parts[number], parts[-1]))
    return {role: Trials(parts) for role, parts in pairs.items()}


def label_trials(scene: Scene, truths: Mapping[Release, Truth]) -> Trials:
    """Return the estimated shares of classes that were there more often than the mean, and of those less often.

    A class is more than one patient: no patient's guarantee bounds what is told of it.
    """
    pairs = []
    for release, truth in truths.items():
        session = scene.sessions[release.site]
        ways = len(scene.study.episodes.class_names)
        counts = np.bincount(labels_of(session, truth.query), minlength=ways)
        elsewhere = scene.sessions[(release.site + 1) % len(scene.sessions)]
        shares = class_shares(scene, release, pictures(elsewhere, unseen(elsewhere)[:64]))
        pairs.append((shares[counts > counts.mean()], shares[counts < counts.mean()]))
    return Trials(pairs)
