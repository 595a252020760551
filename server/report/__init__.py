"""What a run leaves for people: one page that can be read on paper, and a model card."""

from pathlib import Path

from server.files import write_atomic
from server.report.card import card
from server.report.facts import read_facts
from server.report.page import render

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``model-card.md`` into a run's folder, from what it holds now.

    The run may be at any point, finished or not. The same folder gives the same bytes.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    StudyError
        The folder's ``study.json`` is damaged, or another version's.
    """
    facts = read_facts(folder)
    out = folder / "report.html"
    write_atomic(folder / "model-card.md", card(facts).encode())
    write_atomic(out, render(facts).encode())
    return out
