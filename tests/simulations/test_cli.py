"""`wardround-lab` as people and programs use it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.study import Study
from simulations import cli
from simulations.cli import app
from simulations.redteam.settings import built_in

TINY = (
    "study.rounds=1", "data.sites=3", "sites.held-out=hospital-2", "data.patients-per-class=4", "model.width=4",
    "model.image-size=16", "episodes.classes=disc,ring,cross", "episodes.held-out=bar,wedge",
    "episodes.ways=2", "episodes.shots=1", "episodes.queries=1", "episodes.per-round=1",
    "episodes.test-episodes=2", "episodes.scratch-steps=1",
)  # fmt: skip
CHANGES = [part for change in TINY for part in ("-c", change)]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})
    return result.exit_code, result.stdout, result.output


def test_simulate_prints_json_for_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path))
    code, out, everything = run("simulate", *CHANGES, "--json")
    assert code == 0, everything
    answer = json.loads(out)
    held_out = answer["evaluations"][-1]["sites"]["hospital-2"]
    assert {"known.after.mean", "new.after.mean", "new.scratch.mean", "new.gain.mean"} <= set(held_out)
    assert "known.scratch.mean" not in answer["evaluations"][-1]["sites"]["hospital-0"]
    assert (Path(answer["folder"]) / "theta.safetensors").exists()


def test_simulate_prints_a_table_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path))
    code, _, output = run("simulate", *CHANGES)
    assert code == 0
    assert "hospital-2*" in output
    assert "from scratch" in output
    assert "AUROC" in output
    assert "worst site: hospital-" in output
    assert "no formal guarantee" in output


def test_simulate_says_that_figures_are_withheld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path))
    code, _, output = run("simulate", *CHANGES, "-c", "privacy.figures=withheld")
    assert code == 0
    assert "withholds figures" in output
    assert "no loss and no accuracy" in output
    assert "adapted" not in output


def test_a_failed_run_has_an_exit_code_and_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path))
    code, _, output = run("simulate", *CHANGES, "-c", "sites.quorum=3", "-c", "sites.join-seconds=0.1")
    assert code == 1
    assert "sites.quorum is 3" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("change", "says"),
    [("study.rounds", "KEY=VALUE"), ("study.round=3", "unknown key"), ("study.rounds=many", "'many'")],
)
def test_a_bad_change_is_explained(change: str, says: str) -> None:
    code, _, output = run("prepare", "-c", change)
    assert code == 2
    assert says in output


def test_prepare_draws_who_has_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path))
    picture = tmp_path / "sites.png"
    code, out, everything = run("prepare", *CHANGES, "--picture", str(picture), "--json")
    assert code == 0, everything
    assert set(json.loads(out)["images"]) == {"hospital-0", "hospital-1", "hospital-2"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["demo", "simulate", "prepare", "compare"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, _, output = run(command, "--help")
    assert code == 0
    assert "Example: wardround-lab" in output


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "Two lesion types on three phantom hospitals"),
        ({"study.rounds": 3}, "Two lesion types on three phantom hospitals"),
        ({"data.sites": 4}, "4 virtual hospitals with images from phantoms"),
        (
            {"data.source": "npz:/a/b.npz,medmnist:pathmnist"},
            "3 virtual hospitals with images from b.npz, medmnist:pathmnist",
        ),
        ({"episodes.classes": "disc,ring,cross"}, "3 virtual hospitals with images from phantoms"),
        ({"data.sites": 4, "study.title": "Mine"}, "Mine"),
        (
            {"data.source": "npz:b.npz", "study.title": Study().study.title},
            "3 virtual hospitals with images from npz:b.npz",
        ),
    ],
)
def test_a_built_in_title_is_shown_where_it_is_true(changes: dict[str, str | int], title: str) -> None:
    assert cli._title(built_in().override(changes), built_in()) == title
