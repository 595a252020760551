"""Was this machine's clock set? Deadlines are by a clock that nobody sets; Flower's messages end by this one."""

import time

__all__ = ["Clock"]

#: Two clocks of one machine that come apart by more seconds were not merely read one after the other.
_SET_SECONDS = 2.0


class Clock:
    """The time of day, compared with a clock that nobody sets."""

    def __init__(self) -> None:
        self._apart = _apart()

    def was_set(self) -> str:
        """Say what happened to the clock since the last call; nothing where it just went on."""
        moved = _apart() - self._apart
        if abs(moved) <= _SET_SECONDS:
            return ""
        self._apart += moved
        where = "ahead (or it slept)" if moved > 0 else "back"
        return (
            f"this machine's clock was set {abs(moved):.0f} s {where}: Flower's messages end by it, and sites refuse "
            "what is not of their time"
        )


def _apart() -> float:
    return time.time() - time.monotonic()
