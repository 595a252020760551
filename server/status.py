"""What a run is doing: read from its folder, shown on one page, at any moment."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server.runs import ENDED, Tail, is_gone, natural, printable, read_json
from server.units import duration, size

__all__ = ["Watch", "exit_code", "page"]

#: Rounds in a trend, events on the page, and sites in its table: those that need a look come first.
_TREND, _EVENTS, _SITES = 40, 6, 24
_BLOCKS = "▁▂▃▄▅▆▇█"
_STYLES = {"finished": "green", "failed": "red", "interrupted": "red", "stopped": "yellow"}
_SITE_STYLES = {"in": "green", "out": "red", "resting": "yellow", "idle": "dim"}


@dataclass
class Watch:
    """Looks at a run's folder; a second look reads only what is new.

    Parameters
    ----------
    folder : Path
        The run's.
    """

    folder: Path
    _rounds: list[dict[str, Any]] = field(default_factory=list, init=False)
    _events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=200), init=False)

    def __post_init__(self) -> None:
        self._plan = read_json(self.folder / "study.json")
        self._history = Tail(self.folder / "history.jsonl")
        self._event_lines = Tail(self.folder / "events.jsonl")

    def look(self, now: float | None = None) -> dict[str, Any]:
        """Return the run's state as one object that JSON can hold.

        Parameters
        ----------
        now : float or None
            The time in Unix seconds; None asks the clock.
        """
        now = time.time() if now is None else now
        status, state = _status(self.folder)  # first: what is read after it is no older
        for line in self._history:
            # A resumed run may go back: what it did after that round no longer counts.
            while self._rounds and self._rounds[-1]["round"] >= line["round"]:
                self._rounds.pop()
            self._rounds.append({key: line.get(key) for key in _KEPT} | _means(line["sites"]))
        self._events.extend(self._event_lines)
        study = self._plan.get("study", {})
        waiting = sorted(status.get("waiting_for", ()), key=natural) if state not in (*ENDED, "interrupted") else []
        return {
            "run": self.folder.resolve().name,
            "folder": str(self.folder.resolve()),
            "study": {"id": study.get("study.id"), "title": study.get("study.title"), "digest": self._plan["digest"]},
            "state": state,
            "failure": _text(self.folder / "failure.txt") if state == "failed" else None,
            "round": self._rounds[-1]["round"] if self._rounds else 0,
            "rounds": status.get("rounds", study.get("study.rounds")),
            "attempt": status.get("attempt"),
            "seconds_left": status.get("seconds_left") if state in {"joining", "training", "evaluating"} else None,
            "loss": self._rounds[-1]["loss"] if self._rounds else None,
            "accuracy": self._rounds[-1]["accuracy"] if self._rounds else None,
            "trend": {key: [r[key] for r in self._rounds[-_TREND:]] for key in ("loss", "accuracy")},
            "sites": {name: status["sites"][name] for name in sorted(status.get("sites", {}), key=natural)},
            "waiting_for": waiting,
            "waiting_seconds": round(max(0.0, now - self._asked(status, now)), 1) if waiting else None,
            "deadline_seconds": study.get("sites.deadline-seconds"),
            "bytes_up": sum(r["bytes_up"] or 0 for r in self._rounds),
            "bytes_down": sum(r["bytes_down"] or 0 for r in self._rounds),
            "events": list(self._events)[-_EVENTS:],
            "report": str(report.resolve()) if (report := self.folder / "report.html").exists() else None,
            "at": status.get("at"),
            "seconds_ago": round(max(0.0, now - status["at"]), 1) if "at" in status else None,
            "host": status.get("host"),
            "pid": status.get("pid"),
            "versions": status.get("versions", {}),
        }

    def _asked(self, status: Mapping[str, Any], now: float) -> float:
        """Return when the sites waited for were asked: when the last round or attempt ended, or the run began."""
        began = [e["at"] for e in self._events if e.get("event") in {"started", "resumed", "failed-attempt"}]
        ended = [self._rounds[-1]["at"]] if self._rounds and self._rounds[-1]["at"] else []
        return float(max([*began, *ended], default=status.get("at", now)))


_KEPT = ("round", "at", "bytes_up", "bytes_down")


def exit_code(view: Mapping[str, Any]) -> int:
    """Return 0 for a run that is finished or goes on, 1 for one that does neither."""
    return int(view["state"] in {"failed", "interrupted", "stopped"})


def page(view: Mapping[str, Any]) -> RenderableType:
    """Return what `Watch.look` returned as one page for a terminal.

    Names and reasons come from outside: they are text here, never markup.
    """
    return Group(*_page(view))


def _page(view: Mapping[str, Any]) -> Iterator[RenderableType]:
    study = view["study"]
    yield Text.assemble((printable(study["title"] or study["id"]), "bold"))
    yield Text(f"run {printable(view['run'])}   study {str(study['digest'])[:12]}   {view['folder']}", "dim")
    yield Text()
    yield _headline(view)
    yield _progress(view)
    for name in ("loss", "accuracy"):
        if view[name] is not None:
            trend = _spark(view["trend"][name])
            yield Text.assemble((f"{name:<10}", "dim"), f"{view[name]:.3f}  ", (trend, "cyan"))
    if view["round"] and view["loss"] is None:
        yield Text.assemble(("figures   ", "dim"), "no site sent any")
    yield Text.assemble(("data      ", "dim"), f"{size(view['bytes_up'])} up, {size(view['bytes_down'])} down")
    if view["waiting_for"]:
        names = ", ".join(map(printable, view["waiting_for"][:8]))
        more = f" and {len(view['waiting_for']) - 8} more" if len(view["waiting_for"]) > 8 else ""
        most = f", at most {duration(view['deadline_seconds'])}" if view["deadline_seconds"] else ""
        since = duration(view["waiting_seconds"])
        yield Text.assemble(("waiting   ", "dim"), f"{since} for {names}{more}{most}")
    if view["sites"]:
        yield Text()
        yield from _sites(view["sites"])
    if view["report"]:
        yield Text()
        yield Text.assemble(("report    ", "dim"), view["report"], overflow="fold")
    if view["events"]:
        yield Text()
        yield from (_event(event) for event in view["events"])


def _headline(view: Mapping[str, Any]) -> Text:
    state = view["state"]
    line = Text.assemble((state, f"bold {_STYLES.get(state, 'cyan')}"))
    if state in {"interrupted", "stopped"}:
        line.append(f": wardround-study resume {view['run']}")
    elif state == "failed":
        line.append(f": {' '.join(printable(part) for part in str(view['failure'] or 'no reason given').splitlines())}")
    elif state != "finished" and view["seconds_ago"] is not None:
        line.append(f"   last sign of life {duration(view['seconds_ago'])} ago, process {view['pid']}", "dim")
        line.append(f" on {printable(view['host'])}", "dim")
    return line


def _progress(view: Mapping[str, Any]) -> RenderableType:
    rounds = view["rounds"] or 0
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", width=8)
    grid.add_column()
    grid.add_column()
    left = f"about {duration(view['seconds_left'])} left" if view["seconds_left"] is not None else ""
    again = f"attempt {view['attempt']}   " if (view["attempt"] or 0) > 1 and view["state"] == "training" else ""
    bar = ProgressBar(total=max(rounds, 1), completed=min(view["round"], rounds) if rounds else 1, width=40)
    grid.add_row("round", f"{view['round']} of {rounds}", bar, f"{again}{left}")
    return grid


def _sites(sites: Mapping[str, Mapping[str, Any]]) -> Iterator[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("site", overflow="fold")
    table.add_column("role")
    table.add_column("state")
    table.add_column("failures", justify="right")
    table.add_column("last round", justify="right")
    table.add_column("why", overflow="fold", ratio=1)
    shown = list(sites)
    if len(shown) > _SITES:
        well = sorted(
            shown, key=lambda name: sites[name].get("state") in {"in", "idle"} and not sites[name]["failures"]
        )
        shown = sorted(well[:_SITES], key=natural)
    for name in shown:
        site = sites[name]
        state, last = str(site.get("state", "")), site.get("last_round")
        table.add_row(
            Text(printable(name)),
            Text(printable(site.get("role", ""))),
            Text(printable(state), _SITE_STYLES.get(state, "")),
            Text(str(site.get("failures", 0)), "red" if site.get("failures") else "dim"),
            Text("-" if last is None else str(last)),
            Text(printable(site.get("reason", ""))),
        )
    yield table
    if len(shown) < len(sites):
        counts = [f"{sum(s.get('state') == state for s in sites.values())} {state}" for state in _SITE_STYLES]
        yield Text(f"and {len(sites) - len(shown)} more; of all: {', '.join(counts)}", "dim")


def _event(event: Mapping[str, Any]) -> Text:
    when = time.strftime("%d %b %H:%M:%S", time.localtime(event["at"])) if "at" in event else ""
    line = Text.assemble((f"{when}  ", "dim"), printable(event.get("event", "")), no_wrap=True, overflow="ellipsis")
    if event.get("round"):
        line.append(f", round {event['round']}")
    for key, before in (("site", ": "), ("why", ", "), ("reason", ": ")):
        if event.get(key):
            line.append(before + printable(event[key]))
    return line


def _spark(values: Sequence[float | None]) -> str:
    """Return a small trend; a round without the figure is a gap."""
    known = [v for v in values if v is not None]
    low, high = min(known), max(known)
    span = (high - low) or 1.0
    return "".join(" " if v is None else _BLOCKS[round((len(_BLOCKS) - 1) * (v - low) / span)] for v in values)


def _means(sites: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Return the mean loss and accuracy of a round's sites, over those that sent any."""
    out: dict[str, float | None] = {}
    for name in ("loss", "accuracy"):
        sent = [s[name] for s in sites.values() if s.get(name, -1.0) >= 0]
        out[name] = sum(sent) / len(sent) if sent else None
    return out


def _status(folder: Path) -> tuple[dict[str, Any], str]:
    status = read_json(folder / "status.json")
    if status.get("state") not in ENDED and is_gone(status):
        status = read_json(folder / "status.json")  # it may have ended since
        return status, status["state"] if status.get("state") in ENDED else "interrupted"
    if not status:
        ended = {"result.json": "finished", "failure.txt": "failed"}
        return status, next((state for name, state in ended.items() if (folder / name).exists()), "joining")
    return status, str(status["state"])


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
