"""`python -m simulations.bench.scale`: a thousand virtual sites in one process, and what they cost beside the maths.

The real ServerApp and ClientApp run over the in-process Grid, with real serialisation. A tenth of the sites is run
too: memory must not depend on their number.
"""

import json
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.console import plain_errors
from common.study import Study
from simulations.bench.timing import busy_seconds, peak_bytes, resident_bytes

__all__ = ["app", "bench", "make_sites"]

_REAL = 10  # site folders that are really prepared; the others share their images
_STUDY: dict[str, bool | int | float | str] = {
    "study.id": "scale",
    "study.title": "Many virtual sites",
    "sites.held-out": "hospital-0",
    "algorithm.name": "maml",
    "data.patients-per-class": 4,
    "episodes.queries": 5,
    "episodes.per-round": 1,
    "episodes.test-episodes": 2,
    "episodes.scratch-steps": 1,
    "algorithm.test-steps": 1,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def make_sites(study: Study) -> None:
    """Make a study's site folders: ten real ones, and the others from hard links to their files.

    Every folder has a name and an index of its own, so it is a site of its own to everybody but the disk.
    """
    from client.session import virtual_site
    from simulations.prepare import prepare

    real = prepare(study.override({"data.sites": min(_REAL, study.data.sites)}))
    for number in range(study.data.sites):
        source, folder = real[number % len(real)].folder, virtual_site(study, number)
        if folder.exists():
            continue
        shutil.copytree(source, folder, copy_function=os.link)
        catalogue = folder / "catalogue.sqlite"
        catalogue.unlink()
        shutil.copy(source / "catalogue.sqlite", catalogue)
        with closing(sqlite3.connect(catalogue)) as database, database:
            about = {"name": f"hospital-{number}", "number": str(number)}
            database.executemany("UPDATE meta SET value = ? WHERE key = ?", [(v, k) for k, v in about.items()])


def bench(home: str, sites: int, rounds: int) -> dict[str, Any]:
    """Run the study once in this process, which must be fresh; ``home`` is where its sites go.

    Returns
    -------
    dict
        Seconds in all and within the engine, their share, peak resident memory above that at the start (bytes).
    """
    from common.meta import Engine
    from simulations.engines.inprocess import run_in_process

    os.environ["WARDROUND_HOME"] = home
    study = Study().override({**_STUDY, "data.sites": sites, "study.rounds": rounds})
    make_sites(study)
    inside = [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                inside[0] += time.perf_counter() - began

        return run

    Engine.meta_gradient = timed(Engine.meta_gradient)  # type: ignore[method-assign]
    Engine.scores = timed(Engine.scores)  # type: ignore[method-assign]
    before, busy, own, began = resident_bytes(), busy_seconds(), time.process_time(), time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # a line a round
        _, grid = run_in_process(study)
    seconds, after, busy_after = time.perf_counter() - began, peak_bytes(), busy_seconds()
    others = None
    if busy is not None and busy_after is not None:
        others = max(0.0, busy_after - busy - (time.process_time() - own)) / seconds
    return {
        "sites": sites,
        "rounds": rounds,
        "messages": len(grid.traffic),
        "seconds": seconds,
        "engine_seconds": inside[0],
        "share_outside": 1 - inside[0] / seconds,
        "peak_bytes": None if before is None or after is None else after - before,
        "others_cores": others,
    }


def _in_own_process(sites: int, rounds: int) -> dict[str, Any]:
    home = tempfile.mkdtemp(prefix="wardround-scale-")
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(bench, home, sites, rounds).result()
    finally:
        shutil.rmtree(home, ignore_errors=True)


@app.command(epilog="Example: python -m simulations.bench.scale --sites 1000 --rounds 3 --json scale.json")
@plain_errors
def main(
    sites: Annotated[int, typer.Option(min=3, help="Virtual sites.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Run a study with many sites, and with a tenth of them, and say what it costs beside the maths."""
    results = [_in_own_process(n, rounds) for n in (max(3, sites // 10), sites)]
    table = Table(title=f"one process, {rounds} rounds, one episode a site and round, then every site evaluates")
    for column in ("sites", "messages", "s", "s in engine", "outside", "ms outside/message", "peak MB", "others"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        outside = 1000 * (r["seconds"] - r["engine_seconds"]) / r["messages"]
        table.add_row(
            f"{r['sites']}",
            f"{r['messages']}",
            f"{r['seconds']:.1f}",
            f"{r['engine_seconds']:.1f}",
            f"{100 * r['share_outside']:.1f} %",
            f"{outside:.2f}",
            "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}",
            "-" if r["others_cores"] is None else f"{r['others_cores']:.2f} cores",
        )
    Console(width=110).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app()
