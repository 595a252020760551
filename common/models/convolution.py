"""Convolution whose second derivative is made of convolutions too.

PyTorch differentiates the gradient of a convolution by convolutions whose kernels are whole images, for which no
library has fast code: on a CPU they take up to three times as long as the same work needs. Here the convolution and
its two gradients are three bilinear operations that are each other's derivatives, to any order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

__all__ = ["convolve"]


def convolve(x: Tensor, w: Tensor) -> Tensor:
    """Convolve images with kernels, stride 1, padded so that the images keep their size.

    Parameters
    ----------
    x : Tensor
        ``[N, C, H, W]``.
    w : Tensor
        ``[O, C, k, k]``, k odd.

    Returns
    -------
    Tensor
        ``[N, O, H, W]``.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, w, padding=w.shape[-1] // 2)
    out: Tensor = _Convolution.apply(x, w)  # type: ignore[no-untyped-call]
    return out


class _Convolution(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=w.shape[-1] // 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        return _apply(ctx, (_OnImages, v, w), (_OnKernels, v, x, w.shape[-1]))


class _OnImages(Function):
    """The gradient in the images ``[N, C, H, W]`` from the output's ``v`` ``[N, O, H, W]`` and the kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, w: Tensor) -> Tensor:
        n, _, *size = v.shape
        if v.stride(1) == 1:  # only its shape and its memory format count
            like = v.new_empty(n, *size, w.shape[1]).movedim(-1, 1)
        else:
            like = v.new_empty(n, w.shape[1], *size)
        return _gradients(v, like, w, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        v, w = ctx.saved_tensors
        return _apply(ctx, (_Convolution, u, w), (_OnKernels, v, u, w.shape[-1]))


class _OnKernels(Function):
    """The gradient in the kernels ``[O, C, k, k]`` from the output's ``v`` and the images."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, x: Tensor, k: int) -> Tensor:
        like = v.new_empty(v.shape[1], x.shape[1], k, k)
        return _gradients(v, x, like, [False, True, False])[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        v, x = ctx.saved_tensors
        return *_apply(ctx, (_Convolution, x, u), (_OnImages, v, u)), None


def _apply(ctx: Any, *terms: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Run one operation for each of a Function's inputs, where its gradient is asked for."""
    pairs = zip(ctx.needs_input_grad, terms, strict=False)
    return tuple(operation.apply(*inputs) if needed else None for needed, (operation, *inputs) in pairs)


def _gradients(v: Tensor, x: Tensor, w: Tensor, which: list[bool]) -> tuple[Tensor, ...]:
    pad = w.shape[-1] // 2
    out: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        v, x, w, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, which
    )
    return out
