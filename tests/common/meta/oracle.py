"""The meta-gradients a second time, one task after the other, as plainly as autograd allows.

Nothing here comes from the code under test but the container of the episodes and the study's list of settings.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.meta.episodes import Episodes
from common.study import Algorithm

__all__ = ["Features", "Task", "adapted_logits", "conv4", "meta_gradients", "resnet12", "smooth", "tasks"]

Weights = Mapping[str, Tensor]
Features = Callable[[Weights, Tensor], Tensor]


class Task(NamedTuple):
    """One task without padding; ``union`` is support and query together."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor

    def union(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.support_x, self.query_x]), torch.cat([self.support_y, self.query_y])


def tasks(episodes: Episodes) -> list[Task]:
    """Return the tasks, padding rows left out one by one."""

    def real(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = [i for i in range(len(y)) if mask is None or mask[i]]
        return x[rows], y[rows]

    support, query = episodes.support, episodes.query
    return [
        Task(
            *real(support.x[t], support.y[t], None if support.mask is None else support.mask[t]),
            *real(query.x[t], query.y[t], None if query.mask is None else query.mask[t]),
            episodes.classes[t],
        )
        for t in range(len(episodes.classes))
    ]


def _normalise(weights: Weights, name: str, x: Tensor, norm: str) -> Tensor:
    gamma, beta = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if norm == "batch":
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)
    groups = max(g for g in range(1, 9) if x.shape[1] % g == 0)
    return F.group_norm(x, groups, gamma, beta, eps=1e-5)


def smooth(norm: str) -> Features:
    """Return the features of the smooth network."""

    def features(w: Weights, x: Tensor) -> Tensor:
        x = F.conv2d(x, w["body.convolutions.0.weight"])
        x = F.avg_pool2d(F.softplus(_normalise(w, "body.norms.0", x, norm)), 2)
        x = F.conv2d(x, w["body.convolutions.1.weight"], padding=1)
        return F.tanh(_normalise(w, "body.norms.1", x, norm)).flatten(1)

    return features


def conv4(norm: str) -> Features:
    """Return the features of Conv4, its ReLU before the pool."""

    def features(w: Weights, x: Tensor) -> Tensor:
        for i in range(4):
            x = F.conv2d(x, w[f"body.convolutions.{i}.weight"], padding=1)
            x = F.max_pool2d(F.relu(_normalise(w, f"body.norms.{i}", x, norm)), 2)
        return x.flatten(1)

    return features


def resnet12(norm: str) -> Features:
    """Return the features of ResNet-12, the last leaky ReLU of a block before its pool."""

    def features(w: Weights, x: Tensor) -> Tensor:
        for block in (f"body.blocks.{i}" for i in range(4)):
            shortcut = F.conv2d(x, w[f"{block}.shortcut.weight"])
            shortcut = _normalise(w, f"{block}.shortcut_norm", shortcut, norm)
            for i in range(3):
                x = F.conv2d(x, w[f"{block}.convolutions.{i}.weight"], padding=1)
                x = _normalise(w, f"{block}.norms.{i}", x, norm)
                if i < 2:
                    x = F.leaky_relu(x, 0.1)
            x = F.max_pool2d(F.leaky_relu(x + shortcut, 0.1), 2)
        return x.flatten(2).mean(2)

    return features


def _logits(features: Features, w: Weights, x: Tensor) -> Tensor:
    return features(w, x) @ w["head.weight"].T + w["head.bias"]


def _prototypes(features: Features, w: Weights, task: Task) -> Tensor:
    f = features(w, task.support_x)
    return torch.stack([f[task.support_y == k].mean(0) for k in range(len(task.classes))])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _inner_steps(
    name: str, features: Features, theta: Weights, task: Task, steps: int, rate: float, *, graph: bool
) -> dict[str, Tensor]:
    weights = {n: w for n, w in theta.items() if not n.startswith("rate.")}
    if name == "protomaml":
        centres = _prototypes(features, theta, task)
        weights |= {"head.weight": 2 * centres, "head.bias": -(centres**2).sum(1)}
    adapting = [n for n in weights if name != "anil" or n.startswith("head.")]
    for _ in range(steps):
        # Clones: ProtoMAML's head is made from the body, and an inner gradient is partial in each of the two.
        weights = {n: w.clone() for n, w in weights.items()}
        loss = F.cross_entropy(_logits(features, weights, task.support_x), task.support_y)
        grads = torch.autograd.grad(loss, [weights[n] for n in adapting], create_graph=graph and name != "fomaml")
        for n, g in zip(adapting, grads, strict=True):
            weights[n] = weights[n] - (theta[f"rate.{n}"] if name == "metasgd" else rate) * g
    return weights


def _query_loss(a: Algorithm, features: Features, theta: Weights, task: Task) -> Tensor:
    if a.name == "protonet":
        centres = _prototypes(features, theta, task)
        distances = (features(theta, task.query_x).unsqueeze(1) - centres).square().sum(2)
        return F.cross_entropy(-distances, task.query_y)
    weights = _inner_steps(a.name, features, theta, task, a.inner_steps, a.inner_rate, graph=True)
    return F.cross_entropy(_logits(features, weights, task.query_x), task.query_y)


def _sgd(
    a: Algorithm, features: Features, theta: Weights, phi: Weights, x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return phi after a task's local steps, and the last step's loss."""
    mu = a.proximal if a.name == "fedprox" else 0.0
    for _ in range(a.inner_steps):
        leaves = {n: p.detach().requires_grad_() for n, p in phi.items()}
        loss = F.cross_entropy(_logits(features, leaves, x), y)
        drift = sum((leaves[n] - theta[n]).square().sum() for n in theta)
        grads = torch.autograd.grad(loss + mu / 2 * drift, list(leaves.values()))
        phi = {n: p.detach() - a.inner_rate * g for (n, p), g in zip(phi.items(), grads, strict=True)}
    return dict(phi), loss.detach()


def meta_gradients(a: Algorithm, features: Features, theta: Weights, episodes: Episodes) -> tuple[Tensor, Tensor]:
    """Return one gradient a task ``[T, D]`` and one loss a task ``[T]``; FedAvg's and FedProx's are one a round."""
    rows, losses = [], []
    phi = dict(theta)
    for task in tasks(episodes):
        if a.name in {"fedavg", "fedprox"}:
            x, y = task.union()
            phi, loss = _sgd(a, features, theta, phi, x, task.classes[y])
        elif a.name == "reptile":
            end, loss = _sgd(a, features, theta, theta, *task.union())
            rows.append(_flat([(theta[n] - end[n]) / a.inner_rate for n in theta]))
        else:
            leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
            loss = _query_loss(a, features, leaves, task)
            grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            rows.append(_flat(list(grads)))
        losses.append(loss.detach())
    if a.name in {"fedavg", "fedprox"}:
        return _flat([theta[n] - phi[n] for n in theta])[None], torch.stack(losses).mean()[None]
    return torch.stack(rows), torch.stack(losses)


def _adam(features: Features, theta: Weights, task: Task, steps: int, rate: float) -> dict[str, Tensor]:
    """Kingma and Ba, 2015, algorithm 1."""
    phi = {n: t.clone() for n, t in theta.items()}
    first, second = ({n: torch.zeros_like(t) for n, t in theta.items()} for _ in range(2))
    for k in range(1, steps + 1):
        leaves = {n: p.requires_grad_() for n, p in phi.items()}
        loss = F.cross_entropy(_logits(features, leaves, task.support_x), task.support_y)
        for (n, p), g in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.999 * second[n] + 0.001 * g * g
            move = first[n] / (1 - 0.9**k) / ((second[n] / (1 - 0.999**k)).sqrt() + 1e-8)
            phi[n] = p.detach() - rate * move
    return phi


def adapted_logits(a: Algorithm, features: Features, theta: Weights, task: Task, steps: int) -> Tensor:
    """Return a task's query logits after ``steps`` meta-test steps on its support set."""
    if a.name == "protonet":
        distances = features(theta, task.query_x).unsqueeze(1) - _prototypes(features, theta, task)
        return -distances.square().sum(2)
    if a.name == "local-only":
        return _logits(features, _adam(features, theta, task, steps, a.test_rate), task.query_x)
    theta = dict(theta)
    if a.name in {"fedavg", "fedprox"}:
        for part in ("head.weight", "head.bias"):
            rows = list(theta[part])
            theta[part] = torch.stack([rows[c] if c < len(rows) else torch.zeros_like(rows[0]) for c in task.classes])
    leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
    weights = _inner_steps(a.name, features, leaves, task, steps, a.test_rate, graph=False)
    return _logits(features, weights, task.query_x).detach()
