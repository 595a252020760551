"""A run that goes on in a town: what has become of it, and how a test gets into the middle of a round."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from server.record import run_folder
from tests.deploy.town import SITES, Town, history, until

__all__ = [
    "Here",
    "clock_events",
    "command",
    "counted",
    "everybody",
    "last_failed",
    "missing",
    "short_of_time",
    "waiting_for",
]


def command(program: Any, *arguments: str | Path) -> str:
    """Run one of our commands, which must work, and return what it prints."""
    result = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def everybody(line: dict[str, Any]) -> bool:
    return set(line["sites"]) == set(SITES)


def counted(site: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: site in line["sites"]


def missing(site: str) -> Callable[[dict[str, Any]], bool]:
    return lambda line: site not in line["sites"]


@dataclass
class Here:
    """A consortium, and the run that goes on in it."""

    town: Town
    run: int

    @property
    def folder(self) -> Path:
        return run_folder(self.run)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return history(self.folder)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().split("\n")[:-1]]

    def reach(self, condition: Callable[[dict[str, Any]], object], *, without: str = "") -> dict[str, Any]:
        return self.town.reach(self.folder, condition, without=without)

    def until_said(self, site: str, words: str, times: int = 1) -> None:
        """Wait until a site's gateway has said something."""
        until(lambda: self.town.log_of(f"{site} gateway").read_text().count(words) >= times, self.town.logs)


@contextmanager
def waiting_for(here: Here, site: str) -> Iterator[int]:
    """Let something happen in the middle of a round: all sites but one have answered; give the round's number."""
    others = [other for other in SITES if other != site]
    sent = {other: len(here.town.sent(other)) for other in others}
    here.town.signal(f"{site} node", signal.SIGSTOP)
    number = here.town.next_round(here.folder)
    until(lambda: all(len(here.town.sent(other)) > sent[other] for other in others), here.town.logs)
    yield number
    here.town.signal(f"{site} node", signal.SIGCONT)


def clock_events(here: Here) -> list[str]:
    """Return by how much the coordinator noticed that its clock was set."""
    reasons = [event["reason"] for event in here.events if event["event"] == "clock"]
    return [
        " ".join(reason.removeprefix("this machine's clock was set ").split()[:3]).rstrip(":") for reason in reasons
    ]


def last_failed(here: Here, number: int) -> set[int | str]:
    """Return why the last attempt of a round failed: the codes of sites, or a word where they were not reached."""
    failed = [event for event in here.events if event["event"] == "failed-attempt" and event["round"] == number]
    return {out["code"] or out["why"] for event in failed[-1:] for out in event["out"]}


@contextmanager
def short_of_time(here: Here) -> Iterator[None]:
    """Let rounds end soon: Flower hands a message over once, and one that is lost on its way is not answered."""
    here.town.tell(seconds=15.0)
    yield
    here.town.tell(seconds=here.town.study.sites.deadline_seconds)
