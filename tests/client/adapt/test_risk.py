"""A later outcome as the label: an image after the horizon never counts, and tenths of risk say what came true."""

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.adapt import run as running
from client.adapt.images import Labelled
from client.adapt.judge import Judged
from client.adapt.judge import Outcome as Said
from client.adapt.report import markdown
from client.adapt.risk import follow, tenths
from client.adapt.run import Outcome
from client.adapt.trained import Trained
from client.data.labels import Labels
from client.data.outcome import OUTCOMES, Outcomes
from tests.client.adapt.test_cli import call, few_settings
from tests.client.adapt.worlds import images, trained

__all__ = ["few_settings"]  # a fixture of every test here, too

YEAR = timedelta(days=365)


def write_followed(folder: Path) -> tuple[Path, ...]:
    """Write pictures of 14 patients, half of them cases: two before the horizon, and a white one after it."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    those, rows, outcomes = images(7, 2, 2), ["path,who,date"], ["patient,date,outcome"]
    for who in range(14):
        known = date(2020, 1, 1) + timedelta(days=37 * (who % 7))
        outcomes.append(f"SECRET{who},{known},{'yes' if who >= 7 else 'no'}")
        pixels = [*those.pixels[those.patients == who][:, 0], np.full((16, 16), 255, np.uint8)]
        for number, before in enumerate((YEAR + timedelta(days=90), YEAR, YEAR - timedelta(days=1))):
            Image.fromarray(pixels[number]).save(pictures / f"{who}-{number}.png")
            rows.append(f"{who}-{number}.png,SECRET{who},{known - before}")
    rows.append("0-0.png,SECRET0,2018-10-03")
    (folder / "labels.csv").write_text("\n".join(rows))
    (folder / "outcome.csv").write_text("\n".join(outcomes))
    return pictures, folder / "labels.csv", folder / "outcome.csv"


def test_an_image_after_the_horizon_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, labels, outcome = write_followed(tmp_path)
    model, seen, adapt = tmp_path / "run", list[Labelled](), running.adapt
    trained(model)

    def look(those: Trained, found: Labelled, *rest: Any) -> Any:
        seen.append(found)
        return adapt(those, found, *rest) if len(seen) == 1 else Outcome((), report, None, ())

    monkeypatch.setattr(running, "adapt", look)
    base = ("adapt", pictures, "--model", model, "--labels", labels, "--map", "who=patient", "--out", tmp_path / "out")
    site = ("--site", tmp_path / "site", "--json")
    code, out, err = call(*base, *site, "--outcome", outcome, "--horizon", "365d")
    report = json.loads(out)
    assert code == report["exit"], err
    (found,) = seen
    assert found.classes == OUTCOMES
    assert len(found.labels) == 28  # 14 patients with two images each
    assert found.pixels.reshape(28, -1).min(-1).max() < 255  # not one of the white ones
    assert report["followed"]["rows"] == {"used": 29, "after the horizon": 14, "no outcome": 0}
    assert report["asked"]["all"]
    assert sum(tenth["images"] for tenth in report["followed"]["tenths"]) == 28
    text = (tmp_path / "out" / "report.md").read_text()
    assert "at least 365 days before" in text
    written = "".join(p.read_text(errors="replace") for p in (tmp_path / "out").iterdir()) + out + err
    assert "SECRET" not in written
    assert not any(str(date(2018, 10, 3) + timedelta(days=n)) in written for n in range(500))
    # One day more, and the second image is too late as well.
    call(*base, *site, "--outcome", outcome, "--horizon", "366d")
    assert len(seen[-1].labels) == 14
    wrong: list[tuple[tuple[str | Path, ...], str]] = [
        (("--outcome", outcome), "together"),
        (("--horizon", "365d"), "together"),
        (("--outcome", outcome, "--horizon", "365d", "--shots", "3"), "without --shots"),
        (("--outcome", outcome, "--horizon", "365d", "--task", "a,b"), "without --shots and --task"),
        (("--outcome", outcome, "--horizon", "1y"), "number of days"),
    ]
    for more, why in wrong:
        code, _, err = call(*base, *site, *more)
        assert code == 1
        assert why in err


def test_dates_that_tell_the_outcome_are_told(tmp_path: Path) -> None:
    outcomes = Outcomes({f"S{n}": (date(2020, 1, 1), OUTCOMES[n % 2]) for n in range(40)}, YEAR)
    labels = Labels(tmp_path / "labels.csv", {}, outcomes)
    names = ("study", "date", "learner", "study digest", "theta digest")
    report = {**dict.fromkeys(names, ""), "classes": {}, "reasons": []}

    def told(*years: int) -> str:
        rows = [f"{n}.png,S{n},{year}-01-01" for n, year in enumerate(years)]
        labels.path.write_text("\n".join(["path,patient,date", *rows]))
        followed = follow(labels, np.random.default_rng(0)).json()
        return markdown(report | {"followed": followed | {"tenths": []}})

    later, alike = told(*(2010 + n % 2 * 4 + n % 3 for n in range(40))), told(*(2010 + n // 2 % 5 for n in range(40)))
    assert "AUROC of 1.000 [1.000, 1.000]" in later
    assert "may see the years" in later
    assert "AUROC of 0.500" in alike
    assert "may see the years" not in alike


def test_tenths_of_perfect_risks_come_true() -> None:
    generator = np.random.default_rng(0)
    risk = generator.random(4_000)
    labels = (generator.random(4_000) < risk).astype(int)
    p = np.stack([1 - risk, risk], -1)[None]
    found = {"m": Said(p, np.ones_like(p, np.bool_), ())}
    judged = Judged(labels, np.arange(4_000) // 4, found, np.ones(4_000))
    table = tenths(judged, "m", generator)
    assert [tenth["images"] for tenth in table] == [400] * 10
    inside = 0
    for place, tenth in enumerate(table):
        assert tenth["predicted"] == pytest.approx(0.05 + place / 10, abs=0.02)
        inside += tenth["observed"]["low"] <= tenth["predicted"] <= tenth["observed"]["high"]
    assert inside >= 8
    turned = {"m": Said(p[..., ::-1], np.ones_like(p, np.bool_), ())}
    table = tenths(Judged(labels, np.arange(4_000) // 4, turned, np.ones(4_000)), "m", generator)
    assert table[0]["observed"]["value"] > 0.9
    assert table[0]["predicted"] < 0.1
