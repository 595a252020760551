"""Five hundred rounds in which everything goes wrong, from a seed that is printed.

What must hold, whatever happens:

1.  The run ends, with a result, and every round is in the history once, in order, with the attempts that it took.
2.  No round has fewer sites than the quorum, or one that was not asked, or that sent rubbish, failed or left.
3.  A site is in, out, resting, idle or unknown in a round, never two of these; who is out has a word and a sentence,
    and who is resting is asked again later, or rests where the quorum needs it.
4.  Theta is one chain: every message of a round carried the theta that one plain Adam over the rounds before gives,
    from the history alone, bit for bit. Nothing counted twice, late or for another round, or the bits would differ.
5.  Whenever the coordinator dies, its last checkpoint is whole, and the logs up to its mark hold exactly its rounds.
6.  Every rejection in the history is an event too. No text of a site is in any file.
7.  Memory stays flat. In the last rounds the coordinator lives on, for it begins anew with each of its lives: all else
    still goes wrong.
"""

import gc
import json
import os
import random
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from common.contract import Instruction, Vector, theta_digest
from common.errors import RoundError
from common.meta import flatten
from common.study import Study
from server import checkpoint, exchange, roster, rounds
from server.aggregation import Aggregator
from server.checkpoint import KEPT, latest
from server.outer import OuterOptimiser
from server.record import RunRecord, run_folder
from server.rounds import initial_theta, run_study
from simulations.engines.inprocess import InProcessGrid
from tests.client.hospitals import enter_run
from tests.server.rubbish import CASES, PATIENT
from tests.server.scripted import Scripted, a_study, vector_of

ROUNDS, SITES, QUORUM = 500, 7, 3
EVERY = 50  # rounds from one evaluation to the next
CALM, WARM = 200, 250  # the last round in which the coordinator dies; from when memory is watched
# What may be added over all rounds that are watched: Python and its libraries keep some freed memory at hand.
GROWTH, OBJECTS = 64 * 1024, 40
NAMES = [f"hospital-{site}" for site in range(SITES)]
WORDS = {"no-reply", "unsent", "error", "unreadable", "away", *(case.why for case in CASES.values())}
# Without those that are slow, or right in the one round or attempt that they name.
RUBBISH = [name for name in CASES if not name.endswith(("10 MB", "another round", "another attempt"))]


class Restart(BaseException):
    """The coordinator dies."""


class Chaos:
    """Decides what goes wrong, and remembers what it did in the attempt at hand."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.thetas: dict[int, bytes] = {}  # digest by round
        self.attempt = (0, 0)
        self.what: dict[int, str] = {}
        self.outage = self.calm = False

    def fault(self, site: int, message: Message) -> str | int | None:
        """Choose what becomes of a message."""
        kind = message.metadata.message_type
        x = self.random.random()
        fault: str | int | None = None
        if kind == "train":
            instruction = message.content.config_records["instruction"]
            attempt = (int(str(instruction["round"])), int(str(instruction["attempt"])))
            if attempt != self.attempt:
                self.attempt, self.what = attempt, {}
                chance = 0.15 if attempt[1] == 1 else 0.5 * self.outage
                self.outage = self.random.random() < chance and not self.calm  # the network is down for most
                self.counts["outage"] += self.outage
            theta = bytes.fromhex(str(instruction["theta"]))
            assert self.thetas.setdefault(attempt[0], theta) == theta
            crash = 0.9 if self.outage else 0.06
            fault = "drop" if x < 0.03 else "crash" if x < crash else self.random.randrange(1, 9) if x < 0.12 else None
            self.what[site] = "delay" if isinstance(fault, int) else fault or "good"
        else:
            fault = "drop" if x < (0.2 if kind == "query.join" else 0.02) else None
        self.counts[f"{kind} {'delay' if isinstance(fault, int) else fault}"] += fault is not None
        return fault

    def spoil(self, site: int, instruction: Instruction, content: RecordDict, message: Message) -> RecordDict | Message:
        """Let a site send rubbish."""
        if instruction.kind != "train" or self.random.random() > 0.05:
            return content
        name = self.random.choice(RUBBISH)
        self.counts["rubbish"] += 1
        self.what[site] = "rubbish"
        return CASES[name].change(instruction, content, message)

    def dying(self, where: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that kills the coordinator, before or after its work, once in a while."""

        def mortal(*arguments: Any, **options: Any) -> Any:
            x = self.random.random()
            if x < 0.005:
                self.die(f"before {where}")
            out = call(*arguments, **options)
            if x > 0.995:
                self.die(f"after {where}")
            return out

        return mortal

    def die(self, where: str) -> None:
        if self.calm:
            return
        self.counts["restart"] += 1
        self.counts[f"restart {where}"] += 1
        raise Restart


class Client(Scripted):
    """Keeps no list of what it was asked: memory is watched."""

    def __call__(self, message: Message, context: Context) -> Message:
        answer = super().__call__(message, context)
        self.asked.clear()
        return answer


class Ward(InProcessGrid):
    """Sites leave and come back; replies come twice, or long after; the coordinator may die in any call."""

    chaos: Chaos
    old: deque[Message]
    gone: set[int]

    def get_nodes(self) -> Iterable[NodeInfo]:
        for site in range(self.sites):
            if self.chaos.random.random() < (0.3 if site in self.gone else 0.01):
                self.chaos.counts["came back" if site in self.gone else "left"] += 1
                self.gone ^= {site}
        return [info for site, info in enumerate(super().get_nodes()) if site not in self.gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        self._die("push")
        for index in range(len(sent)):
            if self.chaos.random.random() < 0.006:  # it left a moment ago
                self.chaos.counts["unsent"] += 1
                self._pending.pop(ids[index])
                ids[index] = ""
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._die("pull")
        replies = list(super().pull_messages(message_ids))
        x = self.chaos.random.random()
        if replies and x < 0.01:
            self.chaos.counts["twice"] += 1
            return replies * 2
        if self.old and x > 0.99:
            self.chaos.counts["again"] += 1
            return [self.chaos.random.choice(self.old), *replies]
        self.old.extend(replies)
        while len(self._delayed) > 3 * SITES:  # nobody asks for it any more
            self._delayed.pop(next(iter(self._delayed)))
        self.traffic.clear()
        return replies

    def _die(self, where: str) -> None:
        if self.chaos.random.random() < 0.0005:
            self.chaos.die(where)


class Watch:
    """Looks at every round as it ends, and at memory."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self.traced: dict[int, int] = {}  # bytes by round
        self.alive: dict[int, int] = {}  # objects of the coordinator and of Flower

    def round(self, line: Mapping[str, Any]) -> None:
        number, what = line["round"], self.chaos.what
        assert self.chaos.attempt == (number, line["attempt"])
        known = [set(line["sites"]), {r["site"] for r in line["out"]}, {r["site"] for r in line["resting"]},
                 set(line["idle"])]  # fmt: skip
        assert len(set.union(*known)) == sum(map(len, known)) <= SITES
        assert set.union(*known) <= set(NAMES)
        assert len(line["sites"]) >= QUORUM
        for name, figures in line["sites"].items():
            site = NAMES.index(name)
            assert what[site] in {"good", "delay"}, (number, name, what)
            assert figures == {"loss": 1.0 + site, "accuracy": 0.1 * (site + 1)}
        for refusal in line["out"]:
            assert refusal["why"] in WORDS
            assert refusal["reason"]
            site = NAMES.index(refusal["site"])
            assert what.get(site, refusal["why"]) != "good", (number, refusal, what)
        for resting in line["resting"]:
            assert resting["until"] > number
            assert NAMES.index(resting["site"]) not in what
        if number == CALM:
            self.chaos.calm = True
            tracemalloc.start()
        elif number in {WARM, ROUNDS}:
            gc.collect()
            snapshot = tracemalloc.take_snapshot().filter_traces(
                [tracemalloc.Filter(False, f"{Path(__file__).parent}/*"), tracemalloc.Filter(False, "*tracemalloc*")]
            )
            self.traced[number] = sum(statistic.size for statistic in snapshot.statistics("filename"))
            ours = ("server.", "common.", "flwr.")
            self.alive[number] = sum(str(type(thing).__module__).startswith(ours) for thing in gc.get_objects())

    def evaluation(self, line: Mapping[str, Any]) -> None:
        assert set(line["sites"]).isdisjoint(line["out"])

    def finish(self, result: Mapping[str, Any]) -> None:
        assert result["rounds"] == ROUNDS

    def close(self) -> None:
        """Nothing is open."""


def check_checkpoint(folder: Path) -> None:
    """Check that the last checkpoint is whole, and that the logs up to its mark hold exactly its rounds."""
    damaged: list[str] = []
    kept = latest(folder / "checkpoints", damaged.append)
    assert not damaged
    if kept is None:
        return
    for name, every in (("history.jsonl", 1), ("evaluations.jsonl", EVERY)):
        data = (folder / name).read_bytes()
        size = kept.about["logs"][name]
        assert len(data) >= size
        numbers = [json.loads(line)["round"] for line in data[:size].splitlines()]
        assert numbers == list(range(every, min(kept.round, ROUNDS - (every > 1)) + 1, every))


def chain(study: Study, lines: Iterable[Mapping[str, Any]]) -> list[Vector]:
    """Return theta before the first round and after every one, from the history alone."""
    parameter = torch.nn.Parameter(flatten(initial_theta(study)).clone())
    optimiser = torch.optim.Adam([parameter], lr=study.outer.rate)
    thetas: list[Vector] = [parameter.detach().numpy().copy()]
    for line in lines:
        total = np.zeros(parameter.numel(), np.float64)
        for site in sorted(NAMES.index(name) for name in line["sites"]):
            total += vector_of(site, line["round"], parameter.numel())
        parameter.grad = torch.from_numpy((total / len(line["sites"])).astype(np.float32))
        optimiser.step()
        thetas.append(parameter.detach().numpy().copy())
    return thetas


def restless(monkeypatch: pytest.MonkeyPatch, chaos: Chaos) -> None:
    """Give the coordinator a clock of its own, on which nobody waits, and let it die in the middle of its work."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    # With no other clock, the seed alone decides what happens.
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep, time=time.time)
    for module in (exchange, roster, rounds):
        monkeypatch.setattr(module, "time", clock)
    steps: Mapping[str, Any] = {
        "result": Aggregator,
        "step": OuterOptimiser,
        "round": RunRecord,
        "store": rounds,
        "flush": checkpoint,
    }
    for name, owner in steps.items():
        monkeypatch.setattr(owner, name, chaos.dying(name, getattr(owner, name)))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine dies here


def go_on_until_the_end(grid: Ward, study: Study, folder: Path) -> None:
    """Run the study, and resume it whenever its coordinator died or gave up."""

    def say(text: str) -> None:
        assert PATIENT not in text

    while True:
        resume = (folder / "study.json").exists()
        try:
            run_study(grid, study, RunRecord(folder, study, resume=resume), say, resume=resume)
            return
        except (Restart, RoundError) as error:
            grid.chaos.counts["gave up"] += isinstance(error, RoundError)
            grid.chaos.attempt = (0, 0)
            grid._pending.clear()  # Flower forgets the messages of a coordinator that is gone
            check_checkpoint(folder)


def check_chain(study: Study, folder: Path, lines: Sequence[Mapping[str, Any]], chaos: Chaos) -> None:
    """Check that theta went one way, the one that the history tells: in messages, checkpoints and result."""
    layout = {name: tuple(t.shape) for name, t in initial_theta(study).items()}
    digests = [theta_digest(theta, layout) for theta in chain(study, lines)]
    for number in range(1, ROUNDS + 1):
        assert chaos.thetas[number].hex() == digests[number - 1]
    result = json.loads((folder / "result.json").read_text())
    assert (result["rounds"], result["theta"]) == (ROUNDS, digests[ROUNDS])
    kept = sorted((folder / "checkpoints").iterdir())
    assert [int(path.name) for path in kept] == list(range(ROUNDS - KEPT + 1, ROUNDS + 1))
    for path in kept:
        state = json.loads((path / "state.json").read_text())
        assert state["about"]["theta"] == digests[state["round"]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_hundred_rounds_in_which_everything_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("WARDROUND_TEST_SEED", time.time_ns() % 10**6))
    print(f"WARDROUND_TEST_SEED={seed}")
    chaos = Chaos(seed)
    restless(monkeypatch, chaos)
    study = a_study(
        {
            "study.rounds": ROUNDS,
            "sites.held-out": "",
            "data.sites": SITES,
            "sites.quorum": QUORUM,
            "sites.per-round": SITES - 1,
            "sites.attempts": 2,
            "sites.rest-after": 2,
            "sites.deadline-seconds": 2.0,
            "sites.join-seconds": 5.0,
            "episodes.test-every": EVERY,
        }
    )
    enter_run()
    folder = run_folder(40 * 10**6 + seed)
    grid = Ward(Client(study, chaos.spoil), study.run_config(), SITES, chaos.fault)
    grid.chaos, grid.old, grid.gone = chaos, deque(maxlen=20), set()
    watch = Watch(chaos)
    try:
        monkeypatch.setattr(rounds, "open_trackers", lambda *_: watch)
        go_on_until_the_end(grid, study, folder)
    finally:
        tracemalloc.stop()
    print(dict(chaos.counts), watch.traced, watch.alive)

    lines = read(folder / "history.jsonl")
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    assert all(1 <= line["attempt"] <= study.sites.attempts for line in lines)
    check_chain(study, folder, lines, chaos)
    check_checkpoint(folder)
    rejected = {where(event, event) for event in read(folder / "events.jsonl") if event["event"] == "rejected"}
    out = {where(line, refusal) for line in lines for refusal in line["out"] if refusal["why"] != "away"}
    assert out <= rejected
    for path in folder.rglob("*"):
        assert path.is_dir() or PATIENT.encode() not in path.read_bytes()
    assert watch.traced[ROUNDS] - watch.traced[WARM] < GROWTH
    assert watch.alive[ROUNDS] - watch.alive[WARM] < OBJECTS

    happened = {what for what, count in chaos.counts.items() if count}
    assert {"train drop", "train crash", "train delay", "rubbish", "left", "came back", "unsent", "twice"} <= happened
    assert {"again", "query.join drop", "restart", "outage", "gave up"} <= happened
    assert len(out) > ROUNDS / 10
    assert any(line["resting"] for line in lines)
    assert any(line["attempt"] > 1 for line in lines)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def where(line: Mapping[str, Any], refusal: Mapping[str, Any]) -> tuple[Any, ...]:
    return (line.get("round"), line.get("attempt"), refusal["site"], refusal["why"])
