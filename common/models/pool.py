"""2x2 max-pool, fast on a CPU for images that lie channel by channel."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

__all__ = ["max_pool"]

_WINDOW = [2, 2]


def max_pool(x: Tensor) -> Tensor:
    """Return the maximum of every 2x2 window of images ``[N, C, H, W]``; an odd last row or column is left out.

    As PyTorch's, whose code for this memory format compares value by value: this takes a third of its time. Of equal
    values the first one, row by row, gets the gradient, as there.
    """
    if x.device.type != "cpu" or x.stride(1) == 1:
        return F.max_pool2d(x, 2)
    out: Tensor = _MaxPool.apply(x)[0]  # type: ignore[no-untyped-call]
    return out


class _MaxPool(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
        left, right = x[..., :rows, :columns:2], x[..., :rows, 1:columns:2]
        wider = torch.maximum(left, right)
        upper, lower = wider[..., ::2, :], wider[..., 1::2, :]
        is_right, is_lower = right > left, lower > upper
        above, below = is_right[..., ::2, :], is_right[..., 1::2, :]
        is_right = above ^ (is_lower & (above ^ below))  # `where` takes several times as long
        corners = torch.arange(0, rows, 2).unsqueeze(1) * x.shape[-1] + torch.arange(0, columns, 2)
        places = (is_lower.to(torch.int32) * x.shape[-1] + is_right.to(torch.int32)).to(torch.int64)
        return torch.maximum(upper, lower), places + corners

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        v = cotangents[0]
        like = v.new_empty(()).expand(ctx.shape)  # only its shape counts
        out: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            v, like, _WINDOW, _WINDOW, [0, 0], [1, 1], False, places
        )
        return out
