"""What the tests of the meta-gradient run on: small networks, small episodes, and every path through the engine."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.meta import Batch, Engine, Episodes, Learner, MetaGradient, make_learner
from common.models.conv4 import Conv4
from common.models.network import Network
from common.models.norm import make_norm
from common.models.resnet12 import ResNet12
from common.study import Algorithm

__all__ = [
    "INNER_LOOPS",
    "LOCAL",
    "PATHS",
    "Setting",
    "SmoothBody",
    "Variant",
    "class_count",
    "engine",
    "make_conv4",
    "make_episodes",
    "make_resnet12",
    "make_tiny",
    "paths",
    "random_theta",
    "relative_error",
    "rows",
    "setting",
]


@dataclass(frozen=True)
class Variant:
    """A learner and the one choice that some learners have."""

    name: str
    rates: str = "element"

    def __str__(self) -> str:
        return f"{self.name}-{self.rates}" if self.name == "metasgd" else self.name

    def algorithm(self, steps: int, **more: Any) -> Algorithm:
        """Return the study's algorithm; no two of its rates are equal, so that no two can be mixed up."""
        chosen: dict[str, Any] = {"inner_rate": 0.1, "test_rate": 0.15, "proximal": 0.3, "rates": self.rates} | more
        return Algorithm(name=self.name, inner_steps=steps, **chosen)


#: Learners with one gradient an episode that is the derivative of a query loss.
INNER_LOOPS = (
    Variant("maml"),
    Variant("fomaml"),
    Variant("anil"),
    Variant("metasgd", "element"),
    Variant("metasgd", "tensor"),
    Variant("protonet"),
    Variant("protomaml"),
)
#: Learners that run plain SGD at the site.
LOCAL = (Variant("reptile"), Variant("fedavg"), Variant("fedprox"))

#: Every way through the engine: its own settings, and whether the inner loop is replayed.
PATHS: dict[str, tuple[dict[str, Any], bool]] = {
    "loop": ({}, False),
    "loop, 2 cores": ({"cores": 2}, False),
    "loop, replayed": ({}, True),
    "vmap": ({"vectorise": True}, False),
    "vmap, chunks of 2": ({"vectorise": True, "chunk": 2}, False),
    "vmap, chunks, 2 cores": ({"vectorise": True, "chunk": 1, "cores": 2}, False),
    "vmap, replayed": ({"vectorise": True}, True),
}


class SmoothBody(nn.Module):
    """Two blocks without a kink: finite differences of any order are good here. 62 parameters."""

    takes_mask = True

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(1, 2, 3, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False)])
        self.norms = nn.ModuleList(make_norm(norm, 2) for _ in range(2))
        self.mixes_rows = self.channels_last = norm == "batch"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features ``[N, 8]`` of images ``[N, 1, 6, 6]``."""
        x = F.avg_pool2d(F.softplus(self.norms[0](self.convolutions[0](x), mask)), 2)
        return torch.tanh(self.norms[1](self.convolutions[1](x), mask)).flatten(1)


def make_tiny(norm: str, classes: int = 3) -> Network:
    """Return the smooth network."""
    return Network(SmoothBody(norm), 8, classes)


def make_conv4(norm: str, classes: int = 3) -> Network:
    """Return a narrow Conv4 for grey images of side 16."""
    return Network(Conv4(1, 4, norm), Conv4.feature_size(4, 16), classes)


def make_resnet12(norm: str, classes: int = 3) -> Network:
    """Return a narrow ResNet-12 for grey images."""
    return Network(ResNet12(1, 2, norm), ResNet12.feature_size(2), classes)


def random_theta(learner: Learner, network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Return a theta in float64 of which no tensor is special: no scale is one, no bias zero, no two rates equal."""
    rng = np.random.default_rng(seed)
    theta = {}
    for name, like in learner.theta(network).items():
        if name.startswith("rate."):
            value = rng.uniform(0.05, 0.2, like.shape)
        elif like.dim() == 1:
            value = float("norm" in name and name.endswith("weight")) + rng.normal(0, 0.2, like.shape)
        else:
            value = rng.normal(0, 1, like.shape) * (1.5 / like[0].numel()) ** 0.5
        theta[name] = torch.as_tensor(value, dtype=torch.float64)
    return theta


def make_episodes(
    tasks: int = 3,
    *,
    ways: int = 3,
    shots: int = 2,
    size: int = 6,
    ragged: str = "",
    class_count: int = 0,
    seed: int = 0,
) -> Episodes:
    """Return episodes of noisy class patterns, as many query images as support images.

    ``ragged`` names the sets ("support", "query", "both") whose tasks have different numbers of images; their
    padding rows lie anywhere and hold large noise, so that whoever reads one is found out. ``class_count`` is the
    length of the study's class list, of which each task has its own ``ways``; 0: a fixed head.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.normal(0, 1, (max(ways, class_count), 1, size, size))
    classes = np.stack([rng.permutation(class_count)[:ways] if class_count else np.arange(ways) for _ in range(tasks)])

    def batch(role: str) -> Batch:
        n = ways * shots
        x = rng.normal(0, 5, (tasks, n, 1, size, size))
        y = np.zeros((tasks, n), np.int64)
        mask = np.ones((tasks, n), bool)
        for t in range(tasks):
            missing = (t + (role == "query")) % min(tasks, ways) if ragged in {role, "both"} else 0
            labels = np.delete(np.repeat(np.arange(ways), shots), shots * np.arange(missing))  # no class is absent
            labels = rng.permutation(labels)
            mask[t, rng.permutation(n)[:missing]] = False
            y[t, mask[t]] = labels
            x[t, mask[t]] = patterns[classes[t, labels]] + rng.normal(0, 1, (len(labels), 1, size, size))
        return Batch(torch.as_tensor(x), torch.as_tensor(y), None if mask.all() else torch.as_tensor(mask))

    return Episodes(batch("support"), batch("query"), torch.as_tensor(classes))


class Setting(NamedTuple):
    """One problem: what the engine is asked."""

    algorithm: Algorithm
    network: Network
    theta: dict[str, Tensor]
    episodes: Episodes


def class_count(variant: Variant) -> int:
    """Return how many classes the study lists: more than an episode has, where a learner uses the list; else 0."""
    return 5 if variant.name in {"fedavg", "fedprox"} else 0


def setting(
    variant: Variant,
    steps: int,
    norm: str = "batch",
    *,
    ragged: str = "",
    tasks: int = 2,
    build: Callable[[str, int], Network] = make_tiny,
) -> Setting:
    """Return a problem in float64; ``build`` makes its network from a norm and the size of the head."""
    algorithm = variant.algorithm(steps)
    listed = class_count(variant)
    network = build(norm, listed or 3)
    size = 6 if build is make_tiny else 16
    episodes = make_episodes(tasks, ragged=ragged, size=size, class_count=listed)
    return Setting(algorithm, network, random_theta(make_learner(algorithm), network), episodes)


def engine(problem: Setting, path: str = "loop", **more: Any) -> Engine:
    """Return the engine of one path."""
    settings, recompute = PATHS[path]
    learner = make_learner(problem.algorithm.model_copy(update={"recompute": recompute}))
    return replace(Engine(learner, problem.network), **(settings | more))


def paths(variant: Variant) -> tuple[str, ...]:
    """Return the paths that differ for a learner: FedAvg's tasks cannot be batched, only MAML's kin replay."""
    if variant.name in {"fedavg", "fedprox"}:
        return ("loop",)
    replays = variant.name in {"maml", "anil", "metasgd", "protomaml"}
    return tuple(path for path, (_, recompute) in PATHS.items() if replays or not recompute)


def rows(problem: Setting, path: str = "loop") -> MetaGradient:
    """Return one row for every task, or FedAvg's one row."""
    if problem.algorithm.name in {"fedavg", "fedprox"}:
        out = engine(problem, path).meta_gradient(problem.theta, problem.episodes)
        return MetaGradient(*(t[None] for t in out))
    return engine(problem, path).meta_gradient(problem.theta, problem.episodes, reduce="none")


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest ``|got - want| / |want|`` over rows; the norm is over all parameters."""
    assert got.shape == want.shape
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
