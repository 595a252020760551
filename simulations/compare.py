"""Several algorithms side by side: the same virtual hospitals, the same meta-test episodes, 95 % intervals.

Every algorithm runs through the real apps, once a seed; theta starts from ``study.seed + i``, and within a seed all
are judged on the same episodes of the held-out sites (of all sites where none is held out). Two comparisons come out:

equal rounds
    Every algorithm at its last evaluation up to ``study.rounds``.
equal bytes
    Every algorithm at its last evaluation for which a site has sent no more than the reference sends in all its
    rounds. The reference is the first algorithm that sends anything. Nothing is interpolated. An algorithm with a
    smaller theta runs on, in whole steps of ``episodes.test-every``, as long as that budget lasts; not where the steps
    miss ``study.rounds``, or where a cosine schedule ends there. Bytes are theta's own: the envelope that Flower puts
    around them, some kB a message, depends on no algorithm.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from io import StringIO
from math import asin, ceil, cos, log, pi, sin, sqrt, tan
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
#: study's values. Found on 5-way 5-shot Omniglot alphabets with conv4, for short runs. Local-only trains as long and
#: as fast as the study's own training from scratch.
SETTINGS: Mapping[str, Mapping[str, Value]] = {
    "maml": {**_inner(1, 0.1), **_ADAM},
    "fomaml": {**_inner(3, 0.1), **_ADAM},  # without second order, one step says little about adaptation
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
        """Return a method's rounds, bytes up per site and accuracy at every evaluation."""
        runs, key = self.runs[method.algorithm], f"{pool}.{method.moment}"
        together = zip(*(run.points for run in runs), strict=True)
        return [
            (points[0].round, points[0].round * runs[0].bytes_per_round, interval([p.scores[key] for p in points]))
            for points in together
        ]

    def table(self, basis: Basis) -> list[Row]:
        """Return one row a method, at equal rounds or at equal bytes."""
        rows = []
        for method in self.methods:
            curves = {pool: self.curve(method, pool) for pool in self.pools}
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
                f"{ways} ways, {spec.shots} shots, at {', '.join(self.sites)} ({who}). Accuracy in per cent, 95 % "
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
