"""Results as tables for people."""

from collections.abc import Mapping

from rich.table import Table

from common.study import Study

__all__ = ["summary"]

Figures = Mapping[str, float]


def summary(study: Study, scores: Mapping[str, Figures]) -> Table:
    """Return the table of an evaluation: every site before and after adaptation, and from scratch.

    Accuracy in per cent with the 95 % interval over meta-test episodes; the gain is the paired difference between
    adapted theta and training from scratch on the same support sets.
    """
    table = Table(
        title=f"{study.study.title}: {_task(study)}",
        caption="accuracy in %, 95 % intervals over episodes; * never took part in training",
    )
    for column in ("site", "classes", "before", "adapted", "from scratch", "gain"):
        table.add_column(column, justify="left" if column in {"site", "classes"} else "right", no_wrap=True)
    for site, figures in scores.items():
        held_out = site in study.sites.held_out_names
        for pool in ("known", "new"):
            if f"{pool}.after.mean" in figures:
                cells = [_cell(figures, pool, moment) for moment in ("before", "after", "scratch", "gain")]
                style = "bold" if held_out else None
                table.add_row(f"{site}{'*' if held_out else ''}", pool, *cells, style=style)
        table.add_section()
    return table


def _task(study: Study) -> str:
    spec = study.episodes
    if spec.labels == "fixed":
        return f"{len(spec.class_names)} diagnoses, {spec.shots} scans each"
    return f"{spec.ways} classes, {spec.shots} scans each"


def _cell(figures: Figures, pool: str, moment: str) -> str:
    if f"{pool}.{moment}.mean" not in figures:
        return "-"
    mean, error = (100 * figures[f"{pool}.{moment}.{part}"] for part in ("mean", "error"))
    sign = "+" if moment == "gain" else ""
    return f"{mean:{sign}.1f} ± {1.96 * error:.1f}"
