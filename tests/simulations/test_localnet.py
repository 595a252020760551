"""A whole consortium on the loopback: its theta is that of an in-process run, and its sites' own processes fail."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.cli import app as at_site
from client.membership import joined
from common.errors import NotPreparedError
from common.study import Study
from simulations import cli
from simulations.localnet import Localnet, letters, localnet
from tests.deploy.run import command
from tests.deploy.town import until
from tests.processes import processes
from tests.server.consortium.test_edge import needs_nginx
from tests.simulations.failing import FIRST, SECOND, calls, run_with_faults

#: A run that goes on with one of the two sites, whose rounds do not wait long for the other.
FAULTS: dict[str, bool | int | float | str] = {
    "study.id": "faults",
    "study.rounds": 16,
    "sites.deadline-seconds": 45.0,
    "sites.attempts": 20,
    "sites.rest-after": 100,
}


@needs_nginx
@pytest.mark.slow
@pytest.mark.waits
@pytest.mark.timeout(1200)
def test_a_study_runs_through_edge_and_gateways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def and_then(folder: Path, study: Study, *arguments: Any, **options: Any) -> Iterator[Localnet]:
        """Run a second study in the same consortium, which takes long to start."""
        with localnet(folder, study, *arguments, **options) as net:
            yield net
            with subtests.test("every call of the first run's was let in"):
                assert {call["status"] for call in calls(net)} == {"200"}
                assert {call["call"].split("/")[-1] for call in calls(net)} <= {
                    "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages",
                    "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
                }  # fmt: skip
                for name, site in net.sites.items():
                    pushed = [call for call in calls(net) if call["site"] == name and "push-messages" in call["call"]]
                    assert len(pushed) == letters(site)
                    assert joined(site, datetime.now(UTC)).manifest.epoch == 4  # two sites joined, then the study
                    assert not list((site / "node").rglob("*.key"))
            with subtests.test("a run in which a site approves late, and processes are killed and sleep"):
                run_with_faults(net, study.override(FAULTS))
            with subtests.test("a pause, and a dead gateway, are the end of all traffic at once"):
                closed(net)

    monkeypatch.setattr("simulations.localnet.localnet", and_then)
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path / "home"))
    changes = ["study.rounds=1", "privacy.figures=withheld", "sites.quorum=1", "sites.join-seconds=120.0"]
    # Not by typer's runner: those that `command` makes meanwhile would take its output away.
    cli.localnet(None, changes, 2, tmp_path / "net", as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["left"] == {FIRST: 2, SECOND: 2}  # to join and to train
    assert report["rounds"] == 1


def test_without_nginx_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.consortium.up.shutil.which", lambda *_, **__: None)
    with pytest.raises(NotPreparedError, match="apt install nginx"), localnet(tmp_path, Study(), []):
        pass


def closed(net: Localnet) -> None:
    """Pause a site, and kill the gateway of another one; nothing comes to the edge until the first goes on."""
    (up,) = processes("wardround-site up", str(net.sites[SECOND]))
    (gateway,) = processes("wardround-site gateway", str(net.sites[SECOND]))
    command(at_site, "pause", "--site", net.sites[FIRST])
    os.kill(up, signal.SIGSTOP)  # it would start the gateway again
    try:
        os.kill(gateway, signal.SIGKILL)
        before = -1
        for _ in range(10):  # what was on its way is logged
            if before == (before := len(calls(net))):
                break
            time.sleep(2)
        time.sleep(4)  # the nodes ask every 3 s
        assert len(calls(net)) == before
        command(at_site, "resume", "--site", net.sites[FIRST])
        until(lambda: len(calls(net)) > before, lambda: net.log(FIRST))
    finally:
        os.kill(up, signal.SIGCONT)
