"""What holds for both built-in bodies, `Conv4` and `ResNet12`."""

import pytest
import torch
from torch import Tensor

from common.models import Network, build
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


def test_resnet12_has_twelve_convolutions_and_four_shortcuts() -> None:
    sizes = [tuple(p.shape) for p in _build("resnet12", "batch").theta().values() if p.dim() == 4]
    assert [s[0] for s in sizes if s[2:] == (3, 3)] == [4] * 3 + [8] * 3 + [16] * 3 + [32] * 3
    assert [s[:2] for s in sizes if s[2:] == (1, 1)] == [(4, 3), (8, 4), (16, 8), (32, 16)]
