"""What adaptation gives at this site: before, after, and from scratch, on patients that never trained."""

from math import sqrt

import numpy as np
from torch import Tensor

from client.data.episodes import draw
from client.session import Session
from common.contract import EVALUATION, Instruction
from common.models.network import Theta

__all__ = ["evaluate", "meta_test_generator"]


def evaluate(session: Session, theta: Theta, instruction: Instruction) -> dict[str, float]:
    """Return the declared evaluation scalars.

    For the study's known and new classes: mean query accuracy over meta-test episodes and its standard error,
    before and after adapting theta, training from scratch on the same support sets, and the paired difference of
    the last two. -1 where the site has no such classes or the figure was not asked for.
    """
    study = session.study
    out = dict.fromkeys(EVALUATION, -1.0)
    for name in ("known", "new"):
        pool = session.evaluation_pool(instruction.side, new=name == "new")
        if len(pool.classes) < 2:
            continue
        generator = meta_test_generator(session, name)
        episodes = draw(session.site, pool, study.episodes, study.episodes.test_episodes, generator)
        before = session.engine.scores(theta, episodes, 0).accuracy
        after = session.engine.scores(theta, episodes, study.algorithm.test_steps).accuracy
        figures = {"before": before, "after": after}
        if instruction.scratch:
            steps = study.episodes.scratch_steps
            scratch = session.scratch.scores(session.scratch_theta, episodes, steps).accuracy
            figures |= {"scratch": scratch, "gain": after - scratch}
        for moment, values in figures.items():
            out[f"{name}.{moment}.mean"], out[f"{name}.{moment}.error"] = _mean_and_error(values)
    return out


def meta_test_generator(session: Session, pool: str) -> np.random.Generator:
    """Return the randomness of the meta-test episodes of the ``known`` or ``new`` classes.

    It gives the same episodes every time and whatever the algorithm, so that comparisons are paired.
    """
    study, spec = session.study, session.study.episodes
    shape = (spec.labels, spec.ways, spec.shots, spec.queries)
    return session.site.generator("evaluate", study.data_digest, study.study.seed, *shape, pool)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.double().mean()), float(values.double().std()) / sqrt(len(values))
