"""The script that measures adaptation: its lines, its table, and that shuffled labels are shuffled by patient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.adapt.run import ADAPTED, SCRATCH
from simulations.experiments.adapt import _shuffled, one_draw, table
from simulations.figures.adaptation import draw_adaptation
from tests.client.adapt.worlds import images, trained


def line(draw: int, theta: float, scratch: float, gap: float) -> dict[str, Any]:
    errors = {"expected calibration error": abs(gap), "the same of perfect probabilities": 0.01}
    own = {"balanced accuracy": theta, **errors, "gaps": [gap, 0.0], "setting": {}}
    other = {"balanced accuracy": scratch, **errors, "gaps": [0.0, 0.0], "setting": {}}
    return {"draw": draw, "shots": 5, "methods": {ADAPTED: own, SCRATCH: other}, "usable": draw == 0}


def test_the_table_holds_means_intervals_and_paired_gains() -> None:
    text = table([line(0, 0.6, 0.5, 0.1), line(1, 0.8, 0.5, -0.06)])
    assert "K = 5, 2 draws, 1 of them called usable" in text
    half = 12.7062 * np.std([0.6, 0.8], ddof=1) / np.sqrt(2)  # Student's t, one degree of freedom
    assert f"| {ADAPTED} | 0.700 ± {half:.3f} |" in text
    assert f"| gain over {SCRATCH} | +0.200 ± {half:.3f} |" in text
    assert "over all draws together: 0.020" in text
    assert "beyond that of perfect probabilities: +0.070" in text


def test_a_draw_without_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in {"_STEPS": (1,), "_FACTORS": (1.0,), "_ADAM_STEPS": (1,), "_ADAM_RATES": (0.01,)}.items():
        monkeypatch.setattr(f"client.adapt.methods.{name}", values)
    found = one_draw(trained(tmp_path), images(6, 1), 3, 0, alone=True)
    assert list(found["methods"]) == [ADAPTED]
    own = found["methods"][ADAPTED]
    assert np.abs(own["gaps"]).sum() == pytest.approx(own["expected calibration error"])
    assert 0 <= own["coverage"] <= 1
    share, tops = own["tops"]
    assert sum(share) == pytest.approx(1)
    right = np.add(own["gaps"], tops)  # of every bin, times its share
    assert ((right > -1e-9) & (right < np.add(share, 1e-9))).all()
    assert right.sum() == pytest.approx(own["balanced accuracy"])


def test_shuffled_labels_stay_with_the_patient() -> None:
    those = images(6, 3)
    dealt = _shuffled(those, np.random.default_rng(0))
    assert (dealt.labels != those.labels).any()
    assert sorted(dealt.labels) == sorted(those.labels)
    for who in np.unique(those.patients):
        assert len(np.unique(dealt.labels[those.patients == who])) == 1


def test_the_picture_is_small_and_takes_any_shots(tmp_path: Path) -> None:
    lines = [line(n, 0.6 + n / 10, 0.5, 0.1) | {"shots": shots} for n in range(3) for shots in (1, 5)]
    for each in lines:
        for own in each["methods"].values():
            own["tops"] = [[0.5, 0.5], [0.1, 0.4]]
    path = tmp_path / "picture.png"
    draw_adaptation(lines, lines[1::2], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size < 100_000
