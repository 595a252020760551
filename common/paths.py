"""Where wardround keeps things on one machine."""

import os
from pathlib import Path

__all__ = ["home"]


def home() -> Path:
    """Return the folder of everything that wardround keeps: ``$WARDROUND_HOME``, or ``~/.wardround``."""
    return Path(os.environ.get("WARDROUND_HOME") or Path.home() / ".wardround")
