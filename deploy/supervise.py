"""Keep some processes running, and end them all together: what `wardround-site up` and `wardround-study up` share.

It is not in `common`, which is pure, nor in the bundle, in which every site reads all that changed. Of `client` and
`server` only the two commands import it, and they are never run from a bundle.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import ServiceError
from deploy.addresses import answers

__all__ = ["House", "Part", "Say", "printer", "supervise"]

#: Pauses before a part is started again, in seconds: longer each time, and after the last one it is given up.
_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)

#: A part that ran for so long has not failed again, but anew.
_LASTING_SECONDS = 60.0

#: How long a part has to end by itself; then everything of it is killed.
_STOP_SECONDS = 10.0

#: How often a part that starts is asked whether it listens.
_LOOK_SECONDS = 0.1

_LAST_LINES = 12
_LONGEST_LINE = 2**14
_LEASH = str(Path(__file__).with_name("leash.py"))

#: Gets what happened: to which part, a word that is the same every time, and the rest in words.
Say = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Part:
    """One process that is to run all the time.

    Attributes
    ----------
    name : str
        What it is called in events.
    command : sequence of str
        What to start.
    environment : mapping
        Its whole environment.
    listens : str
        ``host:port``, or a socket's path: it is ready as soon as something can be connected to there. Empty: at once.
    after : str
        The part that must be ready before. Empty: none.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    listens: str = ""
    after: str = ""


@dataclass
class House:
    """The parts as they run, for whoever works beside them.

    Attributes
    ----------
    say : callable
        Gets every event.
    ready : dict of str to Event
        For each part, whether it is ready now.
    processes : dict of str to Process
        Those that run.
    """

    say: Say
    ready: dict[str, asyncio.Event]
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    def hang_up(self, name: str) -> None:
        """Send SIGHUP to a part, if it runs: whatever that means to it."""
        if name in self.processes:
            self.processes[name].send_signal(signal.SIGHUP)


Beside = Callable[[House], Coroutine[Any, Any, None]]


def supervise(parts: Sequence[Part], say: Say, beside: Beside | None = None) -> None:
    """Run parts until SIGTERM, SIGINT or SIGHUP; then end them, the last one first, and return.

    A part that ends is started again after a pause, a longer one each time. None outlives this process, even where it
    is killed.

    Parameters
    ----------
    parts : sequence of Part
        In order: what is to end last comes first.
    say : callable
        Gets every event. What the parts themselves say goes to stderr, each line with its part's name.
    beside : callable
        Runs as long as they do.

    Raises
    ------
    ServiceError
        A part ended again and again; its last lines are in the text. The others were ended.
    """
    asyncio.run(_supervise(parts, say, beside))


def printer(as_json: bool) -> Say:
    """Return what prints events to stdout, one line each: for people, or one JSON object for programs."""

    def say(part: str, event: str, text: str) -> None:
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        line = {"time": now, "part": part, "event": event, "text": text}
        print(json.dumps(line) if as_json else f"{now} {part} {event}{f': {text}' * bool(text)}", flush=True)

    return say


async def _supervise(parts: Sequence[Part], say: Say, beside: Beside | None) -> None:
    house = House(say, {part.name: asyncio.Event() for part in parts})
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(_keep(part, house)) for part in parts]
    tasks.append(asyncio.create_task(over.wait()))
    if beside is not None:
        tasks.append(asyncio.create_task(beside(house)))
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    failures: list[Exception] = []
    for task in reversed(tasks):
        task.cancel()
        ends = await asyncio.gather(task, return_exceptions=True)
        failures += [end for end in ends if isinstance(end, Exception)]
    if failures:
        raise failures[0]


async def _keep(part: Part, house: House) -> None:
    """Run a part again and again."""
    failed = 0
    while True:
        if part.after:
            await house.ready[part.after].wait()
        began, tail = time.monotonic(), deque[str](maxlen=_LAST_LINES)
        code = await _run(part, house, tail)
        failed = 1 if time.monotonic() - began > _LASTING_SECONDS else failed + 1
        how = f"exit code {code}" if 0 <= code <= 128 else f"signal {code - 128 if code > 0 else -code}"
        if failed > len(_PAUSES):
            house.say(part.name, "failed", f"{how}, {failed} times in a row")
            said = "\n".join(tail) or "(nothing)"
            raise ServiceError(f"{part.name} ends whenever it is started ({how}). The last that it said:\n{said}")
        pause = _PAUSES[failed - 1]
        house.say(part.name, "ended", f"{how}; it is started again in {pause:g} s")
        await asyncio.sleep(pause)


async def _run(part: Part, house: House, tail: deque[str]) -> int:
    """Run a part once, and return its exit code."""
    # A pipe of our own: asyncio would take a process for running as long as anybody holds one of its pipes.
    source, sink = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", _LEASH, *part.command),
            stdin=asyncio.subprocess.PIPE,
            stdout=sink,
            stderr=sink,
            env=dict(part.environment),
            start_new_session=True,
        )
    finally:
        os.close(sink)
    house.processes[part.name] = process
    house.say(part.name, "started", "")
    reading = asyncio.create_task(_pass_on(part.name, source, tail))
    opening = asyncio.create_task(_become_ready(part, house))
    try:
        return await process.wait()
    except asyncio.CancelledError:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
            house.say(part.name, "stopped", "")
        except TimeoutError:
            assert process.stdin
            process.stdin.close()
            await process.wait()
            house.say(part.name, "killed", f"it did not end within {_STOP_SECONDS:g} s")
        raise
    finally:
        del house.processes[part.name]
        house.ready[part.name].clear()
        opening.cancel()
        with suppress(ProcessLookupError):  # the leash ends all of them, unless it was killed itself
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait([reading], timeout=1.0)
        reading.cancel()


async def _become_ready(part: Part, house: House) -> None:
    while part.listens and not await answers(part.listens):
        await asyncio.sleep(_LOOK_SECONDS)
    house.ready[part.name].set()
    if part.listens:
        house.say(part.name, "ready", f"it listens at {part.listens}")


async def _pass_on(name: str, source: int, tail: deque[str]) -> None:
    """Show what a part says, and keep the end of it."""
    stream = asyncio.StreamReader()
    with open(source, "rb", buffering=0) as pipe:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
        with closing(transport):
            await _show_lines(name, stream, tail)


async def _show_lines(name: str, stream: asyncio.StreamReader, tail: deque[str]) -> None:
    rest = b""
    while data := await stream.read(_LONGEST_LINE):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _show(name, line, tail)
    if rest:
        _show(name, rest, tail)


def _show(name: str, line: bytes, tail: deque[str]) -> None:
    # Some of it comes from code that the other party ships: it shall not move a terminal's cursor.
    text = "".join(letter if letter.isprintable() else " " for letter in line.decode(errors="replace").rstrip())
    tail.append(text)
    print(f"{name} | {text}", file=sys.stderr, flush=True)
