"""Results as tables for people."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

from common.study import Study

__all__ = ["summary"]

Figures = Mapping[str, float]

_COLUMNS = {
    "before": "before",
    "after": "adapted",
    "scratch": "from scratch",
    "gain": "gain",
    "auroc": "AUROC",
    "ece": "ECE",
}


def summary(study: Study, scores: Mapping[str, Figures]) -> Table:
    """Return the table of an evaluation: every site before and after adaptation, and from scratch.

    Accuracy, and AUROC and expected calibration error of adapted theta, in per cent with the 95 % interval over
    meta-test episodes; the gain is the paired difference between adapted theta and training from scratch on the same
    support sets. A column that no site offers is left out.
    """
    offered = {name.split(".")[1] for figures in scores.values() for name in figures}
    columns = {figure: title for figure, title in _COLUMNS.items() if figure in offered}
    table = Table(
        title=f"{study.study.title}: {_task(study)}",
        caption="\n".join(_captions(study, scores, columns)),
        box=box.HORIZONTALS,
        pad_edge=False,
        collapse_padding=True,
    )
    for title in ("site", "classes", *columns.values()):
        name = title in {"site", "classes"}
        # In a narrow terminal figures take two lines, rather than lose their ends.
        table.add_column(title, justify="left" if name else "right", no_wrap=name)
    for site, figures in scores.items():
        held_out = site in study.sites.held_out_names
        for pool in ("known", "new"):
            if f"{pool}.after.mean" in figures:
                cells = [_cell(figures, pool, figure) for figure in columns]
                style = "bold" if held_out else None
                table.add_row(f"{site}{'*' if held_out else ''}", pool, *cells, style=style)
        table.add_section()
    return table


def _task(study: Study) -> str:
    spec = study.episodes
    if spec.labels == "fixed":
        return f"{len(spec.class_names)} diagnoses, {spec.shots} scans each"
    return f"{spec.ways} classes, {spec.shots} scans each"


def _captions(study: Study, scores: Mapping[str, Figures], columns: Mapping[str, str]) -> list[str]:
    lines = ["accuracy in %, 95 % intervals over episodes; * never took part in training"]
    if {"auroc", "ece"} & set(columns):
        lines.append("AUROC and ECE (expected calibration error, 10 bins) in %, of adapted theta")
    adapted = {site: figures["known.after.mean"] for site, figures in scores.items() if "known.after.mean" in figures}
    if len(adapted) > 1:
        worst = min(adapted, key=lambda site: adapted[site])
        lines.append(f"worst site: {worst}, {100 * adapted[worst]:.1f} % on known classes")
    return lines


def _cell(figures: Figures, pool: str, figure: str) -> str:
    if f"{pool}.{figure}.mean" not in figures:
        return "-"
    mean, error = (100 * figures[f"{pool}.{figure}.{part}"] for part in ("mean", "error"))
    sign = "+" if figure == "gain" else ""
    return f"{mean:{sign}.1f} ± {1.96 * error:.1f}"
