"""Flower's engine (Ray) without any network: the same bits as in process, nothing calls home, nothing stays behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.environment import QUIET
from common.paths import home
from server.record import run_folder
from simulations.engines.flower import run_on_flower, superlink
from simulations.engines.inprocess import run_in_process
from tests.client.hospitals import prepared
from tests.simulations.offline import STUDY

ROOT = Path(__file__).parents[2]
OFFLINE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "offline"]


def need_a_namespace() -> None:
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("unshare (util-linux) and ip (iproute2) are needed to cut the network off, Linux only")
    tried = subprocess.run([*OFFLINE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine does not let a user make a network namespace: {tried.stderr.strip()}")


def alive(process: dict[str, Any]) -> bool:
    try:
        fields = Path(f"/proc/{process['pid']}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[19] == process["start"] and fields[0] != "Z"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flower_runs_offline_with_the_same_bits_and_goes_away(subtests: pytest.Subtests) -> None:
    need_a_namespace()
    prepared(STUDY)
    # Whatever the surroundings say; the commands of this environment are not on the PATH.
    surroundings = {
        **os.environ,
        **{name: "0" if value == "1" else "1" for name, value in QUIET.items()},
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
    }
    command = [*OFFLINE, sys.executable, "-m", "tests.simulations.offline"]
    done = subprocess.run(command, env=surroundings, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["interfaces"] == ["lo"]
    assert "folder" in report, done.stderr

    with subtests.test("the same bits as in process"):
        run_id, _ = run_in_process(STUDY)
        for name in ("theta.safetensors", "result.json", "study.json"):
            assert (Path(report["folder"]) / name).read_bytes() == (run_folder(run_id) / name).read_bytes(), name

    with subtests.test("nothing calls home"):
        commands = [process["command"] for process in report["processes"].values()]
        for part in ("flower-superlink", "raylet", "gcs_server", "ray::"):
            assert any(part in command for command in commands), (part, commands)
        for process in report["processes"].values():
            titled = process["command"].startswith("ray::")  # its title may lie over its environment
            wrong = {name: process["quiet"][name] for name, value in QUIET.items() if process["quiet"][name] != value}
            assert not {name: value for name, value in wrong.items() if value is not None or not titled}, process

    with subtests.test("a study that fails says why"):
        assert done.returncode == 1
        assert "error: no site has images prepared for this study: type `wardround-lab prepare" in done.stderr

    with subtests.test("nothing stays behind"):
        until = time.monotonic() + 15
        while (left := [p for p in report["processes"].values() if alive(p)]) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left
        assert not Path(report["state"]).exists()


class KilledError(Exception):
    """The run that is watched has just been killed."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_server_is_killed_is_resumed_with_the_same_bits() -> None:
    study = STUDY.override({"study.rounds": 40})
    prepared(study)
    killed: list[int] = []

    def progress(line: dict[str, Any]) -> None:
        if line["round"] >= 5 and not killed:
            status = json.loads((run_folder_of(line) / "status.json").read_bytes())
            killed.append(status["pid"])
            os.kill(status["pid"], signal.SIGKILL)
            raise KilledError  # Flower itself takes a minute to notice

    def run_folder_of(_: dict[str, Any]) -> Path:
        return max((home() / "runs").iterdir(), key=lambda path: path.stat().st_mtime)

    with superlink() as link:
        with pytest.raises(KilledError):
            run_on_flower(study, link, progress=progress)
        assert len(killed) == 1
        number = int(run_folder_of({}).name)
        assert not (run_folder(number) / "result.json").exists()
        assert run_on_flower(study, link, resume=number) == number
    whole, _ = run_in_process(study)
    for name in ("theta.safetensors", "result.json"):
        assert (run_folder(number) / name).read_bytes() == (run_folder(whole) / name).read_bytes()
    events = [json.loads(line) for line in (run_folder(number) / "events.jsonl").read_text().splitlines()]
    assert [event["round"] >= 4 for event in events if event["event"] == "resumed"] == [True]
