"""Convolution with a fast second derivative.

PyTorch differentiates the gradient of a convolution by convolutions whose kernels are whole images, for which no
library has fast code. Gradients are bilinear: their derivatives are the usual three operations again.
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
        return _forward(x, w)
    out: Tensor = _Forward.apply(x, w)  # type: ignore[no-untyped-call]
    return out


def _forward(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=w.shape[-1] // 2)


def _gradients(v: Tensor, x: Tensor, w: Tensor, *, on_x: bool = True) -> tuple[Tensor, Tensor]:
    """Return the gradients in x and w where the output's is ``v`` ``[N, O, H, W]``; both at once costs less."""
    pad = w.shape[-1] // 2
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        v, x, w, None, [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [on_x, True, False]
    )
    return out[0], out[1]


class _Forward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return _forward(x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor]:
        x, w = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            on_x, on_w = _Backward.apply(v, x, w)  # type: ignore[no-untyped-call]
            return on_x, on_w
        return None, _BackwardOnKernels.apply(v, x, w)  # type: ignore[no-untyped-call]


class _Backward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(v, x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, for_x: Tensor, for_w: Tensor) -> tuple[Tensor, ...]:
        # <for_x, on_x> + <for_w, on_w> = <v, for_x * w + x * for_w>, where * is the convolution.
        v, x, w = ctx.saved_tensors
        return _forward(for_x, w) + _forward(x, for_w), *_gradients(v, for_x, for_w)


class _BackwardOnKernels(Function):
    """The gradient in the kernels alone, where the images are data: theirs would be the dearest of all."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return _gradients(v, x, w, on_x=False)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, for_w: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _forward(x, for_w), None, None
