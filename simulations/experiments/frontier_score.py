"""What a trained theta is worth at every site, and what its answers told of who was in a round.

Private studies withhold all figures. So the sites are looked at from inside, as only a simulation can.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from client.data.episodes import draw
from client.evaluation import meta_test_generator
from client.session import Session
from common.meta.autodiff import EAGER
from common.models.network import Theta
from common.study import Study
from simulations.redteam.bounds import bound_of_a_round
from simulations.redteam.figures import rates
from simulations.redteam.membership import ATTACKS, trials_of
from simulations.redteam.oracle import truth
from simulations.redteam.scene import Scene

__all__ = ["ATTACK", "membership", "utility"]

#: Which attack: the one that says something of every network.
ATTACK = "gradient cosine"


def utility(session: Session, judged: Study, theta: Theta) -> dict[str, Any] | None:
    """Return adapted theta's accuracy, balanced accuracy and recall of every class at a site; None where it has no two.

    Parameters
    ----------
    judged : Study
        Whose meta-test episodes count: a mechanism's own can have other numbers of shots and queries.
    """
    pool = session.evaluation_pool("test", new=False)
    if len(pool.classes) < 2:
        return None
    asked = replace(session, study=judged)
    episodes = draw(
        session.site, pool, judged.episodes, judged.episodes.test_episodes, meta_test_generator(asked, "known")
    )
    learner, network = session.engine.learner, session.engine.network
    names = judged.episodes.class_names
    hits, there = np.zeros(len(names)), np.zeros(len(names))
    for number in range(episodes.n_tasks):
        task = episodes.task(number)
        with torch.no_grad():
            steps = judged.algorithm.test_steps
            state = learner.adapt(network, theta, task.support, task.classes, steps, EAGER)
            chosen = learner.predict(network, state, task.query).argmax(-1)
        real = np.ones(len(chosen), np.bool_) if task.query.mask is None else task.query.mask.numpy()
        labels, right = task.query.y.numpy()[real], (chosen == task.query.y).numpy()[real]
        there += np.bincount(labels, minlength=len(names))
        hits += np.bincount(labels[right], minlength=len(names))
    recall = {name: float(h / t) for name, h, t in zip(names, hits, there, strict=True) if t}
    return {
        "accuracy": float(hits.sum() / there.sum()),
        "balanced": float(np.mean(list(recall.values()))),
        "recall": recall,
    }


def membership(scene: Scene, rounds: int) -> dict[str, Any]:
    """Return the AUC of the attack on the answers of the last ``rounds``, by what patients did, with its limits."""
    last = sorted({release.round for release in scene.releases})[-rounds:]
    truths = {r: truth(scene.sessions[r.site], r.round) for r in scene.releases if r.round in last}
    bound, attack = bound_of_a_round(scene.study), ATTACKS[ATTACK]
    found = {}
    for role, trials in trials_of(scene, truths, attack, np.random.default_rng(0)).items():
        if figures := rates(trials, bound):
            area = figures[0]
            found[role] = {"auc": area.value, "low": area.low, "high": area.high, "broken": area.broken}
    return found
