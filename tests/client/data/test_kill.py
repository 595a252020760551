"""Runs that are killed, and disks that are full: what was there is whole, and the next run ends where any run ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.data.cache import evict, verify
from client.data.catalogue import open_catalogue
from client.data.image import Recipe
from client.data.labels import Labels
from client.data.store import open_site
from common.errors import DataError
from simulations.phantoms import SCANNERS, write_hospital
from tests.client.data.folders import RECIPE, dicom, grey, indexed, png, snapshot, table

RECIPES = [RECIPE, Recipe(1, 4)]
ROOT = Path(__file__).parents[3]
FILES = 284

_RUN = """
import resource, sys
from pathlib import Path
from client.data.labels import Labels
from common.errors import DataError
from tests.client.data.folders import indexed
from tests.client.data.test_kill import RECIPES

if __name__ == "__main__":
    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    print("begun", flush=True)
    try:
        indexed(
            folder,
            Path(sys.argv[3]) / "in",
            labels=Labels(Path(sys.argv[3]) / "labels.csv", {}),
            recipes=RECIPES,
            workers=2,
            progress=lambda counts: print(counts.files, flush=True),
        )
    except DataError as error:
        sys.exit(f"error: {error}")
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hospital of which a site was indexed before much was added, changed and removed; ``whole`` is how it ends."""
    folder = tmp_path_factory.mktemp("hospital")
    source = folder / "in"
    (folder / "run.py").write_text(_RUN)
    lines = [("path", "patient", "label")]
    for number in range(160):
        path = png(source / f"a{number % 3}" / f"{number:03}.png", grey(number))
        lines.append((path.relative_to(source).as_posix(), f"p{number // 2}", "xyz"[number % 3]))
    write_hospital(folder, scanner=SCANNERS[0], lesions=("disc",), patients_per_lesion=10, seed=0, size=32)
    (folder / "dicom").rename(source / "b")
    table(folder / "labels.csv", lines)
    (folder / "before").mkdir()
    indexed(folder / "before", source, labels=Labels(folder / "labels.csv", {}), recipes=RECIPES)
    for number in range(0, 160, 4):
        (source / f"a{number % 3}" / f"{number:03}.png").unlink()
    for number in range(1, 160, 4):
        png(source / f"a{number % 3}" / f"{number:03}.png", grey(1000 + number))
    for number in range(160, 300):
        png(source / f"a{number % 4}" / f"{number:03}.png", grey(number))
    images = np.stack([grey(2000 + i) for i in range(120)])
    np.savez(source / "a2" / "090.npz", images=images, labels=np.arange(120) % 2, groups=np.arange(120))
    np.savez(source / "a1" / "090.npz", images=images, labels=np.arange(120) % 2, groups=np.arange(100))  # damaged
    np.savez(source / "c.npz", images=images[:50], labels=np.arange(50) % 2, groups=np.arange(40))  # damaged
    dicom(source / "d" / "stack.dcm", np.stack([grey(3000 + i) for i in range(30)]))
    (folder / "whole").mkdir()
    shutil.copytree(folder / "before" / "site", folder / "whole" / "site")
    counts = indexed(folder / "whole", source, labels=Labels(folder / "labels.csv", {}), recipes=RECIPES)
    assert (counts.files, counts.gone, counts.refused) == (FILES, 40, 2)
    return folder


def started(hospital: Path, folder: Path, *, limit: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(hospital / "run.py"), str(folder), str(limit), str(hospital)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def check_is_whole(folder: Path) -> None:
    """What there is can be used: every pixel is what the catalogue says, and the site opens."""
    site = folder / "site"
    with open_catalogue(site / "catalogue.sqlite") as catalogue:
        assert list(verify(site, catalogue)) == []
        assert catalogue.database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for recipe in RECIPES:
        assert len(open_site(site, recipe).labels) >= 80  # those that were neither changed nor removed


def finish(hospital: Path, folder: Path) -> None:
    indexed(folder, hospital / "in", labels=Labels(hospital / "labels.csv", {}), recipes=RECIPES)
    found, expected = snapshot(folder / "site"), snapshot(hospital / "whole" / "site")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


def moments(count: int) -> Iterator[tuple[int, float]]:
    """Yield the file after which to kill, and how many seconds after it; every fifth when all files are read."""
    generator = np.random.default_rng()
    for at in range(count):
        if at % 5 == 4:
            yield FILES, float(generator.uniform(0, 0.05))
        else:
            yield int(generator.integers(1, FILES)), float(generator.uniform(0, 0.01))


def kill_and_finish(hospital: Path, folder: Path, moment: tuple[int, float]) -> bool:
    """Return whether the run was still at work when it was killed."""
    folder.mkdir()
    shutil.copytree(hospital / "before" / "site", folder / "site")
    after, wait = moment
    with started(hospital, folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdecimal() and int(line) >= after:
                time.sleep(wait)
                break
        os.killpg(process.pid, signal.SIGKILL)
        rest = process.stdout.read()
    check_is_whole(folder)
    finish(hospital, folder)
    return "ended" not in rest


def test_killed_runs_end_like_any_other(hospital: Path, tmp_path: Path) -> None:
    at_work = [kill_and_finish(hospital, tmp_path / str(at), moment) for at, moment in enumerate(moments(2))]
    assert any(at_work)


@pytest.mark.slow
def test_twenty_killed_runs_end_like_any_other(hospital: Path, tmp_path: Path) -> None:
    at_work = [kill_and_finish(hospital, tmp_path / str(at), moment) for at, moment in enumerate(moments(20))]
    assert sum(at_work) >= 12


@pytest.mark.slow
def test_one_run_that_is_killed_again_and_again(hospital: Path, tmp_path: Path) -> None:
    shutil.copytree(hospital / "before" / "site", tmp_path / "site")
    for at in range(5):
        with started(hospital, tmp_path) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip().isdecimal() and int(line) >= 60 * at:
                    break
            os.killpg(process.pid, signal.SIGKILL)
        check_is_whole(tmp_path)
    finish(hospital, tmp_path)


def test_an_interrupted_first_run_leaves_nothing_odd(hospital: Path, tmp_path: Path) -> None:
    with started(hospital, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
    for _ in range(2):
        indexed(tmp_path, hospital / "in", labels=Labels(hospital / "labels.csv", {}), recipes=RECIPES)
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite") as catalogue:
        assert list(verify(tmp_path / "site", catalogue)) == []


@pytest.mark.parametrize("limit", [10_000, 40_000, 180_000])
def test_a_full_disk_is_said_and_breaks_nothing(hospital: Path, tmp_path: Path, limit: int) -> None:
    shutil.copytree(hospital / "before" / "site", tmp_path / "site")
    with started(hospital, tmp_path, limit=limit) as process:
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended" not in out
    assert errors.startswith("error: the ")
    assert "is there space" in errors
    assert "Traceback" not in errors
    check_is_whole(tmp_path)
    finish(hospital, tmp_path)


def test_a_full_file_system_is_said_and_breaks_nothing(hospital: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    options = ["-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path / "disk")]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        shutil.copytree(hospital / "before" / "site", tmp_path / "disk" / "site")
        for _ in range(2):
            with pytest.raises(DataError, match="is there space"):
                indexed(
                    tmp_path / "disk",
                    hospital / "in",
                    labels=Labels(hospital / "labels.csv", {}),
                    recipes=[*RECIPES, Recipe(3, 16)],
                )
            check_is_whole(tmp_path / "disk")
        shutil.copytree(tmp_path / "disk" / "site", tmp_path / "site")
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite", new={}) as catalogue:
        evict(tmp_path / "site", catalogue, Recipe(3, 16))
    finish(hospital, tmp_path)
