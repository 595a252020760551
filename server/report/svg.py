"""Plots as SVG, drawn by hand: small, sharp on paper, and nothing has to be loaded."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from server.runs import printable

__all__ = ["FAINT", "INK", "PALETTE", "Band", "Line", "Scale", "legend", "plot", "spread", "svg", "text", "ticks"]

INK, FAINT, _GRID = "#1a1a1a", "#5f6368", "#e4e6e8"
#: Okabe and Ito's colours, told apart by colour-blind readers too, darkest first.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#1a1a1a")

#: Text in a drawing, in its units, and about how wide a character is.
_FONT, _CHARACTER = 11.0, 6.1
_LABEL = 22  # characters of a name in a drawing

Values = NDArray[np.floating]


@dataclass(frozen=True)
class Line:
    """A line; ``name`` is written at its end. NaN makes a gap."""

    x: Values
    y: Values
    colour: str = INK
    name: str = ""
    width: float = 1.7
    opacity: float = 1.0
    dash: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """An area between two lines."""

    x: Values
    low: Values
    high: Values
    colour: str


@dataclass(frozen=True)
class Scale:
    """Maps values to places in a drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """Return a drawing; ``label`` says what it shows to whoever cannot see it."""
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(printable(label))}">'
    return head + "".join(parts) + "</svg>"


def text(x: float, y: float, words: object, *, anchor: str = "start", colour: str = FAINT, bold: bool = False) -> str:
    """Return one line of text at the left, the middle or the right of a place."""
    more = (f' text-anchor="{anchor}"' if anchor != "start" else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{more}>{escape(printable(words))}</text>'


def shortened(name: str) -> str:
    return name if len(name) <= _LABEL else name[: _LABEL - 1] + "…"


def plot(
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    label: str,
    width: float,
    height: float = 220,
    percent: bool = False,
    zero: bool = False,
    x_label: str = "round",
) -> str:
    """Return a line plot with names at the ends of lines.

    Parameters
    ----------
    percent : bool
        Values are shares, shown in per cent.
    zero : bool
        The vertical axis begins at zero.
    """
    factor = 100.0 if percent else 1.0
    xs = np.concatenate([line.x for line in lines])
    ys = factor * np.concatenate([*(line.y for line in lines), *(edge for b in bands for edge in (b.low, b.high))])
    ys = ys[np.isfinite(ys)]
    low, high = (float(ys.min()), float(ys.max())) if ys.size else (0.0, 1.0)
    low = 0.0 if zero else low
    marks = ticks(low, high)
    named = [line for line in lines if line.name]
    right = 12 + max((_CHARACTER * len(shortened(line.name)) for line in named), default=0)
    left = 10 + _CHARACTER * max(len(_number(mark)) for mark in marks)
    first, last = float(xs.min()), float(xs.max())
    room = 0.5 if last == first else 0.0
    x = Scale(first - room, last + room, left, width - right)
    y = Scale(min(marks[0], low), max(marks[-1], high), height - 34, 10)
    parts = [_axes(x, y, marks, x_label)]
    parts += [_area(band, x, y, factor) for band in bands]
    parts += [_path(line, x, y, factor) for line in lines]
    parts += _names(named, x, y, factor)
    return svg(width, height, label, parts)


def _axes(x: Scale, y: Scale, marks: Sequence[float], x_label: str) -> str:
    parts = []
    for mark in marks:
        at = y(mark)
        parts.append(f'<path d="M{x.start:.1f} {at:.1f}H{x.end:.1f}" stroke="{_GRID}"/>')
        parts.append(text(x.start - 6, at + 4, _number(mark), anchor="end"))
    whole = [mark for mark in ticks(x.low, x.high, 5) if x.low <= mark <= x.high and mark == round(mark)]
    parts += [text(x(mark), y.start + 16, _number(mark), anchor="middle") for mark in whole]
    parts.append(f'<path d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}" stroke="{FAINT}"/>')
    parts.append(text((x.start + x.end) / 2, y.start + 31, x_label, anchor="middle"))
    return "".join(parts)


def _path(line: Line, x: Scale, y: Scale, factor: float) -> str:
    points, dots, on = [], [], False
    for at, value in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(value):
            on = False
            continue
        place = f"{x(at):.1f} {y(factor * value):.1f}"
        points.append(f"{'L' if on else 'M'}{place}")
        dots.append(place)
        on = True
    more = f' opacity="{line.opacity:g}"' if line.opacity < 1 else ""
    more += f' stroke-dasharray="{line.dash}"' if line.dash else ""
    drawn = f'<path d="{"".join(points)}" fill="none" stroke="{line.colour}" stroke-width="{line.width:g}"{more}/>'
    if not line.dots:  # a point without neighbours would be no line
        ends = [*points[1:], "M"][: len(points)]
        dots = [point[1:] for point, after in zip(points, ends, strict=True) if point[0] == after[0] == "M"]
    if dots:
        wide = f'd="{"".join(f"M{place}h.01" for place in dots)}" stroke-width="{line.width + 3:g}"{more}'
        drawn += f'<path {wide} stroke="{line.colour}"/>'
    return drawn


def _area(band: Band, x: Scale, y: Scale, factor: float) -> str:
    known = np.isfinite(band.low) & np.isfinite(band.high)
    there = [f"{x(a):.1f} {y(factor * b):.1f}" for a, b in zip(band.x[known], band.high[known], strict=True)]
    back = [f"{x(a):.1f} {y(factor * b):.1f}" for a, b in zip(band.x[known], band.low[known], strict=True)]
    return f'<path d="M{"L".join(there + back[::-1])}Z" fill="{band.colour}" opacity=".16"/>' if there else ""


def _names(lines: Sequence[Line], x: Scale, y: Scale, factor: float) -> list[str]:
    ends = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.y))
        if known.size:
            ends.append((y(factor * float(line.y[known[-1]])), line))
    ends.sort(key=lambda end: end[0])
    places = spread([at for at, _ in ends], _FONT + 2, y.end, y.start)
    return [
        text(x.end + 7, place + 4, shortened(line.name), colour=line.colour)
        for place, (_, line) in zip(places, ends, strict=True)
    ]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending places apart to at least ``gap``, within ``low`` and ``high`` where they fit."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap if places else low))
    limit = high
    for k in range(len(places) - 1, -1, -1):
        places[k] = min(places[k], limit)
        limit = places[k] - gap
    return places


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers that span some values, about so many.

    Examples
    --------
    >>> ticks(0.13, 0.87)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda nice: abs(math.log(nice * power / rough)))
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, digits) for k in range(first, last + 1)]


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return the key of a drawing: (colour, meaning) each."""
    keys = "".join(f'<span><i style="background:{colour}"></i>{escape(words)}</span>' for colour, words in entries)
    return f'<p class="legend">{keys}</p>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"
