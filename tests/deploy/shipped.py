"""The files that `deploy/` ships, and the commands in them."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "DEPLOY",
    "NODE",
    "UNITS",
    "commands_of",
    "documents",
    "exec_lines",
    "load",
    "probe",
    "run",
    "settings",
    "tool",
]

DEPLOY = Path(__file__).parents[2] / "deploy"
#: What starts a SuperNode, before its gateway's health service and Flower's options.
NODE = ["python", "-I", "-m", "deploy.supernode"]
UNITS = sorted((DEPLOY / "systemd").glob("*/*.service"))


def tool(name: str) -> str:
    """Return where a program is, or skip the test that needs it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: what only it can check was not checked")
    return found


def run(command: Sequence[str | Path], **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with everything that it says in ``stdout``."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False, **more
    )


def documents(text: str) -> list[dict[str, Any]]:
    """Return the documents of a YAML text."""
    yaml = pytest.importorskip("yaml", reason="PyYAML, which comes with Flower, is missing")
    return [document for document in yaml.safe_load_all(text) if document is not None]


def load(path: Path) -> dict[str, Any]:
    """Return the one document of a YAML file."""
    [document] = documents(path.read_text())
    return document


def settings(unit: Path) -> dict[str, list[str]]:
    """Return a unit's settings, every one with its values in order. Continued lines are one."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", unit.read_text()).splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def exec_lines(unit: Path, kind: str = "") -> list[list[str]]:
    """Return the commands of a unit, or those of a kind (``ExecStart``), split into words."""
    return [
        shlex.split(line)
        for key, lines in settings(unit).items()
        if key.startswith("Exec") and kind in ("", key)
        for line in lines
    ]


def probe(address: str, *more: str) -> list[str]:
    """Return the command by which containers and pods ask a process for its health."""
    return ["python", "-I", "-m", "deploy.health", address, *more]


def commands_of(tree: object) -> Iterator[list[str]]:
    """Return all lists of words in a tree of YAML that begin with one of our programs or Flower's."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from commands_of(value)
    elif isinstance(tree, list):
        program = tree and isinstance(tree[0], str) and re.match(r"wardround-|flower-", tree[0])
        if program or tree[: len(NODE)] == NODE:
            yield tree
        else:
            for value in tree:
                yield from commands_of(value)
