"""Balanced accuracy, and what an attack reached beside its bounds, against epsilon."""

import io
from collections.abc import Sequence
from math import inf, isnan
from pathlib import Path
from textwrap import shorten

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.files import write_atomic
from simulations.experiments.frontier_table import Row

__all__ = ["draw_frontier"]

_INK, _FAINT, _GRID = "#22313a", "#7b8990", "#e6eaec"
# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = {"episode-clip": "#d55e00", "patient-clip": "#0072b2"}
_DASHES = {"fomaml": "-", "maml": (0, (5, 1.5))}


def draw_frontier(found: Sequence[Row], path: Path, title: str) -> None:
    """Draw a PNG: a column of two panels for each part, utility above and the attack's AUC below.

    Bars are 95 % intervals over seeds. Level lines are the study without a mechanism, and its start without a round.
    Below, marks are what the attack reached, and lines what the guarantee leaves to a test of who was in a round.
    """
    parts = sorted({row.part for row in found})
    costs = sorted({row.epsilon for row in found if 0 < row.epsilon < inf})
    figure = Figure(figsize=(5.2 * len(parts) + 0.6, 6.4), dpi=110, layout="constrained")
    grid = figure.subplots(2, len(parts), sharey="row", squeeze=False, height_ratios=(3, 2))
    for (above, below), part in zip(grid.T, parts, strict=True):
        own = [row for row in found if row.part == part]
        _utility(above, own, costs)
        _attack(below, own, costs)
        numbers = own[0].numbers
        above.set_title(f"{part}: {numbers:,} numbers an answer", color=_INK, fontsize=10, loc="left")
        below.set_xlabel("epsilon of the study", color=_INK, fontsize=9)
        for axes in (above, below):
            axes.set_xticks(range(len(costs)), [f"{cost:g}" for cost in costs])
            axes.set_xlim(-0.4, len(costs) - 0.6)
            axes.grid(color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(_FAINT)
    grid[0][0].set_ylabel("balanced accuracy (%)", color=_INK, fontsize=9)
    grid[1][0].set_ylabel("AUC of the attack", color=_INK, fontsize=9)
    grid[0][-1].legend(frameon=False, fontsize=8, labelcolor=_INK)
    figure.suptitle(shorten(title, 90, placeholder="…"), color=_INK, fontsize=12, x=0.01, ha="left", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _lines(own: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    keys = dict.fromkeys((row.mechanism, row.learner) for row in own if 0 < row.epsilon < inf)
    return [
        (mechanism, learner, [row for row in own if (row.mechanism, row.learner) == (mechanism, learner)])
        for mechanism, learner in keys
    ]


def _utility(axes: Axes, own: Sequence[Row], costs: Sequence[float]) -> None:
    levels: dict[tuple[str, float], list[str]] = {}
    for row in own:
        if row.epsilon in {0.0, inf}:
            name = "no mechanism" if row.epsilon else "no round"
            levels.setdefault((name, 100 * row.balanced.mean), []).append(row.learner)
    for (name, level), learners in levels.items():
        dashes = _DASHES[learners[0]] if len(learners) == 1 else ":"
        axes.axhline(level, color=_FAINT, linestyle=dashes, linewidth=1.2)
        # At either end, or lines that are close would write over each other.
        end, side = (-0.37, "left") if learners[0] == "fomaml" else (len(costs) - 0.63, "right")
        words = name if len(learners) > 1 else f"{learners[0]}, {name}"
        axes.annotate(words, (end, level), (0, 2), textcoords="offset points", ha=side, color=_FAINT, fontsize=7.5)
    lines = _lines(own)
    for number, (mechanism, learner, group) in enumerate(lines):
        # Beside each other, or their bars would cover each other.
        at = [costs.index(row.epsilon) + 0.06 * (number - (len(lines) - 1) / 2) for row in group]
        half = [0.0 if isnan(row.balanced.half) else 100 * row.balanced.half for row in group]
        order = sorted(range(len(group)), key=lambda i: at[i])
        axes.errorbar(
            [at[i] for i in order],
            [100 * group[i].balanced.mean for i in order],
            [half[i] for i in order],
            color=_COLOURS[mechanism],
            linestyle=_DASHES[learner],
            marker="o",
            markersize=4,
            linewidth=1.8,
            capsize=3,
            label=f"{mechanism}, {learner}",
        )


def _attack(axes: Axes, own: Sequence[Row], costs: Sequence[float]) -> None:
    axes.axhline(0.5, color=_FAINT, linewidth=0.8, linestyle="--")
    if bounds := [row.bounds[0] for row in own if row.bounds]:
        end = (len(costs) - 1, max(bounds))
        axes.annotate("at most", end, (4, 0), textcoords="offset points", color=_FAINT, fontsize=7.5)
    for mechanism, learner, group in _lines(own):
        ordered = sorted((row for row in group if row.auc and row.bounds), key=lambda row: row.epsilon)
        at = [costs.index(row.epsilon) for row in ordered]
        axes.plot(at, [row.auc[1] for row in ordered if row.auc], "o", color=_COLOURS[mechanism], markersize=4)
        axes.plot(
            at,
            [row.bounds[0] for row in ordered if row.bounds],
            color=_COLOURS[mechanism],
            linestyle=_DASHES[learner],
            linewidth=1.0,
        )
    axes.set_ylim(0.3, 1.02)
