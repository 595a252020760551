"""Membership from what a run publishes: theta alone, which anybody may hold.

A study runs several times with the real apps, each time with a random half of every site's training patients. Each
run's theta is attacked in turn, and the others are the attacker's reference models: so every run is a trial, and every
patient is a member of some and not of others. Nothing else of a run is looked at.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.session import Session, open_session
from common.study import Study
from simulations.prepare import prepare
from simulations.redteam.bounds import bound_of_the_study
from simulations.redteam.confidence import own_images, patient_logits
from simulations.redteam.figures import Figure, Trials, rates
from simulations.redteam.halves import Half, run_half
from simulations.redteam.likelihood import Numbers, lira, rmia
from simulations.redteam.oracle import offered

__all__ = ["FEWEST", "TARGET", "attack_released", "trials_of"]

#: Fewer runs leave patients without a model that had them, or without one that had not, and few trials.
FEWEST = 8

#: Whom these attacks look for: not those who were in a round, of whom an answer tells, but all who could have been.
TARGET = "in the data"


def attack_released(study: Study, count: int, generator: np.random.Generator) -> dict[str, list[Figure]]:
    """Run a study ``count`` times, and return what each attack on its theta reached.

    The bound is that of the whole study: theta is made of all its answers.
    """
    prepare(study)
    sessions = [open_session(study.run_config(), {"partition-id": site}) for site in range(study.data.sites)]
    halves = [run_half(study, sessions, generator) for _ in range(count)]
    inside = np.array([np.concatenate(half.inside) for half in halves])
    logits, strangers = (np.concatenate(parts, 1) for parts in zip(*_asked(sessions, halves, generator), strict=True))
    # Where labels are shuffled, a class can be in no support set: nothing is known of its patients.
    told, others = (~np.isnan(part[0]) for part in (logits, strangers))
    trials = trials_of(logits[:, told], inside[:, told], strangers[:, others])
    bound = bound_of_the_study(study)
    return {name: rates(part, bound) for name, part in trials.items()}


def trials_of(logits: Numbers, inside: NDArray[np.bool_], strangers: Numbers) -> dict[str, Trials]:
    """Return the trials of every attack, one for each model: its members' scores, and those of all others.

    Parameters
    ----------
    logits, inside : ndarray
        ``[M, P]``: how sure each model is of each patient, and whether it had them.
    strangers : ndarray
        ``[M, Z]``: how sure each is of patients whom none had.
    """
    pairs: dict[str, list[tuple[Numbers, Numbers]]] = {"LiRA": [], "RMIA": []}
    for model in range(len(logits)):
        others = np.arange(len(logits)) != model
        seen = logits[model], logits[others], inside[others]
        scores = {"LiRA": lira(*seen), "RMIA": rmia(*seen, strangers[model], strangers[others])}
        for name, score in scores.items():
            known = ~np.isnan(score)
            pairs[name].append((score[known & inside[model]], score[known & ~inside[model]]))
    return {name: Trials(part) for name, part in pairs.items()}


def _asked(
    sessions: Sequence[Session], halves: Sequence[Half], generator: np.random.Generator
) -> list[tuple[Numbers, Numbers]]:
    """Return, for each site, how sure all models are of its training patients and of strangers."""
    found = []
    for session in sessions:
        own = own_images(session, generator)
        places = offered(session), own.strangers
        rows = [[patient_logits(session, half.theta, own.supports, p) for half in halves] for p in places]
        found.append((np.array(rows[0]), np.array(rows[1])))
    return found
