"""`wardround-site adapt` from labelled pictures to a model that is read back, and its refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from client.adapt import run as running
from client.adapt.folder import read_adapted
from client.adapt.images import Labelled
from client.adapt.report import markdown
from client.adapt.trained import read_trained
from client.adapt.verdict import Exit
from client.calibration import in_mix
from client.cli import app
from client.data.episodes import network_input
from common.errors import DataError, NotPreparedError, StudyError
from tests.client.adapt.worlds import images, shuffled, study, trained, write_run


def call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def write_pictures(folder: Path, those: Labelled) -> Path:
    """Write pictures and the labels file beside them."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    lines = ["path,label,who"]
    for number, pixels in enumerate(those.pixels):
        array = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
        Image.fromarray(array).save(pictures / f"{number}.png")
        lines.append(f"{number}.png,{those.classes[those.labels[number]]},SECRET^{those.patients[number]}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return pictures


@pytest.fixture(autouse=True)
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen from is of no matter here, and takes most of the time."""
    monkeypatch.setattr("client.adapt.run._FOLDS", 3)
    monkeypatch.setattr("client.adapt.run._REPEATS", 1)
    few = {
        "_STEPS": (1, 3),
        "_FACTORS": (1.0,),
        "_ADAM_STEPS": (3,),
        "_ADAM_RATES": (0.01,),
        "_PENALTIES": (0.03,),
    }
    for name, values in few.items():
        monkeypatch.setattr(f"client.adapt.methods.{name}", values)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", study())


def command(tmp_path: Path, run_folder: Path, *more: str | Path) -> tuple[int, str, str]:
    return call(
        "adapt", tmp_path / "pictures", "--labels", tmp_path / "labels.csv", "--map", "who=patient", "--model",
        run_folder, "--site", tmp_path / "site", "--out", tmp_path / "out", "--json", *more,
    )  # fmt: skip


@pytest.mark.slow
def test_from_pictures_to_a_model_and_a_report(tmp_path: Path, run_folder: Path) -> None:
    those = images(6, 2)
    write_pictures(tmp_path, those)
    code, out, _ = command(tmp_path, run_folder)
    report = json.loads(out)
    assert report["exit"] == code
    assert report["usable"] is (code == 0)
    assert report["classes"] == {name: {"patients": 6, "images": 12} for name in "abc"}
    assert report["judged"] == {
        "patients": 18, "images": 36, "repeats": 1, "folds": 3, "classes weigh alike": True,
    }  # fmt: skip
    assert list(report["methods"]) == [running.ADAPTED, running.UNADAPTED, running.SCRATCH, running.SIMPLE]
    for found in report["methods"].values():
        for figure in found["figures"].values():
            assert figure["low"] <= figure["value"] <= figure["high"]
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {
        "adapted.json", "weights.safetensors", "patients.json", "report.json", "report.md",
    }  # fmt: skip
    assert len(json.loads((folder / "patients.json").read_text())) == 18
    assert not [p for p in folder.iterdir() if b"SECRET" in p.read_bytes()]
    assert [p.name for p in (tmp_path / "site").iterdir()] == ["site.key"]  # what was indexed is gone
    text = (folder / "report.md").read_text()
    assert ("DO NOT USE" in text) is (code != 0)
    model = read_adapted(folder)
    assert model.classes == ("a", "b", "c")
    assert model.refusals == tuple(report["reasons"])
    assert model.facts["study digest"] == study().digest
    p = model.calibration.probabilities(model.classifier.logits(network_input(those.pixels)))
    np.testing.assert_allclose(p.sum(-1), 1)
    again = command(tmp_path, run_folder)
    assert json.loads(again[1]) == report  # the same key, the same folds, the same figures


def test_a_prevalence_is_that_of_the_predictions_and_of_a_table(tmp_path: Path) -> None:
    those, run, mix = images(8, 1), trained(tmp_path / "run"), (0.8, 0.15, 0.05)
    plain, mixed = (
        running.adapt(run, those, running.Plan(shots=4, mix=asked), np.random.default_rng(0)) for asked in (None, mix)
    )
    assert plain.model is not None
    assert mixed.model is not None
    assert mixed.report["methods"] == plain.report["methods"]  # the verdict is on classes that weigh alike
    assert "in the mix" not in plain.report
    found = mixed.report["in the mix"]
    assert found["mix"] == dict(zip("abc", mix, strict=True))
    assert list(found["methods"]) == list(mixed.report["methods"])
    assert "a 0.8, b 0.15, c 0.05" in markdown(mixed.report)
    logits = mixed.model.classifier.logits(network_input(those.pixels))
    p, alike = mixed.model.calibration.probabilities(logits), plain.model.calibration.probabilities(logits)
    assert (p[:, 0] > alike[:, 0]).all()
    np.testing.assert_allclose(p, in_mix(alike, mix))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a", "CLASS=SHARE"),
        ("a=x,b=1", "CLASS=SHARE"),
        ("a=0.5,b=0.5", "names every class once: a, b, c"),
        ("a=0.5,b=0.5,c=0", "above zero"),
        ("a=0.5,b=0.5,c=0.5", "sum is one"),
    ],
)
def test_a_prevalence_that_is_none(tmp_path: Path, run_folder: Path, text: str, why: str) -> None:
    write_pictures(tmp_path, images(6, 1))
    code, _, error = command(tmp_path, run_folder, "--prevalence", text)
    assert code == 1
    assert why in error


def test_the_model_is_read_back_as_it_was(tmp_path: Path) -> None:
    from client.adapt.folder import write_adapted

    those, run = images(6, 2), trained(tmp_path / "run")
    outcome = running.adapt(run, those, running.Plan(shots=3), np.random.default_rng(0))
    assert outcome.model is not None
    write_adapted(tmp_path / "out", outcome.model, outcome.report, "text", outcome.patients)
    model, x = read_adapted(tmp_path / "out"), network_input(those.pixels)
    np.testing.assert_array_equal(model.classifier.logits(x), outcome.model.classifier.logits(x))
    np.testing.assert_array_equal(model.theta.features(x), outcome.model.theta.features(x))
    assert model.calibration == outcome.model.calibration
    features = model.theta.features(x)
    np.testing.assert_allclose(
        model.familiar.distances(features), outcome.model.familiar.distances(features), rtol=1e-3
    )
    assert model.facts == outcome.model.facts
    assert len(outcome.patients) == 9
    assert set(outcome.patients) <= set(those.hashes)
    (tmp_path / "out" / "weights.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="damaged"):
        read_adapted(tmp_path / "out")
    with pytest.raises(NotPreparedError):
        read_adapted(tmp_path / "run")


def test_a_class_with_two_patients_is_refused_by_name(tmp_path: Path, run_folder: Path) -> None:
    those = images(6, 2)
    keep = (those.labels != 1) | (those.patients % 6 < 2)
    write_pictures(
        tmp_path, Labelled(those.pixels[keep], those.labels[keep], those.patients[keep], those.classes, (), keep[keep])
    )
    code, out, _ = command(tmp_path, run_folder)
    assert code == Exit.TOO_FEW
    assert "b (2)" in json.loads(out)["reasons"][0]
    assert not (tmp_path / "out" / "adapted.json").exists()
    assert "DO NOT USE" in (tmp_path / "out" / "report.md").read_text()


def test_grey_films_for_a_theta_of_colour_are_refused(tmp_path: Path) -> None:
    plan = study({"model.channels": 3})
    write_pictures(tmp_path, images(6, 1))
    code, out, _ = command(tmp_path, write_run(tmp_path / "run", plan))
    assert code == Exit.UNFAMILIAR
    assert "trained on colour" in json.loads(out)["reasons"][0]


def test_one_shot_cannot_be_calibrated(tmp_path: Path, run_folder: Path) -> None:
    write_pictures(tmp_path, images(6, 1))
    code, out, _ = command(tmp_path, run_folder, "--shots", "1")
    assert code == Exit.TOO_FEW
    assert "neither cross-validated nor calibrated" in json.loads(out)["reasons"][0]


def test_an_empty_folder_has_a_reason_of_its_own(tmp_path: Path, run_folder: Path) -> None:
    write_pictures(tmp_path, images(6, 1))
    for path in (tmp_path / "pictures").iterdir():
        path.unlink()
    code, _, err = command(tmp_path, run_folder)
    assert code == Exit.NO_IMAGES
    assert "none of 0 files is an image with a label and a patient" in err


def test_shuffled_labels_are_not_recommended(tmp_path: Path) -> None:
    run = trained(tmp_path)
    codes = []
    for seed in range(3):
        outcome = running.adapt(run, shuffled(images(8, 1), seed), running.Plan(), np.random.default_rng(seed))
        codes.append(min((r.code for r in outcome.refusals), default=Exit.USABLE))
    assert Exit.USABLE not in codes


def test_what_is_no_run_is_refused(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(NotPreparedError):
        read_trained(tmp_path)
    record = json.loads((run_folder / "study.json").read_text())
    (run_folder / "study.json").write_text(json.dumps({**record, "digest": "0" * 64}))
    with pytest.raises(StudyError, match="another digest"):
        read_trained(run_folder)
    code, _, err = call("adapt", "--model", run_folder, "--out", tmp_path / "out")
    assert code == 2
    assert "fetch the model again" in err
    write_run(tmp_path / "other", study({"model.width": 8}))
    (run_folder / "study.json").write_text(json.dumps(record))
    (run_folder / "theta.safetensors").write_bytes((tmp_path / "other" / "theta.safetensors").read_bytes())
    with pytest.raises(StudyError, match="tensors of this study"):
        read_trained(run_folder)


def test_a_theta_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    begin = trained(tmp_path / "a")
    broken = {name: torch.full_like(t, torch.nan) for name, t in begin.theta.items()}
    with pytest.raises(StudyError, match="not finite"):
        read_trained(write_run(tmp_path / "b", study(), broken))


def test_options_that_do_not_go_together(tmp_path: Path, run_folder: Path) -> None:
    base = ("adapt", "--model", run_folder, "--out", tmp_path / "out", "--site", tmp_path / "site")
    assert "together" in call(*base, "--labels", tmp_path / "x.csv")[2]
    assert "two ways" in call(*base, "--shots", "3", "--all")[2]
    code, _, err = call(*base)
    assert code == 1
    assert "no catalogue" in err
