"""The round loop: sites join, then train and step, then evaluation at every site."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from common.contract import Instruction, Vector, pack_instruction, theta_digest
from common.errors import ContractError, NotPreparedError, RoundError
from common.meta import flatten, head_size, make_learner, unflatten
from common.meta.local_only import LocalOnly
from common.models import build
from common.study import Study
from server.aggregation import Aggregator, explain_need, sites_needed
from server.exchange import Answer, Refusal, exchange
from server.outer import OuterOptimiser
from server.record import RunRecord

__all__ = ["initial_theta", "run_study"]

Say = Callable[[str], None]
Nodes = Mapping[str, int]


def initial_theta(study: Study) -> dict[str, Tensor]:
    """Return a study's theta before the first round, by tensor name."""
    dtype = torch.float64 if study.wire.dtype == "float64" else torch.float32
    classes = head_size(study.algorithm, study.episodes)
    network = build(study.model, classes=classes, seed=study.study.seed, dtype=dtype)
    return make_learner(study.algorithm).theta(network)


def run_study(grid: Grid, study: Study, record: RunRecord, say: Say = print) -> None:
    """Run a study from its first round to its result.

    Raises
    ------
    RoundError
        Too few sites joined, or too few replies of a round passed the contract, for the quorum or for the rule.
    NotPreparedError
        No site has images for this study.
    """
    layout = initial_theta(study)
    optimiser = OuterOptimiser(study.outer, flatten(layout).numpy(), study.study.rounds)
    sites, refusals = _join(grid, study, say)
    training = {name: node for name, node in sites.items() if name not in study.sites.held_out_names}
    _need(study, len(training), "joined", refusals)
    aggregator = Aggregator(study.aggregation, optimiser.theta.size, list(training))
    rounds = 0 if study.algorithm.name == LocalOnly.name else study.study.rounds
    say(
        f"study {study.study.id} ({study.digest[:12]}): {study.algorithm.name}, {rounds} rounds, "
        f"{len(training)} sites train, {len(sites) - len(training)} held out, theta has {optimiser.theta.size} numbers"
    )
    say("privacy: no formal guarantee (privacy.mechanism = 'none')")
    # Theta is to prove itself at the sites that never train: only they are asked on the way and from scratch.
    judges = {name: node for name, node in sites.items() if name not in training} or sites
    rest = {name: node for name, node in sites.items() if name not in judges}
    evaluations = []
    for number in range(1, rounds + 1):
        line = _train(grid, study, layout, optimiser, aggregator, training, number)
        record.round(line)
        say(_in_words(line, rounds))
        every = study.episodes.test_every
        if every and number % every == 0 and number < rounds:
            scores = _evaluate(grid, study, layout, optimiser.theta, judges, number, scratch=False)
            evaluations.append({"round": number, **scores})
    scores = _evaluate(grid, study, layout, optimiser.theta, rest, rounds, scratch=False)
    more = _evaluate(grid, study, layout, optimiser.theta, judges, rounds, scratch=True)
    evaluations.append({"round": rounds, **{key: scores[key] | more[key] for key in scores}})
    result = {
        "study": study.digest,
        "theta": _digest(optimiser.theta, layout),
        "numbers_up_per_reply": optimiser.theta.size,
        "rounds": rounds,
        "evaluations": evaluations,
    }
    record.finish(result, unflatten(torch.from_numpy(optimiser.theta), layout))


def _join(grid: Grid, study: Study, say: Say) -> tuple[Nodes, list[Refusal]]:
    """Return the sites that take part, in their fixed order, and why others do not."""
    wanted = study.sites.quorum + len(study.sites.held_out_names)
    until = time.monotonic() + study.sites.join_seconds
    while len(found := sorted(grid.get_node_ids())) < wanted and time.monotonic() < until:
        time.sleep(0.1)
    named = {info.node_id: info.name for info in grid.get_nodes() if info.name}
    for name in named.values():
        _only_one(name, named.values())
    instruction = Instruction("join", study.digest)
    sites: dict[str, int] = {}
    refusals: list[Refusal] = []
    nodes = {named.get(node, f"node {node}"): node for node in found}
    for node, outcome in zip(found, _ask(grid, study, nodes, instruction, None), strict=True):
        if isinstance(outcome, Refusal):
            refusals.append(outcome)
            say(f"site out: {outcome.site}: {outcome.reason}")
            continue
        # An authenticated name is the site's identity; simulated nodes have none and say which site they are.
        name = named.get(node, f"hospital-{int(outcome.reply.scalars['site'])}")
        _only_one(name, [*sites, name])
        sites[name] = node
    if refusals and not sites and {r.code for r in refusals} == {NotPreparedError.code}:
        raise NotPreparedError(
            "no site has images prepared for this study: type `wardround-lab prepare STUDY.toml` "
            "(the default study needs no argument)"
        )
    if missing := set(study.sites.held_out_names) - set(sites):
        names = ", ".join(sorted(missing))
        raise RoundError(f"sites.held-out names sites that did not join: {names}{_reasons(refusals)}")
    return {name: sites[name] for name in sorted(sites, key=_natural)}, refusals


def _only_one(name: str, taken: Iterable[str]) -> None:
    if [*taken].count(name) > 1:
        raise RoundError(f"two nodes say that they are {name}: every site has one node")


def _train(
    grid: Grid,
    study: Study,
    layout: Mapping[str, Tensor],
    optimiser: OuterOptimiser,
    aggregator: Aggregator,
    sites: Nodes,
    number: int,
) -> dict[str, Any]:
    """Run one round, step theta, and return the round's line of history."""
    began = time.monotonic()
    theta = optimiser.theta
    instruction = Instruction("train", study.digest, number, 1, _digest(theta, layout))
    aggregator.begin()
    scalars: dict[str, dict[str, float]] = {}
    refusals: list[Refusal] = []
    for outcome in _ask(grid, study, sites, instruction, theta):
        if isinstance(outcome, Refusal):
            refusals.append(outcome)
        elif outcome.reply.vector is not None:
            try:
                aggregator.add(outcome.site, outcome.reply.vector)
            except ContractError as error:
                refusals.append(Refusal(outcome.site, error.code, str(error)))
                continue
            scalars[outcome.site] = dict(outcome.reply.scalars)
    _need(study, aggregator.count, f"gave a valid reply in round {number}", refusals)
    gradient = aggregator.result()
    optimiser.step(gradient)
    return {
        "round": number,
        "sites": scalars,
        "out": [vars(r) for r in refusals],
        "gradient_norm": float((gradient**2).sum() ** 0.5),
        "bytes_up": theta.nbytes * len(scalars),
        "bytes_down": theta.nbytes * len(sites),
        "seconds": time.monotonic() - began,
    }


def _evaluate(
    grid: Grid,
    study: Study,
    layout: Mapping[str, Tensor],
    theta: Vector,
    sites: Nodes,
    number: int,
    *,
    scratch: bool,
) -> dict[str, dict[str, Any]]:
    """Return every site's evaluation scalars, those that it cannot offer left out, and why a site gave none."""
    instruction = Instruction("evaluate", study.digest, number, 1, _digest(theta, layout), scratch)
    scores: dict[str, dict[str, float]] = {}
    out: dict[str, str] = {}
    for outcome in _ask(grid, study, sites, instruction, theta):
        if isinstance(outcome, Refusal):
            out[outcome.site] = outcome.reason
        else:
            figures = outcome.reply.scalars
            offered = {name.rpartition(".")[0] for name, v in figures.items() if name.endswith("error") and v >= 0}
            scores[outcome.site] = {n: v for n, v in figures.items() if n.rpartition(".")[0] in offered}
    return {"sites": scores, "out": out}


def _ask(
    grid: Grid, study: Study, nodes: Nodes, instruction: Instruction, theta: Vector | None
) -> Iterator[Answer | Refusal]:
    size, dtype = (0, study.wire.dtype) if theta is None else (theta.size, str(theta.dtype))
    content = pack_instruction(instruction, theta)
    return exchange(grid, nodes, instruction, content, size=size, dtype=dtype, seconds=study.sites.deadline_seconds)


def _need(study: Study, count: int, what: str, refusals: list[Refusal]) -> None:
    if count < max(study.sites.quorum, sites_needed(study.aggregation)):
        short = f"sites.quorum is {study.sites.quorum}"
        if count < sites_needed(study.aggregation):
            short = explain_need(study.aggregation)
        raise RoundError(
            f"{count} training sites {what}, {short}: start more sites "
            f"(in simulation: --federation-config 'num-supernodes={study.data.sites}'){_reasons(refusals)}"
        )


def _reasons(refusals: list[Refusal]) -> str:
    return "".join(f"\n  {r.site}: {r.reason}" for r in refusals)


def _digest(theta: Vector, layout: Mapping[str, Tensor]) -> str:
    return theta_digest(theta, {name: tuple(t.shape) for name, t in layout.items()})


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: hospital-2 before hospital-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _in_words(line: Mapping[str, Any], rounds: int) -> str:
    scalars = line["sites"]
    loss = sum(s["loss"] for s in scalars.values()) / len(scalars)
    hits = sum(s["accuracy"] for s in scalars.values()) / len(scalars)
    worst = min(scalars, key=lambda name: scalars[name]["accuracy"])
    out = "".join(f"  out: {r['site']} ({r['reason']})" for r in line["out"])
    return (
        f"round {line['round']:>{len(str(rounds))}}/{rounds}  loss {loss:.3f}  accuracy {hits:.3f}  "
        f"worst {worst} {scalars[worst]['accuracy']:.3f}  {line['bytes_up'] / 1e6:.2f} MB up  "
        f"{line['seconds']:.1f} s{out}"
    )
