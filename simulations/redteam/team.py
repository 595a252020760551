"""The red team at work: every setting runs with every defence, and every attack is made on what was sent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.errors import StudyError
from common.privacy.statement import guarantee
from common.study import Study
from simulations.redteam.bounds import bound_of_a_round, bound_of_the_study
from simulations.redteam.figures import Figure, rates
from simulations.redteam.membership import ATTACKS, label_trials, trials_of
from simulations.redteam.oracle import truth
from simulations.redteam.reconstruction import Picture, reconstruct
from simulations.redteam.released import FEWEST, TARGET, attack_released
from simulations.redteam.scene import Scene, record
from simulations.redteam.settings import TRAINED, attacked
from simulations.redteam.span import rank

__all__ = ["Ranks", "Result", "Row", "attack_run", "attack_study"]

_SEED = 0  # of which patients are looked at: the same in every setting


@dataclass(frozen=True)
class Row:
    """What one attack reached against one role of patients.

    Attributes
    ----------
    attack, target : str
        Which attack, and whom it looks for.
    figures : tuple of Figure
        What it reached.
    """

    attack: str
    target: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Ranks:
    """How often the rank of the first layer's meta-gradient was exactly the number of images it was made of.

    ``seen`` are the query images with first-order MAML, query and support images with MAML.
    """

    equal: int
    releases: int
    median_rank: float
    median_seen: float


@dataclass(frozen=True)
class Result:
    """One setting with one defence.

    Attributes
    ----------
    guarantee : str
        The study's sentence.
    areas : tuple of (float, float) or None
        The largest AUC that the guarantee leaves: of a patient in a round, by that answer; and of a patient in the
        data, by all answers of the study. None without a guarantee.
    releases, numbers : int
        Answers that were attacked, and numbers in each.
    ranks : Ranks
        Of the first layer.
    rows : tuple of Row
        What the attacks reached.
    pictures : tuple of Picture
        The best reconstructions: images of the sites' patients.
    """

    setting: str
    defence: str
    guarantee: str
    areas: tuple[float, float] | None
    releases: int
    numbers: int
    ranks: Ranks
    rows: tuple[Row, ...]
    pictures: tuple[Picture, ...]

    @property
    def broken(self) -> list[str]:
        """The figures that are proven to be above their bound."""
        return [
            f"{self.setting}, {self.defence}: {row.attack} on {row.target}: {figure.name} is {figure.low:.3f} at least,"
            f" and {figure.bound:.3f} at most if the guarantee holds"
            for row in self.rows
            for figure in row.figures
            if figure.broken
        ]


def attack_study(
    study: Study,
    settings: Sequence[str],
    defences: Sequence[str],
    *,
    clip: float,
    noise: float,
    sampling: float,
    runs: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Run and attack every setting with every defence; those that train ``runs`` times more, to attack their theta.

    Raises
    ------
    StudyError
        A setting or defence is not known, or the runs are too few to say anything of theta.
    """
    if 0 < runs < FEWEST:
        raise StudyError(
            f"thetas of {runs} runs tell nothing: ask for {FEWEST} runs or more, or for 0 to leave them out"
        )
    results = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the attacks' tensors are small: more threads would wait for each other
    try:
        for setting in settings:
            for defence in defences:
                say(f"{setting}, {defence}")
                scene = record(attacked(study, setting, defence, clip, noise, sampling))
                result = attack_run(scene, setting, defence)
                if runs and setting in TRAINED:
                    say(f"{setting}, {defence}: theta")
                    found = attack_released(scene.study, runs, np.random.default_rng(_SEED))
                    rows = (Row(f"{name} on theta", TARGET, tuple(part)) for name, part in found.items())
                    result = replace(result, rows=(*result.rows, *rows))
                results.append(result)
    finally:
        torch.set_num_threads(threads)
    return results


def attack_run(scene: Scene, setting: str, defence: str) -> Result:
    """Make every attack on a run."""
    study = scene.study
    bound, whole = bound_of_a_round(study), bound_of_the_study(study)
    truths = {release: truth(scene.sessions[release.site], release.round) for release in scene.releases}
    rows = []
    for name, attack in ATTACKS.items():
        for role, trials in trials_of(scene, truths, attack, np.random.default_rng(_SEED)).items():
            if figures := rates(trials, bound):
                rows.append(Row(name, role, tuple(figures)))
    made = reconstruct(scene, truths, bound, np.random.default_rng(_SEED))
    rows += [Row(m.attack, role, figures) for m in made for role, figures in m.figures.items()]
    if figures := rates(label_trials(scene, truths), None):
        rows.append(Row("label leakage", "classes there more often", tuple(figures[:1])))
    both = study.algorithm.name == "maml"
    ranks = np.array([rank(scene, release) for release in truths])
    seen = np.array([len(t.query) + (len(t.support) if both else 0) for t in truths.values()])
    return Result(
        setting,
        defence,
        guarantee(study),
        (bound.area, whole.area) if bound and whole else None,
        len(scene.releases),
        scene.releases[0].vector.size,
        Ranks(int((ranks == seen).sum()), len(ranks), float(np.median(ranks)), float(np.median(seen))),
        tuple(rows),
        tuple(picture for m in made for picture in m.pictures),
    )
