"""A preview shows what a site would send, to the byte, and sends nothing."""

import json
import shutil
import socket
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client.cli import app
from common.study import Study
from simulations.engines.inprocess import transmit
from tests.client.hospitals import ask, instruct, prepared, tiny_study


@pytest.fixture(scope="module")
def study() -> Study:
    return tiny_study()


@pytest.fixture(scope="module")
def folder(study: Study) -> Path:
    return prepared(study)[1].folder


def call(study: Study, tmp_path: Path, site: Path, *more: str | Path, code: int = 0) -> str:
    (tmp_path / "study.toml").write_text(study.toml())
    result = CliRunner().invoke(app, ["preview", str(tmp_path / "study.toml"), "--site", str(site), *map(str, more)])
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_a_preview_is_what_the_first_round_sends(
    study: Study, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction, theta = instruct(study, "train", scratch=True)
    reply = ask(study, 1, instruction, theta)

    def no_network(*_: object) -> None:
        raise AssertionError("a preview opened a socket")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shown = json.loads(call(study, tmp_path, folder, "--to", tmp_path / "out", "--json"))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    files = {path.name.split("-")[1]: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: sha256(data).hexdigest() for name, data in files.items()} == {name: name for name in files}
    assert shown["bytes"] == sum(map(len, files.values()))
    assert abs(shown["bytes"] - transmit(reply)[1]) < 100, "run and node have longer numbers in a run"
    (sent,) = [array for record in reply.content.array_records.values() for array in record.values()]
    (chunk,) = [data for data in files.values() if data.startswith(b"ArrayChunk")]
    assert chunk.endswith(sent.data)
    assert shown["vector"]["numbers"] == theta.size if theta is not None else False
    assert shown["vector"]["norm"] == pytest.approx(float(np.linalg.norm(np.frombuffer(sent.data[128:], np.float32))))
    assert shown["scalars"] == {key: value for key, value in reply.content["scalars"].items() if key != "token"}


@pytest.mark.parametrize("answer", ["evaluate", "join"])
def test_other_answers_hold_scalars_only(study: Study, folder: Path, tmp_path: Path, answer: str) -> None:
    shown = json.loads(call(study, tmp_path, folder, "--answer", answer, "--json"))
    assert shown["vector"] is None
    assert {one["kind"] for one in shown["objects"]} == {"Message", "RecordDict", "MetricRecord"}


def test_a_person_sees_every_number_and_every_object(study: Study, folder: Path, tmp_path: Path) -> None:
    shown = call(study, tmp_path, folder)
    for word in ("nothing was sent", "loss", "accuracy", "meta_gradient", "ArrayChunk", "no formal guarantee"):
        assert word in shown


@pytest.mark.parametrize("mechanism", ["episode-clip", "patient-clip"])
def test_a_private_study_says_what_it_guarantees(mechanism: str, tmp_path: Path) -> None:
    plan: dict[str, float | str] = {
        "mechanism": mechanism,
        "clip": 0.5,
        "noise": 1.0,
        "sampling": 1.0,
        "delta": 1e-5,
        "figures": "withheld",
    }
    changes: dict[str, float | str] = {
        "algorithm.name": "maml",
        "model.norm": "group",
        "episodes.labels": "fixed",
        "episodes.held-out": "",
    }
    private = tiny_study({f"privacy.{key}": value for key, value in plan.items()} | changes | {"episodes.per-round": 1})
    folder = Path(shutil.copytree(prepared(private)[1].folder, tmp_path / "site"))
    (folder / "ledger.sqlite").unlink(missing_ok=True)
    shown = call(private, tmp_path, folder)
    assert f"for every patient of a site over 2 rounds ({mechanism}" in shown
    assert "no formal guarantee" not in shown


def test_what_is_missing_is_said(study: Study, folder: Path, tmp_path: Path) -> None:
    assert "wardround-site index" in call(study, tmp_path, tmp_path / "none", code=1)
    held_out = prepared(study)[3].folder
    assert "error 102" in call(study, tmp_path, held_out, code=1)
    result = CliRunner().invoke(app, ["preview", str(tmp_path / "none.toml")])
    assert result.exit_code == 2


def test_what_may_not_leave_is_not_previewed_as_if_it_could(study: Study, folder: Path, tmp_path: Path) -> None:
    tight = study.override({"aggregation.max-norm": 1e-9})
    assert "norm of the meta-gradient" in call(tight, tmp_path, folder, code=1)


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["preview", "--help"])
    assert "Example: wardround-site preview" in " ".join(result.stdout.split())


def test_a_preview_in_the_middle_of_a_run_is_not_taken_for_a_replay(study: Study, folder: Path, tmp_path: Path) -> None:
    plan = tiny_study({"study.id": "previewed"})
    for number in (2, 1, 2):
        if number == 1:
            assert json.loads(call(plan, tmp_path, folder, "--json"))["answer"] == "train"
        else:
            assert ask(plan, 1, *instruct(plan, "train", number=number)).has_content()
