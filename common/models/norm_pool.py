"""Batch norm and 2x2 max-pool as one operation: the normalised images themselves are never made.

Max-pool commutes with a rising function, so the norm's affine map is applied to the pooled quarter of the values, and
the backward passes work on that quarter wherever they can. Derivatives are analytic and exact to second order, as in
`common.models.norm`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from common.models.norm import EPSILON

__all__ = ["batch_norm_pool"]

_aten = torch.ops.aten
_OVER = (0, 2, 3)


def batch_norm_pool(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Normalise by the batch's own statistics, per channel, then take the maximum of every 2x2 window.

    Exact first and second derivatives in ``x``, ``gamma`` and ``beta``; a third one raises.

    Parameters
    ----------
    x : Tensor
        ``[N, C, H, W]``, H and W at least 2; an odd last row or column counts in the statistics only.
    gamma : Tensor
        ``[C]``, not negative. (Minus one times a channel and its scale give the same output, so a sign can be
        moved into whatever made ``x``.)
    beta : Tensor
        ``[C]``.

    Returns
    -------
    Tensor
        ``[N, C, H // 2, W // 2]``.
    """
    out: Tensor = _Forward.apply(x, gamma, beta)[0]  # type: ignore[no-untyped-call]
    return out


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return every channel's mean and 1 / sqrt(variance + epsilon)."""
    if x.device.type == "cpu":  # where var_mean takes ten times as long
        mean, variance = _aten.batch_norm_update_stats(x, None, None, 0.0)
    else:
        variance, mean = torch.var_mean(x, _OVER, correction=0)
    return mean, torch.rsqrt(variance + EPSILON)


def _mix(constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Return constant + sum of coefficient * tensor, coefficients being per channel."""
    (coefficient, tensor), *more = terms
    out = torch.addcmul(constant.view(1, -1, 1, 1), tensor, coefficient.view(1, -1, 1, 1))
    for coefficient, tensor in more:
        out.addcmul_(tensor, coefficient.view(1, -1, 1, 1))
    return out


def _rows(images: Tensor) -> Tensor:
    """Return images ``[N, C, H, W]`` as ``[N, H * W, C]``."""
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def _at(images: Tensor, places: Tensor) -> Tensor:
    """Return images' values at the maxima's places ``[N, C, h, w]``."""
    n, c, h, w = places.shape
    return _rows(images).gather(1, _rows(places)).view(n, h, w, c).permute(0, 3, 1, 2)


def _put(images: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Overwrite images at the maxima's places; windows do not overlap, so no place comes twice."""
    n, c, h, w = images.shape
    images.permute(0, 2, 3, 1).view(n, h * w, c).scatter_(1, _rows(places), _rows(values))
    return images


class _Forward(Function):
    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        mean, rstd = _statistics(x)
        maxima, places = _aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
        scale = gamma * rstd
        return _mix(beta - scale * mean, (scale, maxima)), mean, rstd, maxima, places

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = _Backward.apply(cotangents[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return grads

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _in_channels(_Forward, info.batch_size, in_dims, inputs)


class _Backward(Function):
    """First derivative, itself differentiable.

    As `common.models.norm._Backward` with v zero but at the maxima: its sums are sums over the pooled values.
    """

    @staticmethod
    def forward(
        v: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, maxima: Tensor, places: Tensor
    ) -> tuple[Tensor, ...]:
        n = x.numel() / x.shape[1]
        v_sum = v.sum(_OVER)
        v_xh = ((v * maxima).sum(_OVER) - mean * v_sum) * rstd
        scale = gamma * rstd
        on_x = -scale * rstd * v_xh / n
        constant = -scale * v_sum / n - on_x * mean
        at_maxima = _mix(constant, (on_x, maxima), (scale, v))
        return _put(_mix(constant, (on_x, x)), places, at_maxima), v_xh, v_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor, ...] = _Second.apply(*cotangents, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return *grads, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _in_channels(_Backward, info.batch_size, in_dims, inputs)


class _Second(Function):
    """Cotangents of v, x and gamma from those of the first derivative (u, for_gamma, for_beta)."""

    @staticmethod
    def forward(
        u: Tensor, for_gamma: Tensor, for_beta: Tensor,
        v: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, maxima: Tensor, places: Tensor,
        v_xh: Tensor, v_sum: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n = x.numel() / x.shape[1]
        _, u_xh, u_sum = _aten.native_batch_norm_backward(
            u, x, gamma, None, None, mean, rstd, True, EPSILON, [False, True, True]
        )
        u_at = _at(u, places)
        scale = gamma * rstd
        u_p_v = (u_at * v).sum(_OVER) - (u_sum * v_sum + u_xh * v_xh) / n

        # The formulas are those of `common.models.norm._Backward`, x's coefficients being on_xh * rstd.
        on_x = (for_gamma - scale * u_xh / n) * rstd
        grad_v = _mix(for_beta - scale * u_sum / n - on_x * mean, (on_x, maxima), (scale, u_at))
        on_u = -scale * rstd * v_xh / n
        on_v = for_gamma * rstd - scale * rstd * u_xh / n
        on_x = -(scale * rstd * u_p_v + on_u * u_xh + on_v * v_xh) / n * rstd
        constant = -(on_u * u_sum + on_v * v_sum) / n - on_x * mean
        at_maxima = _mix(constant, (on_x, maxima), (on_u, u_at), (on_v, v))
        grad_x = _put(_mix(constant, (on_x, x), (on_u, u)), places, at_maxima)
        return grad_v, grad_x, rstd * u_p_v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        raise NotImplementedError("batch_norm_pool has no third derivative")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _in_channels(_Second, info.batch_size, in_dims, inputs)


def _in_channels(
    function: type[Function], size: int, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run T tasks as one with T * C channels: statistics and sums are per channel, so nothing mixes."""

    def fold(value: Tensor, dim: int | None) -> Tensor:
        value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.flatten() if value.dim() == 2 else value.movedim(0, 1).flatten(1, 2)

    outputs = function.apply(*map(fold, inputs, in_dims))  # type: ignore[no-untyped-call]
    unfolded = [out.unflatten(0 if out.dim() == 1 else 1, (size, -1)) for out in outputs]
    return tuple(unfolded), tuple(0 if out.dim() == 1 else 1 for out in outputs)
