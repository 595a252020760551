"""From nothing to a member with the commands that people type, at both ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.cli import app as at_site
from common.canonical import sha256_hex
from server.cli import app as at_coordinator

STUDY = '[study]\nid = "small"\n[sites]\nquorum = 3\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path / "home"))


def call(app: Any, *arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def told(output: str) -> str:
    """Return the fingerprint that a command showed to a person."""
    (line,) = [line for line in output.splitlines() if "fingerprint" in line]
    return line.split(":")[-1].strip()


def site(*arguments: str, name: str = "st-mary", code: int = 0) -> str:
    return call(at_site, *arguments, "--site", name, code=code)


def study(*arguments: str | Path, code: int = 0) -> str:
    return call(at_coordinator, *arguments, code=code)


def test_a_site_joins_renews_rotates_and_is_revoked() -> None:
    consortium = told(study("found", "lung-north", "--edge", "edge.example:8443"))
    request = told(site("init", "st-mary"))
    assert "new" in study("enrol", "st-mary.request.json", code=1)
    study("enrol", "st-mary.request.json", "--fingerprint", "0" * 40, code=1)
    shown = told(study("enrol", "st-mary.request.json", "--fingerprint", request))
    assert shown == consortium
    assert "--fingerprint" in site("join", "st-mary.kit.json", code=1)
    assert "edge.example:8443" in site("join", "st-mary.kit.json", "--fingerprint", consortium)
    assert "fail" not in site("keys")

    first = json.loads(study("sites", "--json"))
    study("renew", "st-mary", "--days", "20")
    site("join", "st-mary.kit.json")
    assert "warn  certificate" in site("keys")
    assert json.loads(study("sites", "--json"))["sites"]["st-mary"]["warning"] == "ends within 30 days"

    before = Path("st-mary/member/kit.json").read_bytes()
    site("rotate")
    study("enrol", "st-mary.request.json")
    site("join", "st-mary.kit.json")
    assert json.loads(before)["certificate"] != json.loads(Path("st-mary/member/kit.json").read_bytes())["certificate"]

    study("revoke", "st-mary")
    study("revoke", "st-mary", code=1)
    last = json.loads(study("sites", "--json"))
    assert (first["epoch"], last["epoch"]) == (2, 5)
    assert last["sites"] == {}


def test_a_program_gets_json(tmp_path: Path) -> None:
    consortium = json.loads(study("found", "lung-north", "--edge", "edge.example:8443", "--json"))
    request = json.loads(site("init", "st-mary", "--json"))
    kit = json.loads(
        study("enrol", request["request"], "--fingerprint", request["fingerprint"], "--to", "k.json", "--json")
    )
    assert kit["fingerprint"] == consortium["fingerprint"]
    member = json.loads(site("join", "k.json", "--fingerprint", kit["fingerprint"], "--json"))
    assert (member["site"], member["epoch"]) == ("st-mary", 2)
    assert {finding["state"] for finding in json.loads(site("keys", "--json"))} == {"ok"}
    Path("app.fab").write_bytes(b"bundle")
    study("admit", "--bundle", "app.fab")
    assert json.loads(site("update", "home/consortium/manifest.json", "--json"))["epoch"] == 3
    site("update", "none.json", code=1)
    study("sites", "--node-keys", "nodes")
    assert Path("nodes/st-mary.pub").read_text().startswith("ecdsa-sha2-nistp384 ")


def test_studies_and_bundles_are_admitted_and_withdrawn() -> None:
    study("found", "lung-north", "--edge", "edge.example:8443")
    Path("small.toml").write_text(STUDY)
    Path("few.toml").write_text(STUDY.replace("3", "2"))
    Path("app.fab").write_bytes(b"bundle")
    study("admit", "--study", "few.toml", code=1)
    study("admit", "--study", "missing.toml", code=2)
    study("admit", code=1)
    epoch = json.loads(study("admit", "--study", "small.toml", "--bundle", "app.fab", "--json"))["epoch"]
    found = json.loads(study("sites", "--json"))
    assert found["bundles"] == [sha256_hex(b"bundle")]  # as Flower names a bundle
    assert len(found["studies"]) == 1
    assert found["epoch"] == epoch == 2
    study("withdraw", found["bundles"][0])
    assert json.loads(study("sites", "--json"))["bundles"] == []


def test_the_edge_is_written_for_the_current_manifest() -> None:
    study("found", "lung-north", "--edge", "edge.example:8443")
    written = json.loads(study("edge", "--superlink", "127.0.0.1:8000", "--json"))["written"]
    assert {Path(path).name for path in written} == {
        "edge.key", "edge.pem", "superlink.key", "superlink.pem", "authority.pem", "nginx.conf",
    }  # fmt: skip
    assert "nginx -t" in study("edge", "--superlink", "127.0.0.1:8000", "--to", "elsewhere")
    assert "manifest epoch 1." in Path("elsewhere/nginx.conf").read_text()
    study("edge", "--superlink", "nowhere", code=1)


def test_before_the_first_step_the_commands_say_which_it_is() -> None:
    assert "wardround-study found" in study("sites", code=1)
    assert "wardround-site init" in site("keys", code=1)
    assert "cannot be read" in site("join", "none.json", code=1)
    assert "cannot be read" in study("enrol", "none.json", code=1)
    study("found", "Lung North", "--edge", "edge.example:8443", code=1)
    study("found", "lung-north", "--edge", "edge.example", code=1)


COMMANDS: Sequence[tuple[Any, str, str]] = [
    *((at_site, "site", name) for name in ("init", "join", "update", "rotate", "keys")),
    *(
        (at_coordinator, "study", name)
        for name in ("found", "enrol", "renew", "revoke", "admit", "withdraw", "sites", "edge")
    ),
]


@pytest.mark.parametrize(("app", "whose", "command"), COMMANDS, ids=[command for _, _, command in COMMANDS])
def test_every_command_has_help_with_an_example(app: Any, whose: str, command: str) -> None:
    assert f"Example: wardround-{whose} {command}" in " ".join(call(app, command, "--help").split())
