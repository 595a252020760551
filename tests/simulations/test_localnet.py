"""A whole consortium on the loopback gives the theta of an in-process run."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.membership import joined
from common.errors import NotPreparedError
from common.study import Study
from simulations.cli import app
from simulations.localnet import localnet
from tests.server.consortium.test_edge import needs_nginx


@needs_nginx
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_runs_through_edge_and_gateways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path / "home"))
    changes = ["-c", "study.rounds=1", "-c", "privacy.figures=withheld", "-c", "sites.join-seconds=120.0"]
    done = CliRunner().invoke(app, ["localnet", "--sites", "2", "--keep", str(tmp_path / "net"), "--json", *changes])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["left"] == {"hospital-0": 2, "hospital-1": 2}  # to join and to train
    assert report["rounds"] == 1
    for name in report["left"]:
        assert (
            joined(tmp_path / "net" / name, datetime.now(UTC)).manifest.epoch == 4
        )  # two sites joined, then the study
        assert not list((tmp_path / "net" / name / "node").rglob("*.key"))
    calls = [
        json.loads(line) for line in (tmp_path / "net" / "consortium" / "edge" / "access.log").read_text().splitlines()
    ]
    assert {call["status"] for call in calls if "/v1/" in call["call"]} == {"200"}


def test_without_nginx_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.consortium.up.shutil.which", lambda *_, **__: None)
    with pytest.raises(NotPreparedError, match="apt install nginx"), localnet(tmp_path, Study(), []):
        pass
