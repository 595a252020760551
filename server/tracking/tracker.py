"""What a tracker is, and the figures that all of them take from a line."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

__all__ = ["Line", "Tracker", "round_figures", "site_figures"]

Line = Mapping[str, Any]


class Tracker(Protocol):
    """Gets what the run records, line by line, as it stands in the run's folder."""

    def round(self, line: Line) -> None:
        """Take a line of ``history.jsonl``."""

    def evaluation(self, line: Line) -> None:
        """Take a line of ``evaluations.jsonl``."""

    def finish(self, result: Line) -> None:
        """Take the content of ``result.json``: the run is complete."""

    def close(self) -> None:
        """Let go of everything; also after a failure, without `finish`."""


def site_figures(line: Line) -> Iterator[tuple[str, str, float]]:
    """Return (site, figure, value) of a round or an evaluation; -1 in a round says that a site did not send it."""
    for site, figures in line["sites"].items():
        for name, value in figures.items():
            if name not in {"loss", "accuracy"} or value >= 0:
                yield site, name, float(value)


_NUMBERS = (
    "gradient_norm", "bytes_up", "bytes_down",
    "seconds", "compute_seconds", "transport_seconds", "waiting_seconds",
)  # fmt: skip


def round_figures(line: Line) -> dict[str, float]:
    """Return what a round has once, means over sites included."""
    out = {name: float(line[name]) for name in _NUMBERS if line.get(name) is not None}
    for name in ("loss", "accuracy"):
        sent = [value for _, figure, value in site_figures(line) if figure == name]
        if sent:
            out[name] = sum(sent) / len(sent)
    states = {"in": "sites", "out": "out", "resting": "resting", "idle": "idle"}
    return out | {f"sites_{state}": float(len(line.get(key, ()))) for state, key in states.items()}
