"""The commands with which a coordinator watches a run: status and report."""

import json
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from common.console import plain_errors
from server.runs import ENDED, find_run
from server.status import Watch, exit_code, page

__all__ = ["report", "status"]

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, the path of its folder, or latest.")]


@plain_errors
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second until the run ends.")] = False,
) -> None:
    """Show what a run is doing: who is in, who is out and why, how it learns, how long it will take.

    Exit code 0: it goes on, or is finished. Exit code 1: it failed, was stopped or interrupted. Exit code 2: there is
    no such run.
    """
    if as_json and watch:
        raise typer.BadParameter("choose --json or --watch")
    run_watch = Watch(find_run(run))
    view = run_watch.look()
    if as_json:
        print(json.dumps(view, indent=1))
    elif watch:
        with Live(page(view), console=_console(), auto_refresh=False) as live:
            while view["state"] not in {*ENDED, "interrupted"}:
                time.sleep(1)
                view = run_watch.look()
                live.update(page(view), refresh=True)
    else:
        _console().print(page(view))
    raise typer.Exit(exit_code(view))


@plain_errors
def report(run: Run) -> None:
    """Write a run's report.html and model-card.md anew from what its folder holds."""
    from server.report import write_report

    out = write_report(find_run(run))
    print(f"wrote {out} and {out.with_name('model-card.md')}")


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)
