"""`wardround-lab redteam`: the table, the page, the exit code where a guarantee is broken."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.privacy import mechanism
from common.study import Study
from simulations.cli import app
from simulations.redteam import team
from simulations.redteam.figures import Figure
from tests.simulations.redteam.scenes import TINY, write_source


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    write_source()
    study = tmp_path / "tiny.toml"
    study.write_text(TINY.override({"study.rounds": 5, "episodes.shots": 4, "episodes.queries": 5}).toml())
    result = CliRunner().invoke(app, ["redteam", str(study), "--sampling", "0.5", *arguments])
    return result.exit_code, result.stdout, result.output


def test_a_page_shows_originals_beside_reconstructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def attack_released(study: Study, count: int, generator: np.random.Generator) -> dict[str, list[Figure]]:
        asked.append(count)
        return {"LiRA": [Figure("AUC", 0.876, 0.7, 0.9, None, broken=False)]}

    monkeypatch.setattr(team, "TRAINED", ("linear, first order",))
    monkeypatch.setattr(team, "attack_released", attack_released)
    page = tmp_path / "redteam.html"
    code, out, everything = run(
        tmp_path, "--settings", "linear, first order", "--defences", "none", "--page", str(page)
    )
    assert code == 0, everything
    assert "ratio inversion" in out
    assert "equal in 15 of 15" in out
    assert out.count("refused: code 115") == 3
    assert out.count("refused: code 102") == 9
    html = page.read_text()
    assert html.count("<img alt='original'") == html.count("<img alt='reconstruction'") == 8
    assert "http" not in html.replace("http-equiv", "")
    assert "<script" not in html
    assert "No run here has a guarantee" in html
    assert html.count("refused: code") == 12
    assert asked == [8]
    assert "<span class='told'>0.88</span> <span class='note'>LiRA on theta</span>" in html
    assert "AUC of who is in the data, by theta</h4>" in html
    assert "AUC 0.876 [0.700, 0.900]" in out


def test_a_broken_guarantee_has_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "normal_steps", lambda size, deviation, source: np.zeros(size, np.int64))
    page = tmp_path / "redteam.html"
    arguments = ("--settings", "linear, second order", "--defences", "episode-clip", "--noise", "4")
    code, out, everything = run(tmp_path, *arguments, "--json", "--page", str(page))
    assert code == 1
    assert "above its bound" in everything
    found = json.loads(out[: out.rindex("}") + 1])
    (result,) = found["results"]
    assert result["broken"]
    assert all(trick["code"] == trick["wanted"] for trick in found["tricks"])
    assert 0.5 < min(result["areas"]) <= 1
    assert "The guarantee does not hold" in page.read_text()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--settings", "cubic"), "linear, first order"),
        (("--defences", "prayer"), "linear, first order"),
        (("--runs", "7"), "8 runs or more"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, wrong: tuple[str, str], said: str) -> None:
    code, _, everything = run(tmp_path, *wrong)
    assert code == 2
    assert said in everything
