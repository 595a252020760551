"""Accuracy at the unseen site, against rounds and against what a site sends."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from server.files import write_atomic
from simulations.compare import Comparison

__all__ = ["draw_curves"]

_INK, _FAINT, _GRID = "#22313a", "#7b8990", "#e6eaec"

# Okabe and Ito's colours, told apart by colour-blind readers too; relatives share one and differ in their dashes.
_STYLES = {
    "maml": ("#0072b2", "-"),
    "fomaml": ("#0072b2", (0, (5, 1.5))),
    "anil": ("#56b4e9", "-"),
    "metasgd": ("#56b4e9", (0, (5, 1.5))),
    "protonet": ("#009e73", "-"),
    "protomaml": ("#009e73", (0, (5, 1.5))),
    "reptile": ("#cc79a7", "-"),
    "fedavg + fine-tuning": ("#d55e00", "-"),
    "fedprox + fine-tuning": ("#d55e00", (0, (5, 1.5))),
    "fedavg": ("#e69f00", "-"),
    "fedprox": ("#e69f00", (0, (5, 1.5))),
    "local-only": ("#4d4d4d", (0, (1, 1.5))),
}

_POOLS = {"known": "Known classes", "new": "New classes"}
_LINE = 0.16  # inches, height of a label


@dataclass(frozen=True)
class _Line:
    """One method: rounds, MB, and accuracy with its interval's half-width in per cent, ``[points]`` each."""

    name: str
    rounds: NDArray[np.float64]
    megabytes: NDArray[np.float64]
    mean: NDArray[np.float64]
    half: NDArray[np.float64]


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draw a comparison as a PNG: accuracy against rounds, and against MB sent up per site.

    One row of panels for known classes and one for new ones, as far as both were judged. Bands are 95 % intervals.
    An algorithm that sends nothing is a level line; an upright line is where the table compares, if not at the end.
    The axis of accuracy holds all lines; a band can go beyond.

    Parameters
    ----------
    comparison
        What `simulations.compare.compare` found.
    path
        Where to write. The file is complete or not there.
    """
    pools = comparison.pools
    longest = max(len(method.name) for method in comparison.methods)
    height = max(2.6, _LINE * len(comparison.methods) + 0.6)
    figure = Figure(figsize=(10.2 + 0.07 * longest, height * len(pools) + 1.15), dpi=150, layout="constrained")
    grid = figure.subplots(len(pools), 2, sharex="col", sharey="row", squeeze=False)
    for (left, right), pool in zip(grid, pools, strict=True):
        lines = _lines(comparison, pool)
        _draw(left, lines, [line.rounds for line in lines], comparison.study.study.rounds, "equal rounds")
        _draw(right, lines, [line.megabytes for line in lines], comparison.budget / 1e6, "equal bytes")
        _limit(left, lines)
        left.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        right.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        left.set_ylabel(f"{_POOLS[pool]}: accuracy (%)", color=_INK, fontsize=9)
        _label(right, lines, height)
    grid[-1][0].set_xlabel("rounds", color=_INK, fontsize=9)
    grid[-1][1].set_xlabel("MB sent up per site", color=_INK, fontsize=9)
    figure.suptitle(
        shorten(comparison.study.study.title, 90, placeholder="…"),
        color=_INK,
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
        parse_math=False,
    )
    figure.supxlabel(_caption(comparison), color=_FAINT, fontsize=8, x=0.01, ha="left", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _lines(comparison: Comparison, pool: str) -> list[_Line]:
    out = []
    for method in comparison.methods:
        curve = comparison.curve(method, pool)
        rounds, sent, mean, half = np.array([(r, b, e.mean, e.half) for r, b, e in curve], np.float64).T
        out.append(_Line(method.name, rounds, sent / 1e6, 100 * mean, 100 * half))
    return out


def _draw(axes: Axes, lines: Sequence[_Line], xs: Sequence[NDArray[np.float64]], judged: float, basis: str) -> None:
    """Draw the lines over rounds or MB; ``judged`` is where the table compares them, unless all end there."""
    end = max(float(x.max()) for x in xs) or 1.0
    for line, x in zip(lines, xs, strict=True):
        colour, dashes = _STYLES[line.name]
        level = len(x) == 1 and x[0] == 0  # nothing was ever sent
        at, mean, half = x, line.mean, line.half
        if level:
            at, mean, half = np.array([0.0, end]), mean.repeat(2), half.repeat(2)
        axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
        axes.plot(at, mean, color=colour, linestyle=dashes, linewidth=1.8)
        if len(at) == 1:  # a single evaluation has no band
            axes.errorbar(at, mean, half, color=colour, elinewidth=1.8)
        if not level:
            axes.plot(at[-1], mean[-1], "o", color=colour, markersize=4)
    if judged < 0.95 * end:
        axes.axvline(judged, color=_FAINT, linewidth=0.8)
        axes.annotate(
            basis, (judged, 1), (3, -2), ("data", "axes fraction"), "offset points", color=_FAINT, fontsize=8, va="top"
        )
    axes.set_xlim(0, 1.02 * end)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _limit(axes: Axes, lines: Sequence[_Line]) -> None:
    """Let the accuracies fill the axis: two seeds have bands wide enough to flatten every line."""
    means = np.concatenate([line.mean for line in lines])
    low, high = float(means.min()), float(means.max())
    room = max(0.08 * (high - low), 2.0)
    axes.set_ylim(max(low - room, 0), min(high + room, 101))


def _label(axes: Axes, lines: Sequence[_Line], height: float) -> None:
    """Name the lines beside the panel, in the order of their ends, with a leader to each.

    ``height`` is the panel's in inches.
    """
    low, high = axes.get_ylim()
    gap = _LINE * (high - low) / (height - 0.4)
    end = axes.get_xlim()[1]
    order = sorted(lines, key=lambda line: line.mean[-1])
    places = _spread([float(line.mean[-1]) for line in order], gap, low + gap / 2, high - gap / 2)
    for line, place in zip(order, places, strict=True):
        colour, dashes = _STYLES[line.name]
        last = end if line.megabytes[-1] == 0 else float(line.megabytes[-1])
        axes.plot(
            [last, 1.015 * end, 1.05 * end],
            [line.mean[-1], line.mean[-1], place],
            color=colour,
            linewidth=0.6,
            alpha=0.55,
            clip_on=False,
        )
        axes.plot(
            [1.05 * end, 1.105 * end], [place, place], color=colour, linestyle=dashes, linewidth=1.8, clip_on=False
        )
        axes.text(
            1.115 * end,
            place,
            f"{line.name}  {line.mean[-1]:.1f}",
            color=_INK,
            fontsize=8.5,
            va="center",
            parse_math=False,
        )
    axes.set_xlim(0, end)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending places apart to at least ``gap``, from ``low`` up and within ``high`` where they fit."""
    places = list(wanted)
    for _ in range(200):  # each pass takes out what the pass before pushed together
        for i in range(1, len(places)):
            if (short := gap - (places[i] - places[i - 1])) > 0:
                places[i - 1] -= short / 2
                places[i] += short / 2
        places = [max(place, low + i * gap) for i, place in enumerate(places)]
        places = [min(place, high - (len(places) - 1 - i) * gap) for i, place in enumerate(places)]
    return places


def _caption(comparison: Comparison) -> str:
    seeds = len(next(iter(comparison.runs.values())))
    spec = comparison.study.episodes
    ways = len(spec.class_names) if spec.labels == "fixed" else spec.ways
    spread = f"95 % intervals over {seeds} seeds" if seeds > 1 else "95 % intervals over episodes, one seed"
    who = "never trained" if comparison.study.sites.held_out_names else "patients that never trained"
    sites = shorten(", ".join(comparison.sites), 60, placeholder="…")
    return f"{sites} ({who}); {ways}-way {spec.shots}-shot; bands: {spread}; numbers: last evaluation."
