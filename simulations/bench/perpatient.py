"""`python -m simulations.bench.perpatient`: every patient's own gradient and Hessian-vector product, against Opacus.

What `patient-clip` sums: one row for each patient. Opacus gives per-sample gradients, by its hooks and by
``torch.func``; it has no Hessian-vector products, so those stand beside its gradients, and beside ``torch.func`` alone.
Every rival runs in a process of its own with the same threads, in turns, one image a patient, from the same numbers.
Before anything is timed, each one's rows are compared with those of plain ``autograd`` in float64.

Opacus is no dependency. It is found where it is installed, beside this PyTorch:

    pip install --target /tmp/opacus --no-deps opacus opt_einsum
    PYTHONPATH=/tmp/opacus python -m simulations.bench.perpatient
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from client.devices import cpu_cores
from client.memory import keep_freed_memory
from common.console import plain_errors
from common.errors import DeviceError
from common.meta import Batch, Engine, Episodes, flatten, unflatten
from common.meta.maml import Maml
from simulations.bench.cases import CASES, WAYS, Case, tiny
from simulations.bench.plain import network
from simulations.bench.timing import Rival, Timed, peak_bytes, quietness, race, resident_bytes

__all__ = ["RIVALS", "Contender", "app", "bench", "judge"]

#: What patients are computed by; the products end in the word.
RIVALS = (
    "wardround",
    "opacus",
    "opacus, functorch",
    "vmap(grad)",
    "wardround, product",
    "vmap(jvp(grad)), product",
)
_EXACT = 1e-9  # of a row's norm, in float64
_CHECKED = 3  # patients

NETWORKS = {
    "conv4": Case("Conv4-64-GN, 28x28x1", norm="group", tasks=32),
    "resnet": replace(CASES["resnet-w16"], title="ResNet12-GN-16, 28x28x3", tasks=16),
}

Rows = Callable[[], Tensor]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Contender:
    """One rival in its process; ``case.tasks`` is the number of patients."""

    name: str
    case: Case
    threads: int

    def __post_init__(self) -> None:
        torch.set_num_threads(self.threads)
        self._timed = self._rows(self.case, torch.float32)

    def _rows(self, case: Case, dtype: torch.dtype) -> Rows:
        """Return what computes ``[P, D]``."""
        x, y, vector = _given(case, dtype)
        if self.name.startswith("wardround"):
            keep_freed_memory()  # as a site's process does
            engine = Engine(Maml(1, case.rate, case.rate), case.network(dtype), cores=self.threads)
            theta = engine.network.theta()
            nobody = Batch(x[:, None][:, :0], y[:, None][:, :0], None)
            people = Episodes(Batch(x[:, None], y[:, None], None), nobody, torch.arange(WAYS).repeat(len(y), 1))
            if "product" in self.name:
                along = unflatten(vector, theta)
                return lambda: torch.stack(list(engine.patient_products(theta, along, people)))
            return lambda: torch.stack([row.gradient for row in engine.patient_gradients(theta, people)])
        net = network(case, dtype)
        if self.name.startswith("opacus"):
            net = import_module("opacus").GradSampleModule(
                net, loss_reduction="sum", force_functorch="functorch" in self.name
            )

            def opacus() -> Tensor:
                net.zero_grad(set_to_none=True)
                F.cross_entropy(net(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
                return torch.cat([p.grad_sample.reshape(len(y), -1) for p in net.parameters()], 1)

            return opacus
        start = {name: p.detach() for name, p in net.named_parameters()}

        def loss(at: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(net, dict(at), (x[None],)), y[None])

        along = unflatten(vector, start)

        def slopes(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return grad(loss)(start, x, y)  # type: ignore[no-any-return]

        def products(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return jvp(lambda at: grad(loss)(at, x, y), (start,), (along,))[1]  # type: ignore[no-any-return]

        work = vmap(products if "product" in self.name else slopes)
        return lambda: torch.cat([t.reshape(len(y), -1) for t in work(x, y).values()], 1)

    def run(self) -> None:
        self._timed()

    def peak(self) -> int | None:
        resident = resident_bytes()
        self.run()
        self.run()
        most = peak_bytes()
        return None if resident is None or most is None else max(0, most - resident)

    def check(self) -> dict[str, Any]:
        few = replace(self.case, tasks=min(_CHECKED, self.case.tasks))
        exact = _plain(few, products="product" in self.name)
        size = torch.linalg.vector_norm(exact, dim=1)
        rows = {"timed": self._rows(few, torch.float32)(), "float64": self._rows(few, torch.float64)()}
        return {
            name: (torch.linalg.vector_norm(got.double() - exact, dim=1) / size).tolist() for name, got in rows.items()
        }


def _given(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return images ``[P, C, H, H]``, their labels ``[P]``, and a vector ``[D]``, always the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tasks, case.channels, case.size, case.size, generator=generator)
    size = flatten(case.network(dtype).theta()).numel()
    vector = torch.randn(size, generator=generator)
    return x.to(dtype), torch.arange(case.tasks) % WAYS, (vector / vector.norm()).to(dtype)


def _plain(case: Case, *, products: bool) -> Tensor:
    """Return the rows ``[P, D]`` by autograd, a patient at a time, in float64."""
    x, y, vector = _given(case, torch.float64)
    net, rows = network(case, torch.float64), []
    parameters = list(net.parameters())
    for image, label in zip(x, y, strict=True):
        value = F.cross_entropy(net(image[None]), label[None])
        slopes = torch.autograd.grad(value, parameters, create_graph=products)
        row = torch.cat([t.reshape(-1) for t in slopes])
        if products:
            row = torch.cat([t.reshape(-1) for t in torch.autograd.grad(row @ vector, parameters)])
        rows.append(row.detach())
    return torch.stack(rows)


def _rival(name: str, case: Case, threads: int) -> Rival:
    return Contender(name, case, threads)


def bench(case: Case, *, threads: int, rounds: int) -> dict[str, Any]:
    """Compare the rivals on one network.

    Returns
    -------
    dict
        What is written as JSON: times in seconds, memory in bytes, errors relative to each row's norm; ratios to
        Opacus, or to ``vmap(grad)`` where it is not installed.

    Raises
    ------
    DeviceError
        A rival does not compute the rows that autograd computes in float64.
    """
    there = [name for name in RIVALS if not name.startswith("opacus") or find_spec("opacus")]
    results = race({name: partial(_rival, name, case, threads) for name in there}, rounds, judge)
    results |= {name: Timed("Opacus is not installed") for name in RIVALS if name not in there}
    reference = next(name for name in ("opacus", "vmap(grad)") if not results[name].missing)
    rows = {name: _row(case, results[name], results[reference]) for name in RIVALS}
    return {"case": asdict(case), "others_cores": quietness(results), "reference": reference, "rivals": rows}


def judge(results: Mapping[str, Timed]) -> None:
    """Raise DeviceError where a rival does not compute autograd's rows in float64."""
    for name, timed in results.items():
        if not timed.missing and max(timed.check["float64"]) > _EXACT:
            raise DeviceError(f"{name} does not compute the patients' rows in float64: {max(timed.check['float64'])}")


def _row(case: Case, timed: Timed, reference: Timed) -> dict[str, Any]:
    if timed.missing:
        return {"missing": timed.missing}
    ratios = timed.ratios(reference)
    return {
        "patients_per_second": case.tasks / median(timed.seconds),
        "times_reference": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_bytes": timed.peak,
        "errors_timed": timed.check["timed"],
        "errors_float64": timed.check["float64"],
        "seconds": timed.seconds,
        "others_cores": timed.others,
    }


def _table(result: dict[str, Any]) -> Table:
    case, busy = result["case"], result["others_cores"]
    table = Table(
        title=f"{case['title']} ({case['tasks']} patients; other programs: {busy:.2f} cores)", title_justify="left"
    )
    table.add_column("", min_width=24)
    for column in ("patients/s", f"x {result['reference']}", "min .. max", "peak MB", "error", "error in float64"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in result["rivals"].items():
        if "missing" in row:
            table.add_row(name, row["missing"])
            continue
        ratio, peak = row["times_reference"], row["peak_bytes"]
        table.add_row(
            name,
            f"{row['patients_per_second']:.1f}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f} .. {ratio['max']:.2f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
            f"{np.median(row['errors_timed']):.0e}",
            f"{max(row['errors_float64']):.0e}",
        )
    return table


@app.command(epilog="Example: python -m simulations.bench.perpatient --networks conv4 --rounds 9")
@plain_errors
def main(
    quick: Annotated[bool, typer.Option(help="Tiny networks and two rounds: does the benchmark work?")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every rival.")] = cpu_cores(),
    networks: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(NETWORKS)}.")] = ",".join(NETWORKS),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, for each network.")] = 9,
) -> None:
    """Measure patients per second: their own gradients and Hessian-vector products, in turns with Opacus.

    Peak memory is resident memory above the process's own before it first computes. A round in which other programs
    used the CPU is repeated; the report says how busy they were.
    """
    chosen = [name.strip() for name in networks.split(",") if name.strip()]
    if unknown := set(chosen) - set(NETWORKS):
        raise typer.BadParameter(f"no network is called {', '.join(sorted(unknown))}", param_hint="--networks")
    console = Console(width=120)
    results = {}
    for name in chosen:
        case = NETWORKS[name]
        results[name] = bench(
            replace(tiny(case), tasks=4) if quick else case, threads=threads, rounds=2 if quick else rounds
        )
        console.print(_table(results[name]))
    if not find_spec("opacus"):
        console.print("Opacus is not installed here: ratios are to vmap(grad), and say nothing about Opacus")
    if json_file is not None:
        json_file.write_text(json.dumps({"torch": torch.__version__, "networks": results}, indent=1) + "\n")


if __name__ == "__main__":
    app()
