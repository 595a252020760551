"""The private meta-gradient of a site: patients by coins of their own, an episode to a bin, clipped, added, noised.

What one patient does: they are in the round or not, by a coin that nobody else's presence moves, and if so in one bin.
Everything after that happens inside of a bin, with the bin's own randomness. So one patient more or less changes one
clipped vector, and the sum by twice the clip bound at most. `docs/privacy.md` has the proof and what it leaves out.
"""

import os
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.episodes import draw, make_pool
from client.data.store import Site
from client.session import Session
from common.contract import TRAIN, Vector
from common.errors import DataError
from common.meta import Batch, Engine, Episodes, MetaGradient
from common.models.network import Theta
from common.privacy.mechanism import SENSITIVITY, Source, Steps, clipped_sum, noised
from common.study import Study

__all__ = ["OUT", "bins", "episodes_of_bins", "gradients", "noise_source", "private_gradient", "sum_of_bins"]

#: The bin of a patient who is not in the round.
OUT = -1


def private_gradient(session: Session, theta: Theta, number: int) -> tuple[Vector, dict[str, float]]:
    """Return a round's meta-gradient with noise ``[D]``, and the scalars that go with it.

    The scalars are constant, but where the study forgoes its guarantee and has figures sent.

    Parameters
    ----------
    number : int
        The round: it draws the patients, always the same ones at this site and in this study. The noise is fresh every
        time, so what was sent once must be sent again and never made again.
    """
    study = session.study
    plan, parts = study.privacy, study.episodes.per_round
    total, result = sum_of_bins(session, theta, number)
    deviation = plan.noise * SENSITIVITY[plan.mechanism] * plan.clip
    released = noised(total, plan.clip, deviation, parts, noise_source(session.site, study, number))
    scalars = dict.fromkeys(TRAIN, -1.0)
    if plan.research and plan.figures == "sent" and result is not None:
        scalars = {"loss": float(result.loss.mean()), "accuracy": float(result.accuracy.mean())}
    return released.astype(study.wire.dtype), scalars


def sum_of_bins(session: Session, theta: Theta, number: int) -> tuple[Steps, MetaGradient | None]:
    """Return the sum of a round's clipped meta-gradients ``[D]``, in steps, and what it was made of: both secret."""
    drawn = episodes_of_bins(session.site, session.study, number)
    result = gradients(session.engine, theta, list(drawn.values()))
    rows = [] if result is None else [row.numpy() for row in result.gradient]
    size = sum(tensor.numel() for tensor in theta.values())
    return clipped_sum(rows, session.study.privacy.clip, size), result


def bins(site: Site, study: Study, number: int) -> NDArray[np.int64]:
    """Return ``[P]``, the bin of every patient in a round, or `OUT`; no patient's depends on who else is there."""
    chosen = np.full(len(site.keys), OUT, np.int64)
    below = int(study.privacy.sampling * 2**64)
    for patient in range(len(site.keys)):
        coin = site.coin(patient, "bin", study.digest, number)
        if int.from_bytes(coin[:8], "big") < below:
            chosen[patient] = int.from_bytes(coin[8:], "big") % study.episodes.per_round
    return chosen


def episodes_of_bins(site: Site, study: Study, number: int) -> dict[int, Episodes]:
    """Return the episode of every bin whose patients can make one."""
    spec, chosen = study.episodes.in_training, bins(site, study, number)
    drawn = {}
    for part in range(spec.per_round):
        pool = make_pool(site, spec.class_names, 0, ("train",), among=chosen == part)
        # A generator of its own: with one for all, a patient in this bin would change what is drawn in the next.
        generator = site.generator("bin", study.digest, number, part)
        with suppress(DataError):  # too few patients or classes: the bin counts as a vector of zeros
            drawn[part] = draw(site, pool, spec, 1, generator, augment=True)
    return drawn


def gradients(engine: Engine, theta: Theta, drawn: list[Episodes]) -> MetaGradient | None:
    """Return a row for every episode, None where there are none."""
    if not drawn:
        return None
    if engine.learner.per_episode:
        return engine.meta_gradient(theta, _joined(drawn), reduce="none")
    # A pseudo-gradient of all episodes together would not be a sum over bins.
    rows = [engine.meta_gradient(theta, episode) for episode in drawn]
    return MetaGradient(*(torch.stack(part) for part in zip(*rows, strict=True)))


def _joined(drawn: list[Episodes]) -> Episodes:
    def joined(parts: list[Batch]) -> Batch:
        masks = [torch.ones_like(p.y, dtype=torch.bool) if p.mask is None else p.mask for p in parts]
        return Batch(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]), torch.cat(masks))

    support, query = joined([d.support for d in drawn]), joined([d.query for d in drawn])
    return Episodes(support, query, torch.cat([d.classes for d in drawn]))


def noise_source(site: Site, study: Study, number: int) -> Source:
    """Return where noise comes from: the operating system, or a seed that voids the guarantee."""
    return site.generator("noise", study.digest, number).bytes if study.privacy.research else os.urandom
