"""Which side of a score means "member": what the attacker learns by playing a site with images of their own.

The attacker knows the study and every theta, so they can compute what a site sends whose images they know, and look on
which side those images are. Nothing about the attacked patients is needed.

References
----------
Shokri, Stronati, Song and Shmatikov, "Membership Inference Attacks Against Machine Learning Models", 2017, section V.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.episodes import network_input
from client.session import Session
from common.meta import Batch, Episodes, unflatten
from simulations.redteam.figures import Trials, area
from simulations.redteam.oracle import Places, labels_of, unseen
from simulations.redteam.scene import Release, Scene

__all__ = ["sides"]

#: Rounds that are played.
_GAMES = 8
#: Images of a class that are not there.
_OUT = 12


def sides(
    scene: Scene,
    scores: Callable[[Scene, Release, Tensor, Tensor], NDArray[np.float64]],
    generator: np.random.Generator,
) -> Mapping[str, float]:
    """Return 1 for each role whose members have the higher scores, and -1 for one whose members have the lower."""
    pairs: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {"support": [], "query": []}
    for release in scene.releases[:: max(1, len(scene.releases) // _GAMES)]:
        player = (release.site + 1) % len(scene.sessions)
        session = scene.sessions[player]
        support, query, out = _dealt(session, generator)
        if not min(map(len, (support, query, out))):
            continue
        task = Episodes(_batch(session, support), _batch(session, query), torch.arange(len(_names(session)))[None])
        vector = session.engine.meta_gradient(unflatten(torch.tensor(release.theta), session.theta), task).gradient
        played = replace(release, site=player, vector=vector.numpy())
        places = np.concatenate([support, query, out])
        images, labels = _batch(session, places)[:2]
        each = np.split(scores(scene, played, images[0], labels[0]), np.cumsum([len(support), len(query)]))
        pairs["support"].append((each[0], each[2]))
        pairs["query"].append((each[1], each[2]))
    pairs["in the round"] = [*pairs["support"], *pairs["query"]]
    return {role: -1.0 if found and area(Trials(found)) < 0.5 else 1.0 for role, found in pairs.items()}


def _dealt(session: Session, generator: np.random.Generator) -> tuple[Places, Places, Places]:
    """Return a third of every class's images as support, as query, and as those that are not there."""
    spec, places = session.study.episodes, unseen(session)
    labels = labels_of(session, places)
    dealt: list[list[Places]] = [[], [], []]
    for label in np.unique(labels):
        mixed = generator.permutation(places[labels == label])
        thirds = np.split(mixed, [len(mixed) // 3, 2 * (len(mixed) // 3)])
        for part, images, most in zip(dealt, thirds, (spec.shots, spec.queries, _OUT), strict=True):
            part.append(images[:most])
    support, query, out = (np.concatenate(part) if part else np.zeros(0, np.int64) for part in dealt)
    return support, query, out


def _batch(session: Session, places: Places) -> Batch:
    labels = torch.from_numpy(labels_of(session, places))
    return Batch(network_input(session.site.pixels(places))[None], labels[None], None)


def _names(session: Session) -> tuple[str, ...]:
    return session.study.episodes.class_names
