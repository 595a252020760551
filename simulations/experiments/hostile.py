"""`python -m simulations.experiments.hostile`: what hostile sites do to a study, under every aggregation rule.

Seven phantom hospitals train together, with the real apps over the in-process Grid. Some of them lie about their
meta-gradient in every round; what theta gives is then measured at the honest ones, on the same meta-test episodes in
every run. A rule holds an attack if that costs no more than two points against its own run in which nobody lies.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import fmean
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
from common.study import Study
from server.aggregation import explain_need, sites_needed
from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from simulations.prepare import prepare

__all__ = ["ATTACKS", "RULES", "Liar", "app", "measure"]

_POINTS = 0.02  # what an attack may cost
_CLIP = 20.0  # the bound on a reply's norm, where an attack stays within it: no honest reply is longer

_STUDY: Mapping[str, bool | int | float | str] = {
    "study.id": "hostile",
    "study.title": "Hostile sites",
    "sites.held-out": "",
    "model.width": 8,
    "algorithm.name": "fomaml",
    "algorithm.inner-rate": 0.1,
    "algorithm.test-rate": 0.1,
    "algorithm.test-steps": 2,
    "episodes.labels": "fixed",
    "episodes.classes": "disc,ring,cross",
    "episodes.held-out": "",
    "episodes.ways": 3,
    "episodes.queries": 8,
    "episodes.per-round": 2,
    "episodes.test-episodes": 60,
    "episodes.scratch-steps": 0,
    "outer.rate": 0.01,
    "outer.clip": 0.0,
    "data.sites": 7,
    "data.patients-per-class": 30,
    "data.test-fraction": 0.5,
}

#: What every rule needs beside the number of hostile sites, which is f.
RULES: Mapping[str, Mapping[str, bool | int | float | str]] = {
    "mean": {},
    "median": {},
    "trimmed-mean": {},
    "krum": {},
    "multi-krum": {"aggregation.selected": 3},
    "centred-clipping": {"aggregation.radius": 1.0, "aggregation.momentum": 0.9},
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


def measure(study: Study, liars: int, rules: Sequence[str], attacks: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """Run every rule under every attack.

    Returns
    -------
    list of dict
        Rule, attack, and the accuracies of the seeds: mean over the honest sites, after adaptation (0 to 1); None
        where theta was ruined so far that no round could go on.

    Raises
    ------
    RoundError
        There are too few sites for so many liars under one of the rules.
    """
    plans = {rule: _with_rule(study, rule, liars) for rule in rules}
    prepare(study)
    results = []
    for rule in rules:
        for attack in attacks:
            change, bound = ATTACKS[attack]
            plan = plans[rule].override({"aggregation.max-norm": bound})
            accuracies = [
                _accuracy(plan.override({"study.seed": study.study.seed + i}), liars, change) for i in range(seeds)
            ]
            results.append({"rule": rule, "attack": attack, "accuracies": accuracies})
    return results


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


@app.command(epilog="Example: python -m simulations.experiments.hostile --rules mean,median --json hostile.json")
@plain_errors
def main(
    liars: Annotated[int, typer.Option(min=1, max=3, help="Hostile sites among the seven; f of the robust rules.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 120,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every rule under every attack.")] = 1,
    rules: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(RULES),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Say what hostile sites cost under every aggregation rule, in points of accuracy."""
    from common.study import names

    study = Study().override({**_STUDY, "study.rounds": rounds})
    results = measure(study, liars, names(rules), list(ATTACKS), seeds)
    table = Table(title=f"{liars} of 7 sites hostile, {rounds} rounds: accuracy at the honest sites in per cent")
    table.add_column("rule")
    for attack in ATTACKS:
        table.add_column(attack, justify="right", no_wrap=True)
    for rule in names(rules):
        mine = {r["attack"]: r["accuracies"] for r in results if r["rule"] == rule}
        clean = fmean(mine["nobody lies"])
        table.add_row(rule, *(_words(mine[attack], clean, change is None) for attack, (change, _) in ATTACKS.items()))
    Console(width=120).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


def _words(accuracies: Sequence[float | None], clean: float, is_clean: bool) -> str:
    known = [a for a in accuracies if a is not None]
    if len(known) < len(accuracies):
        return "ruined"
    if is_clean:
        return f"{100 * clean:.1f}"
    cost = clean - fmean(known)
    return f"{100 * fmean(known):.1f} ({-100 * cost:+.1f}{', holds' if cost <= _POINTS else ''})"


if __name__ == "__main__":
    app()
