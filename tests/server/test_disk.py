"""A disk that is full or read-only: nothing that was written before is lost, and the run goes on to the same bits."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from server.record import run_folder
from simulations.engines.inprocess import run_in_process
from tests.server.disk import ROUND, TROUBLES, a_long_study
from tests.server.scripted import Scripted

_NAMESPACE = ("unshare", "--map-root-user", "--mount")


@cache
def namespaces() -> bool:
    """Return whether this user may mount a disk of memory where nobody else sees it."""
    try:
        done = subprocess.run([*_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every run whose trouble can be had here."""
    out: dict[str, Any] = {}
    for namespace in (False, True) if namespaces() else (False,):
        chosen = [name for name, trouble in TROUBLES.items() if bool(trouble.mounts) == namespace]
        command = [*(_NAMESPACE if namespace else ()), sys.executable, "-m", "tests.server.disk", *chosen]
        home = tmp_path_factory.mktemp("home")
        done = subprocess.run(
            command,
            env={**os.environ, "WARDROUND_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        out |= json.loads(done.stdout)
    return out


@pytest.fixture(scope="module")
def undisturbed() -> str:
    study = a_long_study()
    run_id, _ = run_in_process(study, client=Scripted(study))
    return (run_folder(run_id) / "theta.safetensors").read_bytes().hex()


@pytest.mark.slow
@pytest.mark.parametrize("name", TROUBLES)
def test_a_bad_disk_costs_nothing_but_time(name: str, played: dict[str, Any], undisturbed: str) -> None:
    if name not in played:
        pytest.skip("no mount namespace can be made here (unshare --map-root-user --mount)")
    story = played[name]
    what = {"no file": "File too large", "read-only": "Read-only file system", "checkpoints": "Read-only file system"}
    said = next((text for start, text in what.items() if name.startswith(start)), "No space left on device")
    for moment in (story["first"], story["again"]):  # when it happens, and when the run is resumed too early
        assert moment["error"] == "StorageError"
        assert "cannot be written" in moment["text"]
        assert f"({said})" in moment["text"]
        assert story["folder"] in moment["text"]
        assert "make room there, or make it writable, and resume the run" in moment["text"]
        assert moment["warnings"] == []  # no checkpoint is damaged
        assert moment["parts"] == []
    in_logs = name in {"no room for the logs", "read-only"}
    if not in_logs:
        assert f"the checkpoint of round {ROUND} cannot be written" in story["first"]["text"]
        assert f"that of round {ROUND - 1} is intact" in story["first"]["text"]
        assert story["first"]["kept"] == story["again"]["kept"] == ROUND - 1
    assert story["first"]["kept"] >= ROUND - 1
    assert story["last"] == {"theta": undisturbed}
    assert story["rounds"] == list(range(1, 13))
