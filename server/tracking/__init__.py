"""Figures to where people watch them; the run's own record is apart, and always there."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from common.errors import StudyError
from common.study import Study, names
from server.tracking.mlflow import MLflow
from server.tracking.prometheus import Prometheus
from server.tracking.tensorboard import TensorBoard
from server.tracking.tracker import Line, Tracker

__all__ = ["Tracker", "Trackers", "open_trackers"]

Say = Callable[[str], None]

_OPEN: Mapping[str, Callable[[str, Path, Study], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "prometheus": Prometheus,
}
_KNOWN = "tensorboard, mlflow=URI or mlflow=FOLDER, prometheus=PORT"
#: Lines that wait for a slow tracker, and how long the end of a run waits for it, in seconds.
_WAITING, _PATIENCE = 1000, 10.0


def open_trackers(spec: str, folder: Path, study: Study, say: Say = print) -> "Trackers":
    """Open the trackers that a coordinator asked for.

    Parameters
    ----------
    spec : str
        Comma-separated: ``tensorboard`` (into the run's folder), ``mlflow=URI`` (``http`` or a folder),
        ``prometheus=PORT`` (on 127.0.0.1). Empty for none.
    folder : Path
        The run's.
    study : Study
        What runs.
    say : callable
        Told once when a tracker is switched off.

    Raises
    ------
    StudyError
        The text names no tracker, or one that is not installed, or a port that is taken.
    """
    opened: dict[str, Tracker] = {}
    try:
        for kind, value in [*_parsed(spec)]:  # all of it is read before anything opens
            opened[kind] = _InItsThread(kind, _OPEN[kind](value, folder, study), say)
    except ImportError as error:
        _close(opened)
        raise StudyError(
            f"track = {spec!r}: {error.name or error} is missing; pip install 'wardround[tracking]'"
        ) from None
    except StudyError:
        _close(opened)
        raise
    return Trackers(opened)


class Trackers:
    """All trackers of a run as one; none can stop it or hold it up."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = trackers

    def round(self, line: Line) -> None:
        for tracker in self._trackers.values():
            tracker.round(line)

    def evaluation(self, line: Line) -> None:
        for tracker in self._trackers.values():
            tracker.evaluation(line)

    def finish(self, result: Line) -> None:
        for tracker in self._trackers.values():
            tracker.finish(result)

    def close(self) -> None:
        _close(self._trackers)


def _close(trackers: Mapping[str, Tracker]) -> None:
    for tracker in trackers.values():
        tracker.close()


class _InItsThread:
    """Hands lines to a tracker in a thread of its own; one that fails or falls far behind is switched off."""

    def __init__(self, kind: str, tracker: Tracker, say: Say) -> None:
        self._kind, self._tracker, self._say = kind, tracker, say
        self._todo: queue.Queue[tuple[Callable[[Line], None], Line] | None] = queue.Queue(_WAITING)
        self._off = False
        self._thread = threading.Thread(target=self._work, name=f"track-{kind}", daemon=True)
        self._thread.start()

    def round(self, line: Line) -> None:
        self._put(self._tracker.round, line)

    def evaluation(self, line: Line) -> None:
        self._put(self._tracker.evaluation, line)

    def finish(self, result: Line) -> None:
        self._put(self._tracker.finish, result)

    def close(self) -> None:
        with suppress(queue.Full):
            self._todo.put(None, timeout=_PATIENCE)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._switch_off(f"it did not take everything within {_PATIENCE:g} s")

    def _put(self, what: Callable[[Line], None], line: Line) -> None:
        if self._off:
            return
        try:
            self._todo.put_nowait((what, line))
        except queue.Full:
            self._switch_off(f"it is {_WAITING} lines behind")

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            if self._off:
                continue
            what, line = item
            try:
                what(line)
            except Exception as error:  # whatever a library throws: the run goes on
                self._switch_off(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        with suppress(Exception):
            self._tracker.close()

    def _switch_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            self._say(f"tracking with {self._kind} is switched off, the run goes on: {why}")


def _parsed(spec: str) -> Iterator[tuple[str, str]]:
    seen = set()
    for part in names(spec):
        kind, _, value = (piece.strip() for piece in part.partition("="))
        if kind not in _OPEN:
            raise StudyError(f"track = {spec!r}: {kind} is no tracker; known are {_KNOWN}")
        if kind in seen:
            raise StudyError(f"track = {spec!r}: {kind} is named twice")
        if bool(value) == (kind == "tensorboard"):
            raise StudyError(f"track = {spec!r}: {part} is not complete or says too much; known are {_KNOWN}")
        seen.add(kind)
        yield kind, value
