"""The environment of Flower's processes: nothing is sent home, and Flower still listens to these names."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from flwr.common.constant import FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION
from flwr.supercore.constant import FLWR_DISABLE_UPDATE_CHECK

from common.environment import QUIET, flower_environment

ROOT = Path(__file__).parents[2]


def test_everything_that_calls_home_is_off() -> None:
    environment = flower_environment()
    assert environment.items() >= QUIET.items()
    assert QUIET["FLWR_TELEMETRY_ENABLED"] == "0"
    assert QUIET[FLWR_DISABLE_UPDATE_CHECK] == "1"
    assert QUIET[FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION] == "1"
    assert QUIET["RAY_USAGE_STATS_ENABLED"] == "0"


def test_the_surroundings_cannot_switch_it_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in QUIET:
        monkeypatch.setenv(name, "yes")
    assert flower_environment().items() >= QUIET.items()


def test_the_rest_of_the_environment_is_kept_and_more_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_TEST", "kept")
    monkeypatch.setenv("FLWR_HOME", "old")
    before = dict(os.environ)
    environment = flower_environment(FLWR_HOME="new", EXTRA="more")
    assert environment["WARDROUND_TEST"] == "kept"
    assert environment["FLWR_HOME"] == "new"
    assert environment["EXTRA"] == "more"
    assert dict(os.environ) == before
    assert set(environment) == set(before) | set(QUIET) | {"EXTRA", "PATH"}


@pytest.mark.parametrize("path", [None, "/somewhere/else"])
def test_the_commands_beside_this_python_come_first(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    first, *rest = flower_environment()["PATH"].split(os.pathsep)
    assert Path(first) == Path(sys.executable).parent
    assert rest == (path or os.defpath).split(os.pathsep)


def test_flower_reads_these_names() -> None:
    spec = find_spec("flwr.supercore.telemetry")
    assert spec is not None
    assert spec.origin is not None
    telemetry = Path(spec.origin).read_text()
    assert 'os.getenv("FLWR_TELEMETRY_ENABLED", "1")' in telemetry
    assert 'if FLWR_TELEMETRY_ENABLED == "1"' in telemetry


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'wardround[simulation]'")
def test_ray_reads_these_names() -> None:
    from ray._common.usage.usage_constants import USAGE_STATS_ENABLED_ENV_VAR
    from ray._private.accelerators import RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR

    assert {USAGE_STATS_ENABLED_ENV_VAR, RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR} <= set(QUIET)


def test_make_sets_the_same() -> None:
    exports = dict(re.findall(r"^export (FLWR_\w+) = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert exports == {name: value for name, value in QUIET.items() if name.startswith("FLWR_")}
