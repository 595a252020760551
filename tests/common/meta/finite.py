"""Meta-gradients of the smooth network by finite differences: no second derivative is taken anywhere.

Every perturbed theta is one row of a batch, so a whole gradient is four evaluations of the network. The network
stands here a second time, written for rows.
"""

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from common.study import Algorithm
from tests.common.meta.oracle import Task

__all__ = ["adapted", "central_differences", "gradient", "loss_gradient"]

Rows = Mapping[str, Tensor]

STEP = 5e-5


def central_differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient ``[D]`` of a function from rows ``[P, D]`` to values ``[P]``; fourth order in the step."""
    moves = STEP * torch.eye(len(at), dtype=at.dtype)
    one = function(at + moves) - function(at - moves)
    two = function(at + 2 * moves) - function(at - 2 * moves)
    return (8 * one - two) / (12 * STEP)


def _split(rows: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out, start = {}, 0
    for name, t in like.items():
        out[name] = rows[:, start : start + prod(t.shape)].reshape(len(rows), *t.shape)
        start += prod(t.shape)
    return out


def _normalise(x: Tensor, gamma: Tensor, beta: Tensor, norm: str) -> Tensor:
    """Normalise ``[P, N, C, L]``: over images and places, or (a group is one channel here) over places."""
    over = (1, 3) if norm == "batch" else (3,)
    mean = x.mean(over, keepdim=True)
    variance = (x - mean).square().mean(over, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * gamma[:, None, :, None] + beta[:, None, :, None]


def _features(w: Rows, x: Tensor, norm: str) -> Tensor:
    """Return the features ``[P, N, 8]`` of images ``[N, 1, 6, 6]`` under every row of weights."""
    first, second = (w[f"body.convolutions.{i}.weight"].flatten(2) for i in range(2))
    p, n = len(first), len(x)
    out = torch.einsum("poi,nil->pnol", first, F.unfold(x, 3))
    out = F.softplus(_normalise(out, w["body.norms.0.weight"], w["body.norms.0.bias"], norm))
    out = out.reshape(p, n, 2, 2, 2, 2, 2).mean((4, 6))
    patches = F.unfold(out.reshape(p * n, 2, 2, 2), 3, padding=1).reshape(p, n, 18, 4)
    out = torch.einsum("poi,pnil->pnol", second, patches)
    return torch.tanh(_normalise(out, w["body.norms.1.weight"], w["body.norms.1.bias"], norm)).flatten(2)


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    picked = logits.log_softmax(2)[:, torch.arange(len(y)), y]
    return -picked.mean(1)


def _linear_losses(w: Rows, x: Tensor, y: Tensor, norm: str) -> Tensor:
    logits = torch.einsum("pnf,pkf->pnk", _features(w, x, norm), w["head.weight"])
    return _losses(logits + w["head.bias"][:, None], y)


def _prototypes(w: Rows, task: Task, norm: str) -> Tensor:
    f = _features(w, task.support_x, norm)
    return torch.stack([f[:, task.support_y == k].mean(1) for k in range(len(task.classes))], 1)


def adapted(a: Algorithm, rows: Rows, task: Task, norm: str) -> dict[str, Tensor]:
    """Return every row's weights after the inner loop; only first derivatives, and all of them constants."""
    weights = {n: w for n, w in rows.items() if not n.startswith("rate.")}
    if a.name == "protomaml":
        centres = _prototypes(rows, task, norm)
        weights |= {"head.weight": 2 * centres, "head.bias": -centres.square().sum(2)}
    adapting = [n for n in weights if a.name != "anil" or n.startswith("head.")]
    for _ in range(a.inner_steps):
        leaves = {n: weights[n].detach().requires_grad_() for n in adapting}
        losses = _linear_losses({**weights, **leaves}, task.support_x, task.support_y, norm)
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))  # rows do not see one another
        for n, g in zip(adapting, grads, strict=True):
            rate: float | Tensor = a.inner_rate
            if a.name == "metasgd":
                rate = rows[f"rate.{n}"]
                rate = rate.reshape(*rate.shape, *[1] * (g.dim() - rate.dim()))
            weights[n] = weights[n] - rate * g
    return weights


def _query_losses(a: Algorithm, rows: Rows, task: Task, norm: str) -> Tensor:
    """Return the query loss ``[P]`` after the inner loop from every row."""
    if a.name == "protonet":
        centres = _prototypes(rows, task, norm)
        apart = _features(rows, task.query_x, norm).unsqueeze(2) - centres.unsqueeze(1)
        return _losses(-apart.square().sum(3), task.query_y)
    return _linear_losses(adapted(a, rows, task, norm), task.query_x, task.query_y, norm)


def loss_gradient(theta: Mapping[str, Tensor], x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Return the gradient ``[D]`` of one batch's loss."""
    flat = torch.cat([t.reshape(-1) for t in theta.values()])
    return central_differences(lambda rows: _linear_losses(_split(rows, theta), x, y, norm), flat)


def gradient(a: Algorithm, theta: Mapping[str, Tensor], episodes: list[Task], norm: str) -> Tensor:
    """Return every task's gradient ``[T, D]``; FedAvg's and FedProx's is one a round ``[1, D]``."""
    at = torch.cat([t.reshape(-1) for t in theta.values()])

    def along(start: Tensor, task: Task, y: Tensor) -> Tensor:
        """Return where local SGD ends, its gradients by finite differences."""
        mu = a.proximal if a.name == "fedprox" else 0.0
        for _ in range(a.inner_steps):
            slope = loss_gradient(_named(start), task.union()[0], y, norm)
            start = start - a.inner_rate * (slope + mu * (start - at))
        return start

    def _named(flat: Tensor) -> dict[str, Tensor]:
        return {n: rows[0] for n, rows in _split(flat[None], theta).items()}

    if a.name in {"fedavg", "fedprox"}:
        phi = at
        for task in episodes:
            phi = along(phi, task, task.classes[task.union()[1]])
        return (at - phi)[None]
    if a.name == "reptile":
        return torch.stack([(at - along(at, task, task.union()[1])) / a.inner_rate for task in episodes])

    def of_task(task: Task) -> Tensor:
        if a.name == "fomaml":  # inner gradients held constant: the query loss around the adapted weights
            phi = adapted(a, _split(at[None], theta), task, norm)
            return loss_gradient({n: w[0] for n, w in phi.items()}, task.query_x, task.query_y, norm)
        return central_differences(lambda rows: _query_losses(a, _split(rows, theta), task, norm), at)

    return torch.stack([of_task(task) for task in episodes])
