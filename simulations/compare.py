"""Several algorithms side by side: the same virtual hospitals, the same meta-test episodes, 95 % intervals.

Every algorithm runs through the real apps, once a seed; theta starts from ``study.seed + i``, and within a seed all
are judged on the same episodes of the held-out sites (of all sites where none is held out). These have all their
patients judge, every time. Where none is held out, the sites' validation patients judge on the way and their test
patients at the end: the curves show both, the tables the end alone. Two comparisons come out:

equal rounds
    Every algorithm at its last evaluation up to ``study.rounds``.
equal bytes
    Every algorithm at its last evaluation for which a site has sent no more than the reference sends in all its rounds.
    The reference is the first algorithm that sends anything. Nothing is interpolated. An algorithm with a smaller theta
    runs on, in whole steps of ``episodes.test-every``, as long as that budget lasts; not where the steps miss
    ``study.rounds``, where a cosine schedule ends there, or where no site is held out. Bytes are theta's own: the
    envelope that Flower puts around them, some kB a message, depends on no algorithm.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from io import StringIO
from math import ceil, cos, log, pi, sin, sqrt, tan
from statistics import fmean, stdev
from typing import Any, Literal

from common.errors import DataError, RoundError, StudyError
from common.meta import flatten
from common.meta.local_only import LocalOnly
from common.study import Study
from server.record import run_folder
from server.rounds import initial_theta
from simulations.engines.inprocess import run_in_process

__all__ = [
    "SETTINGS",
    "Comparison",
    "Estimate",
    "Method",
    "Point",
    "Row",
    "Run",
    "compare",
    "interval",
    "student_t",
]

Value = bool | int | float | str
Basis = Literal["rounds", "bytes"]

_ADAM: Mapping[str, Value] = {
    "outer.optimiser": "adam",
    "outer.rate": 0.003,
    "outer.schedule": "constant",
    "outer.momentum": 0.0,
    "outer.clip": 0.0,
}
# With outer SGD at rate 1 the server's theta is the average of the sites' weights.
_AVERAGE = {**_ADAM, "outer.optimiser": "sgd", "outer.rate": 1.0}


def _inner(steps: int, rate: float) -> Mapping[str, Value]:
    return {
        "algorithm.inner-steps": steps,
        "algorithm.inner-rate": rate,
        "algorithm.test-steps": 10,
        "algorithm.test-rate": rate,
    }


#: What each algorithm changes in a study that was written for another one; the study's own algorithm keeps the
#: study's values. Starting points, not optima: one to three tries each (fedprox: none, it has fedavg's), one seed,
#: 20 to 50 rounds, conv4 on Omniglot alphabets, 5-way 5-shot, judged at the held-out alphabet Latin. So a comparison
#: on that very set has seen its test site; give `compare` settings of your own for one that is to stand.
#: Local-only trains as long and as fast as the study's own training from scratch.
SETTINGS: Mapping[str, Mapping[str, Value]] = {
    "maml": {**_inner(1, 0.1), **_ADAM},
    "fomaml": {**_inner(3, 0.1), **_ADAM},
    "anil": {**_inner(5, 0.1), **_ADAM},  # only the head adapts: steps are cheap
    "metasgd": {**_inner(1, 0.1), **_ADAM},  # where the learned rates start
    "reptile": {**_inner(5, 0.1), **_ADAM},  # with one step it would be plain SGD on all tasks at once
    "protonet": _ADAM,
    "protomaml": {**_inner(1, 0.01), **_ADAM},
    "fedavg": {**_inner(5, 0.1), **_AVERAGE},
    "fedprox": {**_inner(5, 0.1), **_AVERAGE, "algorithm.proximal": 0.01},
    "local-only": {},
}

_POOLS = {"known": "known classes", "new": "new classes"}
_KEYS = tuple(f"{pool}.{moment}" for pool in _POOLS for moment in ("before", "after"))
_POINTS = 8  # evaluations of a run where the study leaves their number open


@dataclass(frozen=True)
class Method:
    """A line of the comparison: an algorithm, before or after its adaptation at meta-test time."""

    name: str
    algorithm: str
    moment: Literal["before", "after"]


@dataclass(frozen=True)
class Estimate:
    """A mean accuracy (0 to 1) and the half-width of its 95 % interval."""

    mean: float
    half: float

    def overlaps(self, other: "Estimate") -> bool:
        """Whether the two intervals have a value in common."""
        return abs(self.mean - other.mean) <= self.half + other.half


@dataclass(frozen=True)
class Point:
    """One evaluation: mean over the judged sites and its standard error over episodes, by ``pool.moment``."""

    round: int
    scores: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One algorithm with one seed: the study as it ran, and what one site sent in a round (bytes)."""

    study: Study
    bytes_per_round: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Row:
    """One method in one of the comparisons.

    Attributes
    ----------
    rounds, bytes_up : int or None
        Where it is judged: rounds, and bytes that one site had sent by then. None: no evaluation within the budget.
    estimates : mapping
        By pool of classes.
    best : tuple of str
        Pools in which its interval overlaps that of the best method (which includes the best).
    """

    method: str
    rounds: int | None
    bytes_up: int | None
    estimates: Mapping[str, Estimate]
    best: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    study : Study
        The study that every run was made from.
    sites : tuple of str
        Who judges: the held-out sites, or all.
    runs : mapping
        By algorithm, in the order asked for; one run a seed.
    """

    study: Study
    sites: tuple[str, ...]
    runs: Mapping[str, tuple[Run, ...]]

    @property
    def methods(self) -> tuple[Method, ...]:
        """The lines of the comparison: averaging counts twice, with and without fine-tuning."""
        out: list[Method] = []
        for name in self.runs:
            if name in {"fedavg", "fedprox"}:
                out += [Method(name, name, "before"), Method(f"{name} + fine-tuning", name, "after")]
            else:
                out.append(Method(name, name, "after"))
        return tuple(out)

    @property
    def pools(self) -> tuple[str, ...]:
        """Which classes could be judged: ``known``, ``new`` or both."""
        scores = next(iter(self.runs.values()))[0].points[-1].scores
        return tuple(pool for pool in _POOLS if f"{pool}.after" in scores)

    @property
    def budget(self) -> int:
        """Bytes that a site of the reference sends in ``study.rounds`` rounds."""
        return _budget(self.study, [runs[0].bytes_per_round for runs in self.runs.values()])

    def curve(self, method: Method, pool: str) -> list[tuple[int, int, Estimate]]:
        """Return a method's rounds, bytes up per site and accuracy at every evaluation that all its seeds have."""
        runs, key = self.runs[method.algorithm], f"{pool}.{method.moment}"
        by_round = [{point.round: point.scores[key] for point in run.points} for run in runs]
        return [
            (number, number * runs[0].bytes_per_round, interval([scores[number] for scores in by_round]))
            for number in by_round[0]
            if all(number in scores for scores in by_round)
        ]

    def table(self, basis: Basis) -> list[Row]:
        """Return one row a method, at equal rounds or at equal bytes."""
        rows = []
        for method in self.methods:
            curves = {pool: self.curve(method, pool) for pool in self.pools}
            if not self.study.sites.held_out_names:  # other patients judge at the end than on the way
                curves = {pool: curve[-1:] for pool, curve in curves.items()}
            affordable = [
                at
                for at, (rounds, sent, _) in enumerate(next(iter(curves.values())))
                if (rounds <= self.study.study.rounds if basis == "rounds" else sent <= self.budget)
            ]
            if affordable:
                chosen = {pool: curve[affordable[-1]] for pool, curve in curves.items()}
                rounds, sent, _ = next(iter(chosen.values()))
                rows.append(Row(method.name, rounds, sent, {pool: c[2] for pool, c in chosen.items()}))
            else:
                rows.append(Row(method.name, None, None, {}))
        return _mark_best(rows, self.pools)

    def markdown(self) -> str:
        """Return both tables and what they mean, as Markdown."""
        spec, seeds = self.study.episodes, len(next(iter(self.runs.values())))
        ways = len(spec.class_names) if spec.labels == "fixed" else spec.ways
        who = "never trained" if self.study.sites.held_out_names else "patients that never trained"
        spread = f"over {seeds} seeds (Student t)" if seeds > 1 else "over episodes, one seed"
        plural = "s" if self.study.study.rounds != 1 else ""
        return "\n".join(
            [
                f"# {self.study.study.title}",
                "",
                f"{ways}-way {spec.shots}-shot at {', '.join(self.sites)} ({who}). Accuracy in per cent, 95 % "
                f"intervals {spread}. All methods have the same meta-test episodes. Bold: the interval overlaps that "
                "of the best.",
                "",
                f"## Equal rounds: {self.study.study.rounds} round{plural}",
                "",
                *self._lines("rounds"),
                "",
                f"## Equal bytes: at most {self.budget / 1e6:.2f} MB up per site",
                "",
                *self._lines("bytes"),
                "",
            ]
        )

    def _lines(self, basis: Basis) -> list[str]:
        head = ["method", *(_POOLS[pool] for pool in self.pools), "rounds", "MB up per site"]
        lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
        for row in self.table(basis):
            cells = []
            for pool in self.pools:
                e = row.estimates.get(pool)
                text = "-" if e is None else f"{100 * e.mean:.1f} ± {100 * e.half:.1f}"
                cells.append(f"**{text}**" if pool in row.best else text)
            rounds = "-" if row.rounds is None else str(row.rounds)
            sent = "-" if row.bytes_up is None else f"{row.bytes_up / 1e6:.2f}"
            lines.append(f"| {' | '.join([row.method, *cells, rounds, sent])} |")
        return lines

    def json(self) -> dict[str, Any]:
        """Return everything that was measured, and what it takes to measure it again, for `json.dumps`."""
        given = self.study.run_config()
        algorithms = {}
        for name, runs in self.runs.items():
            changed = {k: v for k, v in runs[0].study.run_config().items() if v != given[k] and k != "study.seed"}
            algorithms[name] = {
                "settings": changed,
                "bytes_up_per_site_and_round": runs[0].bytes_per_round,
                "runs": [
                    {
                        "seed": run.study.study.seed,
                        "study": run.study.digest,
                        "points": [
                            {
                                "round": p.round,
                                "scores": {k: {"mean": m, "error": e} for k, (m, e) in p.scores.items()},
                            }
                            for p in run.points
                        ],
                    }
                    for run in runs
                ],
            }
        out = {
            "study": self.study.digest,
            "configuration": given,
            "judged_sites": self.sites,
            "algorithms": algorithms,
            "budget_bytes_up_per_site": self.budget,
            "equal_rounds": [asdict(row) for row in self.table("rounds")],
            "equal_bytes": [asdict(row) for row in self.table("bytes")],
            "versions": {"python": platform.python_version()} | {n: version(n) for n in ("flwr", "numpy", "torch")},
        }
        plain: dict[str, Any] = json.loads(json.dumps(out))  # lists for tuples, as a reader of the file gets them
        return plain


def compare(
    study: Study,
    algorithms: Sequence[str],
    seeds: int,
    *,
    settings: Mapping[str, Mapping[str, Value]] = SETTINGS,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Run algorithms on a study's prepared virtual sites.

    Parameters
    ----------
    study : Study
        Gives everything but the algorithm and its outer optimiser.
    algorithms : sequence of str
        The first that sends anything is the reference of the comparison at equal bytes.
    seeds : int
        Runs of every algorithm, with theta's seed ``study.seed + i``.
    settings : mapping
        What each algorithm changes in the study, ``group.key`` to value.
    progress : callable
        Called with a line of text after every run.

    Raises
    ------
    StudyError
        An algorithm does not exist or is named twice, none is named, there is no seed, or sites withhold figures.
    NotPreparedError
        The study's virtual sites are not prepared.
    RoundError
        A run failed, or a site that judges gave no evaluation.
    DataError
        No site that judges has patients enough to judge.
    """
    if seeds < 1 or not algorithms or len(set(algorithms)) < len(algorithms):
        raise StudyError(f"a comparison needs at least one seed, and algorithms named once each: {seeds}, {algorithms}")
    if study.privacy.figures == "withheld":
        raise StudyError("a comparison needs the sites' figures: set privacy.figures = 'sent'")
    plans = {name: _plan(study, name, settings) for name in algorithms}
    sent = {name: _bytes_per_round(plan) for name, plan in plans.items()}
    budget = _budget(study, list(sent.values()))
    runs: dict[str, tuple[Run, ...]] = {}
    for name, plan in plans.items():
        rounds = _rounds(plan, sent[name], budget)
        seeded = [plan.override({"study.rounds": rounds, "study.seed": study.study.seed + i}) for i in range(seeds)]
        runs[name] = tuple(_run(one, sent[name], progress) for one in seeded)
    return Comparison(study, _judges(study), runs)


def _plan(study: Study, name: str, settings: Mapping[str, Mapping[str, Value]]) -> Study:
    """Return the study as an algorithm runs it."""
    changes: dict[str, Value] = {"algorithm.name": name}
    if name != study.algorithm.name:
        if name == LocalOnly.name:
            changes |= {"algorithm.test-steps": study.episodes.scratch_steps}
            changes |= {"algorithm.test-rate": study.episodes.scratch_rate}
        changes |= settings.get(name, {})
    # Training from scratch is a row of its own, local-only: no other run need repeat it. Nobody stops early, or
    # rounds would not be equal.
    fixed = {"episodes.test-every": _every(study), "episodes.scratch-steps": 0, "outer.patience": 0}
    return study.override(changes | fixed)


def _every(study: Study) -> int:
    """Return the rounds between evaluations: the study's own, or about eight evaluations a run."""
    rounds = study.study.rounds
    if study.episodes.test_every or rounds < 2:
        return study.episodes.test_every
    divisors = [d for d in range(1, rounds + 1) if rounds % d == 0]
    best = min(divisors, key=lambda d: abs(log(rounds / d / _POINTS)))
    return best if _POINTS // 2 <= rounds // best <= 2 * _POINTS else ceil(rounds / _POINTS)


def _bytes_per_round(plan: Study) -> int:
    return 0 if plan.algorithm.name == LocalOnly.name else int(flatten(initial_theta(plan)).numpy().nbytes)


def _budget(study: Study, sent: Sequence[int]) -> int:
    return study.study.rounds * next((size for size in sent if size), 0)


def _rounds(plan: Study, sent: int, budget: int) -> int:
    rounds, every = plan.study.rounds, plan.episodes.test_every
    if not sent or not every or rounds % every or plan.outer.schedule == "cosine" or not plan.sites.held_out_names:
        return rounds
    return max(rounds, budget // sent // every * every)


def _judges(study: Study) -> tuple[str, ...]:
    return study.sites.held_out_names or tuple(f"hospital-{i}" for i in range(study.data.sites))


def _run(plan: Study, sent: int, progress: Callable[[str], None]) -> Run:
    began = time.monotonic()
    what = f"{plan.algorithm.name}, seed {plan.study.seed}"
    try:
        with redirect_stdout(StringIO()):  # the ServerApp prints a line a round
            run_id, _ = run_in_process(plan)
    except RoundError as error:
        raise RoundError(f"{what}: {error}") from None
    result = json.loads((run_folder(run_id) / "result.json").read_text())
    points = _points(result["evaluations"], _judges(plan), what)
    figures = ", ".join(
        f"{_POOLS[pool]} {100 * points[-1].scores[f'{pool}.after'][0]:.1f} %"
        for pool in _POOLS
        if f"{pool}.after" in points[-1].scores
    )
    progress(f"{what}: {figures} after {points[-1].round} rounds, {time.monotonic() - began:.0f} s")
    return Run(plan, sent, points)


def _points(evaluations: Sequence[Mapping[str, Any]], judges: Sequence[str], what: str) -> tuple[Point, ...]:
    """Return a run's evaluations, without those at which a judge lacks a figure that it gives at the end."""
    last = evaluations[-1]
    if missing := [name for name in judges if name not in last["sites"]]:
        raise RoundError(f"{what}: {', '.join(missing)} gave no evaluation after round {last['round']}")
    offered = {name: [key for key in _KEYS if f"{key}.mean" in last["sites"][name]] for name in judges}
    if not any(offered.values()):
        raise DataError(f"{', '.join(judges)}: no two classes with two test patients each; add patients to judge by")
    return tuple(
        _point(e["round"], e["sites"], offered)
        for e in evaluations
        if all(f"{key}.mean" in e["sites"].get(name, {}) for name, keys in offered.items() for key in keys)
    )


def _point(number: int, sites: Mapping[str, Mapping[str, float]], offered: Mapping[str, Sequence[str]]) -> Point:
    scores = {}
    for key in _KEYS:
        at = [sites[name] for name, keys in offered.items() if key in keys]
        if at:
            error = sqrt(sum(s[f"{key}.error"] ** 2 for s in at)) / len(at)
            scores[key] = fmean(s[f"{key}.mean"] for s in at), error
    return Point(number, scores)


def _mark_best(rows: Sequence[Row], pools: Sequence[str]) -> list[Row]:
    best: dict[str, Estimate] = {}
    for pool in pools:
        if estimates := [row.estimates[pool] for row in rows if pool in row.estimates]:
            best[pool] = max(estimates, key=lambda e: e.mean)
    return [
        replace(row, best=tuple(pool for pool, e in row.estimates.items() if e.overlaps(best[pool]))) for row in rows
    ]


def interval(scores: Sequence[tuple[float, float]]) -> Estimate:
    """Return the mean accuracy over seeds and its 95 % interval.

    Parameters
    ----------
    scores : sequence of (float, float)
        Each seed's mean, and its standard error over episodes. The latter counts only for a single seed: several
        differ in their episodes too, so their spread holds both.
    """
    mean = fmean(score for score, _ in scores)
    if len(scores) == 1:
        return Estimate(mean, 1.96 * scores[0][1])
    return Estimate(mean, student_t(len(scores) - 1) * stdev(score for score, _ in scores) / sqrt(len(scores)))


@cache
def student_t(degrees: int) -> float:
    """Return t such that 95 % of Student's distribution with so many degrees of freedom lies within -t to t.

    References
    ----------
    Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4, with ``t = sqrt(n) tan(angle)``.
    """
    odd = degrees % 2

    def within(angle: float) -> float:
        term = total = 0.0 if degrees == 1 else cos(angle) ** odd
        for power in range(odd + 2, degrees - 1, 2):
            term *= (power - 1) / power * cos(angle) ** 2
            total += term
        return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total

    low, high = 0.0, pi / 2
    while high - low > 1e-15:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return sqrt(degrees) * tan(low)
