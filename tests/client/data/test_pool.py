"""Workers that hang, die or lag behind: real signals to real processes, and nothing is lost but their own task."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.data.pool import CRASHED, TOO_SLOW, Failure, run_in_workers

LARGE = 2**22


@dataclass(frozen=True)
class Task:
    number: int
    does: str = ""
    payload: bytes = b""


def work(task: Task) -> Iterator[object]:
    """Yield three results, and misbehave after the first where the task says so."""
    if task.does == "report":
        yield os.getpid(), resource.getrlimit(resource.RLIMIT_CORE), signal.getsignal(signal.SIGINT)
        return
    if task.does == "die first":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.does == "large":
        yield bytes(LARGE)
        return
    if task.does == "many":
        yield from range(200)
        return
    if task.does == "print":
        os.write(1, b"a name in the file\n")
        os.write(2, b"a name in the file\n")
    yield task.number, 0
    if task.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.does == "segfault":
        ctypes.string_at(0)
    if task.does == "hang":
        while True:
            time.sleep(60)
    if task.does == "slow":
        time.sleep(0.05)
    yield task.number, 1
    yield task.number, 2


def outcome(tasks: list[Task], **options: float) -> list[tuple[int, list[object]]]:
    arguments = {"workers": 2, "seconds": 20.0, **options}
    return [
        (task.number, list(results))
        for task, results in run_in_workers(work, tasks, **arguments)  # type: ignore[arg-type]
    ]


def whole(number: int) -> tuple[int, list[object]]:
    return number, [(number, 0), (number, 1), (number, 2)]


def descendants() -> set[int]:
    """Return the processes below this one, but for the fork server and the resource tracker themselves."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(folder.name)] = int(fields[1])
    helpers = {child for child, parent in parents.items() if parent == os.getpid()}
    return {child for child, parent in parents.items() if parent in helpers}


def test_results_come_in_the_order_of_the_tasks() -> None:
    tasks = [Task(i, "slow" if i % 2 else "") for i in range(20)]
    assert outcome(tasks) == [whole(i) for i in range(20)]
    assert descendants() == set()


def test_one_worker_and_no_task() -> None:
    assert outcome([], workers=1) == []
    assert outcome([Task(7)], workers=1, ahead=1) == [whole(7)]


@pytest.mark.parametrize("does", ["die", "segfault"])
def test_a_worker_that_dies_costs_its_task_alone(does: str) -> None:
    bad = {3, 4, 19, 39}
    tasks = [Task(i, does if i in bad else "") for i in range(40)]
    expected = [(i, [(i, 0), Failure(CRASHED)]) if i in bad else whole(i) for i in range(40)]
    assert outcome(tasks) == expected


def test_a_worker_that_dies_while_it_is_told_of_more() -> None:
    def tasks() -> Iterator[Task]:
        for i in range(12):
            yield Task(i, "die first" if i < 4 else "")
            time.sleep(0.1)  # long enough to be dead before the next one is sent

    got = [(task.number, list(results)) for task, results in run_in_workers(work, tasks(), workers=2, seconds=20)]
    assert got == [(i, [Failure(CRASHED)]) if i < 4 else whole(i) for i in range(12)]


def test_every_worker_dies_on_every_task() -> None:
    assert outcome([Task(i, "die first") for i in range(8)]) == [(i, [Failure(CRASHED)]) for i in range(8)]


def test_a_worker_that_hangs_is_given_up() -> None:
    tasks = [Task(i, "hang" if i in {1, 2} else "") for i in range(6)]
    assert outcome([Task(0)]) == [whole(0)]  # the fork server may take seconds to start, which is nobody's hanging
    started = time.monotonic()
    got = outcome(tasks, seconds=4.0)
    assert got == [(i, [(i, 0), Failure(TOO_SLOW)]) if i in {1, 2} else whole(i) for i in range(6)]
    assert time.monotonic() - started < 60  # the tasks would sleep for ever
    assert descendants() == set()


def test_large_results_wait_in_the_workers() -> None:
    # 60 results of 4 MiB: were they taken in advance, this process would hold hundreds of MiB.
    tasks = [Task(i, "large") for i in range(60)]
    started = resident()
    most = 0
    for _, results in run_in_workers(work, tasks, workers=2, seconds=20):
        assert [len(result) for result in results] == [LARGE]
        most = max(most, resident())
    assert most - started < 40 * 2**20


def test_large_tasks_one_at_a_time() -> None:
    tasks = [Task(i, "large" if i % 3 else "die", bytes(LARGE)) for i in range(12)]
    got = outcome(tasks, ahead=1)
    assert [i for i, _ in got] == list(range(12))
    assert [results[-1] == Failure(CRASHED) for _, results in got] == [i % 3 == 0 for i in range(12)]


def test_workers_are_told_of_no_more_tasks_than_their_pipes_hold() -> None:
    # 48 of these are twice what a pipe holds; a worker that waits with its large result would not take them out.
    tasks = [Task(i, "large", bytes(8192)) for i in range(120)]
    assert [len(result) for _, results in run_in_workers(work, tasks, workers=2, seconds=20) for result in results] == [
        LARGE
    ] * 120


def test_results_that_nobody_takes_do_not_shift_the_others() -> None:
    tasks = [Task(i, "many" if i % 2 else "die") for i in range(10)]
    for at, (task, results) in enumerate(run_in_workers(work, tasks, workers=2, seconds=20)):
        assert task.number == at
        assert next(results) == (0 if at % 2 else (at, 0))


def test_tasks_that_raise_end_the_run() -> None:
    def tasks() -> Iterator[Task]:
        yield Task(0)
        yield Task(1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(run_in_workers(work, tasks(), workers=2, seconds=20, ahead=1))
    assert descendants() == set()


def test_who_stops_early_leaves_no_process_behind() -> None:
    run = run_in_workers(work, [Task(i, "large") for i in range(50)], workers=2, seconds=20)
    task, _ = next(run)
    assert task.number == 0
    assert len(descendants()) == 2
    run.close()
    assert descendants() == set()


def test_a_run_without_tasks_starts_no_worker() -> None:
    def tasks() -> Iterator[Task]:
        assert descendants() == set()
        yield from ()

    assert list(run_in_workers(work, tasks(), workers=2, seconds=20)) == []


def test_a_worker_leaves_no_dump_and_lets_its_parent_be_interrupted() -> None:
    [(_, [(number, core, interrupt)])] = outcome([Task(0, "report")])  # type: ignore[misc]
    assert number != os.getpid()  # type: ignore[has-type]
    assert (core, interrupt) == ((0, 0), signal.SIG_IGN)  # type: ignore[has-type]


def test_what_a_decoder_prints_is_not_seen(capfd: pytest.CaptureFixture[str]) -> None:
    assert outcome([Task(0, "print")]) == [whole(0)]
    assert capfd.readouterr() == ("", "")


_PARENT = """
import sys, os
sys.path[:0] = {path!r}
from tests.client.data.test_pool import Task, work
from client.data.pool import run_in_workers
if __name__ == "__main__":
    if {limit}:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
    for _, results in run_in_workers(work, [Task(0, {does!r})], workers=1, seconds={seconds}):
        for result in results:
            print(result, flush=True)
"""


def parent(tmp_path: Path, does: str, *, seconds: float = 60, limit: int = 0) -> subprocess.Popen[str]:
    script = tmp_path / "parent.py"
    root = str(Path(__file__).parents[3])
    script.write_text(_PARENT.format(path=[root], does=does, limit=limit, seconds=seconds))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_a_worker_that_hangs_dies_with_a_killed_parent(tmp_path: Path) -> None:
    with parent(tmp_path, "hang", seconds=5) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "(0, 0)\n"  # now it hangs
        process.kill()
        process.wait()
        for _ in range(1200):
            if not group(process.pid):
                break
            time.sleep(0.05)
        left = group(process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == set()


def test_a_lower_limit_of_memory_is_kept(tmp_path: Path) -> None:
    with parent(tmp_path, "", limit=2**31) as process:
        out, _ = process.communicate(timeout=60)
    assert out == "(0, 0)\n(0, 1)\n(0, 2)\n"


def group(session: int) -> set[int]:
    """Return the living processes of a session."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[3]) == session:
                    found.add(int(folder.name))
    return found


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
