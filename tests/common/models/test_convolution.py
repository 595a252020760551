"""The convolution's derivatives against finite differences and against PyTorch's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.models.convolution import convolve

FORMATS = (torch.contiguous_format, torch.channels_last)


def _inputs(k: int, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator).to(memory_format=layout)
    w = torch.randn(4, 3, k, k, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), w.requires_grad_()


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_derivatives_are_those_of_finite_differences(k: int, layout: torch.memory_format) -> None:
    x, w = _inputs(k, layout)
    torch.testing.assert_close(convolve(x, w), F.conv2d(x, w, padding=k // 2))
    assert torch.autograd.gradcheck(convolve, (x, w))
    assert torch.autograd.gradgradcheck(convolve, (x, w))


def test_derivatives_in_the_kernels_alone_are_those_of_finite_differences() -> None:
    x, w = _inputs(3, torch.channels_last)

    def of_kernels(w: Tensor) -> Tensor:
        return convolve(x.detach(), w)

    assert torch.autograd.gradcheck(of_kernels, w)
    assert torch.autograd.gradgradcheck(of_kernels, w)


@pytest.mark.parametrize("outside", [False, True], ids=["vmap(grad)", "grad(vmap)"])
def test_second_derivatives_under_vmap_are_those_of_pytorch(outside: bool) -> None:
    x, w = _inputs(3, torch.contiguous_format)
    xs = torch.stack([x, 2 * x, x.flip(0)]).detach()

    def second(operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def one(w: Tensor, x: Tensor) -> Tensor:
            first: Tensor = torch.func.grad(lambda w: operation(x, w).tanh().square().sum())(w)
            return first.square().sum()

        if outside:
            whole: Tensor = torch.func.grad(lambda w: torch.vmap(one, (None, 0))(w, xs).sum())(w.detach())
            return whole
        gradients: Tensor = torch.vmap(torch.func.grad(one), (None, 0))(w.detach(), xs)
        return gradients.sum(0)

    torch.testing.assert_close(second(convolve), second(lambda x, w: F.conv2d(x, w, padding=1)), rtol=1e-10, atol=1e-10)
