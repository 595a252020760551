"""What a theta is worth by support patients, and whether adapted probabilities mean what they say.

``python -m simulations.figures.adaptation PICTURE --by k1.jsonl --by k5.jsonl --reliable k10.jsonl`` draws what
`simulations.experiments.adapt` wrote.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from client.adapt.run import ADAPTED, SCRATCH, SIMPLE, UNADAPTED
from server.files import write_atomic
from simulations.experiments.adapt import half_width

__all__ = ["draw_adaptation", "main"]

_FIGURE = "balanced accuracy"
_INK, _FAINT, _GRID = "#22313a", "#7b8990", "#e6eaec"
# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = {ADAPTED: "#0072b2", UNADAPTED: "#56b4e9", SCRATCH: "#d55e00", SIMPLE: "#4d4d4d"}


def draw_adaptation(by: Sequence[dict[str, Any]], reliable: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a PNG: balanced accuracy of every method by K, and reliability of theta, adapted.

    Parameters
    ----------
    by, reliable : sequence
        Lines of `simulations.experiments.adapt`; those of any K, and those whose probabilities are looked at.
    """
    figure = Figure(figsize=(10.2, 4.0), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, colour in _COLOURS.items():
        own = [(line["shots"], 100 * line["methods"][name][_FIGURE]) for line in by if name in line["methods"]]
        if not own:
            continue
        shots = sorted({k for k, _ in own})
        values = [[value for k, value in own if k == at] for at in shots]
        half = [half_width(v) for v in values]
        mean = [float(np.mean(v)) for v in values]
        left.errorbar(shots, mean, half, color=colour, marker="o", markersize=4, linewidth=1.8, capsize=3, label=name)
    left.set_xticks(sorted({line["shots"] for line in by}))
    left.legend(frameon=False, fontsize=8, labelcolor=_INK)
    _label(left, "support patients of a class", "balanced accuracy (%)")
    for line in reliable:
        share, tops = np.array(line["methods"][ADAPTED]["tops"])
        right.plot(*_points(share, tops, np.array(line["methods"][ADAPTED]["gaps"])), color=_GRID, linewidth=0.8)
    tops, gaps = (np.mean([line["methods"][ADAPTED][what] for line in reliable], 0) for what in ("tops", "gaps"))
    right.plot([0, 100], [0, 100], color=_FAINT, linewidth=0.8, linestyle="--")
    right.plot(*_points(tops[0], tops[1], gaps), color=_COLOURS[ADAPTED], marker="o", markersize=4, linewidth=1.8)
    right.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    shown = sorted({line["shots"] for line in reliable})
    _label(right, f"probability of the top class (%), K = {', '.join(map(str, shown))}", "how often it is right (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _points(share: Any, tops: Any, gaps: Any) -> tuple[Any, Any]:
    """Return mean probability and share of right answers, in per cent, of the bins that hold anything."""
    held = share > 0
    return 100 * tops[held] / share[held], 100 * (tops + gaps)[held] / share[held]


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def main(
    picture: Annotated[Path, typer.Argument(help="PNG to write.")],
    by: Annotated[list[Path], typer.Option(help="Files of draws, of any K.")],
    reliable: Annotated[Path, typer.Option(help="File of draws whose probabilities are looked at.")],
) -> None:
    """Draw the picture."""
    draw_adaptation([line for path in by for line in _read(path)], _read(reliable), picture)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    typer.run(main)
