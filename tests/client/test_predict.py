"""Predictions of many files: the right numbers, whatever stops it, and nobody's name."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import predict as predicting
from client.adapt import run as running
from client.adapt.folder import AdaptedModel, read_adapted, write_adapted
from client.data.episodes import network_input
from client.data.picture import Reason
from common.errors import DataError
from simulations.phantoms.hospital import write_hospital
from simulations.phantoms.scanners import SCANNERS
from tests.client.adapt.test_cli import call, write_pictures
from tests.client.adapt.worlds import images, trained

KEY = bytes(32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapted model."""
    place = tmp_path_factory.mktemp("adapted")
    few = {"_STEPS": (1, 3), "_FACTORS": (1.0,), "_ADAM_STEPS": (3,), "_ADAM_RATES": (0.01,)}
    with pytest.MonkeyPatch.context() as patch:
        for name, values in few.items():
            patch.setattr(f"client.adapt.methods.{name}", values)
        outcome = running.adapt(trained(place / "run"), images(6, 2), running.Plan(shots=4), np.random.default_rng(0))
    assert outcome.model is not None
    write_adapted(place / "model", outcome.model, outcome.report, "text", outcome.patients)
    return place / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> AdaptedModel:
    return read_adapted(folder)


def run(model: AdaptedModel, paths: list[Path], out: Path, site: Path, **more: Any) -> predicting.Counts:
    return predicting.predict(model, KEY, paths, out, skip=site, workers=1, **more)


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_record_holds_what_the_model_says_of_the_image(model: AdaptedModel, tmp_path: Path) -> None:
    those = images(3, 1, seed=9)
    pictures = write_pictures(tmp_path, those)
    (pictures / "notes.txt").write_text("no image")
    out = tmp_path / "out.csv"
    counts = run(model, [pictures], out, tmp_path / "site")
    assert (counts.done, counts.refused, counts.images, counts.before) == (10, 1, 9, 0)
    found = {Path(row["file"]).name: row for row in rows(out)}
    assert found.pop("notes.txt")["reason"] == Reason.NOT_AN_IMAGE.value
    x = network_input(those.pixels)
    logits = model.classifier.logits(x)
    p, (low, high) = model.calibration.probabilities(logits), model.calibration.intervals(logits)
    sets, unlike = model.calibration.sets(logits), model.familiar.unlike(model.theta.features(x))
    for number in range(9):
        row = found[f"{number}.png"]
        for place, name in enumerate("abc"):
            assert float(row[f"p {name}"]) == pytest.approx(p[number, place], abs=6e-5)
            assert float(row[f"low {name}"]) == pytest.approx(low[number, place], abs=6e-5)
            assert float(row[f"high {name}"]) == pytest.approx(high[number, place], abs=6e-5)
        assert row["class"] == "abc"[p[number].argmax()]
        assert row["set"] == ";".join(name for name, member in zip("abc", sets[number], strict=True) if member)
        assert row["unlike"] == str(bool(unlike[number]))


class Stopped(Exception):  # noqa: N818
    """As Ctrl-C would."""


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_was_stopped_goes_on(
    model: AdaptedModel, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "_BATCH", 4)
    pictures = write_pictures(tmp_path, images(5, 1))
    whole, stopped = tmp_path / f"whole{suffix}", tmp_path / f"stopped{suffix}"
    run(model, [pictures], whole, tmp_path / "site")

    def stop(counts: predicting.Counts) -> None:
        if counts.done >= 8:
            raise Stopped

    with pytest.raises(Stopped):
        run(model, [pictures], stopped, tmp_path / "site", progress=stop)
    assert len(rows(stopped)) == 8
    with stopped.open("a") as file:
        file.write('{"file": "half a li' if suffix == ".jsonl" else "half,a li")
    counts = run(model, [pictures], stopped, tmp_path / "site")
    assert (counts.before, counts.done) == (8, 7)
    assert stopped.read_text() == whole.read_text()
    assert run(model, [pictures], stopped, tmp_path / "site").done == 0
    assert stopped.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path, images(1000, 1))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "site.key").write_bytes(KEY)
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"

    def command(file: Path) -> list[str]:
        # A shell that starts this in the background ignores SIGINT, and what it starts inherits that.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from client.cli import app; app()"
        )
        options = ["--anyway", "--workers", "1", "--site", str(tmp_path / "site"), "--json"]
        return [
            sys.executable,
            "-c",
            code,
            "predict",
            str(pictures),
            "--model",
            str(folder),
            "--out",
            str(file),
            *options,
        ]

    running = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < 2:  # the header, and the first batch
            assert time.monotonic() < until
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert "Traceback" not in err
    kept = out.read_text()
    done = len(rows(out))
    assert 0 < done < 3000
    assert kept.endswith("\n")
    again = subprocess.run(command(out), capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(again.stdout)["before"] == done
    assert json.loads(again.stdout)["done"] == 3000 - done
    run(read_adapted(folder), [pictures], whole, tmp_path / "site")
    predicting.write_patients(whole, read_adapted(folder))
    assert out.read_text() == whole.read_text()
    assert out.read_text().startswith(kept)
    assert (tmp_path / "out.patients.csv").read_text() == (tmp_path / "whole.patients.csv").read_text()


def test_a_patient_is_the_mean_of_its_images(model: AdaptedModel, tmp_path: Path) -> None:
    write_hospital(tmp_path, scanner=SCANNERS[0], lesions=("disc", "ring"), patients_per_lesion=2, seed=0, size=32)
    out = tmp_path / "out.jsonl"
    run(model, [tmp_path / "dicom"], out, tmp_path / "site")
    patients = rows(predicting.write_patients(out, model))
    single = [row for row in rows(out) if row["patient"]]
    assert {row["patient"] for row in single} == {row["patient"] for row in patients}
    assert sum(row["images"] for row in patients) == len(single)
    for patient in patients:
        own = [row for row in single if row["patient"] == patient["patient"]]
        for column in ("p a", "low b", "high c"):
            assert patient[column] == pytest.approx(np.mean([row[column] for row in own]), abs=1e-4)
    assert "^" not in out.read_text()  # no name of a DICOM patient


def test_a_file_of_something_else_is_left_alone(model: AdaptedModel, tmp_path: Path) -> None:
    for name, text in (("a.csv", "a,b\n1,2\n3"), ("b.csv", "one line"), ("c.jsonl", '{"a": 1}\n{'), ("d.jsonl", "1")):
        other = tmp_path / name
        other.write_text(text)
        with pytest.raises(DataError, match="something else"):
            run(model, [tmp_path], other, tmp_path / "site")
        assert other.read_text() == text
    with pytest.raises(DataError, match=r"\.csv or \.jsonl"):
        run(model, [tmp_path], tmp_path / "x.txt", tmp_path / "site")


def test_what_another_model_said_is_left_alone(model: AdaptedModel, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path, images(1, 1, seed=9))
    out = tmp_path / "out.csv"
    run(model, [pictures], out, tmp_path / "site")
    assert {row["model"] for row in rows(out)} == {model.digest}
    before = out.read_bytes()
    with pytest.raises(DataError, match="another model"):
        run(replace(model, digest="0" * 16), [pictures], out, tmp_path / "site")
    assert out.read_bytes() == before


def test_the_command(folder: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path, images(2, 1))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "site.key").write_bytes(KEY)
    base = ("predict", "--model", folder, "--site", tmp_path / "site", "--json")
    code, out, err = call(*base, pictures, "--out", tmp_path / "out.csv")
    about = json.loads((folder / "adapted.json").read_text())
    if about["refusals"]:  # it is a model of noise: usually so
        assert code == 10
        assert "DO NOT USE" in err
    code, out, err = call(*base, pictures, "--out", tmp_path / "out.csv", "--anyway")
    assert code == 0, err
    assert json.loads(out) == {"done": 6, "before": 0, "refused": 0, "images": 6, "usable": not about["refusals"]}
    code, out, _ = call(*base, pictures, "--out", tmp_path / "out.csv", "--anyway")
    assert json.loads(out)["before"] == 6
    (tmp_path / "empty").mkdir()
    code, _, err = call(*base, tmp_path / "empty", "--out", tmp_path / "none.csv", "--anyway")
    assert code == 1
    assert "none of 0 files" in err
    code, _, err = call(*base, tmp_path / "nowhere", "--out", tmp_path / "none.csv", "--anyway")
    assert code == 1
    assert "does not exist" in err
