"""`python -m simulations.experiments.hostile`: what hostile sites do to a study, under every aggregation rule.

Seven phantom hospitals train together, with the real apps over the in-process Grid. Some of them lie about their
meta-gradient in every round; what theta gives is then measured at the honest ones, on the same meta-test episodes in
every run. A rule holds an attack if that costs no more than two points against its own runs in which nobody lies.

The hospitals are alike, with patients of their own and the same scanner, as the theory of every rule supposes; with
``--differ`` each has a scanner of its own. The runs are long enough to converge: what is measured is then where an
attack leads, and not how far a run has come.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import typer
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table

from common.console import plain_errors
from common.contract import Instruction, Vector, pack_reply
from common.errors import RoundError
from common.study import Study, names
from server.aggregation import explain_need, sites_needed
from server.record import run_folder
from simulations.compare import student_t
from simulations.engines.inprocess import run_in_process
from simulations.prepare import prepare

__all__ = ["ATTACKS", "RULES", "Liar", "Run", "app", "measure", "words"]

_POINTS = 0.02  # what an attack may cost
_CLIP = 20.0  # the bound on a reply's norm, where an attack stays within it: no honest reply is longer

_STUDY: Mapping[str, bool | int | float | str] = {
    "study.id": "hostile",
    "study.title": "Hostile sites",
    "sites.held-out": "",
    "model.width": 16,
    "algorithm.name": "anil",
    "algorithm.inner-rate": 0.1,
    "algorithm.test-rate": 0.1,
    "algorithm.test-steps": 2,
    "episodes.labels": "fixed",
    "episodes.classes": "disc,ring,cross",
    "episodes.held-out": "",
    "episodes.ways": 3,
    "episodes.queries": 8,
    "episodes.per-round": 4,
    "episodes.test-episodes": 20,
    "episodes.scratch-steps": 0,
    "outer.rate": 0.01,
    "outer.schedule": "cosine",
    "outer.clip": 0.0,
    "data.sites": 7,
    "data.patients-per-class": 60,
    "data.test-fraction": 0.33,
}

#: What every rule needs beside the number of hostile sites, which is f.
RULES: Mapping[str, Mapping[str, bool | int | float | str]] = {
    "mean": {},
    "median": {},
    "trimmed-mean": {},
    "krum": {},
    "multi-krum": {"aggregation.selected": 3},
    "centred-clipping": {"aggregation.radius": 0.25, "aggregation.iterations": 10},
}


def _drift(honest: Vector) -> Vector:
    """Return always the same vector, just within the bound."""
    direction = np.random.default_rng(0).normal(size=honest.size)
    return (0.99 * _CLIP * direction / np.linalg.norm(direction)).astype(honest.dtype)


#: What a liar makes of its meta-gradient, and the bound on a reply's norm meanwhile; 0 is none.
ATTACKS: Mapping[str, tuple[Callable[[Vector], Vector] | None, float]] = {
    "nobody lies": (None, 0.0),
    "a million times": (lambda honest: 1e6 * honest, 0.0),
    "signs flipped": (lambda honest: -honest, 0.0),
    "drift within the bound": (_drift, _CLIP),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Liar(ClientApp):
    """The real ClientApp, but some sites change the meta-gradient that they send.

    Parameters
    ----------
    sites : int
        The first so many sites lie.
    change : callable
        Gets the honest meta-gradient ``[D]``.
    """

    def __init__(self, sites: int, change: Callable[[Vector], Vector]) -> None:
        super().__init__()
        self._sites, self._change = sites, change

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the real app does, then lie."""
        from client.app import app as client_app

        reply = client_app(message, context)
        site = int(str(context.node_config["partition-id"]))
        if site >= self._sites or message.metadata.message_type != "train" or reply.has_error():
            return reply
        fields: dict[str, Any] = dict(message.content.config_records["instruction"])
        honest = reply.content.array_records["meta_gradient"]["meta_gradient"].numpy()
        scalars = {n: v for n, v in reply.content.metric_records["scalars"].items() if n != "token"}
        lie = np.ascontiguousarray(self._change(honest), honest.dtype)
        return Message(pack_reply(Instruction(**fields), scalars, lie), reply_to=message)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Attributes
    ----------
    study : str
        Digest of its plan, the seed and the rule among it.
    liars : int
        How many sites lied.
    rule, attack : str
        Of `RULES` and `ATTACKS`.
    seed : int
        Of the initial theta, the training episodes and the meta-test episodes.
    accuracy : float or None
        Mean over the honest sites, after adaptation (0 to 1); None where theta was ruined so far that no round could
        go on.
    """

    study: str
    liars: int
    rule: str
    attack: str
    seed: int
    accuracy: float | None


def measure(
    study: Study, liars: int, rules: Sequence[str], attacks: Sequence[str], seeds: int, known: Sequence[Run] = ()
) -> Iterator[Run]:
    """Run every rule under every attack, seed after seed; a run that is ``known`` is not done again.

    Raises
    ------
    RoundError
        There are too few sites for so many liars under one of the rules; nothing has run.
    """
    plans = {rule: _with_rule(study, rule, liars) for rule in rules}
    have = {(run.study, run.liars, run.attack): run for run in known}
    prepare(study)
    for seed, rule, attack in product(range(study.study.seed, study.study.seed + seeds), rules, attacks):
        change, bound = ATTACKS[attack]
        plan = plans[rule].override({"aggregation.max-norm": bound, "study.seed": seed})
        yield have.get((plan.digest, liars, attack)) or Run(
            plan.digest, liars, rule, attack, seed, _accuracy(plan, liars, change)
        )


def _with_rule(study: Study, rule: str, liars: int) -> Study:
    tolerated = {"aggregation.tolerated": 0 if rule == "mean" else liars}
    plan = study.override({"aggregation.rule": rule, **tolerated, **RULES[rule]})
    if study.data.sites < sites_needed(plan.aggregation):
        raise RoundError(f"{study.data.sites} sites are too few: {explain_need(plan.aggregation)}")
    return plan


def _accuracy(study: Study, liars: int, change: Callable[[Vector], Vector] | None) -> float | None:
    try:
        with redirect_stdout(StringIO()):  # a line a round
            run_id, _ = run_in_process(study, client=Liar(liars, change) if change else None)
    except RoundError:
        return None
    result = json.loads((run_folder(run_id) / "result.json").read_text())
    sites = result["evaluations"][-1]["sites"]
    lying = {f"hospital-{i}" for i in range(liars)}
    name = "known.after.mean"
    return fmean(figures[name] for site, figures in sites.items() if site not in lying and name in figures)


@app.command(epilog="Example: python -m simulations.experiments.hostile --seeds 3 --json hostile.jsonl")
@plain_errors
def main(
    liars: Annotated[int, typer.Option(min=1, max=3, help="Hostile sites among the seven; f of the robust rules.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 120,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every rule under every attack.")] = 1,
    rules: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(RULES),
    differ: Annotated[bool, typer.Option("--differ", help="Every hospital has a scanner of its own.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Append a line a run to this file; what it holds is not run again.")
    ] = None,
) -> None:
    """Say what hostile sites cost under every aggregation rule, in points of accuracy."""
    study = Study().override({**_STUDY, "study.rounds": rounds, "data.partition": "natural" if differ else "iid"})
    known = _read(json_file) if json_file is not None and json_file.exists() else []
    runs = []
    for run in measure(study, liars, names(rules), list(ATTACKS), seeds, known):
        runs.append(run)
        if json_file is not None and run not in known:
            with json_file.open("a") as lines:
                lines.write(json.dumps(asdict(run)) + "\n")
    about = f"{liars} of 7 {'different' if differ else 'alike'} sites hostile, {rounds} rounds, {seeds} seed(s)"
    table = Table(title=f"{about}: accuracy at the honest sites in per cent, and against nobody lying")
    table.add_column("rule")
    for attack in ATTACKS:
        table.add_column(attack, justify="right")
    for rule in names(rules):
        table.add_row(rule, *(words([run for run in runs if run.rule == rule], attack) for attack in ATTACKS))
    Console(width=120).print(table)


def _read(file: Path) -> list[Run]:
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()]


def words(runs: Sequence[Run], attack: str) -> str:
    """Return a rule's mean accuracy under an attack, and what that is against its runs in which nobody lies.

    The change is paired: every seed has its own run without liars. Its 95 % interval is over the seeds; the rule holds
    where all of that is within the two points. One seed has no interval, and proves nothing.
    """
    clean = {run.seed: run.accuracy for run in runs if ATTACKS[run.attack][0] is None}
    pairs = [(clean[run.seed], run.accuracy) for run in runs if run.attack == attack]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if len(known) < len(pairs):
        return "ruined"
    mean = f"{100 * fmean(after for _, after in known):.1f}"
    if ATTACKS[attack][0] is None:
        return mean
    changes = [after - before for before, after in known]
    gain = fmean(changes)
    if len(changes) == 1:
        return f"{mean} ({100 * gain:+.1f})"
    half = student_t(len(changes) - 1) * stdev(changes) / sqrt(len(changes))
    return f"{mean} ({100 * gain:+.1f} ± {100 * half:.1f}{', holds' if gain - half >= -_POINTS else ''})"


if __name__ == "__main__":
    app()
