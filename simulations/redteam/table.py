"""The red team's results as a table for people and as a tree for programs."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from common.errors import explain
from simulations.redteam.figures import Figure
from simulations.redteam.team import Result
from simulations.redteam.tricks import Trick

__all__ = ["as_tree", "outcome", "promised", "table", "tricks_table", "words"]


def table(results: list[Result]) -> Table:
    """Return a line for every attack on every run: figure, its one-sided 95 % limits, and the bound."""
    out = Table(title="What attacks on answers and on theta reach: figure [95 % limits] < bound of the guarantee")
    for name in ("setting", "defence", "attack", "on"):
        out.add_column(name)
    out.add_column("figures")
    for result in results:
        ranks = result.ranks
        out.add_row(result.setting, result.defence, "guarantee", "all rounds", promised(result))
        about = (
            f"equal in {ranks.equal} of {ranks.releases} (median {ranks.median_rank:g}, images {ranks.median_seen:g})"
        )
        out.add_row("", "", "rank", "first layer", about)
        for row in result.rows:
            figures = "\n".join(f"{figure.name} {words(figure)}" for figure in row.figures)
            out.add_row("", "", row.attack, row.target, figures, end_section=row is result.rows[-1])
    return out


def tricks_table(tricks: Sequence[Trick]) -> Table:
    """Return a line for every trick of a malicious coordinator: what came back."""
    out = Table(title="What a malicious coordinator is answered, before any data are opened")
    for name in ("it sends", "answer"):
        out.add_column(name)
    for trick in tricks:
        out.add_row(trick.name, outcome(trick))
    return out


def outcome(trick: Trick) -> str:
    """Return what came back in words."""
    if not trick.code:
        return "answered" if trick.refused else "ANSWERED"
    return f"{'refused' if trick.refused else 'REFUSED OTHERWISE'}: code {trick.code}, {explain(trick.code)}"


def words(figure: Figure) -> str:
    """Return a figure with its limits and, where there is one, its bound."""
    bound = "" if figure.bound is None else f" {'ABOVE' if figure.broken else '<'} {figure.bound:.3f}"
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]{bound}"


def promised(result: Result) -> str:
    """Return a run's guarantee over all its rounds, and the two bounds that attacks have by it."""
    if result.areas is None:
        return result.guarantee
    round_area, study_area = result.areas
    return (
        f"{result.guarantee}: the AUC of a test of who is in the data, by all answers or theta, is {study_area:.3f} at "
        f"most; of who is in a round, by one answer, {round_area:.3f}"
    )


def as_tree(result: Result) -> dict[str, Any]:
    """Return a result as JSON has it, without the pictures."""
    tree = asdict(replace(result, pictures=()))
    del tree["pictures"]
    return {**tree, "broken": result.broken}
