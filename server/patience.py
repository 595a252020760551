"""How long Flower's Grid waits for the parts of a reply that was announced: until the deadline, and not for minutes.

A reply is announced first and its parts follow. `HttpGrid` waits for them for as long as Flower says (minutes), also
where they never come because the site's line broke, or the site means it: the deadline of a round would hold for
nobody. How long it waits cannot be said to it, so it is said to the function that it waits in.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.superlink.grid import http_grid

__all__ = ["parts_until"]

#: Also after the deadline, a reply whose parts are all there takes a moment to fetch.
_LEAST_SECONDS = 0.5
#: Between two looks for a part; Flower begins with a whole second.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 0.5

_flowers: Callable[..., dict[str, bytes]] = http_grid.pull_objects  # type: ignore[attr-defined]
_until: list[float] = []


@contextmanager
def parts_until(moment: float) -> Iterator[None]:
    """Let Flower's Grid wait for the parts of replies until a moment of the monotonic clock."""
    _until.append(moment)
    try:
        yield
    finally:
        _until.pop()


def _pull_objects(*arguments: Any, **options: Any) -> dict[str, bytes]:
    if _until:
        options["max_time"] = max(_LEAST_SECONDS, _until[-1] - time.monotonic())
        options["initial_backoff"], options["backoff_cap"] = _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS
    return _flowers(*arguments, **options)


http_grid.pull_objects = _pull_objects  # type: ignore[attr-defined]
