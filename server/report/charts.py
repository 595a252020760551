"""The report's drawings: what is drawn of a run, and how much of it where there is too much."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from server.report.facts import STATES, Estimate, Evaluation, Facts, History
from server.report.svg import FAINT, INK, PALETTE, Band, Line, Scale, legend, plot, shortened, svg, text, ticks
from server.runs import natural

__all__ = [
    "CELLS",
    "WIDTH",
    "bytes_chart",
    "evaluations_chart",
    "figures_chart",
    "learning_chart",
    "roster_chart",
    "seconds_chart",
    "smoothing",
    "worst_chart",
]

Values = NDArray[np.floating]

#: Width of a drawing in its own units; two beside each other have half of it.
WIDTH, _HALF = 760.0, 372.0
#: Points of a line, of a line among many, bars, cells of a row of the roster, and its rows.
_POINTS, _FEW, _BARS, CELLS, _ROWS = 240, 80, 75, 250, 40
#: Sites that have a colour each; more are grey, with the best and the worst named.
_COLOURS = 7

#: What a site was in a round, its colour and its name; colours first of what is drawn last.
ROSTER: Mapping[str, tuple[str, str]] = {
    "in": ("#c3ced6", "reply counted"),
    "idle": ("#eef1f3", "not drawn this round"),
    "resting": ("#56b4e9", "resting after failures"),
    "silent": ("#e69f00", "no reply"),
    "error": ("#cc79a7", "error at the site"),
    "refused": ("#d55e00", "reply refused"),
}
_PARTS = {"compute_seconds": "#0072b2", "transport_seconds": "#56b4e9", "waiting_seconds": "#e69f00"}


def learning_chart(facts: Facts, figure: str) -> str:
    """Return the curves of the training sites: query ``loss`` or ``accuracy``, smoothed."""
    history = facts.history
    values: Values = getattr(history, figure)
    many = len(history.sites) > _COLOURS
    x, means = _binned(history.rounds, _smooth(values), _FEW if many else _POINTS)
    lines: list[Line] = []
    if many:
        lines.append(_all_in_one(x, means))
        lines.append(Line(x, _mean(means), INK, "mean", 2.2))
        ends = {column: _last(means[:, column]) for column in range(means.shape[1])}
        ranked = sorted((c for c in ends if math.isfinite(ends[c])), key=lambda c: ends[c], reverse=figure == "loss")
        for colour, column in zip((PALETTE[1], PALETTE[0]), (ranked[0], ranked[-1]), strict=True):
            lines.append(Line(x, means[:, column], colour, history.sites[column]))
    else:
        raw_x, raw = _binned(history.rounds, values, _POINTS)
        for column, site in enumerate(history.sites):
            colour = PALETTE[column]
            lines.append(Line(raw_x, raw[:, column], colour, width=0.8, opacity=0.3))
            lines.append(Line(x, means[:, column], colour, site))
    return plot(lines, label=f"{figure} of each site over the rounds", width=_HALF, percent=figure == "accuracy")


def worst_chart(history: History) -> str:
    """Return the mean accuracy and that of the site that is worst at each moment, smoothed."""
    x, means = _binned(history.rounds, _smooth(history.accuracy), _POINTS)
    mean, worst = _mean(means), _reduced(np.nanmin, means)
    lines = [Line(x, mean, INK, "mean", 2.0), Line(x, worst, PALETTE[1], "worst site", 2.0)]
    return plot(lines, [Band(x, worst, mean, PALETTE[1])], label="mean and worst accuracy", width=WIDTH, percent=True)


def evaluations_chart(evaluations: Sequence[Evaluation], sites: Sequence[str]) -> str:
    """Return accuracy after adaptation over the evaluations on the way: mean, with its interval, and worst site."""
    ordered = sorted(evaluations, key=lambda e: e.round)
    x = np.array([e.round for e in ordered], np.float64)
    means = [e.mean(sites, "known", "after") for e in ordered]
    lows = [
        min(
            (f["known", "after"].mean for s in sites if ("known", "after") in (f := e.figures.get(s, {}))), default=None
        )
        for e in ordered
    ]
    mean = np.array([m.mean if m else np.nan for m in means])
    half = np.array([m.half if m else np.nan for m in means])
    worst = np.array([np.nan if low is None else low for low in lows])
    lines = [Line(x, mean, INK, "mean", 2.0, dots=True)]
    if len(sites) > 1:
        lines.append(Line(x, worst, PALETTE[1], "worst site", 1.6, dots=True))
    band = Band(x, mean - half, mean + half, INK)
    return plot(lines, [band], label="accuracy after adaptation, evaluation by evaluation", width=WIDTH, percent=True)


def bytes_chart(history: History) -> str:
    """Return megabytes up and down per round."""
    both = np.stack([history.scalars["bytes_up"], history.scalars["bytes_down"]], 1) / 1e6
    x, means = _binned(history.rounds, both, _POINTS)
    lines = [Line(x, means[:, 1], PALETTE[5], "down"), Line(x, means[:, 0], PALETTE[0], "up")]
    return plot(lines, label="megabytes per round, up and down", width=_HALF, height=190, zero=True)


def seconds_chart(history: History) -> str:
    """Return the seconds of a round as bars of computing, transport and waiting."""
    parts = np.nan_to_num(np.stack([history.scalars[name] for name in _PARTS], 1))
    x, means = _binned(history.rounds, parts, _BARS)
    width, height = _HALF, 190.0
    marks = ticks(0, float(means.sum(1).max()) or 1.0)
    y = Scale(0, marks[-1], height - 34, 10)
    place = Scale(-0.5, len(x) - 0.5, 40, width - 10)
    bar = (place.end - place.start) / len(x)
    drawn = [f'<path d="M40 {y(m):.1f}H{width - 10:.1f}" stroke="#e4e6e8"/>' for m in marks]
    drawn += [text(34, y(m) + 4, f"{m:g}", anchor="end") for m in marks]
    base = np.zeros(len(x))
    for column, colour in enumerate(_PARTS.values()):
        top = base + means[:, column]
        shape = "".join(
            f"M{place(k) - 0.42 * bar:.1f} {y(base[k]):.1f}V{y(top[k]):.1f}h{0.84 * bar:.2f}V{y(base[k]):.1f}z"
            for k in range(len(x))
            if top[k] > base[k]
        )
        drawn.append(f'<path d="{shape}" fill="{colour}"/>')
        base = top
    for k in sorted({0, len(x) // 2, len(x) - 1}):
        drawn.append(text(place(k), height - 18, f"{x[k]:,.0f}", anchor="middle"))
    drawn.append(text(width / 2, height - 3, "round", anchor="middle"))
    names = [(colour, name.removesuffix("_seconds")) for name, colour in _PARTS.items()]
    return svg(width, height, "seconds per round in computing, transport and waiting", drawn) + legend(names)


def roster_chart(history: History) -> str:
    """Return one row a site: what it was in each round; where a cell holds several rounds, their shares."""
    shares = _shares(history.state)  # [S, states, cells]
    trouble = [float(shares[s, 1:].sum()) for s in range(len(history.sites))]
    order = sorted(range(len(history.sites)), key=lambda s: natural(history.sites[s]))
    rows = [(history.sites[s], shares[s]) for s in order]
    if len(order) > _ROWS:  # those with the most absences; the others as one
        most = set(sorted(order, key=lambda s: -trouble[s])[: _ROWS - 1])
        others = [s for s in order if s not in most]
        rows = [(history.sites[s], shares[s]) for s in order if s in most]
        rows.append((f"{len(others)} other sites", shares[others].mean(0)))
    longest = max(len(shortened(name)) for name, _ in rows)
    left, pitch = 14 + 6.1 * longest, 18.0
    cells = shares.shape[2]
    x = Scale(0, cells, left, WIDTH - 10)
    drawn = []
    for row, (name, parts) in enumerate(rows):
        top = 4 + row * pitch
        drawn.append(text(left - 8, top + 11, shortened(name), anchor="end", colour=INK))
        drawn.append(_row(parts, x, top, pitch - 4))
    bottom = 4 + len(rows) * pitch
    first, last = int(history.rounds[0]), int(history.rounds[-1])
    whole = [m for m in ticks(first, last, 6) if first <= m <= last and m == round(m)]
    at = Scale(first - 0.5, last + 0.5, left, WIDTH - 10)
    drawn += [text(at(mark), bottom + 12, f"{mark:,.0f}", anchor="middle") for mark in whole]
    drawn.append(text((left + WIDTH - 10) / 2, bottom + 27, "round", anchor="middle"))
    present = [state for k, state in enumerate(STATES) if (history.state == k).any()]
    key = legend([ROSTER[state] for state in ROSTER if state in present])
    return svg(WIDTH, bottom + 32, "who was in and who was out in each round", drawn) + key


def _row(shares: Values, x: Scale, top: float, height: float) -> str:
    """Return a row: cells of equal shares run together, what went wrong is at the bottom."""
    out = []
    base = np.zeros(shares.shape[1])
    for state in reversed([*ROSTER]):
        share = shares[STATES.index(state)]
        shape = []
        start = 0
        for cell in range(1, shares.shape[1] + 1):
            same = cell < shares.shape[1] and share[cell] == share[start] and base[cell] == base[start]
            if same:
                continue
            if share[start] > 0:
                foot = top + height * (1 - base[start])
                shape.append(f"M{x(start):.1f} {foot:.1f}H{x(cell):.1f}v{-height * share[start]:.1f}H{x(start):.1f}z")
            start = cell
        if shape:
            outline = ' stroke="#dfe3e6" stroke-width=".5"' if state == "idle" else ""
            out.append(f'<path d="{"".join(shape)}" fill="{ROSTER[state][0]}"{outline}/>')
        base = base + share
    return "".join(out)


def _shares(state: NDArray[np.int8]) -> Values:
    """Return the share of each state in each cell ``[S, states, cells]``, rounded up to quarters: all can be seen."""
    rounds, sites = state.shape
    edges = np.linspace(0, rounds, (rounds if rounds <= 2 * CELLS else CELLS) + 1).astype(int)
    sizes = np.diff(edges)
    out = np.zeros((sites, len(STATES), len(sizes)))
    for k in range(len(STATES)):
        counts = np.add.reduceat(state == k, edges[:-1], axis=0).T
        out[:, k] = np.ceil(4 * counts / sizes) / 4
    # Rounding up can give more than a whole: the replies that counted make room.
    over = np.maximum(out.sum(1) - 1, 0)
    for k in (STATES.index("in"), STATES.index("idle"), STATES.index("resting")):
        give = np.minimum(over, out[:, k])
        out[:, k] -= give
        over -= give
    return out


def figures_chart(evaluation: Evaluation, sites: Sequence[str], pool: str, held_out: Sequence[str]) -> str:
    """Return accuracy at each site with 95 % intervals: before and after adaptation, and from scratch."""
    shown = [site for site in sites if (pool, "after") in evaluation.figures[site]]
    styles = {"after": (PALETTE[0], "adapted"), "scratch": (PALETTE[1], "from scratch"), "before": (FAINT, "before")}
    found = {(s, m): e for s in shown for m in styles if (e := evaluation.figures[s].get((pool, m)))}
    low = 100 * min(e.low for e in found.values())
    high = 100 * max(e.high for e in found.values())
    marks = ticks(max(low, 0), min(high, 100), 6)
    longest = max(len(shortened(site)) for site in shown) + 2
    left, pitch = 14 + 6.1 * longest, 30.0
    x = Scale(marks[0], marks[-1], left, WIDTH - 16)
    bottom = 6 + len(shown) * pitch
    drawn = [f'<path d="M{x(m):.1f} 4V{bottom:.1f}" stroke="#e4e6e8"/>' for m in marks]
    for row, site in enumerate(shown):
        middle = 6 + (row + 0.5) * pitch
        if row:
            drawn.append(f'<path d="M0 {middle - pitch / 2:.1f}H{WIDTH:g}" stroke="#e4e6e8"/>')
        unseen = site in held_out
        drawn.append(
            text(
                left - 10, middle + 4, shortened(site) + (" *" if unseen else ""), anchor="end", colour=INK, bold=unseen
            )
        )
        for k, moment in enumerate(styles):
            if estimate := found.get((site, moment)):
                drawn.append(_interval(estimate, x, middle + 7 * (k - 1), styles[moment][0], full=moment == "after"))
    drawn += [text(x(m), bottom + 14, f"{m:g}", anchor="middle") for m in marks]
    drawn.append(text((left + WIDTH) / 2, bottom + 29, "accuracy, %", anchor="middle"))
    there = [styles[m] for m in styles if any(moment == m for _, moment in found)]
    return svg(WIDTH, bottom + 34, "accuracy at each site with 95 % intervals", drawn) + legend(there)


def _interval(estimate: Estimate, x: Scale, y: float, colour: str, *, full: bool) -> str:
    low, high = (min(max(100 * v, x.low), x.high) for v in (estimate.low, estimate.high))
    fill = colour if full else "#fff"
    return (
        f'<path d="M{x(low):.1f} {y:.1f}H{x(high):.1f}" stroke="{colour}" stroke-width="1.4"/>'
        f'<circle cx="{x(100 * estimate.mean):.1f}" cy="{y:.1f}" r="{3.2 if full else 2.6}" fill="{fill}" '
        f'stroke="{colour}" stroke-width="1.3"/>'
    )


def smoothing(rounds: int) -> int:
    """Return over how many rounds curves are smoothed."""
    return max(1, rounds // 15) | 1


def _smooth(values: Values) -> Values:
    """Return centred moving means ``[R, S]``, over the rounds in which there is a value."""
    half = smoothing(len(values)) // 2
    if not half:
        return values
    known = np.isfinite(values)
    sums = np.vstack([np.zeros((1, values.shape[1])), np.cumsum(np.where(known, values, 0.0), 0, np.float64)])
    counts = np.vstack([np.zeros((1, values.shape[1]), np.int64), np.cumsum(known, 0)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return np.where(number > 0, means, np.nan)


def _binned(rounds: NDArray[np.int64], values: Values, most: int) -> tuple[Values, Values]:
    """Return means over runs of rounds so that no more than ``most`` points are left: ``[P]`` and ``[P, S]``."""
    edges = np.linspace(0, len(rounds), min(len(rounds), most) + 1).astype(int)[:-1]
    known = np.isfinite(values)
    counts = np.add.reduceat(known, edges, axis=0)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges, axis=0, dtype=np.float64)
    sizes = np.diff([*edges, len(rounds)])
    x = np.add.reduceat(rounds, edges) / sizes
    return x, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _mean(values: Values) -> Values:
    return _reduced(np.nanmean, values)


def _reduced(function: np.ufunc | object, values: Values) -> Values:
    """Reduce over sites, where there is any value."""
    out = np.full(len(values), np.nan)
    some = np.isfinite(values).any(1)
    if some.any():
        out[some] = function(values[some], axis=1)  # type: ignore[operator]
    return out


def _all_in_one(x: Values, values: Values) -> Line:
    """Return all sites' curves as one line with gaps."""
    gap = np.array([np.nan])
    columns = [np.concatenate([values[:, c], gap]) for c in range(values.shape[1])]
    return Line(
        np.tile(np.concatenate([x, x[-1:]]), len(columns)), np.concatenate(columns), "#9aa0a6", width=0.7, opacity=0.5
    )


def _last(values: Values) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan
