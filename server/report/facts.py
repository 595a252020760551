"""What a run's folder says, as numbers: the one source of the report and of the model card."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.study import Study
from server.runs import lines, natural, read_json, recorded_study

__all__ = ["MOMENTS", "STATES", "Estimate", "Evaluation", "Facts", "History", "read_facts"]

#: What a site was in a round. The three ways to be out: it kept silent, it reported an error, its reply was refused.
STATES = ("in", "silent", "error", "refused", "resting", "idle")
_OUT = {"no-reply": "silent", "unsent": "silent", "error": "error"}
#: Figures of one evaluation, in the order in which tables show them.
MOMENTS = ("before", "after", "scratch", "gain", "balanced", "auroc", "ece")
#: What a round's line holds beside its sites.
_SCALARS = (
    "at", "gradient_norm", "bytes_up", "bytes_down",
    "seconds", "compute_seconds", "transport_seconds", "waiting_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over meta-test episodes and its standard error."""

    mean: float
    error: float

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval."""
        return 1.96 * self.error

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: ``figures[site][pool, moment]``."""

    round: int
    side: str
    figures: Mapping[str, Mapping[tuple[str, str], Estimate]]
    out: Mapping[str, str]
    best: bool

    def mean(self, sites: Iterable[str], pool: str, moment: str) -> Estimate | None:
        """Return the mean over some sites; its error is that of their episodes, not of other sites."""
        found = [e for site in sites if (e := self.figures.get(site, {}).get((pool, moment)))]
        if not found:
            return None
        return Estimate(sum(e.mean for e in found) / len(found), math.sqrt(sum(e.error**2 for e in found)) / len(found))

    @property
    def pools(self) -> tuple[str, ...]:
        """Return the pools of classes in which some site was evaluated."""
        return tuple(p for p in ("known", "new") if any((p, "after") in f for f in self.figures.values()))


@dataclass(frozen=True)
class History:
    """All rounds as arrays; R rounds, S sites that were asked to train.

    Attributes
    ----------
    rounds : ndarray
        Their numbers ``[R]``.
    sites : tuple of str
        In natural order.
    loss, accuracy : ndarray
        Query loss and accuracy ``[R, S]``; NaN where a site was not in, or sent none.
    state : ndarray
        Index into `STATES` ``[R, S]``, -1 where nothing is known.
    scalars : mapping
        What a round has once, ``[R]`` each; NaN where it was not recorded.
    attempts : int
        Attempts that all these rounds took.
    """

    rounds: NDArray[np.int64]
    sites: tuple[str, ...]
    loss: NDArray[np.float32]
    accuracy: NDArray[np.float32]
    state: NDArray[np.int8]
    scalars: Mapping[str, NDArray[np.float64]]
    attempts: int

    @property
    def asked(self) -> int:
        """How many replies the rounds asked for, in the attempts that completed them."""
        return self.lost + int((self.state == STATES.index("in")).sum())

    @property
    def lost(self) -> int:
        """How many of those did not count."""
        return sum(int((self.state == STATES.index(kind)).sum()) for kind in ("silent", "error", "refused"))


@dataclass(frozen=True)
class Facts:
    """Everything that a report says.

    Attributes
    ----------
    failures : mapping
        How often each site failed in each way, attempts that were tried again included.
    reasons : mapping
        For each way to fail, the sentence that was recorded last, and by which site.
    """

    name: str
    study: Study
    digest: str
    state: str
    failure: str
    history: History
    evaluations: tuple[Evaluation, ...]
    held_out: tuple[str, ...]
    training: tuple[str, ...]
    failures: Mapping[str, Mapping[str, int]]
    reasons: Mapping[str, str]
    events: tuple[Mapping[str, Any], ...]
    result: Mapping[str, Any]
    versions: Mapping[str, str]
    began: float | None
    ended: float | None

    @property
    def final(self) -> Evaluation | None:
        """The evaluation that counts: the last one on test patients, else the last one."""
        candidates = [e for e in self.evaluations if e.side == "test"] or self.evaluations
        return candidates[-1] if candidates else None

    @property
    def judges(self) -> tuple[str, ...]:
        """Sites that the final evaluation is judged by: those that never trained, else all."""
        if self.final is None:
            return ()
        unseen = tuple(s for s in self.held_out if s in self.final.figures)
        return unseen or tuple(self.final.figures)


def read_facts(folder: Path) -> Facts:
    """Read a run's folder, at whatever point the run is.

    Raises
    ------
    StudyError
        The folder's ``study.json`` is damaged, or another version's.
    """
    study = recorded_study(folder)
    status, result = read_json(folder / "status.json"), read_json(folder / "result.json")
    reader = _Reader()
    for line in lines(folder / "history.jsonl"):
        reader.add(line)
    history = reader.history()
    events = tuple(lines(folder / "events.jsonl"))
    failures, reasons = _failures(reader.out, events)
    recorded = [*lines(folder / "evaluations.jsonl")] or result.get("evaluations", [])
    known = {s for s, about in status.get("sites", {}).items() if about.get("role") == "held-out"}
    held_out = known | set(study.sites.held_out_names)
    training = {s for s, about in status.get("sites", {}).items() if about.get("role") != "held-out"}
    failed = folder / "failure.txt"
    state = status.get("state", "reporting")
    if state == "reporting":  # the report is written before the run says that it has ended
        state = "finished" if result else "failed" if failed.exists() else state
    times = [e["at"] for e in events if "at" in e]
    times += [float(t) for t in history.scalars["at"] if math.isfinite(t)]
    return Facts(
        name=folder.resolve().name,
        study=study,
        digest=study.digest,
        state=state,
        failure=failed.read_text(encoding="utf-8", errors="replace") if failed.exists() and state == "failed" else "",
        history=history,
        evaluations=_evaluations(recorded),
        held_out=tuple(sorted(held_out, key=natural)),
        training=tuple(sorted((training | set(history.sites)) - held_out, key=natural)),
        failures=failures,
        reasons=reasons,
        events=events,
        result=result,
        versions=status.get("versions", {}),
        began=min(times, default=None),
        ended=max(times, default=None),
    )


@dataclass
class _Reader:
    """Gathers rounds in little memory: a site's column is known only once all lines are read."""

    columns: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[int, int, dict[str, float], NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)
    out: list[tuple[int, int, list[dict[str, Any]]]] = field(default_factory=list)

    def add(self, line: Mapping[str, Any]) -> None:
        number, attempt = line["round"], line.get("attempt", 1)
        # A resumed run may go back: what it did after that round no longer counts.
        while self.rows and self.rows[-1][0] >= number:
            self.rows.pop()
        while self.out and self.out[-1][0] >= number:
            self.out.pop()
        who: list[tuple[str, str]] = [(site, "in") for site in line["sites"]]
        who += [(o["site"], _OUT.get(o["why"], "refused")) for o in line.get("out", ())]
        who += [(r["site"], "resting") for r in line.get("resting", ())]
        who += [(site, "idle") for site in line.get("idle", ())]
        places = [(self.columns.setdefault(site, len(self.columns)), STATES.index(state)) for site, state in who]
        nothing = (math.nan, math.nan)
        figures = [_sent(line["sites"][site]) if state == "in" else nothing for site, state in who]
        self.rows.append(
            (
                number,
                attempt,
                {name: float(line.get(name, math.nan)) for name in _SCALARS},
                np.array(places, np.int32).reshape(-1, 2),
                np.array(figures, np.float32).reshape(-1, 2),
            )
        )
        if line.get("out"):
            self.out.append((number, attempt, line["out"]))

    def history(self) -> History:
        sites = tuple(sorted(self.columns, key=natural))
        order = np.empty(len(sites), np.int64)
        for place, site in enumerate(sites):
            order[self.columns[site]] = place
        shape = (len(self.rows), len(sites))
        state = np.full(shape, -1, np.int8)
        figures = np.full((*shape, 2), np.nan, np.float32)
        for row, (_, _, _, places, values) in enumerate(self.rows):
            state[row, order[places[:, 0]]] = places[:, 1]
            figures[row, order[places[:, 0]]] = values
        return History(
            rounds=np.array([row[0] for row in self.rows], np.int64),
            sites=sites,
            loss=figures[..., 0],
            accuracy=figures[..., 1],
            state=state,
            scalars={name: np.array([row[2][name] for row in self.rows], np.float64) for name in _SCALARS},
            attempts=sum(row[1] for row in self.rows),
        )


def _sent(scalars: Mapping[str, float]) -> tuple[float, float]:
    """Return loss and accuracy; -1 says that a site did not send it."""
    loss, accuracy = (scalars.get(name, -1.0) for name in ("loss", "accuracy"))
    return loss if loss >= 0 else math.nan, accuracy if accuracy >= 0 else math.nan


def _failures(
    rounds: Iterable[tuple[int, int, list[dict[str, Any]]]], events: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Counter[str]], dict[str, str]]:
    """Count failures of the rounds that were completed, and of events what those do not hold."""
    counts: dict[str, Counter[str]] = {}
    reasons: dict[str, str] = {}
    seen = set()
    for number, attempt, out in rounds:
        for one in out:
            seen.add((number, attempt, one["site"]))
            counts.setdefault(one["site"], Counter())[one["why"]] += 1
            reasons[one["why"]] = one["reason"]
    for event in events:
        kind, site = event.get("event"), event.get("site")
        why = event.get("why") or kind
        if kind not in {"rejected", "late", "duplicate"} or not isinstance(site, str) or not isinstance(why, str):
            continue
        if kind == "rejected" and (event.get("round"), event.get("attempt"), site) in seen:
            continue
        counts.setdefault(site, Counter())[why] += 1
        reasons[why] = event.get("reason") or reasons.get(why, "")
    return {site: counts[site] for site in sorted(counts, key=natural)}, reasons


def _evaluations(recorded: Iterable[Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    merged: dict[tuple[int, str], Evaluation] = {}
    for line in recorded:
        key = line["round"], line.get("side", "test")
        figures = {site: _estimates(values) for site, values in line["sites"].items()}
        before = merged.pop(key, None)  # sites may be asked in several goes
        earlier, missing = (before.figures, before.out) if before else ({}, {})
        together = {**earlier, **figures}
        merged[key] = Evaluation(
            *key,
            {site: together[site] for site in sorted(together, key=natural)},
            {site: why for site, why in {**missing, **line.get("out", {})}.items() if site not in together},
            bool(line.get("best")),
        )
    return tuple(merged.values())


def _estimates(values: Mapping[str, float]) -> dict[tuple[str, str], Estimate]:
    out = {}
    for name, mean in values.items():
        pool, _, rest = name.partition(".")
        moment, _, kind = rest.partition(".")
        error = values.get(f"{pool}.{moment}.error", -1.0)
        if kind == "mean" and error >= 0:
            out[pool, moment] = Estimate(mean, error)
    return out
