"""A round in words."""

from collections.abc import Mapping
from typing import Any

from server.units import duration

__all__ = ["in_words", "means"]


def means(line: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the mean loss and accuracy of a round, None where they were withheld."""
    sent = [scalars for scalars in line["sites"].values() if scalars["accuracy"] >= 0]
    return {name: sum(s[name] for s in sent) / len(sent) if sent else None for name in ("loss", "accuracy")}


def in_words(line: Mapping[str, Any], rounds: int) -> str:
    """Return a round on one line."""
    scalars = {name: s for name, s in line["sites"].items() if s["accuracy"] >= 0}
    figures = ""
    if scalars:
        mean, worst = means(line), min(scalars, key=lambda name: scalars[name]["accuracy"])
        figures = (
            f"loss {mean['loss']:.3f}  accuracy {mean['accuracy']:.3f}  "
            f"worst {worst} {scalars[worst]['accuracy']:.3f}  "
        )
    tried = f" (attempt {line['attempt']})" if line["attempt"] > 1 else ""
    out = "".join(f"  out: {r['site']} ({r['reason']})" for r in line["out"])
    rest = "".join(f"  resting: {r['site']} (until round {r['until']})" for r in line["resting"])
    return (
        f"round {line['round']:>{len(str(rounds))}}/{rounds}{tried}  {len(line['sites'])} sites  {figures}"
        f"{line['bytes_up'] / 1e6:.2f} MB up {line['bytes_down'] / 1e6:.2f} down  {line['seconds']:.1f} s "
        f"({line['compute_seconds']:.1f} compute, {line['transport_seconds']:.1f} transport, "
        f"{line['waiting_seconds']:.1f} waiting)  {duration(line['seconds_left'])} left{out}{rest}"
    )
