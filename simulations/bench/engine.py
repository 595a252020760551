"""`python -m simulations.bench.engine`: meta-gradients per second and memory, against the usual loops.

Every rival runs in a process of its own, with the same number of threads and the same environment, in turns. Before
anything is timed, each one's gradient is compared with the float64 plain loop: in float64, where it must agree, and
in the precision that is timed, where ReLU and max-pool masks may flip.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from client.devices import cpu_cores
from client.memory import keep_freed_memory
from common.console import plain_errors
from common.errors import DeviceError
from common.meta import Engine, Episodes
from common.meta.fomaml import Fomaml
from common.meta.maml import Maml
from simulations.bench.cases import CASES, Case, tiny
from simulations.bench.plain import LOOPS, network
from simulations.bench.timing import Rival, Timed, peak_bytes, quietness, race, resident_bytes

__all__ = ["Contender", "app", "bench", "judge"]

REFERENCE = "plain loop"
_EXACT = 1e-9  # of the gradient's norm, in float64
_CHECKED = 3  # tasks; in float32 a mask flips in some, hence the median
_GPU_TASKS = 32

_ENGINES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"wardround": {}},
    "cuda": {
        "wardround": {},
        "wardround, no vmap": {"vectorise": False},
        "wardround, bf16": {"precision": "bf16"},
    },
}

Gradient = Callable[[Episodes], Tensor]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Contender:
    """One rival in its process: the engine (with options) or one of `LOOPS`."""

    name: str
    case: Case
    device: torch.device
    threads: int

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)
        torch.backends.cudnn.allow_tf32 = False  # not exact; the engine switches it off itself
        torch.backends.cudnn.benchmark = True
        self.chunk: int | None = None
        self._episodes = self.case.episodes(self.case.tasks)
        self._timed = self._gradient(torch.float32)

    def _gradient(self, dtype: torch.dtype) -> Gradient:
        case, device = self.case, self.device
        if self.name in LOOPS:
            if self.name != REFERENCE:
                import_module(self.name)  # now: it is not part of the computation's time or memory
            loop, net = LOOPS[self.name], network(case, dtype).to(device)
            return lambda e: loop(net, e.to(device, dtype), case.rate, case.steps, case.first_order).cpu()
        keep_freed_memory()  # as a site's process does
        learner = (Fomaml if case.first_order else Maml)(case.steps, case.rate, case.rate, case.recompute)
        options = _ENGINES[device.type][self.name]
        engine = Engine(learner, case.network(dtype), (device,), self.threads, **options)
        theta = learner.theta(engine.network)

        def gradient(episodes: Episodes) -> Tensor:
            out = engine.meta_gradient(theta, episodes).gradient
            self.chunk = max(engine._fits.values(), default=None)  # what fits into one `vmap`
            return out

        return gradient

    def run(self) -> None:
        self._timed(self._episodes)

    def peak(self) -> int | None:
        if self.device.type == "cuda":
            self.run()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run()
            return torch.cuda.max_memory_allocated() - before
        resident = resident_bytes()
        self.run()
        self.run()
        most = peak_bytes()
        return None if resident is None or most is None else max(0, most - resident)

    def check(self) -> dict[str, Any]:
        some = [self._episodes.take(slice(i, i + 1)) for i in range(min(_CHECKED, self.case.tasks))]
        exact = None if "bf16" in self.name else self._gradient(torch.float64)
        return {
            "timed": np.stack([self._timed(task).double().numpy() for task in some]),
            "float64": exact and np.stack([exact(task).numpy() for task in some]),
            "chunk": self.chunk,
        }


def _rival(name: str, case: Case, device: str, threads: int) -> Rival:
    return Contender(name, case, torch.device(device), threads)


def bench(case: Case, *, device: str, threads: int, rounds: int) -> dict[str, Any]:
    """Compare the engine with the loops on one case.

    Parameters
    ----------
    device : str
        ``cpu`` or ``cuda``.
    threads : int
        CPU threads of every rival.
    rounds : int
        Rounds that count.

    Returns
    -------
    dict
        What is written as JSON: times in seconds, memory in bytes, errors relative to the gradient's norm.

    Raises
    ------
    DeviceError
        A rival does not compute the gradient that the plain loop computes in float64.
    """
    there = [name for name in LOOPS if name == REFERENCE or find_spec(name)]
    rivals = {name: partial(_rival, name, case, device, threads) for name in [*_ENGINES[device], *there]}
    results = race(rivals, rounds, judge) | {name: Timed("not installed") for name in LOOPS if name not in there}
    rows = {name: _row(case, timed, results[REFERENCE]) for name, timed in results.items()}
    return {"case": asdict(case), "others_cores": quietness(results), "rivals": rows}


def judge(results: Mapping[str, Timed]) -> None:
    """Raise DeviceError where a rival does not compute the plain loop's gradient in float64."""
    for name, timed in results.items():
        errors = [] if timed.missing else _errors(timed.check["float64"], results[REFERENCE])
        if max(errors, default=0.0) > _EXACT:
            raise DeviceError(f"{name} does not compute the gradient in float64: relative errors {errors}; not timed")


def _errors(gradients: NDArray[np.float64] | None, reference: Timed) -> list[float]:
    """Return the relative error of every checked task's gradient ``[tasks, D]``."""
    if gradients is None:
        return []
    exact = reference.check["float64"]
    return [float(e) for e in np.linalg.norm(gradients - exact, axis=1) / np.linalg.norm(exact, axis=1)]


def _row(case: Case, timed: Timed, reference: Timed) -> dict[str, Any]:
    if timed.missing:
        return {"missing": timed.missing}
    ratios = timed.ratios(reference)
    return {
        "tasks_per_second": case.tasks / median(timed.seconds),
        "times_plain": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_bytes": timed.peak,
        "errors_timed": _errors(timed.check["timed"], reference),
        "errors_float64": _errors(timed.check["float64"], reference),
        "chunk": timed.check["chunk"],
        "seconds": timed.seconds,
        "others_cores": timed.others,
    }


def _table(result: dict[str, Any], device: str) -> Table:
    busy = result["others_cores"]
    table = Table(
        title=f"{result['case']['title']} ({result['case']['tasks']} tasks; other programs: {busy:.2f} cores)",
        title_justify="left",
    )
    table.add_column("", min_width=18)
    columns = ["tasks/s", "x plain loop", "min .. max", "peak MB", "error", "error in float64"]
    for column in [*columns, *["chunk"] * (device == "cuda")]:
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in result["rivals"].items():
        if "missing" in row:
            table.add_row(name, row["missing"])
            continue
        ratio, peak, exact = row["times_plain"], row["peak_bytes"], row["errors_float64"]
        cells = [
            f"{row['tasks_per_second']:.2f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} .. {ratio['max']:.2f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
            f"{median(row['errors_timed']):.0e}",
            f"{max(exact):.0e}" if exact else "-",
            f"{row['chunk'] or '-'}",
        ]
        table.add_row(name, *cells[: len(table.columns) - 1])
    return table


def _machine(device: str, threads: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": threads,
        "cores": cpu_cores(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "OMP_", "MKL_", "KMP_"))},
    }


@app.command(epilog="Example: python -m simulations.bench.engine --cases conv4-1shot-k1,resnet-w16 --rounds 15")
@plain_errors
def main(
    quick: Annotated[bool, typer.Option(help="Tiny networks and two rounds: does the benchmark work?")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to compute.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every rival.")] = cpu_cores(),
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(CASES)}.")] = ",".join(CASES),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, for each case.")] = 15,
) -> None:
    """Measure meta-gradients per second and peak memory of the engine and of the usual loops, in turns.

    Peak memory is resident memory above the process's own before it first computes (on a GPU: memory that PyTorch
    allocated). A round in which other programs used the CPU is repeated; the report says how busy they were.
    """
    chosen = [name.strip() for name in cases.split(",") if name.strip()]
    if unknown := set(chosen) - set(CASES):
        raise typer.BadParameter(f"no case is called {', '.join(sorted(unknown))}", param_hint="--cases")
    console = Console(width=110)
    results = {}
    for name in chosen:
        case = CASES[name]
        if device == "cuda":
            case = replace(case, tasks=_GPU_TASKS)
        results[name] = bench(
            tiny(case) if quick else case, device=device, threads=threads, rounds=2 if quick else rounds
        )
        console.print(_table(results[name], device))
    if json_file is not None:
        report = {"machine": _machine(device, threads), "cases": results}
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    app()
