"""`python -m simulations.bench.server`: the coordinator's memory with many sites, and what checking a reply costs.

One round of the real ServerApp over the in-process Grid with real serialisation: virtual sites answer with a vector
at once, one in eight comes late, so that the replies behind it have to wait for their turn. A tenth of the sites is run
too, each number in a process of its own: peak memory must not depend on it.

Then the work on one reply, check and add, is timed beside what is usually written: a plain loop that stacks all replies
and takes NumPy's mean, and the function that Flower's own strategies call.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from common.console import plain_errors
from common.contract import Instruction, Vector, check_instruction, check_reply, pack_reply
from common.errors import RoundError
from common.meta import flatten
from common.study import Aggregation, Study
from simulations.bench.timing import Rival, Timed, peak_bytes, quietness, race, resident_bytes

__all__ = ["CONTENDERS", "Contender", "app", "bench", "judge"]

_LATE = 8  # one site in so many answers when the next ones have answered
_TOLERANCE = 1e-5  # of the mean's norm: the others add in float32

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class _Echo(ClientApp):
    """A site that answers at once, with a vector of its own."""

    def __init__(self, study: Study, size: int) -> None:
        super().__init__()
        self._study, self._size = study, size
        self._vector = _vector(size)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer without learning anything."""
        site = int(str(context.node_config["partition-id"]))
        dtype = self._study.wire.dtype
        instruction, _ = check_instruction(message.content, study=self._study.digest, size=self._size, dtype=dtype)
        if instruction.kind == "join":
            return Message(pack_reply(instruction, {"site": site}), reply_to=message)
        vector = self._vector + np.float32(site)
        return Message(pack_reply(instruction, {"loss": -1.0, "accuracy": -1.0}, vector), reply_to=message)


def _vector(size: int) -> Vector:
    return np.random.default_rng(0).standard_normal(size, np.float32)


def _late(site: int, message: Message) -> int | None:
    return 3 if site % _LATE == 0 and message.metadata.message_type == "train" else None


def bench(home: str, sites: int, width: int) -> dict[str, Any]:
    """Run one round in this process, which must be fresh; ``home`` is where its run folder goes.

    Returns
    -------
    dict
        Numbers of theta, seconds, peak resident memory above that at the start (bytes).
    """
    from server.record import run_folder
    from server.rounds import initial_theta
    from simulations.engines.inprocess import run_in_process

    os.environ["WARDROUND_HOME"] = home
    study = Study().override(
        {
            "study.id": "server",
            "study.title": "The coordinator alone",
            "study.rounds": 1,
            "sites.held-out": "",
            "sites.quorum": sites,
            "privacy.figures": "withheld",  # nobody evaluates
            "model.width": width,
            "data.sites": sites,
        }
    )
    size = flatten(initial_theta(study)).numel()
    client = _Echo(study, size)
    before, began = resident_bytes(), time.perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        run_id, _ = run_in_process(study, client=client, fault=_late)
    seconds, after = time.perf_counter() - began, peak_bytes()
    (line,) = [json.loads(text) for text in (run_folder(run_id) / "history.jsonl").read_text().splitlines()]
    return {
        "sites": len(line["sites"]),
        "numbers": size,
        "seconds": seconds,
        "peak_bytes": None if before is None or after is None else after - before,
    }


def _in_own_process(sites: int, width: int) -> dict[str, Any]:
    home = tempfile.mkdtemp(prefix="wardround-server-")
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(bench, home, sites, width).result()
    finally:
        shutil.rmtree(home, ignore_errors=True)


Replies = list[RecordDict]
_INSTRUCTION = Instruction("train", "study", 1, 1, "theta")


def _ours(replies: Replies, size: int) -> NDArray[np.floating]:
    from server.aggregation import Aggregator

    names = [f"hospital-{i}" for i in range(len(replies))]
    aggregator = Aggregator(Aggregation(max_norm=1e9), size, names)
    for name, content in zip(names, replies, strict=True):
        vector = check_reply(content, _INSTRUCTION, size=size, dtype="float32").vector
        assert vector is not None
        aggregator.add(name, vector)
    return aggregator.result()


def _stacked(replies: Replies, _: int) -> NDArray[np.floating]:
    out: NDArray[np.floating] = np.mean(
        np.stack([r.array_records["meta_gradient"]["meta_gradient"].numpy() for r in replies]), axis=0
    )
    return out


def _flower(replies: Replies, _: int) -> NDArray[np.floating]:
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    return aggregate_arrayrecords(replies, "loss")["meta_gradient"].numpy()


#: Who turns replies into their mean. Only ours checks anything, and only ours adds in float64.
CONTENDERS: Mapping[str, Callable[[Replies, int], NDArray[np.floating]]] = {
    "wardround": _ours,
    "plain loop": _stacked,
    "Flower": _flower,
}


@dataclass
class Contender:
    """One way to aggregate in its process; all replies are in memory before it begins."""

    name: str
    sites: int
    size: int

    def __post_init__(self) -> None:
        content = pack_reply(_INSTRUCTION, {"loss": 1.0, "accuracy": 1.0}, _vector(self.size))
        self._replies = [content] * self.sites

    def check(self) -> float:
        """Return how far the mean is from the one vector that all sites sent, as a part of its norm."""
        truth = _vector(self.size)
        return float(np.linalg.norm(CONTENDERS[self.name](self._replies, self.size) - truth) / np.linalg.norm(truth))

    def run(self) -> None:
        """Aggregate once."""
        CONTENDERS[self.name](self._replies, self.size)

    def peak(self) -> int | None:
        """Return the memory that it takes beside the replies, in bytes."""
        before = resident_bytes()
        self.run()
        most = peak_bytes()
        return None if before is None or most is None else max(0, most - before)


def _contender(name: str, sites: int, size: int) -> Rival:
    return Contender(name, sites, size)


def judge(results: Mapping[str, Timed]) -> None:
    """Check that all computed the same mean.

    Raises
    ------
    RoundError
        One did not.
    """
    for name, timed in results.items():
        if timed.check > _TOLERANCE:
            raise RoundError(f"{name} does not compute the mean: it is off by {timed.check:.1e} of its norm")


@app.command(epilog="Example: python -m simulations.bench.server --sites 200 --json server.json")
@plain_errors
def main(
    sites: Annotated[int, typer.Option(min=10, help="Virtual sites.")] = 200,
    width: Annotated[int, typer.Option(min=1, help="Width of Conv4; 608 has ten million numbers.")] = 608,
    turns: Annotated[int, typer.Option(min=1, help="Timed turns of every contender.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Run one round with many sites, and with a tenth of them; then time check and add beside the usual loops."""
    few, many = (_in_own_process(n, width) for n in (sites // 10, sites))
    table = Table(title=f"one round of the real coordinator, theta of {many['numbers'] / 1e6:.2f} million numbers")
    for column in ("sites", "s", "ms a site", "peak MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in (few, many):
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}"
        table.add_row(f"{r['sites']}", f"{r['seconds']:.1f}", f"{1000 * r['seconds'] / r['sites']:.0f}", peak)
    console = Console(width=110)
    console.print(table)

    size, count = many["numbers"], max(2, sites // 10)
    results = race({name: partial(_contender, name, count, size) for name in CONTENDERS}, turns, judge)
    ours = results["wardround"]
    table = Table(title=f"{count} replies to one mean, {turns} turns, others kept {quietness(results):.2f} cores busy")
    for column in ("who", "ms a reply", "our time, times theirs", "peak MB"):
        table.add_column(column, justify="left" if column == "who" else "right", no_wrap=True)
    for name, timed in results.items():
        ratios = timed.ratios(ours)
        peak = "-" if timed.peak is None else f"{timed.peak / 1e6:.0f}"
        times = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{1000 * median(timed.seconds) / count:.1f}", times, peak)
    console.print(table)
    if json_file is not None:
        rivals = {name: {**vars(timed), "ours_times": timed.ratios(ours)} for name, timed in results.items()}
        json_file.write_text(json.dumps({"memory": [few, many], "replies": count, "rivals": rivals}, indent=1) + "\n")


if __name__ == "__main__":
    app()
