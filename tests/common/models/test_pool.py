"""Max-pool against PyTorch's: the same values and, also among equal ones, the same gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.models.pool import max_pool

SHAPES = ([2, 3, 6, 6], [1, 2, 5, 7], [2, 1, 2, 3])


def _images(shape: list[int], kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "many equal":  # as in the background of an image
        return torch.randint(0, 2, shape, generator=generator).double()
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _derivatives(pool: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = pool(x)
    v = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out).requires_grad_()
    (first,) = torch.autograd.grad(out, x, v, create_graph=True)
    (second,) = torch.autograd.grad(first, v, torch.linspace(3, 4, x.numel(), dtype=x.dtype).view_as(x))
    return [out.detach(), first.detach(), second]


@pytest.mark.parametrize("kind", ["normal", "many equal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_derivatives_are_those_of_pytorch(shape: list[int], kind: str) -> None:
    x = _images(shape, kind)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = _derivatives(max_pool, x.to(memory_format=layout))
        theirs = _derivatives(lambda x: F.max_pool2d(x, 2), x.to(memory_format=layout))
        assert all(map(torch.equal, ours, theirs))


def test_gradients_under_vmap_are_those_of_pytorch() -> None:
    x = torch.stack([_images([2, 3, 5, 4], "many equal"), _images([2, 3, 5, 4], "normal")])

    def gradient(pool: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = torch.vmap(torch.func.grad(lambda x: pool(x).pow(3).sum()))(x)
        return out

    torch.testing.assert_close(gradient(max_pool), gradient(lambda x: F.max_pool2d(x, 2)))
