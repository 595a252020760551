"""Coordinator and sites as real processes that get real signals: whatever dies, the final theta has the same bits."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from common.study import Study
from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from tests.processes import CONTEXT, alive
from tests.server.scripted import Scripted, a_study
from tests.server.spool import coordinate, serve

SITES = (0, 1, 2)
KILLS = 28
FAILED = b'"event":"failed-attempt"'
#: Where the coordinator dies, and at which calls of it: module or class, function, before or after it.
TRAPS = {
    "after sending": ("tests.server.spool:SpoolGrid", "push_messages", "after", range(1, 6)),
    "while waiting": ("tests.server.spool:SpoolGrid", "pull_messages", "before", range(1, 30)),
    "before aggregation": ("server.aggregation:Aggregator", "result", "before", range(1, 4)),
    "after aggregation": ("server.aggregation:Aggregator", "result", "after", range(1, 4)),
    "after the step": ("server.outer:OuterOptimiser", "step", "after", range(1, 4)),
    "after the line of history": ("server.record:RunRecord", "round", "after", range(1, 4)),
    "in an evaluation": ("server.evaluation", "with_verdict", "before", range(1, 2)),
    "before a checkpoint": ("server.rounds", "store", "before", range(1, 5)),
    "with half a file": ("server.checkpoint", "write_durably", "half", range(1, 9)),
    "before a flush": ("os", "fsync", "before", range(1, 30)),
    "before the rename": ("os", "rename", "before", range(1, 5)),
    "after the rename": ("os", "rename", "after", range(1, 5)),
    "while old ones go": ("shutil", "rmtree", "before", range(1, 9)),
    "before the result": ("server.record:RunRecord", "finish", "before", range(1, 2)),
}


def spring(where: str, name: str, moment: str, call: int) -> None:
    """Make a call of a function the last thing that this process does."""
    from importlib import import_module

    module, _, kind = where.partition(":")
    owner: Any = getattr(import_module(module), kind) if kind else import_module(module)
    original, calls = getattr(owner, name), [0]

    def trapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and moment == "half":
            path, data = arguments
            path.write_bytes(data[: len(data) // 2])
        if calls[0] == call and moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        out = original(*arguments, **options)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    setattr(owner, name, trapped)


class Consortium:
    """Three sites and a coordinator, each a process that starts with everything imported."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder, self.study = folder, study
        self.processes: list[ForkServerProcess] = []
        self.sites = {site: self.start(serve, folder, site, study) for site in SITES}

    def start(self, work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
        process = CONTEXT.Process(target=work, args=arguments, daemon=True)
        process.start()
        self.processes.append(process)
        return process

    def coordinator(self, run_id: int, *, resume: bool, arm: Callable[[], None] | None = None) -> ForkServerProcess:
        return self.start(coordinate, self.folder, self.study, run_id, resume, arm)

    def end(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError, AttributeError):
                process.kill()
            process.join()


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Callable[[Study], Consortium]]:
    made: list[Consortium] = []

    def make(study: Study) -> Consortium:
        made.append(Consortium(tmp_path / str(len(made)), study))
        return made[-1]

    yield make
    for one in made:
        one.end()


def theta(run_id: int) -> bytes:
    return (run_folder(run_id) / "theta.safetensors").read_bytes()


def without_faults(study: Study) -> bytes:
    run_id, _ = run_in_process(study, client=Scripted(study))
    return theta(run_id)


def three(changes: dict[str, Any]) -> Study:
    return a_study({"sites.quorum": 3, "sites.held-out": "", "data.sites": 3, "sites.join-seconds": 30.0, **changes})


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_coordinator_is_killed_at_every_step_and_the_bits_stay(consortium: Callable[[Study], Consortium]) -> None:
    study = three(
        {
            "study.rounds": 12,
            "episodes.test-every": 4,
            "outer.average": 0.9,
            "outer.schedule": "cosine",
            "outer.clip": 3.0,
        }
    )
    truth = without_faults(study)
    seed = int(os.environ.get("WARDROUND_TEST_SEED", time.time_ns() % 10**6))
    print(f"WARDROUND_TEST_SEED={seed}")
    choose = random.Random(seed)
    together = consortium(study)
    left = list(TRAPS) * 2
    choose.shuffle(left)
    run_id, kills = 32_000_000, 0
    resume = False
    while left:
        name = left.pop()
        where, function, moment, calls = TRAPS[name]
        # The first calls of a life count: some of these traps are in the last act of a run.
        call = choose.choice(calls)
        coordinator = together.coordinator(run_id, resume=resume, arm=partial(spring, where, function, moment, call))
        coordinator.join()
        assert coordinator.exitcode in {0, -signal.SIGKILL}, name
        kills += coordinator.exitcode != 0
        resume = (run_folder(run_id) / "study.json").exists()
        if coordinator.exitcode == 0:  # it got through before its trap: its bits are right, and another run begins
            assert theta(run_id) == truth, name
            run_id, resume = run_id + 1, False
            if kills < KILLS:
                left.insert(0, choose.choice(list(TRAPS)))
    last = together.coordinator(run_id, resume=resume)
    last.join()
    assert last.exitcode == 0
    assert theta(run_id) == truth
    assert kills >= 25


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sites_that_die_sleep_or_are_replaced_are_waited_for(consortium: Callable[[Study], Consortium]) -> None:
    study = three({"study.rounds": 60, "sites.deadline-seconds": 1.0, "sites.attempts": 50})
    truth = without_faults(study)
    together = consortium(study)
    run_id = 33_000_000
    coordinator = together.coordinator(run_id, resume=False)

    def reach(number: int, file: str = "history.jsonl", word: bytes = b"\n") -> None:
        path = run_folder(run_id) / file
        until = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(word) < number:
            assert time.monotonic() < until
            assert coordinator.is_alive()
            time.sleep(0.01)

    def failed() -> int:
        return (run_folder(run_id) / "events.jsonl").read_bytes().count(FAILED)

    reach(5)  # killed, and replaced
    together.sites[1].kill()
    together.sites[1].join()
    reach(1, "events.jsonl", b'"event":"left"')
    together.sites[1] = together.start(serve, together.folder, 1, study)
    reach(20)  # asleep for longer than the deadline
    os.kill(together.sites[2].pid or 0, signal.SIGSTOP)
    reach(failed() + 1, "events.jsonl", FAILED)
    os.kill(together.sites[2].pid or 0, signal.SIGCONT)
    reach(40)  # replaced while it still sleeps: its message is left behind
    os.kill(together.sites[0].pid or 0, signal.SIGSTOP)
    time.sleep(0.3)
    together.sites[0].kill()
    together.sites[0].join()
    together.sites[0] = together.start(serve, together.folder, 0, study)
    coordinator.join()
    assert coordinator.exitcode == 0
    assert theta(run_id) == truth
    events = (run_folder(run_id) / "events.jsonl").read_text()
    assert '"event":"failed-attempt"' in events
    assert '"event":"late"' in events
    assert '"event":"left"' in events
    assert all(alive(process.pid or 0) for process in together.sites.values())
