"""What holds for both built-in bodies, `Conv4` and `ResNet12`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.models import Network, Theta, build
from common.study import Model

BOTH = pytest.mark.parametrize("name", ["conv4", "resnet12"])
NORMS = pytest.mark.parametrize("norm", ["batch", "group"])


def _build(name: str, norm: str) -> Network:
    model = Model.model_validate({"name": name, "norm": norm, "width": 4, "channels": 3, "image_size": 20})
    return build(model, classes=3, seed=0, dtype=torch.float64)


def _images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@BOTH
@NORMS
def test_padding_changes_no_real_row(name: str, norm: str) -> None:
    net, x = _build(name, norm), _images(5)
    mask = torch.tensor([True, True, True, False, False])
    padded = net.logits(net.theta(), x, mask)
    torch.testing.assert_close(padded[:3], net.logits(net.theta(), x[:3]), rtol=1e-10, atol=1e-10)


@BOTH
@NORMS
def test_body_says_whether_it_mixes_rows(name: str, norm: str) -> None:
    net, x = _build(name, norm), _images(4)
    others = net(torch.cat([x[:1], 2 * x[1:]]))
    alone = torch.allclose(net(x)[0], others[0], rtol=1e-10, atol=0)
    assert bool(net.body.mixes_rows) == (not alone)


@BOTH
def test_every_parameter_matters(name: str) -> None:
    net = _build(name, "group")
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (net(_images(4)) * weight).sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def _norm(x: Tensor, theta: Theta, name: str) -> Tensor:
    return F.batch_norm(x, None, None, theta[f"{name}.weight"], theta[f"{name}.bias"], training=True)


def _conv4(theta: Theta, x: Tensor) -> Tensor:
    for i in range(4):
        x = F.conv2d(x, theta[f"body.convolutions.{i}.weight"], padding=1)
        x = F.max_pool2d(F.relu(_norm(x, theta, f"body.norms.{i}")), 2)
    return x.flatten(1)


def _resnet12(theta: Theta, x: Tensor) -> Tensor:
    for i in range(4):
        block = f"body.blocks.{i}"
        shortcut = _norm(F.conv2d(x, theta[f"{block}.shortcut.weight"]), theta, f"{block}.shortcut_norm")
        for j in range(3):
            x = F.conv2d(x, theta[f"{block}.convolutions.{j}.weight"], padding=1)
            x = _norm(x, theta, f"{block}.norms.{j}")
            x = F.leaky_relu(x if j < 2 else x + shortcut, 0.1)
        x = F.max_pool2d(x, 2)
    return x.mean((2, 3))


@pytest.mark.parametrize(("name", "reference"), [("conv4", _conv4), ("resnet12", _resnet12)])
def test_features_are_those_of_the_papers_order(name: str, reference: Callable[..., Tensor]) -> None:
    net, x = _build(name, "batch"), _images(4)
    generator = torch.Generator().manual_seed(3)
    theta = {key: torch.randn(p.shape, dtype=torch.float64, generator=generator) for key, p in net.theta().items()}
    theta |= {key: p.abs() + 0.1 for key, p in theta.items() if "norm" in key}
    torch.testing.assert_close(net.features(theta, x), reference(theta, x), rtol=1e-9, atol=1e-9)


def test_resnet12_has_twelve_convolutions_and_four_shortcuts() -> None:
    sizes = [tuple(p.shape) for p in _build("resnet12", "batch").theta().values() if p.dim() == 4]
    assert [s[0] for s in sizes if s[2:] == (3, 3)] == [4] * 3 + [8] * 3 + [16] * 3 + [32] * 3
    assert [s[:2] for s in sizes if s[2:] == (1, 1)] == [(4, 3), (8, 4), (16, 8), (32, 16)]
