"""The round loop: sites join, then train and step, then evaluation at every site; and it can begin anywhere."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from common.contract import Instruction, Side, Vector, pack_instruction, theta_digest
from common.errors import ContractError, RoundError
from common.meta import flatten, head_size, make_learner, unflatten
from common.meta.local_only import LocalOnly
from common.models import build
from common.privacy.site_task import check_network
from common.privacy.statement import guarantee
from common.study import Study
from server.aggregation import Aggregator, explain_need, sites_needed
from server.checkpoint import Checkpoint, latest, store
from server.clock import Clock
from server.evaluation import Best, evaluate, with_verdict
from server.exchange import Exchange, Refusal
from server.outer import OuterOptimiser
from server.record import RunRecord
from server.roster import Choice, Roster
from server.tracking import open_trackers
from server.words import in_words, means

__all__ = ["initial_theta", "run_study"]

Say = Callable[[str], None]
Line = dict[str, Any]

#: Rounds that the time left is estimated from.
_RECENT = 10
#: Before a round is tried again; twice as long each time. What made it fail may take a while to pass.
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


def initial_theta(study: Study) -> dict[str, Tensor]:
    """Return a study's theta before the first round, by tensor name."""
    dtype = torch.float64 if study.wire.dtype == "float64" else torch.float32
    classes = head_size(study.algorithm, study.episodes)
    network = build(study.model, classes=classes, seed=study.study.seed, dtype=dtype)
    check_network(study, network)
    return make_learner(study.algorithm).theta(network)


def run_study(
    grid: Grid,
    study: Study,
    record: RunRecord,
    say: Say = print,
    *,
    resume: bool = False,
    track: str = "",
) -> None:
    """Run a study to its result, from its first round or from the last checkpoint.

    Parameters
    ----------
    say : callable
        Gets a line of text a round, and what else a person should know.
    resume : bool
        Go on with what the record holds.
    track : str
        Where figures go besides the record: see `server.tracking.open_trackers`.

    Raises
    ------
    RoundError
        Too few sites joined, or in every attempt of a round too few replies passed the contract, for the quorum or for
        the rule. The run can be resumed.
    NotPreparedError
        No site has images for this study.
    StorageError
        The record cannot be written.
    """
    _Run(grid, study, record, say).run(resume=resume, track=track)


class _Run:
    """One run in progress: what a round changes, and what it needs."""

    def __init__(self, grid: Grid, study: Study, record: RunRecord, say: Say) -> None:
        self.study, self.record, self.say = study, record, say
        self.needed = max(study.sites.quorum, sites_needed(study.aggregation))
        self.exchange = Exchange(grid, record.event)
        self.roster = Roster(study, self.exchange, record.event, self.needed)
        self.layout = initial_theta(study)
        self.rounds = 0 if study.algorithm.name == LocalOnly.name else study.study.rounds
        self.outer = OuterOptimiser(study.outer, flatten(self.layout).numpy(), study.study.rounds)
        self.clock = Clock()
        self.round = 0
        self.best: Best | None = None
        self.recent: list[float] = []

    def run(self, *, resume: bool, track: str) -> None:
        study = self.study
        checkpoint = latest(self.record.folder / "checkpoints", self._warn) if resume else None
        self.record.status(state="joining", round=checkpoint.round if checkpoint else 0, rounds=self.rounds)
        if checkpoint:
            self.roster.restore(checkpoint.about["roster"])
        self._join()
        names = list(self.roster.nodes(held_out=False))
        self.aggregator = Aggregator(study.aggregation, self.outer.theta.size, names)
        if checkpoint:
            self._restore(checkpoint)
        self.record.event("resumed" if resume else "started", round=self.round)
        never = len(self.roster.nodes(held_out=True))
        self.say(
            f"study {study.study.id} ({study.digest[:12]}): {study.algorithm.name}, {self.rounds} rounds, "
            f"{len(names)} sites train, {never} held out, theta has {self.outer.theta.size} numbers"
            + (f"; resumed after round {self.round}" if resume else "")
        )
        self.say(f"privacy: {guarantee(study)}")
        if not checkpoint:
            self._checkpoint()
        with closing(open_trackers(track, self.record.folder, study, self.say)) as self.trackers:
            while self.round < self.rounds and not self._patience_is_over():
                self._one_round(self.round + 1)
            self._conclude()

    def _join(self) -> None:
        self.roster.gather(start=True)
        for refusal in self.roster.refusals:
            self.say(f"site out: {refusal.site}: {refusal.reason}")
        if missing := set(self.study.sites.held_out_names) - set(self.roster.nodes(held_out=True)):
            names = ", ".join(sorted(missing))
            raise RoundError(f"sites.held-out names sites that did not join: {names}{_reasons(self.roster.refusals)}")
        self._need(len(self.roster.nodes(held_out=False)), "joined", self.roster.refusals)

    def _one_round(self, number: int) -> None:
        """Train, step, evaluate where it is due, and make the round durable; only then is it complete."""
        line = self._train(number)
        self.round = number
        self.recent = [*self.recent, line["seconds"]][-_RECENT:]
        line["seconds_left"] = (self.rounds - number) * sum(self.recent) / len(self.recent)
        self.record.round(line)
        self.trackers.round(line)
        self.say(in_words(line, self.rounds))
        self.record.status(now=False, **means(line), seconds_left=line["seconds_left"])
        every = self.study.episodes.test_every
        if every and number % every == 0 and number < self.rounds and self.study.privacy.figures == "sent":
            self._evaluate_on_the_way()
        self._checkpoint()

    def _train(self, number: int) -> Line:
        """Run a round's attempts until one reaches the quorum, step theta, and return the round's line of history."""
        began, moved, waited = time.monotonic(), self.exchange.transport_seconds, self.exchange.waiting_seconds
        theta = self.outer.theta
        digest = self._digest(theta)
        down = 0
        for attempt in range(1, self.study.sites.attempts + 1):
            if attempt > 1:
                time.sleep(min(_PAUSE_SECONDS * 2 ** (attempt - 2), _LONGEST_PAUSE_SECONDS))
                self.roster.gather(number)
            else:
                self.roster.refresh(number)
            choice = self.roster.choose(number, attempt)
            asked = list(choice.asked)
            sites = self._sites(choice)
            self.record.status(state="training", round=number, attempt=attempt, waiting_for=asked, sites=sites)
            try:
                scalars, refusals = self._attempt(number, attempt, choice, theta, digest)
            finally:  # also where Flower has ended the run for it
                if happened := self.clock.was_set():
                    self.record.event("clock", round=number, reason=happened)
                    self.say(f"warning: {happened}")
            short = self.aggregator.count < self.needed
            self.record.status(now=short, waiting_for=[], sites=self._sites(choice))
            down += theta.nbytes * len(choice.asked)
            if not short:
                break
            out = [vars(refusal) for refusal in refusals]
            self.record.event("failed-attempt", round=number, attempt=attempt, valid=len(scalars), out=out)
        else:
            self._need(len(scalars), f"gave a valid reply in round {number}", refusals, resumable=True)
        gradient = self.aggregator.result()
        self.outer.step(gradient)
        seconds = time.monotonic() - began
        transport, waiting = self.exchange.transport_seconds - moved, self.exchange.waiting_seconds - waited
        return {
            "round": number,
            "attempt": attempt,
            "at": time.time(),
            "sites": scalars,
            "out": [vars(refusal) for refusal in refusals],
            "resting": [{"site": name, "until": until} for name, until in choice.resting.items()],
            "idle": list(choice.idle),
            "gradient_norm": float((gradient**2).sum() ** 0.5),
            "bytes_up": theta.nbytes * len(scalars),
            "bytes_down": down,
            "seconds": seconds,
            "transport_seconds": transport,
            "waiting_seconds": waiting,
            "compute_seconds": max(0.0, seconds - transport - waiting),
        }

    def _attempt(
        self, number: int, attempt: int, choice: Choice, theta: Vector, digest: str
    ) -> tuple[dict[str, dict[str, float]], list[Refusal]]:
        """Ask the chosen sites once; what counts is in the aggregator."""
        instruction = Instruction("train", self.study.digest, number, attempt, digest)
        content = pack_instruction(instruction, theta)
        self.aggregator.begin(list(choice.asked))
        scalars: dict[str, dict[str, float]] = {}
        refusals = [Refusal(name, 0, "away", "not connected") for name in choice.away]
        waiting = list(choice.asked)
        for outcome in self.exchange.ask(
            choice.asked,
            instruction,
            content,
            size=theta.size,
            dtype=str(theta.dtype),
            seconds=self.study.sites.deadline_seconds,
        ):
            waiting.remove(outcome.site)
            self.record.status(now=False, waiting_for=waiting)
            refusal = outcome if isinstance(outcome, Refusal) else None
            if not isinstance(outcome, Refusal) and outcome.reply.vector is not None:
                try:
                    self.aggregator.add(outcome.site, outcome.reply.vector)
                    scalars[outcome.site] = dict(outcome.reply.scalars)
                    self.roster.answered(outcome.site, number)
                except ContractError as error:
                    refusal = Refusal(outcome.site, error.code, error.why, str(error))
            if refusal:
                refusals.append(refusal)
                self.roster.failed(refusal, number)
                self.record.event("rejected", round=number, attempt=attempt, **vars(refusal))
        return scalars, refusals

    def _evaluate_on_the_way(self) -> None:
        theta = self.outer.published
        line = self._evaluate(theta, "validation", scratch=False)
        if line["score"] is not None:
            before = self.best or Best(-1.0, 0, theta)
            self.best = before.after(line["score"], self.round, theta)
        line["best"] = self.best is not None and self.best.round == self.round
        self._keep_evaluation(line)

    def _evaluate(self, theta: Vector, side: Side, *, scratch: bool) -> Line:
        self.record.status(state="evaluating", waiting_for=[])
        self.roster.refresh()
        digest = self._digest(theta)
        line = evaluate(self.exchange, self.study, self.roster, theta, digest, self.round, side, scratch=scratch)
        return with_verdict(self.study, line)

    def _keep_evaluation(self, line: Line) -> None:
        line = {**line, "at": time.time()}
        self.record.evaluation(line)
        self.trackers.evaluation(line)

    def _patience_is_over(self) -> bool:
        patience = self.study.outer.patience
        return bool(patience and self.best and self.best.worse >= patience)

    def _conclude(self) -> None:
        """Evaluate the theta that is published at every site, and write the result."""
        theta, source = self.outer.published, "average" if self.study.outer.average else "last"
        if self.study.outer.patience and self.best:
            theta, source = self.best.theta, "best"
        if self._patience_is_over():
            self.record.event("stopped-early", round=self.round)
            patience = self.study.outer.patience
            self.say(f"no better theta in {patience} evaluations: the best one is of round {self.best_round}")
        if self.study.privacy.figures == "sent":
            self._keep_evaluation({**self._evaluate(theta, "test", scratch=True), "best": source == "best"})
        result = {
            "study": self.study.digest,
            "theta": self._digest(theta),
            "theta_from": source,
            "best_round": self.best_round,
            "numbers_up_per_reply": theta.size,
            "rounds": self.round,
            "evaluations": [{k: v for k, v in line.items() if k != "at"} for line in self.record.evaluations()],
        }
        self.record.finish(result, unflatten(torch.from_numpy(theta), self.layout))
        self.trackers.finish(result)

    @property
    def best_round(self) -> int | None:
        return self.best.round if self.best else None

    def _checkpoint(self) -> None:
        tensors, about = self.outer.state()
        arrays = {f"outer.{name}": tensor for name, tensor in tensors.items()}
        arrays |= {f"rule.{name}": torch.from_numpy(array) for name, array in self.aggregator.state().items()}
        best: dict[str, Any] = {}
        if self.best:
            arrays["best"] = torch.from_numpy(self.best.theta)
            best = {"score": self.best.score, "round": self.best.round, "worse": self.best.worse}
        state = {
            "study": self.study.digest,
            "theta": self._digest(self.outer.theta),
            "outer": about,
            "best": best,
            "roster": self.roster.state(),
            "logs": self.record.sizes(),
        }
        store(self.record.folder / "checkpoints", Checkpoint(self.round, arrays, state))

    def _restore(self, checkpoint: Checkpoint) -> None:
        arrays, about = checkpoint.tensors, checkpoint.about
        self.round = checkpoint.round
        self.outer.restore(_under("outer.", arrays), about["outer"])
        self.aggregator.restore({name: array.numpy() for name, array in _under("rule.", arrays).items()})
        if about["best"]:
            self.best = Best(theta=arrays["best"].numpy(), **about["best"])
        self.record.rewind(about["logs"])

    def _warn(self, text: str) -> None:
        self.record.event("damaged", reason=text)
        self.say(f"warning: {text}")

    def _sites(self, choice: Choice) -> dict[str, Any]:
        """Return how every site stands, for the status."""
        return {
            name: {
                "role": "held-out" if site.held_out else "trains",
                "state": "out"
                if site.node is None or site.reason
                else "resting"
                if name in choice.resting
                else "idle"
                if name in choice.idle
                else "in",
                "failures": site.failures,
                "last_round": site.last_round or None,
                "reason": site.reason,
            }
            for name, site in self.roster.sites.items()
        }

    def _need(self, count: int, what: str, refusals: Sequence[Refusal], *, resumable: bool = False) -> None:
        if count >= self.needed:
            return
        plan = self.study.aggregation
        robust = plan.rule != "mean" and count < sites_needed(plan)
        short = explain_need(plan) if robust else f"sites.quorum is {self.study.sites.quorum}"
        more = (
            "what was learned is kept: when the sites are back, resume the run"
            if resumable
            else f"start more sites (in simulation: --federation-config 'num-supernodes={self.study.data.sites}')"
        )
        raise RoundError(f"{count} training sites {what}, {short}: {more}{_reasons(refusals)}")

    def _digest(self, theta: Vector) -> str:
        return theta_digest(theta, {name: tuple(t.shape) for name, t in self.layout.items()})


def _under(prefix: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _reasons(refusals: Sequence[Refusal]) -> str:
    return "".join(f"\n  {r.site}: {r.reason}" for r in refusals)
