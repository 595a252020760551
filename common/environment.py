"""The environment of every Flower process that we start: nothing is sent home, nothing is installed."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["QUIET", "flower_environment", "tool"]

#: Flower's telemetry, its update check, and its installation of an app's dependencies at run time: all off.
QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def flower_environment(**more: str) -> dict[str, str]:
    """Return this process's environment with everything that calls home switched off, and some more values.

    Flower starts its helpers by name: those beside this Python come first, whether or not its environment is active.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {**os.environ, **QUIET, "PATH": path, **more}


def tool(name: str) -> str:
    """Return a command of the environment that this Python runs in, whatever the PATH says."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name
