"""The second-order MAML gradient of one inner step, written three ways."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

__all__ = ["PATHS", "Logits", "Theta", "by_loop"]

RATE = 0.5
Theta = Mapping[str, Tensor]
#: Parameters, images ``[N, C, *]`` and a mask ``[N]`` or None, to logits ``[N, classes]``.
Logits = Callable[[Theta, Tensor, Tensor | None], Tensor]


def _step(theta: Theta, gradients: Theta) -> Theta:
    return {name: p - RATE * gradients[name] for name, p in theta.items()}


def by_loop(logits: Logits, theta: Theta, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Theta:
    """Return the meta-gradient by ``torch.autograd`` alone, one task after another, without padding.

    Parameters
    ----------
    x, y : Tensor
        ``[T, 2, N, C, *]`` and ``[T, 2, N]``; the parts are support and query.
    mask : Tensor, optional
        ``[T, N]``, of both parts.
    """
    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    keep = torch.ones_like(y[:, 0], dtype=torch.bool) if mask is None else mask
    total = torch.zeros((), dtype=x.dtype)
    for images, labels, real in zip(x, y, keep, strict=True):
        support = F.cross_entropy(logits(leaves, images[0][real], None), labels[0][real])
        inner = torch.autograd.grad(support, list(leaves.values()), create_graph=True)
        adapted = _step(leaves, dict(zip(leaves, inner, strict=True)))
        total = total + F.cross_entropy(logits(adapted, images[1][real], None), labels[1][real])
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def _task(logits: Logits) -> Callable[..., Tensor]:
    def query_loss(theta: Theta, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        def loss(parameters: Theta, part: int) -> Tensor:
            each = F.cross_entropy(logits(parameters, x[part], mask), y[part], reduction="none")
            return each.mean() if mask is None else (each * mask).sum() / mask.sum()

        return loss(_step(theta, grad(loss)(theta, 0)), 1)

    return query_loss


def vmap_of_grad(logits: Logits, theta: Theta, *tasks: Tensor) -> Theta:
    each: Theta = vmap(grad(_task(logits)), (None, *[0] * len(tasks)))(theta, *tasks)
    return {name: g.sum(0) for name, g in each.items()}


def grad_of_vmap(logits: Logits, theta: Theta, *tasks: Tensor) -> Theta:
    batched = vmap(_task(logits), (None, *[0] * len(tasks)))
    out: Theta = grad(lambda parameters: batched(parameters, *tasks).sum())(theta)
    return out


PATHS = (vmap_of_grad, grad_of_vmap)
