"""How long Flower's Grid waits for the parts of a reply that was announced: until the deadline, and not for minutes.

A reply is announced first and its parts follow. `HttpGrid` waits for them for as long as Flower says (minutes), also
where they never come because the site's line broke, or the site means it: the deadline of a round would hold for
nobody. How long it waits cannot be said to it, so it is said to the function that it waits in.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["parts_until"]

#: Where Flower's Grid is. Not imported here: that costs half a second and 40 MB, also where the Grid is another one.
_MODULE = "flwr.superlink.grid.http_grid"
#: Also after the deadline, a reply whose parts are all there takes a moment to fetch.
_LEAST_SECONDS = 0.5
#: Between two looks for a part; Flower begins with a whole second.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 0.5


@contextmanager
def parts_until(moment: float) -> Iterator[None]:
    """Let Flower's Grid wait for the parts of replies until a moment of the monotonic clock."""
    module: Any = sys.modules.get(_MODULE)
    if module is None:  # the Grid is not Flower's
        yield
        return
    flowers: Callable[..., dict[str, bytes]] = module.pull_objects

    def pull_objects(*arguments: Any, **options: Any) -> dict[str, bytes]:
        options["max_time"] = max(_LEAST_SECONDS, moment - time.monotonic())
        options["initial_backoff"], options["backoff_cap"] = _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS
        return flowers(*arguments, **options)

    module.pull_objects = pull_objects
    try:
        yield
    finally:
        module.pull_objects = flowers
