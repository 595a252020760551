"""What the edge has logged. nginx logs a call after it has answered it: whoever made the call may have to wait."""

import json
from pathlib import Path

__all__ = ["calls"]


def calls(edge: Path) -> list[dict[str, str]]:
    """Return the calls in the log of the edge in a folder, without a line that is still being written."""
    return [json.loads(line) for line in (edge / "access.log").read_text().split("\n")[:-1]]
