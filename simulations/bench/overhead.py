"""`python -m simulations.bench.overhead`: what a round costs beyond its computing, stock Flower's deployment and ours.

Stock is Flower's SuperLink and SuperNodes as they come: no TLS, no gateway, every message a process that imports
PyTorch. Ours is `simulations.localnet`: TLS, edge, gateways that open every message, and a worker at every site. Both
stay up, and run the same study in turns; theta must come out the same.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from client.data.store import Site
from client.devices import cpu_cores
from common.console import plain_errors
from common.environment import flower_environment, tool
from common.errors import RoundError
from common.study import Study
from server.consortium.superlink import write_connection
from server.record import run_folder
from simulations.engines.control import Control, free_ports, running, until
from simulations.localnet import localnet

__all__ = ["app", "beyond", "stock"]

_START_SECONDS = 90.0
_STUDY: dict[str, bool | int | float | str] = {
    "study.id": "overhead",
    "study.title": "Overhead of a round",
    "sites.held-out": "",
    "privacy.figures": "withheld",  # training rounds only
    "data.patients-per-class": 5,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_progress = Console(stderr=True)

Runner = Callable[[], Path]


@contextmanager
def stock(folder: Path, study: Study, data: Sequence[Site]) -> Iterator[Runner]:
    """Start a SuperLink and SuperNodes as Flower's documentation does; give what runs the study on them.

    Parameters
    ----------
    folder : Path
        Empty; gets their logs and the runs.
    study : Study
        What is run.
    data : sequence of Site
        Each node's images.
    """
    superlink, *nodes = free_ports(1 + len(data))
    environment = flower_environment(FLWR_HOME=str(folder), WARDROUND_HOME=str(folder))
    control, plan, log = Control(folder), folder / "study.toml", folder / "superlink.log"
    plan.write_text(study.toml())
    write_connection(folder, f"127.0.0.1:{superlink}", None)

    def run() -> Path:
        began, number = time.time(), control.run(plan)
        control.follow(number, folder / "runs" / str(number), lambda _: None, since=began)
        return folder / "runs" / str(number)

    with ExitStack() as stack:
        command = [tool("flower-superlink"), "--insecure", "--port", str(superlink)]
        command += ["--disable-runtime-dependency-installation"]
        stack.enter_context(running(log, environment, *command))
        until(partial(_says, log, "Uvicorn running"), _START_SECONDS, log.read_text)
        for site, port in zip(data, nodes, strict=True):
            said = folder / f"{site.name}.log"
            command = [tool("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{superlink}"]
            command += ["--port", str(port), "--node-config", f'site="{site.folder}"']
            stack.enter_context(running(said, environment, *command))
        for site in data:
            said = folder / f"{site.name}.log"
            until(partial(_says, said, "SuperNode ID"), _START_SECONDS, said.read_text)
        yield run


def _says(log: Path, text: str) -> bool:
    return text in log.read_text()


def beyond(folder: Path, compute: float) -> list[float]:
    """Return what every round of a run took beyond its computing, in seconds."""
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [max(0.0, json.loads(line)["seconds"] - compute) for line in lines]


def _compute(study: Study, rounds: int, sites: int) -> tuple[float, bytes]:
    """Return what a round takes in this process where sites share the cores (seconds), and the study's last theta."""
    from simulations.engines.inprocess import run_in_process

    with redirect_stdout(_progress.file):
        folder = run_folder(run_in_process(study)[0])
    seconds = [json.loads(line)["seconds"] for line in (folder / "history.jsonl").read_text().splitlines()]
    return median(seconds[-rounds:]) / min(sites, cpu_cores()), (folder / "theta.safetensors").read_bytes()


@app.command(epilog="Example: python -m simulations.bench.overhead --sites 1 --rounds 4 --turns 3 --json overhead.json")
@plain_errors
def main(
    sites: Annotated[int, typer.Option(min=1, help="Sites, all of them on this machine.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a run.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Runs of each deployment.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Run the same study on stock Flower and on our consortium in turns, and compare a round's overhead.

    Seconds of a round, less those that the same round takes within one warm process. nginx must be installed. Other
    programs disturb it: sites share the cores of this machine.

    Exit code 1: a process did not start, a run failed, or theta is not the same everywhere.
    """
    from simulations.prepare import prepare

    study = Study().override({**_STUDY, "sites.quorum": sites, "data.sites": sites, "study.rounds": rounds})
    data = prepare(study, progress=_progress.print)
    compute, theta = _compute(study, rounds, sites)
    found: dict[str, list[list[float]]] = {"stock": [], "ours": []}
    with TemporaryDirectory(prefix="wardround-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        for part in found:
            (Path(name) / part).mkdir()
        ours = stack.enter_context(localnet(Path(name) / "ours", study, data, say=_progress.print))
        theirs = stack.enter_context(stock(Path(name) / "stock", study, data))
        for turn in range(turns):
            for part, run in (("stock", theirs), ("ours", lambda: ours.run(study))):
                folder = run()
                if (folder / "theta.safetensors").read_bytes() != theta:
                    raise RoundError(f"theta of {part} is not that of the in-process run: please report this")
                found[part].append(beyond(folder, compute))
                _progress.print(f"turn {turn + 1}, {part}: {median(found[part][-1]):.1f} s a round beyond computing")
    result = _result(found, compute, sites, rounds)
    _show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


def _result(found: dict[str, list[list[float]]], compute: float, sites: int, rounds: int) -> dict[str, Any]:
    pairs = zip(found["stock"], found["ours"], strict=True)
    ratios = [median(theirs) / median(ours) for theirs, ours in pairs]
    return {"sites": sites, "rounds": rounds, "compute_seconds": compute, "beyond_seconds": found, "ratios": ratios}


def _show(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['sites']} site(s), {result['rounds']} rounds a run; computing takes "
        f"{result['compute_seconds']:.2f} s a round"
    )
    for column in ("deployment", "s a round beyond computing", "least", "most"):
        table.add_column(column, justify="left" if column == "deployment" else "right")
    for part, runs in result["beyond_seconds"].items():
        every = [seconds for run in runs for seconds in run]
        table.add_row(part, f"{median(every):.2f}", f"{min(every):.2f}", f"{max(every):.2f}")
    Console(width=110).print(table)
    low, middle, high = min(result["ratios"]), median(result["ratios"]), max(result["ratios"])
    print(f"stock takes {middle:.1f} times as long ({low:.1f} to {high:.1f} in {len(result['ratios'])} turns)")


if __name__ == "__main__":
    app()
