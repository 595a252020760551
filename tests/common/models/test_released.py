"""A body that is fixed, and a body that starts as a released theta."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import ModelError
from common.models import build, untrained
from common.models.released import keep, released_path
from common.study import Model

HEAD = ["head.weight", "head.bias"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path / "home"))


def _model(name: str = "conv4", start: str = "", **fields: Any) -> Model:
    arguments = json.dumps({"start": start}) if start else "{}"
    return Model.model_validate({"name": name, "arguments": arguments, "width": 4, "image_size": 16} | fields)


def _released(folder: Path, theta: dict[str, Tensor]) -> str:
    save_file(theta, folder / "theta.safetensors")
    return keep(folder / "theta.safetensors")


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_theta_is_the_head_and_the_features_are_those_of_the_body(norm: str) -> None:
    whole, head = (build(_model(name, norm=norm), classes=3, seed=1) for name in ("conv4", "head:conv4"))
    assert list(head.theta()) == HEAD
    assert all(torch.equal(head.theta()[name], whole.theta()[name]) for name in HEAD)
    x = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.logits(head.theta(), x), whole.logits(whole.theta(), x))
    # A copy without numbers, as the engine's workers have it, keeps the body's.
    assert torch.equal(head.to("meta").logits(whole.theta(), x), whole.logits(whole.theta(), x))
    assert torch.equal(head.features({}, x), whole.features(whole.theta(), x))


def test_both_precisions_have_the_body_of_their_own_type() -> None:
    head = build(_model("head:resnet12"), classes=3, seed=1, dtype=torch.float64)
    assert {t.dtype for t in head.fixed.values()} == {torch.float64}


@pytest.mark.parametrize("name", ["conv4", "head:conv4"])
def test_the_body_starts_as_the_released_one_and_the_head_from_the_seed(name: str, tmp_path: Path) -> None:
    trained = build(_model(), classes=7, seed=9).theta()
    digest = _released(tmp_path, trained)
    assert digest == hashlib.sha256((tmp_path / "theta.safetensors").read_bytes()).hexdigest()
    network, plain = build(_model(name, digest), classes=3, seed=1), build(_model(), classes=3, seed=1)
    own = dict(network.named_parameters())
    for key, tensor in own.items():
        assert torch.equal(tensor, trained[key] if key.startswith("body.") else plain.theta()[key])
    assert all(torch.equal(t, trained[key]) for key, t in network.fixed.items())
    assert list(network.theta()) == (HEAD if name == "head:conv4" else list(own))


def test_its_size_is_known_without_the_file(tmp_path: Path) -> None:
    model = _model("head:conv4", "0" * 64)
    with pytest.raises(ModelError, match=r"released theta 000000000000, which is not here: put .*0000\.safetensors"):
        build(model, classes=3, seed=0)
    assert list(build(model, classes=3, seed=0, released=False).theta()) == HEAD


def test_untrained_is_the_network_by_itself(tmp_path: Path) -> None:
    model = _model("head:conv4", "0" * 64)
    assert untrained(model) == _model()
    assert untrained(_model(arguments='{"depth":3}')).arguments == '{"depth":3}'


def test_what_is_not_the_released_theta_is_refused(tmp_path: Path) -> None:
    digest = _released(tmp_path, build(_model(), classes=3, seed=9).theta())
    with pytest.raises(ModelError, match="belongs to another network: set"):
        build(_model(start=digest, width=5), classes=3, seed=0)
    path = released_path(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="is not the theta that its name says"):
        build(_model(start=digest), classes=3, seed=0)
    for wrong in ("../" * 3, digest.upper(), "abc"):
        with pytest.raises(ModelError, match="start is the SHA-256"):
            build(_model(start=wrong), classes=3, seed=0)


def test_what_has_no_body_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no body"):
        _released(tmp_path, {"head.weight": torch.zeros(2, 3)})
    (tmp_path / "theta.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"is no theta\.safetensors"):
        keep(tmp_path / "theta.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        keep(tmp_path / "nothing")
