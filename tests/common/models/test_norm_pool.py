"""Batch norm with max-pool against finite differences and against PyTorch's two layers, on every engine path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.models.conv4 import Conv4
from common.models.norm_pool import batch_norm_pool
from tests.common.models.maml import PATHS, Logits, Theta, by_loop

SHAPES = ([2, 3, 2, 2], [2, 3, 5, 4])  # odd: a row is normalised but not pooled
FORMATS = (torch.contiguous_format, torch.channels_last)


def _inputs(shape: list[int], layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).to(memory_format=layout)
    gamma = torch.tensor([1.3, 0.2, 2.0], dtype=torch.float64)
    beta = torch.tensor([0.2, -0.4, 0.0], dtype=torch.float64)
    return x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_derivatives_are_those_of_finite_differences(shape: list[int], layout: torch.memory_format) -> None:
    inputs = _inputs(shape, layout)
    assert torch.autograd.gradcheck(batch_norm_pool, inputs)
    assert torch.autograd.gradgradcheck(batch_norm_pool, inputs)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_a_zero_scale_gives_finite_derivatives(layout: torch.memory_format) -> None:
    x, gamma, beta = _inputs([2, 3, 4, 4], layout)
    with torch.no_grad():
        gamma.zero_()
    out = batch_norm_pool(x, gamma, beta)
    torch.testing.assert_close(out, beta.view(1, 3, 1, 1).expand_as(out))
    first = torch.autograd.grad(out.pow(3).sum(), (x, gamma, beta), create_graph=True)
    second = torch.autograd.grad(
        torch.cat([g.flatten() for g in first]).square().sum(), (x, gamma, beta), materialize_grads=True
    )
    assert all(bool(g.isfinite().all()) for g in (*first, *second))


def test_a_third_derivative_is_refused() -> None:
    x, *rest = _inputs([2, 3, 2, 2], torch.contiguous_format)
    value = batch_norm_pool(x, *rest).pow(3).sum()
    for _ in range(2):
        (value,) = torch.autograd.grad(value, x, create_graph=True)
        value = value.pow(2).sum()
    with pytest.raises(NotImplementedError, match="third"):
        torch.autograd.grad(value, x)


class _Plain(nn.Module):
    """Conv4's blocks from PyTorch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(a, 4, 3, padding=1, bias=False) for a in (2, 4, 4, 4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, track_running_stats=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(convolution(x))), 2)
        return x.flatten(1)


def _logits(net: nn.Module) -> Logits:
    def logits(theta: Theta, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = functional_call(net, dict(theta), (x,))
        return out

    return logits


@pytest.mark.parametrize("path", [by_loop, *PATHS])
def test_conv4s_maml_gradient_is_that_of_plain_layers(path: Callable[..., Theta]) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    theta = {name: draw(*p.shape) for name, p in _Plain().named_parameters()}  # scales of both signs
    x, y = draw(2, 2, 6, 2, 16, 16), torch.randint(4, (2, 2, 6), generator=generator)
    got = path(_logits(Conv4(2, 4, "batch")), theta, x, y)
    torch.testing.assert_close(got, by_loop(_logits(_Plain()), theta, x, y), rtol=1e-10, atol=1e-11)
