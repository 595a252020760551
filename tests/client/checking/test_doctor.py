"""The doctor: a site that is in order passes, and each thing that is not has its own line and remedy."""

import asyncio
import json
import shutil
import socket
from collections import namedtuple
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import pytest
from flwr.app import RecordDict
from typer.testing import CliRunner

from client.checking import images, machine, processes
from client.checking.doctor import diagnose
from client.cli import app
from client.data.catalogue import open_catalogue
from client.finding import Finding, lines, worst
from client.gateway.approvals import note_study
from client.gateway.audit import AuditLog, Event
from client.gateway.cli import audit_path
from client.gateway.health import answering
from client.gateway.switch import pause, resume
from client.membership import store
from client.worker.serve import serving
from common.study import Study
from tests.client.hospitals import prepared, tiny_study
from tests.ports import free_port
from tests.server.consortium.founded import NOW, enrol, new_world

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def study() -> Study:
    return tiny_study()


@pytest.fixture
def site(study: Study, tmp_path: Path) -> Path:
    """A site that is indexed, prepared and a member."""
    folder = Path(shutil.copytree(prepared(study)[1].folder, tmp_path / "site"))
    authority = new_world(tmp_path / "world").authority
    kit = enrol(authority, store.create(folder, "st-mary", NOW))
    store.join(folder, kit, authority.fingerprint, NOW)
    with AuditLog(audit_path(folder), store.identity(folder), NOW) as log:
        log.append(Event(outcome="sent", kind="join"), NOW)
    return folder


def found(site: Path, *plans: Study, later: timedelta = timedelta()) -> dict[str, Finding]:
    health, worker = f"127.0.0.1:{free_port()}", site / "worker" / "socket"
    findings = diagnose(site, list(plans), NOW + later, health=health, socket=worker, connect=False)
    return {one.what: one for one in findings}


def test_a_site_in_order_has_nothing_that_fails(site: Path, study: Study) -> None:
    findings = found(site, study)
    assert {name for name, one in findings.items() if one.state == "fail"} == set()
    assert set(findings) == {
        "versions", "telemetry", "disk", "memory", "device", "keys", "certificate", "authority", "manifest", "audit",
        "gateway", "worker", "catalogue", "splits", "cache", "episodes",
    }  # fmt: skip


def test_a_paused_gateway_and_what_waits_are_said(site: Path, study: Study) -> None:
    resume(site)
    assert found(site)["approvals"].state == "ok"
    note_study(site, study, NOW)
    pause(site)
    findings = found(site)
    assert (findings["switch"].state, findings["approvals"].state) == ("warn", "warn")
    assert findings["approvals"].text.startswith("1 ")
    next((site / "gateway" / "approvals").glob("*.json")).write_bytes(b"{}")
    assert found(site)["approvals"].state == "fail"


def test_each_thing_that_is_wrong_is_said(site: Path, study: Study) -> None:
    assert found(site, later=timedelta(days=400))["keys"].state == "fail"
    assert found(site, later=timedelta(days=350))["certificate"].state == "warn"

    other = study.override({"model.image-size": 20})
    assert "--study STUDY" in found(site, other)["cache"].text
    wrong = study.override({"episodes.classes": "x,y,z", "episodes.ways": 2})
    assert found(site, wrong)["episodes"].state == "fail"
    never = study.override({"sites.held-out": "hospital-1"})
    assert "never trains" in found(site, never)["episodes"].text

    (site / "site.key").chmod(0o644)
    assert found(site)["site.key"].state == "fail"
    path = audit_path(site)
    path.write_bytes(path.read_bytes().replace(b"sent", b"lost"))
    assert found(site)["audit"].state == "fail"
    (site / "catalogue.sqlite").write_bytes(b"rubbish")
    assert found(site)["catalogue"].state == "fail"


def test_a_site_that_is_one_task_needs_no_episodes(site: Path, study: Study) -> None:
    numbers: dict[str, float | str] = {"clip": 1.0, "noise": 1.0, "sampling": 0.1, "delta": 1e-5, "figures": "withheld"}
    plan = study.override(
        {f"privacy.{key}": value for key, value in numbers.items()}
        | {"privacy.mechanism": "patient-clip", "algorithm.name": "maml", "model.norm": "group"}
        | {"episodes.labels": "fixed", "episodes.held-out": "", "episodes.per-round": 1}
    )
    one = plan.override({"episodes.classes": "a,x", "episodes.ways": 2})
    none = plan.override({"episodes.classes": "x,y", "episodes.ways": 2})
    assert [found(site, p)["episodes"].state for p in (plan, one, none)] == ["ok", "ok", "fail"]


def test_a_split_that_leaks_fails(site: Path) -> None:
    with open_catalogue(site / "catalogue.sqlite", new={}) as catalogue, catalogue.transaction():
        catalogue.note("leaks", "2")
    (splits,) = [one for one in images.catalogue(site) if one.what == "splits"]
    assert splits.state == "fail"
    assert "--leave-out-shared" in splits.remedy


def test_an_empty_site_is_told_the_first_steps(tmp_path: Path) -> None:
    findings = found(tmp_path / "none")
    assert "wardround-site init" in findings["keys"].text
    assert "wardround-site index" in findings["catalogue"].text
    assert not (tmp_path / "none").exists(), "looking changes nothing"


def test_the_gateway_is_asked_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 60.0)
    health, states = f"127.0.0.1:{free_port()}", {"": True, "node": True}

    async def story() -> None:
        async with answering(health, {"": lambda: states[""], "node": lambda: states["node"]}):
            for state, text, wrong in (
                ("ok", "is serving", None), ("warn", "no SuperNode has asked", "node"), ("fail", "nothing leaves", ""),
            ):  # fmt: skip
                states.update({service: service != wrong for service in states})
                finding = await asyncio.to_thread(processes.gateway, health)
                assert (finding.state, bool(finding.remedy)) == (state, state != "ok"), finding
                assert text in finding.text

    asyncio.run(story())
    for nobody in (health, "nowhere", "127.0.0.1:65536"):
        assert (processes.gateway(nobody).state, processes.gateway(nobody).text) == (
            "warn",
            f"no gateway listens at {nobody}",
        )
    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=_hang_up, args=[server], daemon=True).start()
        finding = processes.gateway(f"127.0.0.1:{server.getsockname()[1]}")
    assert (finding.state, "does not answer as a gateway" in finding.text) == ("fail", True)


def _hang_up(server: socket.socket) -> None:
    with suppress(OSError):  # until the test has closed it
        while True:
            server.accept()[0].close()


def test_the_worker_is_asked_how_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 60.0)
    with TemporaryDirectory(prefix="worker-") as name:
        path = Path(name) / "socket"
        assert processes.worker(path).state == "warn"
        with serving(path, lambda *_: RecordDict(), list):
            assert processes.worker(path) == Finding("worker", "ok", f"the worker at {path} is serving")
        monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 0.2)
        with socket.socket(socket.AF_UNIX) as deaf:
            path.unlink(missing_ok=True)
            deaf.bind(str(path))
            assert processes.worker(path).state == "warn", "nobody listens there any more"
            deaf.listen()
            assert processes.worker(path).state == "fail"


@pytest.mark.parametrize(("free", "state"), [(50 * 2**20, "fail"), (2 * 2**30, "warn"), (50 * 2**30, "ok")])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    monkeypatch.setattr("client.checking.machine.shutil.disk_usage", lambda _: Usage(2**40, 0, free))
    assert machine.disk(tmp_path / "site").state == state


@pytest.mark.parametrize(
    ("skew", "state"),
    [(0.5, "ok"), (-2, "ok"), (3.5, "warn"), (6, "fail"), (-60, "warn"), (-310, "fail"), (86400, "fail")],
)
def test_the_clock_may_be_as_wrong_as_flower_lets_it(skew: float, state: str) -> None:
    assert machine.clock(skew).state == state
    assert (machine.clock(skew).remedy == "") == (state == "ok")


@pytest.mark.parametrize(
    ("flower", "state"), [("1.41.0", "ok"), ("1.42.3", "ok"), ("1.40.9", "fail"), ("1.43.0", "fail")]
)
def test_the_version_of_flower(monkeypatch: pytest.MonkeyPatch, flower: str, state: str) -> None:
    monkeypatch.setattr(machine, "version", lambda name: {"flwr": flower, "torch": "2.13.0"}[name])
    (finding,) = machine.versions()
    assert finding.state == state


def test_telemetry_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.switches().state == "ok"
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED")
    assert machine.switches().state == "warn"
    assert "FLWR_TELEMETRY_ENABLED=0" in machine.switches().remedy


def test_one_line_each_and_the_worst_counts() -> None:
    findings = [Finding("disk", "ok", "much"), Finding("keys", "warn", "old", "renew"), Finding("x", "ok", "y")]
    assert lines(findings) == ["ok    disk  much", "warn  keys  old: renew", "ok    x     y"]
    assert worst(findings) == "warn"
    assert worst([*findings, Finding("z", "fail", "")]) == "fail"
    assert worst([]) == "ok"


def call(*arguments: str | Path, code: int) -> str:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result.stdout


def test_the_command(site: Path, study: Study, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(study.toml())
    arguments: list[str | Path] = ["--site", site, "--study", tmp_path / "study.toml"]
    arguments += ["--health", f"127.0.0.1:{free_port()}"]
    findings = json.loads(call(*arguments, "--offline", "--json", code=0))
    assert all(one["state"] != "fail" for one in findings)
    # Nobody listens at the edge of this consortium.
    shown = call(*arguments, code=1)
    (edge,) = [line for line in shown.splitlines() if " edge " in line]
    assert edge.startswith("fail")
    assert "nothing listens" in edge
    assert len(shown.splitlines()) == len(findings) + 1
    call("--study", tmp_path / "none.toml", code=2)
    assert "Example: wardround-site doctor" in " ".join(call("--help", code=0).split())
