"""The red team's results as a table for people and as a tree for programs."""

from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from simulations.redteam.figures import Figure
from simulations.redteam.team import Result

__all__ = ["as_tree", "table", "words"]


def table(results: list[Result]) -> Table:
    """Return a line for every attack on every run: figure, its one-sided 95 % limits, and the bound."""
    out = Table(title="What attacks on the recorded messages reach: figure [95 % limits] < bound of the guarantee")
    for name in ("setting", "defence", "attack", "on"):
        out.add_column(name)
    out.add_column("figures")
    for result in results:
        ranks = result.ranks
        about = (
            f"equal in {ranks.equal} of {ranks.releases} (median {ranks.median_rank:g}, images {ranks.median_seen:g})"
        )
        out.add_row(result.setting, result.defence, "rank", "first layer", about)
        for row in result.rows:
            figures = "\n".join(f"{figure.name} {words(figure)}" for figure in row.figures)
            out.add_row("", "", row.attack, row.target, figures, end_section=row is result.rows[-1])
    return out


def words(figure: Figure) -> str:
    """Return a figure with its limits and, where there is one, its bound."""
    bound = "" if figure.bound is None else f" {'ABOVE' if figure.broken else '<'} {figure.bound:.3f}"
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]{bound}"


def as_tree(result: Result) -> dict[str, Any]:
    """Return a result as JSON has it, without the pictures."""
    tree = asdict(replace(result, pictures=()))
    del tree["pictures"]
    return {**tree, "broken": result.broken}
