"""Normalisation without running statistics, exact to second order in every engine path.

PyTorch's affine batch norm under ``vmap`` takes the saved mean and deviation as constants, so a gradient
taken outside the ``vmap`` silently loses a second-order term; its double backward is also a chain of a dozen
full-size temporaries. `batch_norm` here is one differentiable operation with an analytic double backward:
right under every composition of ``grad`` and ``vmap``, and faster.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

__all__ = ["BatchStatNorm", "batch_norm", "make_norm", "masked_batch_norm"]

EPSILON = 1e-5
_aten = torch.ops.aten


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.view(1, -1, *[1] * (like.dim() - 2))


def _mix(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return constant + sum of coefficient * tensor, coefficients being per channel."""
    like = terms[0][1]
    out = _per_channel(constant, like)
    for coefficient, tensor in terms:
        out = torch.addcmul(out, tensor, _per_channel(coefficient, like))
    return out


class _Backward(Function):
    """First derivative of batch norm, itself differentiable.

    With xh = r (x - mean), r = 1 / sqrt(var + eps) and P v = v - mean(v) - xh mean(v xh), the gradient in x is
    gamma r P v. P is symmetric, so every cotangent is again a per-channel combination of v, x and the incoming
    u; only the reductions below are needed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
        return tuple(_aten.native_batch_norm_backward(v, x, gamma, None, None, mean, rstd, True, EPSILON, [True] * 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        u, for_gamma, for_beta = cotangents
        v, x, gamma, mean, rstd, v_xh, v_sum = ctx.saved_tensors
        n = v.numel() / v.shape[1]
        _, u_xh, u_sum = _aten.native_batch_norm_backward(
            u, x, gamma, None, None, mean, rstd, True, EPSILON, [False, True, True]
        )
        scale = gamma * rstd
        u_p_v = (u * v).sum([0, *range(2, v.dim())]) - (u_sum * v_sum + u_xh * v_xh) / n

        # Cotangent of v: gamma r P u, plus what the gradients of gamma and beta owe to v.
        on_xh = for_gamma - scale * u_xh / n
        grad_v = _mix(for_beta - scale * u_sum / n - on_xh * rstd * mean, (on_xh * rstd, x), (scale, u))
        # Cotangent of x: -(gamma r^2 / n) (xh <u, P v> + P u <v, xh> + P v <u, xh>) + for_gamma r P v.
        on_u = -scale * rstd * v_xh / n
        on_v = for_gamma * rstd - scale * rstd * u_xh / n
        on_xh = -(scale * rstd * u_p_v + on_u * u_xh + on_v * v_xh) / n
        constant = -(on_u * u_sum + on_v * v_sum) / n - on_xh * rstd * mean
        grad_x = _mix(constant, (on_xh * rstd, x), (on_u, u), (on_v, v))
        return grad_v, grad_x, rstd * u_p_v, None, None


class _Forward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return tuple(_aten.native_batch_norm(x, gamma, beta, None, None, True, 0.0, EPSILON))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], inputs[1], *output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        x, gamma, mean, rstd = ctx.saved_tensors
        grads: tuple[Tensor, ...] = _Backward.apply(cotangents[0], x, gamma, mean, rstd)  # type: ignore[no-untyped-call]
        return grads


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Normalise by the batch's own statistics, per channel.

    Exact first and second derivatives in ``x``, ``gamma`` and ``beta``; a third derivative is not offered.

    Parameters
    ----------
    x : Tensor
        ``[N, C, *]``, N times the spatial size at least 2.
    gamma, beta : Tensor
        ``[C]``.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 (the statistics of the batch, always).
    """
    out: Tensor = _Forward.apply(x, gamma, beta)[0]  # type: ignore[no-untyped-call]
    return out


def masked_batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, mask: Tensor) -> Tensor:
    """As `batch_norm`, with the statistics of the rows that ``mask`` ``[N]`` (bool) marks as real.

    It lets ragged episodes share one padded shape: padding rows change no real row's output.
    """
    over = [0, *range(2, x.dim())]
    weight = mask.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    count = weight.sum() * (x[0, 0].numel())
    mean = (x * weight).sum(over, keepdim=True) / count
    centred = x - mean
    variance = (centred.square() * weight).sum(over, keepdim=True) / count
    return centred * torch.rsqrt(variance + EPSILON) * _per_channel(gamma, x) + _per_channel(beta, x)


class BatchStatNorm(nn.Module):
    """Batch norm that keeps no running statistics: it has no buffers and no evaluation mode.

    A network with it is transductive: a prediction depends on the other images in the same call.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise ``x`` ``[N, C, *]``; ``mask`` ``[N]`` marks the rows that are not padding."""
        x = x.to(self.weight.dtype)  # statistics are not for bfloat16, and PyTorch's under vmap do not take it
        if mask is None:
            return batch_norm(x, self.weight, self.bias)
        return masked_batch_norm(x, self.weight, self.bias, mask)


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)  # each image has statistics of its own: padding cannot matter


def make_norm(kind: str, channels: int) -> nn.Module:
    """Return a ``batch`` (`BatchStatNorm`) or ``group`` (eight groups at most) norm over some channels."""
    if kind == "batch":
        return BatchStatNorm(channels)
    groups = next(g for g in range(min(8, channels), 0, -1) if channels % g == 0)
    return _GroupNorm(groups, channels)
