"""One picture of a partition: who has what."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from common.errors import DataError

__all__ = ["draw_partition"]

_INK, _FAINT, _BAR, _EMPTY = "#22313a", "#7b8990", "#7fb3b8", "#f3f5f6"
_SHADES = LinearSegmentedColormap.from_list(
    "partition", ["#dcefee", "#8fc6c8", "#3a8fa0", "#1b5a78", "#123150"]
).with_extremes(bad=_EMPTY)
_READABLE = 24  # rows or columns up to which every cell can show its number
_LETTER = 0.085  # inches, width of a letter in a column's name


def draw_partition(
    counts: NDArray[np.int64],
    site_names: Sequence[str],
    label_names: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw how many images of every class each site has, as a PNG.

    A row is a site, a column a class. A cell is the darker, on a log scale, the more images it has, and stays
    empty without any, so that a missing class is seen at once. Bars at the top and right are the sums.

    Parameters
    ----------
    counts
        Number of images, ``[sites, classes]``.
    site_names, label_names
        Names of the rows and columns.
    path
        Where to write. The file is complete or not there.
    title
        Headline: set, partition and its parameter.

    Raises
    ------
    DataError
        If the counts are negative, all zero, or do not fit the names.
    """
    if counts.shape != (len(site_names), len(label_names)) or counts.min(initial=0) < 0 or not counts.any():
        raise DataError(
            f"counts {list(counts.shape)} do not fit {len(site_names)} sites and {len(label_names)} classes, "
            "or are negative or all zero; count the images of a partition first."
        )
    n_sites, n_classes = counts.shape
    width, height = float(np.clip(0.62 * n_classes, 2.8, 12)), float(np.clip(0.42 * n_sites, 1.2, 11))
    title = shorten(title, 120, placeholder="…")
    figure = Figure(
        figsize=(max(width + 3.4, 0.11 * len(title) + 0.6), height + 3),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0, hspace=0),
    )
    grid = figure.add_gridspec(2, 2, width_ratios=(width, 1.4), height_ratios=(0.8, height))
    cells = figure.add_subplot(grid[1, 0])
    _draw_cells(cells, counts)
    _label_axes(cells, site_names, label_names, width / n_classes)
    by_class = figure.add_subplot(grid[0, 0], sharex=cells)
    by_site = figure.add_subplot(grid[1, 1], sharey=cells)
    _finish_sums(by_class, by_class.bar(np.arange(n_classes), counts.sum(axis=0), width=0.72, color=_BAR))
    _finish_sums(by_site, by_site.barh(np.arange(n_sites), counts.sum(axis=1), height=0.72, color=_BAR))
    by_class.margins(y=0.25)  # room for the numbers
    by_site.margins(x=0.35)
    by_class.set_title(f"{counts.sum():,} images", color=_FAINT, fontsize=8.5, loc="left")
    figure.suptitle(title, color=_INK, fontsize=12, fontweight="bold", parse_math=False)
    _write(figure, path)


def _draw_cells(axes: Axes, counts: NDArray[np.int64]) -> None:
    n_sites, n_classes = counts.shape
    most = max(int(counts.max()), 2)
    roomy = max(counts.shape) <= _READABLE
    axes.pcolormesh(
        np.arange(n_classes + 1) - 0.5,
        np.arange(n_sites + 1) - 0.5,
        np.ma.masked_equal(counts, 0),
        cmap=_SHADES,
        norm=LogNorm(1, most),
        edgecolor="white",
        linewidth=1.5 if roomy else 0.3,
    )
    axes.set(xlim=(-0.5, n_classes - 0.5), ylim=(n_sites - 0.5, -0.5))
    if roomy:
        for site, label in np.argwhere(counts):
            count = int(counts[site, label])
            colour = "white" if np.log(count) > 0.42 * np.log(most) else _INK
            axes.text(label, site, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)


def _label_axes(axes: Axes, site_names: Sequence[str], label_names: Sequence[str], column_width: float) -> None:
    """Name rows and columns; ``column_width`` in inches."""
    # Beyond what fits, every k-th name: a thinned axis reads better than one with overlapping names.
    rows = range(0, len(site_names), max(1, round(len(site_names) / 48)))
    columns = range(0, len(label_names), max(1, round(len(label_names) / 48)))
    axes.set_yticks(rows, [_short(site_names[k]) for k in rows], parse_math=False)
    axes.set_xticks(columns, [_short(label_names[k]) for k in columns], parse_math=False)
    if max(map(len, label_names)) * _LETTER > column_width:
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
    axes.set_xlabel("class", color=_FAINT, fontsize=8.5)
    axes.set_ylabel("site", color=_FAINT, fontsize=8.5)
    axes.spines[:].set_visible(False)


def _finish_sums(axes: Axes, bars: BarContainer) -> None:
    if len(bars) <= _READABLE:
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8, color=_INK)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= 32 else name[:31].rstrip() + "…"


def _write(figure: Figure, path: Path) -> None:
    """Write the file under another name first, so that nobody sees half a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(buffer.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
