"""What travels to the hospitals, and what gets installed: neither more nor less than the project says."""

import io
import os
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TRAVELLING = ("common", "client", "server")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").replace("\\\n", "")


@pytest.fixture(scope="module")
def checkout() -> set[str]:
    """Paths that git tracks or would track: a change not yet committed counts, a cache does not."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout, so nothing says which files belong to the project")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {path for path in listing.split("\0") if path and (ROOT / path).is_file()}


def test_bundle_holds_exactly_the_three_packages(checkout: set[str]) -> None:
    ours = {path for path in checkout if path.split("/")[0] in TRAVELLING and path.endswith(".py")}
    by_flower = {"pyproject.toml", ".info/CONTENT"}
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        names = bundle.namelist()
    assert sorted(names) == sorted(ours | by_flower | {"README.md", "LICENSE"})
    for component in PYPROJECT["tool"]["flwr"]["app"]["components"].values():
        assert component.split(":")[0].replace(".", "/") + ".py" in names


def test_travelling_packages_need_no_file_that_stays_behind(checkout: set[str]) -> None:
    travelling = {path for path in checkout if path.split("/")[0] in TRAVELLING}
    left_behind = {path for path in travelling if not path.endswith((".py", "/py.typed"))}
    assert left_behind == set(), "add these to fab-include, or keep what they hold in Python"


def test_flower_has_no_reason_to_rewrite_pyproject() -> None:
    assert "federations" not in PYPROJECT["tool"]["flwr"]


def test_lock_pins_every_direct_dependency() -> None:
    pins = dict(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", LOCK, flags=re.MULTILINE))
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["simulation"], *extras["dev"]]:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        if name == "torch":
            assert name not in pins
        else:
            assert wanted.specifier.contains(pins[name]), f"{line} is locked as {pins[name]}: run make lock"


def test_lock_is_hashed_portable_and_free_of_cuda() -> None:
    entries = [line for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+==\S+", entry), f"neither a pin nor a comment: {entry[:80]}"
        assert "--hash=sha256:" in entry
        assert not re.match(r"nvidia-|cuda-|triton", entry), f"only torch's GPU build needs {entry[:40]}"
    assert "://" not in LOCK
    assert "--index-url" not in LOCK
    assert "--find-links" not in LOCK


def test_ci_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
