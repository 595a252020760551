"""The frontier as tables for people and as a tree for programs: means over seeds with 95 % intervals (Student t)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, isnan, nan
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from common.privacy.statement import rounded_up
from simulations.compare import Estimate, interval
from simulations.experiments.frontier import Plan, Run

__all__ = ["Row", "recalls", "rows", "table", "tree"]


@dataclass(frozen=True)
class Row:
    """One mechanism, learner, part and epsilon, over its seeds; shares are 0 to 1.

    Attributes
    ----------
    seeds : int
        How many.
    accuracy, balanced : Estimate
        At the sites that judge: the held-out ones, or all.
    cost : Estimate or None
        Balanced accuracy without a mechanism less this row's, paired by seed; None for the row itself.
    worst : tuple of (str, float)
        The site with the smallest mean of balanced accuracy, of all sites, and that mean.
    recall : dict of str to Estimate
        By class, at the sites that judge.
    auc : tuple of (str, float)
        The largest mean AUC of the attack over what patients do in a round, and for what.
    """

    mechanism: str
    learner: str
    part: str
    epsilon: float
    seeds: int
    noise: float
    spent: float
    numbers: int
    signal: float | None
    accuracy: Estimate
    balanced: Estimate
    cost: Estimate | None
    worst: tuple[str, float]
    recall: dict[str, Estimate]
    auc: tuple[str, float] | None
    bounds: list[float] | None
    broken: bool


def rows(done: Sequence[tuple[Plan, Run]]) -> list[Row]:
    """Return a row for every mechanism, learner, part and epsilon, in the order in which they were asked for."""
    groups: dict[tuple[str, str, str, float], list[tuple[Plan, Run]]] = {}
    for plan, run in done:
        groups.setdefault((plan.part, plan.learner, plan.mechanism, plan.epsilon), []).append((plan, run))
    free = {(p.part, p.learner, r.seed): _mean(p, r, "balanced") for p, r in done if p.epsilon == inf}
    out = [_row(group, free) for group in groups.values()]
    first = ("none", "no round")
    return sorted(out, key=lambda r: (r.part, r.learner, r.mechanism not in first, r.mechanism, -r.epsilon))


def _row(group: Sequence[tuple[Plan, Run]], free: dict[tuple[str, str, int], float]) -> Row:
    (plan, run), *_ = group
    costs = [free[key] - _mean(p, r, "balanced") for p, r in group if (key := (p.part, p.learner, r.seed)) in free]
    sites = {name: fmean(r.sites[name]["balanced"] for _, r in group) for name in run.sites}
    worst = min(sites, key=lambda name: sites[name])
    roles = {role for _, r in group for role in r.attack}
    areas = {role: fmean(r.attack[role]["auc"] for _, r in group if role in r.attack) for role in roles}
    auc = max(areas.items(), key=lambda item: item[1]) if areas else None
    return Row(
        plan.mechanism,
        plan.learner,
        plan.part,
        plan.epsilon,
        len(group),
        run.noise,
        inf if run.spent is None else run.spent,
        run.numbers,
        run.signal,
        _interval([_mean(p, r, "accuracy") for p, r in group]),
        _interval([_mean(p, r, "balanced") for p, r in group]),
        _interval(costs) if costs and plan.epsilon < inf else None,
        (worst, sites[worst]),
        {name: _interval([_recall(p, r, name) for p, r in group]) for name in _classes(group)},
        auc,
        run.bounds,
        any(figure["broken"] for _, r in group for figure in r.attack.values()),
    )


def _judges(plan: Plan, run: Run) -> list[dict[str, Any]]:
    names = plan.judged.sites.held_out_names or tuple(run.sites)
    return [run.sites[name] for name in names if name in run.sites]


def _mean(plan: Plan, run: Run, figure: str) -> float:
    return fmean(site[figure] for site in _judges(plan, run))


def _classes(group: Sequence[tuple[Plan, Run]]) -> Iterator[str]:
    plan, _ = group[0]
    for name in plan.judged.episodes.class_names:
        if all(any(name in site["recall"] for site in _judges(p, r)) for p, r in group):
            yield name


def _recall(plan: Plan, run: Run, name: str) -> float:
    return fmean(site["recall"][name] for site in _judges(plan, run) if name in site["recall"])


def _interval(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds and its interval, which one seed has not."""
    if len(values) == 1:
        return Estimate(values[0], nan)
    return interval([(value, 0.0) for value in values])


def table(found: Sequence[Row], title: str) -> Table:
    """Return the table of privacy, utility and attack."""
    out = Table(title=title, caption=_CAPTION, box=box.HORIZONTALS, pad_edge=False, collapse_padding=True)
    for name in ("part", "learner", "mechanism"):
        out.add_column(name, no_wrap=True)
    for name in ("epsilon", "noise", "signal/noise", "balanced %", "cost", "accuracy %", "worst site", "attack AUC"):
        out.add_column(name, justify="right")
    out.add_column("AUC at most: round, study", justify="right")
    for row in found:
        out.add_row(
            f"{row.part} ({row.numbers:,})",
            row.learner,
            row.mechanism,
            f"{row.epsilon:g} ({rounded_up(row.spent)})" if 0 < row.epsilon < inf else _epsilon(row),
            f"{row.noise:g}" if row.noise else "-",
            "-" if row.signal is None else f"{row.signal:.2g}",
            _words(row.balanced),
            "-" if row.cost is None else _words(row.cost),
            _words(row.accuracy),
            f"{row.worst[0]} {100 * row.worst[1]:.1f}",
            "-" if row.auc is None else f"{row.auc[1]:.2f}{' ABOVE' if row.broken else ''} {row.auc[0]}",
            "-" if row.bounds is None else "{:.2f}, {:.2f}".format(*row.bounds),
        )
    return out


_CAPTION = (
    "epsilon: asked for (spent), per patient over all rounds; signal/noise: at most, in the mean of the quorum; "
    "cost: points of balanced accuracy against no mechanism, paired by seed; "
    "AUC at most: of who is in a round by one answer, of who is in the data by all answers"
)


def recalls(found: Sequence[Row]) -> Table:
    """Return the table of every class's recall, in per cent."""
    classes = list(dict.fromkeys(name for row in found for name in row.recall))
    out = Table(title="recall by class, %", box=box.HORIZONTALS, pad_edge=False, collapse_padding=True)
    for name in ("part", "learner", "mechanism"):
        out.add_column(name, no_wrap=True)
    for name in ("epsilon", *classes):
        out.add_column(name, justify="right")
    for row in found:
        cells = [_words(row.recall[name]) if name in row.recall else "-" for name in classes]
        out.add_row(row.part, row.learner, row.mechanism, _epsilon(row), *cells)
    return out


def _epsilon(row: Row) -> str:
    return "∞" if row.epsilon == inf else f"{row.epsilon:g}"


def _words(estimate: Estimate) -> str:
    half = "" if isnan(estimate.half) else f" ± {100 * estimate.half:.1f}"
    return f"{100 * estimate.mean:.1f}{half}"


def tree(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON has them; what is infinite or has no interval is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not isfinite(value) else value

    return [plain(asdict(row)) for row in found]
