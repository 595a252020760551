"""What cross-validation chooses from: every setting is fitted once, and the model itself is the one that was chosen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.adapt.choose import draw_shots
from client.adapt.classifier import start
from client.adapt.methods import Adapted, Setting
from client.data.episodes import network_input
from tests.client.adapt.worlds import images, trained


@pytest.mark.parametrize("name", ["maml", "metasgd", "protonet", "fedavg"])
def test_every_setting_is_fitted_and_the_model_is_the_chosen_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant, values in {"_STEPS": (1, 2), "_ADAM_STEPS": (2, 4), "_ADAM_RATES": (0.01, 0.03)}.items():
        monkeypatch.setattr(f"client.adapt.methods.{constant}", values)
    those, run = images(4, 1), trained(tmp_path, {"algorithm.name": name})
    method = Adapted(run.learner, start(run, those.classes), run.study, torch.device("cpu"))
    assert len(set(method.settings)) == len(method.settings)
    assert [setting for setting in method.settings if setting.adam] == [
        Setting(rate, steps, adam=True) for rate in (0.01, 0.03) for steps in (2, 4)
    ]
    support, rows = draw_shots(those, 2, np.random.default_rng(0)), np.arange(len(those.labels))
    found = dict(method.fit(those, support, method.settings))
    assert set(found) == set(method.settings)
    assert len({found[setting](rows).tobytes() for setting in found}) > len(found) / 2  # they are not the same
    for setting in method.settings:
        model = method.classifier(those, support, setting)
        np.testing.assert_allclose(model.logits(network_input(those.pixels)), found[setting](rows), atol=1e-5)
