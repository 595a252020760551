"""The parts of a reply that was announced are waited for until the deadline, and no longer."""

import subprocess
import sys
import time

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.superlink.grid import HttpGrid, http_grid

from server.patience import parts_until


def pulled(tries: int) -> dict[str, bytes]:
    """Pull an object that is there after so many looks, as Flower's Grid does."""
    left = [tries]

    def pull(_: str) -> bytes:
        left[0] -= 1
        if left[0]:
            raise ObjectUnavailableError("a")
        return b"x"

    found: dict[str, bytes] = http_grid.pull_objects(["a"], pull)  # type: ignore[attr-defined]
    return found


def test_parts_that_never_come_are_given_up_and_those_that_come_are_taken() -> None:
    assert "pull_objects" in HttpGrid.pull_messages.__code__.co_names, "Flower pulls in another way now"
    with parts_until(time.monotonic() - 60), pytest.raises(ObjectPullError):
        pulled(100)  # with Flower's own pauses, a quarter of an hour
    with parts_until(time.monotonic() + 60):
        assert pulled(4) == {"a": b"x"}
    assert http_grid.pull_objects is pull_objects, "Flower's own is back"  # type: ignore[attr-defined]


def test_a_run_over_another_grid_does_not_pay_for_flowers() -> None:
    """It brings FastAPI and SQLAlchemy along: half a second, and 40 MB."""
    seen = "import sys, server.app, simulations.engines.inprocess; print({'fastapi', 'sqlalchemy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "set()\n"
