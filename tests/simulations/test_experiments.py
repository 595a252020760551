"""The script that measures adaptation: its lines, its table, and that shuffled labels are shuffled by patient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.adapt.run import ADAPTED, SCRATCH
from simulations.experiments.adapt import _shuffled, one_draw, table
from tests.client.adapt.worlds import images, trained


def line(draw: int, theta: float, scratch: float, gap: float) -> dict[str, Any]:
    own = {"balanced accuracy": theta, "gaps": [gap, 0.0], "setting": {}}
    other = {"balanced accuracy": scratch, "gaps": [0.0, 0.0], "setting": {}}
    return {"draw": draw, "shots": 5, "methods": {ADAPTED: own, SCRATCH: other}, "usable": draw == 0}


def test_the_table_holds_means_intervals_and_paired_gains() -> None:
    text = table([line(0, 0.6, 0.5, 0.1), line(1, 0.8, 0.5, -0.06)])
    assert "K = 5, 2 draws, 1 of them called usable" in text
    half = 1.96 * np.std([0.6, 0.8], ddof=1) / np.sqrt(2)
    assert f"| {ADAPTED} | 0.700 ± {half:.3f} |" in text
    assert f"| gain over {SCRATCH} | +0.200 ± {half:.3f} |" in text
    assert "over all draws together: 0.020" in text


def test_a_draw_without_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.adapt.methods._STEPS", (1,))
    found = one_draw(trained(tmp_path), images(6, 1), 3, 0, alone=True)
    assert list(found["methods"]) == [ADAPTED]
    own = found["methods"][ADAPTED]
    assert np.abs(own["gaps"]).sum() == pytest.approx(own["expected calibration error"])
    assert 0 <= own["coverage"] <= 1


def test_shuffled_labels_stay_with_the_patient() -> None:
    those = images(6, 3)
    dealt = _shuffled(those, np.random.default_rng(0))
    assert (dealt.labels != those.labels).any()
    assert sorted(dealt.labels) == sorted(those.labels)
    for who in np.unique(those.patients):
        assert len(np.unique(dealt.labels[those.patients == who])) == 1
