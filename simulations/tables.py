"""Results as tables for people."""

from collections.abc import Mapping

from rich.table import Table

from common.study import Study

__all__ = ["summary"]

Figures = Mapping[str, float]

_POOLS = {"known": "known classes", "new": "new classes"}


def summary(study: Study, scores: Mapping[str, Figures]) -> Table:
    """Return the table of an evaluation: every site before and after adaptation, and from scratch.

    Accuracy in per cent with the 95 % interval over meta-test episodes; the gain is the paired difference between
    adapted theta and training from scratch on the same support sets.
    """
    table = Table(title=f"{study.study.title}: {_task(study)}")
    for column in ("site", "task", "theta as it is", "adapted", "from scratch", "gain over scratch"):
        table.add_column(column, justify="left" if column in {"site", "task"} else "right")
    for site, figures in scores.items():
        held_out = site in study.sites.held_out_names
        for pool, words in _POOLS.items():
            if f"{pool}.after.mean" not in figures:
                continue
            cells = [_cell(figures, pool, moment) for moment in ("before", "after", "scratch", "gain")]
            name = f"{site} (never trained)" if held_out else site
            table.add_row(name, words, *cells, style="bold" if held_out else None)
        table.add_section()
    return table


def _task(study: Study) -> str:
    spec = study.episodes
    if spec.labels == "fixed":
        return f"{len(spec.class_names)} diagnoses, {spec.shots} scans of each to adapt on"
    return f"{spec.ways} classes, {spec.shots} scans of each to adapt on"


def _cell(figures: Figures, pool: str, moment: str) -> str:
    if f"{pool}.{moment}.mean" not in figures:
        return "-"
    mean, error = (100 * figures[f"{pool}.{moment}.{part}"] for part in ("mean", "error"))
    sign = "+" if moment == "gain" else ""
    return f"{mean:{sign}.1f} ± {1.96 * error:.1f}"


