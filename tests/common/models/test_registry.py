"""The same network from the same study and seed, and nothing else touched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.models import Network, build
from common.models.conv4 import Conv4
from common.study import Model

NAMES = ["conv4", "resnet12", f"factory:{__name__}:make_network", f"factory:{__name__}:make_module"]


def _model(**fields: Any) -> Model:
    return Model.model_validate({"width": 4, "image_size": 16} | fields)


def make_network(channels: int, classes: int, image_size: int, dimensions: int, width: int = 3) -> Network:
    assert dimensions == 2
    return Network(Conv4(channels, width, "group"), Conv4.feature_size(width, image_size), classes)


def make_module(channels: int, classes: int, image_size: int, dimensions: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**dimensions, classes))


def make_wrong_head(**sizes: int) -> Network:
    return make_network(**(sizes | {"classes": 7}))


def make_nothing(**sizes: int) -> None:
    return None


def make_lazy(classes: int, **sizes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", NAMES)
def test_theta_follows_from_the_seed(name: str) -> None:
    first, again, other = (build(_model(name=name), classes=3, seed=seed).theta() for seed in (5, 5, 6))
    assert _equal(first, again)
    assert not _equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_global_generator_is_left_as_it_was(name: str) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    build(_model(name=name), classes=3, seed=5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_both_precisions_start_at_the_same_point(name: str) -> None:
    single, double = (
        build(_model(name=name), classes=3, seed=5, dtype=dtype).theta() for dtype in (torch.float32, torch.float64)
    )
    assert {p.dtype for p in double.values()} == {torch.float64}
    assert _equal({key: p.double() for key, p in single.items()}, double)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("size", [16, 28, 33])
@pytest.mark.parametrize("name", NAMES)
def test_network_fits_the_study_and_keeps_no_buffers(name: str, size: int, norm: str) -> None:
    net = build(_model(name=name, channels=3, image_size=size, norm=norm), classes=5, seed=0)
    assert net.logits(net.theta(), torch.zeros(2, 3, size, size)).shape == (2, 5)
    assert dict(net.named_buffers()) == {}


def test_convolutions_have_the_spread_of_he() -> None:
    theta = build(_model(name="conv4", width=64), classes=3, seed=0).theta()
    weight = theta["body.convolutions.3.weight"]
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_factory_gets_the_arguments() -> None:
    net = build(_model(name=NAMES[2], arguments='{"width": 9}'), classes=3, seed=0)
    assert net.theta()["body.convolutions.0.weight"].shape[0] == 9


REFUSED: dict[str, dict[str, Any]] = {
    r"no network 'conv5'; known are conv4, resnet12, monai:NAME .*, factory:": {"name": "conv5"},
    r"no network 'monai:'": {"name": "monai:"},
    r"conv4 needs model.image-size of at least 16, not 15": {"image_size": 15},
    r"resnet12 needs model.image-size of at least 16, not 15": {"name": "resnet12", "image_size": 15},
    r"conv4 takes 2-D images": {"dimensions": 3},
    r"conv4 takes no model.arguments": {"arguments": '{"width": 3}'},
    r"model.arguments is not JSON": {"arguments": "{width: 3}"},
    r"must be a JSON object such as \{\}, not \[3\]": {"arguments": "[3]"},
    r"cannot be imported .*nowhere": {"name": "factory:nowhere:make"},
    r"cannot be imported .*make_x": {"name": f"factory:{__name__}:make_x"},
    r"cannot be imported .*it must be factory:": {"name": "factory:json"},
    r"failed \(TypeError.*depth": {"name": NAMES[2], "arguments": '{"depth": 3}'},
    r"failed \(AssertionError": {"name": NAMES[2], "dimensions": 3},
    r"made a head of 7 classes, not 3": {"name": f"factory:{__name__}:make_wrong_head"},
    r"returned a NoneType": {"name": f"factory:{__name__}:make_nothing"},
    r"does not run .* uninitialized parameter": {"name": f"factory:{__name__}:make_lazy"},
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items(), ids=REFUSED)
def test_refusals(message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=message):
        build(_model(**fields), classes=3, seed=0)
