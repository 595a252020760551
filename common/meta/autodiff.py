"""Two ways to differentiate one and the same learner: eager autograd, and ``torch.func`` under ``vmap``.

A learner is written once, against `Autodiff`. `EAGER` is the faster one task by task; `FUNCTIONAL` composes with
``vmap``, where the gradient must be taken *inside* the ``vmap`` to be exact for every network.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from common.models.network import Theta

__all__ = ["EAGER", "FUNCTIONAL", "Autodiff"]

Loss = Callable[[Theta], Tensor]
LossAndMore = Callable[[Theta], tuple[Tensor, Any]]


class Autodiff(Protocol):
    """How gradients are taken."""

    def inner(self, loss: Loss, at: Theta, *, second_order: bool) -> dict[str, Tensor]:
        """Return d loss / d at; differentiable again when ``second_order``, constant otherwise."""

    def outer(self, loss: LossAndMore, at: Theta) -> tuple[dict[str, Tensor], Tensor, Any]:
        """Return (d loss / d at, loss, whatever else ``loss`` returned), all detached."""

    def pull(
        self, function: Callable[[Theta, Theta], Theta], first: Theta, second: Theta, cotangent: Theta
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the vector-Jacobian products of ``function(first, second)`` in both arguments."""


class _Eager:
    def inner(self, loss: Loss, at: Theta, *, second_order: bool) -> dict[str, Tensor]:
        with torch.enable_grad():
            # The derivative is partial: one tensor of `at` may be computed from another (ProtoMAML's head from the
            # body), so each gets a node of its own, with its history for the second order and without it otherwise.
            if second_order:
                at = {name: t.view_as(t) for name, t in at.items()}
            else:
                at = {name: t.detach().requires_grad_() for name, t in at.items()}
            return _named(at, loss(at), create_graph=second_order)

    def outer(self, loss: LossAndMore, at: Theta) -> tuple[dict[str, Tensor], Tensor, Any]:
        with torch.enable_grad():
            leaves = {name: t.detach().requires_grad_() for name, t in at.items()}
            value, more = loss(leaves)
            return _named(leaves, value), value.detach(), more

    def pull(
        self, function: Callable[[Theta, Theta], Theta], first: Theta, second: Theta, cotangent: Theta
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.enable_grad():
            first, second = ({n: t.detach().requires_grad_() for n, t in d.items()} for d in (first, second))
            out = function(first, second)
            leaves = [*first.values(), *second.values()]
            moved = [name for name in cotangent if out[name].requires_grad]  # a fixed body's features do not move
            grads = torch.autograd.grad(
                [out[name] for name in moved], leaves, [cotangent[name] for name in moved], materialize_grads=True
            )
        split = len(first)
        return dict(zip(first, grads[:split], strict=True)), dict(zip(second, grads[split:], strict=True))


def _named(at: Theta, value: Tensor, *, create_graph: bool = False) -> dict[str, Tensor]:
    grads = torch.autograd.grad(value, list(at.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(at, grads, strict=True))


class _Functional:
    def inner(self, loss: Loss, at: Theta, *, second_order: bool) -> dict[str, Tensor]:
        if not second_order:
            at = {name: t.detach() for name, t in at.items()}
        grads: dict[str, Tensor] = torch.func.grad(loss)(dict(at))
        return grads if second_order else {name: t.detach() for name, t in grads.items()}

    def outer(self, loss: LossAndMore, at: Theta) -> tuple[dict[str, Tensor], Tensor, Any]:
        grads, (value, more) = torch.func.grad_and_value(loss, has_aux=True)(dict(at))
        return grads, value, more

    def pull(
        self, function: Callable[[Theta, Theta], Theta], first: Theta, second: Theta, cotangent: Theta
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        vjp = torch.func.vjp(function, dict(first), dict(second))[1]
        grads: tuple[dict[str, Tensor], dict[str, Tensor]] = vjp(dict(cotangent))
        return grads


EAGER: Autodiff = _Eager()
FUNCTIONAL: Autodiff = _Functional()
