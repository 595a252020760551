"""What a run leaves behind, and that a file is there whole or not at all."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import StorageError
from common.paths import home
from common.study import Study
from server.files import write_atomic
from server.record import RunRecord, run_folder
from tests.server.scripted import a_study


def test_writing_replaces_a_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"one")
    write_atomic(file, b"two")
    assert file.read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"one")

    def full(_: int) -> None:
        assert file.read_bytes() == b"one"  # durable before it takes the old one's place
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, b"two")
    assert file.read_bytes() == b"one"


def test_a_record_holds_study_rounds_theta_and_result(tmp_path: Path) -> None:
    study = a_study()
    record = RunRecord(tmp_path / "runs" / "7", study)
    assert Study.from_run_config(json.loads((record.folder / "study.json").read_text())["study"]) == study
    assert (record.folder / "history.jsonl").read_text() == ""
    record.round({"round": 1})
    record.round({"round": 2, "a": "ö"})
    lines = (record.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 1}, {"round": 2, "a": "ö"}]
    assert not (record.folder / "result.json").exists()
    theta = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones((), dtype=torch.float64)}
    record.finish({"rounds": 2}, theta)
    assert json.loads((record.folder / "result.json").read_text()) == {"rounds": 2}
    saved = load_file(record.folder / "theta.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in theta.items())
    assert {path.name for path in record.folder.iterdir()} == {
        "study.json", "history.jsonl", "evaluations.jsonl", "events.jsonl", "theta.safetensors", "result.json",
    }  # fmt: skip


def test_theta_is_written_before_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord(tmp_path, a_study())
    with monkeypatch.context() as patch:
        patch.setattr("server.record.save", lambda _: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(StorageError, match=r"cannot be written \(no\): make room"):
            record.finish({}, {"a": torch.ones(1)})
    assert not (tmp_path / "result.json").exists()  # a run with a result is complete


def test_a_failure_is_a_sentence_in_a_file(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, a_study())
    record.fail("too few sites: start more")
    assert (tmp_path / "failure.txt").read_text() == "too few sites: start more"


def test_runs_lie_under_home() -> None:
    assert run_folder(12) == home() / "runs" / "12"
