"""The next patients to label: the least sure first, nobody twice, nobody who has a label."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.adapt.folder import AdaptedModel
from client.records import Table
from client.worklist import worklist
from common.errors import DataError
from tests.client.adapt.test_cli import call
from tests.client.test_predict import folder, model

__all__ = ["folder", "model"]


def record(file: str, patient: str, p: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    return {
        "file": file,
        "frame": 0,
        "patient": patient,
        **{f"p {c}": v for c, v in zip("abc", p, strict=True)},
        **more,
    }


def test_the_least_sure_come_first(model: AdaptedModel, folder: Path, tmp_path: Path) -> None:
    used = json.loads((folder / "patients.json").read_text())[0]
    flat, sure = (0.34, 0.33, 0.33), (0.98, 0.01, 0.01)
    Table(tmp_path / "p.csv", model.classes, model.digest).append(
        [
            record("1", "x", sure),
            record("2", "y", flat),
            record("3", "z", (0.98, 0.01, 0.01)),
            record("4", "z", (0.01, 0.98, 0.01)),  # the same patient, and another class
            record("5", used, flat),
            record("6", "", (0.5, 0.5, 0.0)),
            record("7", "w", flat, unlike=True),
            record("8", "", flat, reason="damaged"),
        ]
    )
    found = worklist(tmp_path / "p.csv", model, folder / "patients.json")
    assert [c.file for c in found] == ["2", "3", "6", "1", "7"]
    assert [c.images for c in found] == [1, 2, 1, 1, 1]
    assert found[0].entropy == pytest.approx(1, abs=1e-3)
    assert found[2].entropy == pytest.approx(0.631, abs=1e-3)
    assert found[-1].unlike
    code, out, _ = call("worklist", tmp_path / "p.csv", "--model", folder, "--top", "2", "--json")
    assert code == 0
    assert [c["file"] for c in json.loads(out)] == ["2", "3"]


def test_without_records_there_is_no_list(model: AdaptedModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="predict"):
        worklist(tmp_path / "none.csv", model, folder / "patients.json")
    assert not (tmp_path / "none.csv").exists()
