"""Worker processes that may hang or die on a file, and cost that file alone.

Tasks are dealt out in turn and results come in the order of the tasks, so what is made of them does not depend on which
worker was faster. A worker that is ahead waits when its pipe is full: memory does not grow with the number of tasks.
"""

import ctypes
import gc
import multiprocessing
import os
import pickle
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any, Generic, TypeVar

from client.memory import keep_freed_memory

__all__ = ["AHEAD", "CRASHED", "TOO_SLOW", "Failure", "no_main_module", "run_in_workers"]

T = TypeVar("T")

#: Bytes that a worker may allocate; a decoder that wants more fails, and the machine goes on.
_MEMORY = 8 * 2**30
#: Bytes of tasks that a worker is told of in advance. With one more task they fit into its pipe: a worker that cannot
#: send and a parent that cannot tell would wait for each other.
_TOLD = 2**16
#: Most tasks that a worker is told of in advance, where they are small.
AHEAD = 48
#: Seconds between two looks at a worker that has nothing yet. Waking for each result would take a core away from those
#: who compute them; a worker has other tasks meanwhile.
_NAP = 0.005
_DUMPABLE = 4  # PR_SET_DUMPABLE of <sys/prctl.h>

_END = object()

CRASHED, TOO_SLOW = "crashed", "too slow"


@dataclass(frozen=True)
class Failure:
    """What became of a task without an end: `CRASHED` or `TOO_SLOW`."""

    kind: str


@dataclass
class _Worker(Generic[T]):
    process: ForkServerProcess
    line: Connection
    ready: select.poll
    told: deque[tuple[T, bytes]] = field(default_factory=deque)

    def tell(self, task: T, message: bytes) -> None:
        self.told.append((task, message))
        # It may have died on an earlier task; when that one's results are asked for, another is hired and told again.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.line.send_bytes(message)

    @property
    def busy(self) -> bool:
        return sum(len(message) for _, message in self.told) >= _TOLD


def run_in_workers(
    work: Callable[[T], Iterator[Any]],
    tasks: Iterable[T],
    *,
    workers: int,
    seconds: float,
    ahead: int = AHEAD,
    preload: Iterable[str] = (),
) -> Generator[tuple[T, Iterator[Any]]]:
    """Yield every task in order with an iterator over what ``work`` makes of it, computed in other processes.

    The iterator of a task must be used up before the next task is asked for. It ends with a `Failure` where the worker
    died, or gave nothing for a while; everything before that is as it was sent.

    Parameters
    ----------
    work : callable
        Picklable; yields picklable results of one task. It must not raise.
    tasks : iterable
        Picklable; taken one by one.
    workers : int
        Processes.
    seconds : float
        How long a worker may take for the next result.
    ahead : int
        Most tasks that a worker is told of in advance, so that it need not wait for its next one: 1 where a task can
        be larger than some kilobytes.
    preload : iterable of str
        Modules that every worker starts with.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preload])
    crew: list[_Worker[T]] = []
    source, turn = iter(tasks), 0
    order: deque[int] = deque()
    try:
        while True:
            while len(order) < workers * ahead and not (turn < len(crew) and crew[turn].busy):
                if (task := next(source, None)) is None:
                    break
                if turn == len(crew):  # a run that has nothing to read starts no process
                    crew.append(_hire(context, work, seconds))
                crew[turn].tell(task, pickle.dumps(task))
                order.append(turn)
                turn = (turn + 1) % workers
            if not order:
                return
            number = order.popleft()
            results = _results(context, work, crew, number, seconds)
            yield crew[number].told[0][0], results
            for _ in results:
                pass
            crew[number].told.popleft()
    finally:
        for worker in crew:
            worker.process.kill()
            worker.line.close()
        for worker in crew:
            worker.process.join()


def _results(
    context: ForkServerContext, work: Callable[[T], Iterator[Any]], crew: list[_Worker[T]], number: int, seconds: float
) -> Iterator[Any]:
    worker, failure = crew[number], None
    while True:
        try:
            if not worker.ready.poll(0):
                time.sleep(_NAP)
            if not worker.ready.poll(seconds * 1000):
                failure = Failure(TOO_SLOW)
                break
            message = worker.line.recv_bytes()
        except (EOFError, OSError):
            failure = Failure(CRASHED)
            break
        if not message:
            return
        yield pickle.loads(message)
    worker.process.kill()
    worker.process.join()
    worker.line.close()
    if worker.process.exitcode == -signal.SIGALRM:
        failure = Failure(TOO_SLOW)
    crew[number] = _hire(context, work, seconds)
    crew[number].told.append(worker.told.popleft())  # not again
    for task, message in worker.told:
        crew[number].tell(task, message)
    yield failure


def _hire(context: ForkServerContext, work: Callable[[T], Iterator[Any]], seconds: float) -> _Worker[T]:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, work, seconds), daemon=True)
    with no_main_module():
        process.start()
    there.close()
    ready = select.poll()
    ready.register(here, select.POLLIN)
    return _Worker(process, here, ready)


@contextmanager
def no_main_module() -> Iterator[None]:
    """Keep a new process from importing the program that starts it, which takes seconds and is not needed."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(line: Connection, work: Callable[[T], Iterator[Any]], seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    # A dump of this process would hold patients' names and pixels, and what a decoder prints can quote its file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DUMPABLE, 0, 0, 0, 0)
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        memory = _MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    keep_freed_memory()
    gc.freeze()  # the modules are for ever: no collection need look at them
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            results = work(pickle.loads(line.recv_bytes()))
            while True:
                # The parent ends a worker that is too slow; should the parent be killed, this does.
                signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
                result = next(results, _END)
                signal.setitimer(signal.ITIMER_REAL, 0)
                if result is _END:
                    line.send_bytes(b"")
                    break
                line.send_bytes(pickle.dumps(result))
