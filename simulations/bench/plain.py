"""The loops that the engine is measured against, written as their users write them."""

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.meta import Episodes
from simulations.bench.cases import WAYS, Case

__all__ = ["LOOPS", "Loop", "network"]

#: (network, episodes, inner rate, inner steps, first order) to the mean meta-gradient ``[D]``.
Loop = Callable[[nn.Module, Episodes, float, int, bool], Tensor]


class _Conv4(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = (case.channels, *[case.width] * 4)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(case.width, track_running_stats=False)
            if case.norm == "batch"
            else nn.GroupNorm(8, case.width)
            for _ in range(4)
        )
        self.head = nn.Linear(case.width * (case.size // 16) ** 2, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(convolution(x))), 2)
        out: Tensor = self.head(x.flatten(1))
        return out


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        sizes = (inputs, outputs, outputs, outputs)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.GroupNorm(8, outputs) for _ in range(3))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.shortcut_norm = nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shortcut_norm(self.shortcut(x))
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(F.leaky_relu(x, 0.1) if i else x))
        return F.max_pool2d(F.leaky_relu(out + x, 0.1), 2)


class _ResNet12(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = (case.channels, *[case.width * 2**i for i in range(4)])
        self.blocks = nn.Sequential(*[_Block(a, b) for a, b in pairwise(sizes)])
        self.head = nn.Linear(8 * case.width, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return out


def network(case: Case, dtype: torch.dtype) -> nn.Module:
    """Return the case's network from PyTorch's own layers, with the engine's initialisation."""
    net = (_Conv4 if case.model == "conv4" else _ResNet12)(case).to(dtype)
    with torch.no_grad():
        for mine, value in zip(net.parameters(), case.network(dtype).parameters(), strict=True):
            mine.copy_(value)
    return net


def _tasks(episodes: Episodes) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    support, query = episodes.support, episodes.query
    return list(zip(support.x, support.y, query.x, query.y, strict=True))


def _mean(net: nn.Module, tasks: int) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None]) / tasks


def plain(net: nn.Module, episodes: Episodes, rate: float, steps: int, first_order: bool) -> Tensor:
    """PyTorch alone: `functional_call`, ``autograd.grad(create_graph=True)``, one backward per task."""
    net.zero_grad()
    for xs, ys, xq, yq in _tasks(episodes):
        fast: dict[str, Tensor] = dict(net.named_parameters())
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(net, fast, (xs,)), ys)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=not first_order)
            fast = {name: p - rate * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        F.cross_entropy(functional_call(net, fast, (xq,)), yq).backward()  # type: ignore[no-untyped-call]
    return _mean(net, episodes.n_tasks)


def learn2learn(net: nn.Module, episodes: Episodes, rate: float, steps: int, first_order: bool) -> Tensor:
    """As in the examples of learn2learn."""
    net.zero_grad()
    maml = import_module("learn2learn").algorithms.MAML(net, lr=rate, first_order=first_order)
    for xs, ys, xq, yq in _tasks(episodes):
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(xs), ys))
        F.cross_entropy(learner(xq), yq).backward()  # type: ignore[no-untyped-call]
    return _mean(net, episodes.n_tasks)


def higher(net: nn.Module, episodes: Episodes, rate: float, steps: int, first_order: bool) -> Tensor:
    """As in the examples of higher; its first-order gradient is that of the adapted weights."""
    innerloop: Any = import_module("higher").innerloop_ctx
    net.zero_grad()
    total = [torch.zeros_like(p) for p in net.parameters()]
    optimiser = torch.optim.SGD(net.parameters(), lr=rate)
    for xs, ys, xq, yq in _tasks(episodes):
        loop = innerloop(net, optimiser, copy_initial_weights=False, track_higher_grads=not first_order)
        with loop as (adapted, inner):
            for _ in range(steps):
                inner.step(F.cross_entropy(adapted(xs), ys))
            at = adapted.parameters(time=-1 if first_order else 0)
            grads = torch.autograd.grad(F.cross_entropy(adapted(xq), yq), list(at))
            total = [t + g for t, g in zip(total, grads, strict=True)]
    return torch.cat([t.reshape(-1) for t in total]) / episodes.n_tasks


LOOPS: dict[str, Loop] = {"plain loop": plain, "learn2learn": learn2learn, "higher": higher}
