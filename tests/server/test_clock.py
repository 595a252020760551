"""A clock that is set is noticed once, and by how much; one that merely goes on is not."""

from types import SimpleNamespace

import pytest

from server import clock as module
from server.clock import Clock


def test_a_clock_that_is_set_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(day=1e9, uptime=500.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now.day, monotonic=lambda: now.uptime))
    clock = Clock()
    now.day, now.uptime = now.day + 86400, now.uptime + 86399
    assert clock.was_set() == ""
    now.day += 3600
    assert clock.was_set().startswith("this machine's clock was set 3601 s ahead (or it slept): ")
    assert clock.was_set() == ""
    now.day -= 7200
    assert clock.was_set().startswith("this machine's clock was set 7200 s back: ")
    assert clock.was_set() == ""
