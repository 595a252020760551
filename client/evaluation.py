"""What adaptation gives at this site: before, after, and from scratch, on patients that never train."""

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

    For the study's known and new classes, each as mean and standard error over meta-test episodes: query accuracy
    before and after adapting theta, training from scratch on the same support sets, and the paired difference of
    the last two; balanced accuracy, AUROC and expected calibration error of adapted theta. -1 where the site has no
    such classes among the side's patients or the figure was not asked for.
    """
    study = session.study
    out = dict.fromkeys(EVALUATION, -1.0)
    for name in ("known", "new"):
        pool = session.evaluation_pool(instruction.side, new=name == "new")
        if len(pool.classes) < 2:
            continue
        generator = meta_test_generator(session, name)
        episodes = draw(session.site, pool, study.episodes, study.episodes.test_episodes, generator)
        before = session.engine.scores(theta, episodes, 0)
        after = session.engine.scores(theta, episodes, study.algorithm.test_steps)
        figures = {"before": before.accuracy, "after": after.accuracy}
        figures |= {"balanced": after.balanced, "auroc": after.auroc, "ece": after.ece}
        if instruction.scratch:
            steps = study.episodes.scratch_steps
            scratch = session.scratch.scores(session.scratch_theta, episodes, steps).accuracy
            figures |= {"scratch": scratch, "gain": after.accuracy - scratch}
        for figure, values in figures.items():
            out[f"{name}.{figure}.mean"], out[f"{name}.{figure}.error"] = _mean_and_error(values)
    return out


def meta_test_generator(session: Session, pool: str) -> np.random.Generator:
    """Return the randomness of the meta-test episodes of the ``known`` or ``new`` classes.

    It gives the same episodes of the same patients every time and whatever the algorithm, so that comparisons are
    paired: a held-out site, all of whose patients are asked, has the same ones on both sides.
    """
    study, spec = session.study, session.study.episodes
    shape = (spec.labels, spec.ways, spec.shots, spec.queries)
    return session.site.generator("evaluate", study.data_digest, study.study.seed, *shape, pool)


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return mean and standard error of a figure over the episodes that have it; -1 where fewer than two do."""
    values = values[~values.isnan()].double()
    if len(values) < 2:
        return -1.0, -1.0
    return float(values.mean()), float(values.std()) / sqrt(len(values))
