"""The frontier of privacy, utility and attacks: one study under both mechanisms, at several epsilons.

Every run is the study with the real apps on copies of its virtual sites, noise from the operating system and figures
withheld, as hospitals would run it. An epsilon is that of the whole study: the noise follows from it, the sampling
rate, the rounds and delta. No noise (epsilon infinite) is the study without a mechanism: what privacy costs is the
difference to that, seed by seed. Epsilon 0 is no round at all: what a site has without the others, from the same start.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from client.session import Session, open_session
from common.errors import StudyError
from common.privacy.accounting import noise_for
from common.study import Study
from server.plan import facts_of
from server.rounds import initial_theta
from simulations.experiments.frontier_score import membership, utility
from simulations.redteam.bounds import bound_of_a_round, bound_of_the_study
from simulations.redteam.oracle import offered
from simulations.redteam.scene import record

__all__ = [
    "LEARNERS",
    "MECHANISMS",
    "PARTS",
    "Choice",
    "Plan",
    "Run",
    "Setting",
    "built_in",
    "forecast",
    "line",
    "measure",
    "name_of",
    "plans",
    "read",
]

MECHANISMS = ("episode-clip", "patient-clip")
LEARNERS = ("fomaml", "maml")
#: What learns and is sent: all of the network, or its head over a fixed body.
PARTS = ("full", "head")

# Of a patient-clip round's patients, those who are support: the query sum is what theta is stepped with.
_SUPPORT = 0.3

Changes = dict[str, bool | int | float | str]

_PHANTOMS: Changes = {
    "study.id": "frontier",
    "study.title": "Three lesion types on four phantom hospitals",
    "study.rounds": 60,
    "sites.held-out": "hospital-3",
    "model.width": 32,
    "model.norm": "group",
    "algorithm.name": "fomaml",
    "algorithm.inner-rate": 0.1,
    "algorithm.test-rate": 0.1,
    "algorithm.test-steps": 5,
    "episodes.labels": "fixed",
    "episodes.classes": "disc,ring,cross",
    "episodes.held-out": "",
    "episodes.ways": 3,
    "episodes.shots": 3,
    "episodes.queries": 6,
    "episodes.per-round": 4,
    "episodes.test-episodes": 40,
    "outer.rate": 0.01,
    "outer.clip": 0.0,
    "data.patients-per-class": 200,
}


# Whatever the study itself has: every run's mechanism is the one that it is for.
_NO_MECHANISM: Changes = {
    "privacy.mechanism": "none",
    "privacy.clip": 0.0,
    "privacy.noise": 0.0,
    "privacy.sampling": 0.0,
    "privacy.delta": 0.0,
    "privacy.research": False,
    "privacy.figures": "withheld",
}


def built_in() -> Study:
    """Return the study that is measured where none is named."""
    return Study().override(_PHANTOMS)


@dataclass(frozen=True)
class Setting:
    """What all private runs have in common.

    Attributes
    ----------
    sampling, clip, delta : float
        As in the study's group ``privacy``.
    starts : sequence of str
        Digests of released thetas that bodies start from: seed i from the i-th, and so on from the first again. Empty
        for the study's seed.
    attacked : int
        The attack looks at the answers of so many rounds, the last ones.
    """

    sampling: float
    clip: float
    delta: float
    starts: Sequence[str] = ()
    attacked: int = 5


@dataclass(frozen=True)
class Choice:
    """Which runs are asked for: all combinations, so many seeds of each.

    An infinite epsilon is no mechanism, and 0 no round.
    """

    mechanisms: Sequence[str] = MECHANISMS
    learners: Sequence[str] = LEARNERS
    parts: Sequence[str] = PARTS
    epsilons: Sequence[float] = (0.0, 1.0, 3.0, 8.0, inf)
    seeds: int = 5


@dataclass(frozen=True)
class Plan:
    """One run to make.

    Attributes
    ----------
    mechanism : str
        One of `MECHANISMS`, ``none`` where epsilon is infinite, or ``no round`` where it is 0.
    epsilon : float
        Asked for.
    study : Study
        What runs.
    judged : Study
        Whose meta-test episodes count.
    """

    mechanism: str
    learner: str
    part: str
    epsilon: float
    study: Study
    judged: Study


@dataclass(frozen=True)
class Run:
    """What one run gave, as a line of the file has it.

    Attributes
    ----------
    study : str
        Digest of what ran.
    epsilon, spent : float or None
        Asked for, and what the study costs; None is infinite.
    noise : float
        ``privacy.noise``.
    numbers : int
        D, of an answer.
    signal : float or None
        The plan's signal to noise in the mean over the quorum, at most.
    sites : dict
        By site: accuracy, balanced accuracy and recall by class (0 to 1).
    attack : dict
        By what patients did in the round: AUC and its limits.
    bounds : list of float or None
        The largest AUC that the guarantee leaves: in a round, and over the study.
    seconds : float
        Of the run and what was looked at.
    """

    study: str
    mechanism: str
    learner: str
    part: str
    epsilon: float | None
    seed: int
    noise: float
    spent: float | None
    numbers: int
    signal: float | None
    rounds: int
    attacked: int
    sites: dict[str, Any]
    attack: dict[str, Any]
    bounds: list[float] | None
    seconds: float


def training_patients(study: Study) -> int:
    """Return the median number of training patients with a class of the study, over the sites that train."""
    counts = [len(np.unique(s.site.patients[offered(s)])) for s in _sessions(study) if not s.held_out]
    return int(median(counts))


def plans(study: Study, setting: Setting, choice: Choice) -> list[Plan]:
    """Return the runs to make, seed after seed; the ones without a mechanism or a round stand for both mechanisms.

    With ``patient-clip``, ``shots`` and ``queries`` are set so that sums are divided by about as many patients as are
    in a round: the sampling rate times the training patients of the median site. Meta-test keeps the study's own.

    Raises
    ------
    StudyError
        A name is not known, or the study's labels are not fixed.
    """
    asked = ((choice.mechanisms, MECHANISMS), (choice.learners, LEARNERS), (choice.parts, PARTS))
    for given, known in asked:
        if wrong := sorted(set(given) - set(known)):
            raise StudyError(f"no {', '.join(wrong)} here: choose among {', '.join(known)}")
    if study.episodes.labels != "fixed":
        raise StudyError("the frontier needs episodes.labels = 'fixed': patient-clip has no other")
    costs = [cost for cost in choice.epsilons if 0 < cost < inf]
    noises = {cost: noise_for(cost, setting.delta, setting.sampling, study.study.rounds) for cost in costs}
    people = setting.sampling * training_patients(study)
    out = []
    for seed, part, learner, cost in product(range(choice.seeds), choice.parts, choice.learners, choice.epsilons):
        number = study.study.seed + seed
        judged = study.override({**_common(study, setting, learner, part, number), "study.seed": number})
        if cost == inf:
            out.append(Plan("none", learner, part, inf, judged, judged))
            continue
        if cost == 0:
            out.append(Plan("no round", learner, part, 0.0, judged.override({"study.rounds": 0}), judged))
            continue
        for mechanism in choice.mechanisms:
            changes = _private(study, setting, mechanism, noises[cost], people)
            out.append(Plan(mechanism, learner, part, cost, judged.override(changes), judged))
    return out


def _common(study: Study, setting: Setting, learner: str, part: str, seed: int) -> Changes:
    model = study.model
    changes: Changes = {
        "algorithm.name": learner,
        "model.norm": "group",
        "model.name": ("head:" if part == "head" else "") + model.name.removeprefix("head:"),
        "episodes.test-every": 0,
        "episodes.scratch-steps": 0,
        "outer.patience": 0,
        **_NO_MECHANISM,
    }
    if setting.starts:
        start = setting.starts[seed % len(setting.starts)]
        changes["model.arguments"] = json.dumps(json.loads(model.arguments) | {"start": start})
    return changes


def _private(study: Study, setting: Setting, mechanism: str, noise: float, people: float) -> Changes:
    changes: Changes = {
        "privacy.mechanism": mechanism,
        "privacy.clip": setting.clip,
        "privacy.noise": noise,
        "privacy.sampling": setting.sampling,
        "privacy.delta": setting.delta,
    }
    if mechanism == "patient-clip":
        each = people / len(study.episodes.class_names)
        changes |= {
            "episodes.per-round": 1,
            "episodes.shots": max(1, round(_SUPPORT * each)),
            "episodes.queries": max(1, round((1 - _SUPPORT) * each)),
        }
    return changes


def name_of(plan: Plan) -> str:
    """Return what a run is, in a few words."""
    private = plan.study.privacy.guaranteed
    cost = f"{plan.mechanism}, epsilon {plan.epsilon:g}" if private else plan.mechanism.replace("none", "no mechanism")
    return f"{plan.part}, {plan.learner}, {cost}, seed {plan.study.study.seed}"


def forecast(todo: Sequence[Plan]) -> Iterator[str]:
    """Return what the plan says of every private setting before anything runs: how much of the signal noise leaves."""
    for plan in todo:
        if plan.study.privacy.guaranteed and plan.judged.study.seed == todo[0].judged.study.seed:
            facts = facts_of(plan.study, [])
            ratio, what = facts["signal_to_noise"]["quorum"], f"{plan.part}, {plan.learner}, {plan.mechanism}"
            yield (
                f"{what}, epsilon {plan.epsilon:g}: noise {plan.study.privacy.noise:g}, signal to noise {ratio:.2g} at "
                f"most in {facts['numbers']:,} numbers"
            )


def measure(todo: Sequence[Plan], attacked: int, known: Sequence[Run] = ()) -> Iterator[tuple[Plan, Run]]:
    """Make the runs in turn; one that is ``known`` is not made again."""
    have = {(run.study, run.attacked): run for run in known}
    for plan in todo:
        yield plan, have.get((plan.study.digest, attacked)) or _run(plan, attacked)


def _run(plan: Plan, attacked: int) -> Run:
    began, study = time.monotonic(), plan.study
    private = study.privacy.guaranteed
    facts = facts_of(study, []) if private else {}
    round_bound, study_bound = bound_of_a_round(study), bound_of_the_study(study)
    scene = record(study) if plan.epsilon else None
    theta = scene.theta if scene else initial_theta(study)
    sessions = scene.sessions if scene else _sessions(study)
    found = {s.site.name: utility(s, plan.judged, theta) for s in sessions}
    return Run(
        study.digest,
        plan.mechanism,
        plan.learner,
        plan.part,
        None if plan.epsilon == inf else plan.epsilon,
        study.study.seed,
        study.privacy.noise,
        None if plan.epsilon == inf else facts["epsilon"]["study"] if private else 0.0,
        sum(tensor.numel() for tensor in theta.values()),
        facts["signal_to_noise"]["quorum"] if private else None,
        study.study.rounds,
        attacked,
        {name: figures for name, figures in found.items() if figures is not None},
        membership(scene, attacked) if scene else {},
        [round_bound.area, study_bound.area] if round_bound and study_bound else None,
        time.monotonic() - began,
    )


def _sessions(study: Study) -> list[Session]:
    return [open_session(study.run_config(), {"partition-id": number}) for number in range(study.data.sites)]


def read(file: Path) -> list[Run]:
    """Return the runs that a file holds; none where there is no file."""
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def line(run: Run) -> str:
    """Return a run as a line of the file."""
    return json.dumps(asdict(run)) + "\n"
