"""Run one program, and let nothing that it started outlive it, or whoever holds the other end of standard input.

``python -I -S leash.py PROGRAM ARGUMENT...``: one of these stands between a supervisor and every part that it keeps.
Its standard input is a pipe that nobody writes into. When the pipe ends, because the supervisor closed it or was
killed, everything that the program started is killed. What the program leaves behind when it ends by itself is told to
end, and killed if it does not. Nothing but the standard library is imported: there is one for every part, and each
shall be small.
"""

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["main"]

#: Linux' PR_SET_CHILD_SUBREAPER: what loses its parent becomes this process's child, also in a session of its own.
_SET_CHILD_SUBREAPER = 36

#: What the supervisor wants to say to the program.
_PASSED_ON: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP)

#: How long what the program leaves behind has to end by itself.
_GRACE_SECONDS = 3.0


def main(command: list[str]) -> int:
    """Run a program to its end, and return its exit code: 128 and the signal's number where one ended it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, waker = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signals: list[int] = []
    for watched in (*_PASSED_ON, signal.SIGCHLD):
        signal.signal(watched, lambda number, _: signals.append(number))
    try:
        program = os.posix_spawnp(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        )
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 127
    code = None
    while code is None:
        readable, _, _ = select.select([0, woken], [], [])
        if 0 in readable and not os.read(0, 1):
            break
        with suppress(BlockingIOError):
            os.read(woken, 512)
        while signals:
            if (number := signals.pop(0)) in _PASSED_ON:
                os.kill(program, number)  # not yet waited for, so it is still this number
        code = _ended(program)
    _end_rest(0.0 if code is None else _GRACE_SECONDS)
    return 128 + signal.SIGKILL if code is None else code if code >= 0 else 128 - code


def _ended(program: int) -> int | None:
    """Take leave of all that have ended; return the program's exit code if it is among them."""
    while True:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == program:
            return os.waitstatus_to_exitcode(status)
        if process == 0:
            return None


def _end_rest(grace: float) -> None:
    """Tell every descendant to end, and kill those that did not. One that loses its parent comes here, and is next."""
    until, told = time.monotonic() + grace, set()
    while True:
        killing = time.monotonic() >= until
        for child in _children():
            if killing or child not in told:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL if killing else signal.SIGTERM)
                told.add(child)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        readable, _, _ = select.select([0], [], [], 0.02)
        if readable:  # the supervisor has let go
            until = 0.0
            time.sleep(0.02)


def _children() -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]
    except OSError:  # not Linux: all of the group, this process too
        os.killpg(0, signal.SIGKILL)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
