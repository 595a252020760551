"""What the engine's benchmark computes: a network, episodes of noise, an inner loop."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from common.meta import Batch, Episodes
from common.models import build
from common.models.network import Network
from common.study import Model

__all__ = ["CASES", "WAYS", "Case", "tiny"]

WAYS, QUERIES = 5, 15  # the few-shot literature's usual episode


@dataclass(frozen=True)
class Case:
    """One meta-gradient to compute.

    Attributes
    ----------
    title : str
        For the report.
    model, norm, width, channels, size
        The network and the side of its square images, as in `common.study.Model`.
    shots, steps, rate
        Support images per class, inner steps K and their rate.
    tasks : int
        Tasks of one call on a CPU.
    first_order, recompute : bool
        First-order MAML; keeping only the iterates of the inner loop.
    """

    title: str
    model: Literal["conv4", "resnet12"] = "conv4"
    norm: Literal["batch", "group"] = "batch"
    width: int = 64
    channels: Literal[1, 3] = 1
    size: int = 28
    shots: int = 1
    steps: int = 1
    rate: float = 0.05
    tasks: int = 8
    first_order: bool = False
    recompute: bool = False

    def network(self, dtype: torch.dtype) -> Network:
        """Return the network, always with the same initialisation."""
        model = Model(name=self.model, norm=self.norm, width=self.width, channels=self.channels, image_size=self.size)
        return build(model, classes=WAYS, seed=0, dtype=dtype)

    def episodes(self, tasks: int) -> Episodes:
        """Return always the same tasks: normal noise, so that no value is special."""
        generator = torch.Generator().manual_seed(0)

        def batch(each: int) -> Batch:
            x = torch.randn(tasks, WAYS * each, self.channels, self.size, self.size, generator=generator)
            return Batch(x, torch.arange(WAYS).repeat_interleave(each).repeat(tasks, 1), None)

        return Episodes(batch(self.shots), batch(QUERIES), torch.arange(WAYS).repeat(tasks, 1))


def _resnet(title: str, width: int, size: int, tasks: int, shots: int = 1, steps: int = 1) -> Case:
    return Case(title, "resnet12", "group", width, 3, size, shots, steps, 0.01, tasks)


CASES = {
    "conv4-1shot-k1": Case("Conv4-64, 28x28x1, 1-shot, K=1"),
    "conv4-5shot-k1": Case("Conv4-64, 28x28x1, 5-shot, K=1", shots=5),
    "conv4-1shot-k5": Case("Conv4-64, 28x28x1, 1-shot, K=5", steps=5),
    "conv4-5shot-k5": Case("Conv4-64, 28x28x1, 5-shot, K=5", shots=5, steps=5),
    "conv4-84px": Case("Conv4-32, 84x84x3, 1-shot, K=1", width=32, channels=3, size=84, tasks=4),
    "conv4-64px": Case("Conv4-64, 64x64x3, 1-shot, K=1", channels=3, size=64, tasks=4),
    "resnet-w16": _resnet("ResNet12-GN-16, 28x28x3, 1-shot, K=1", 16, 28, 4),
    "resnet-w32": _resnet("ResNet12-GN-32, 28x28x3, 1-shot, K=1", 32, 28, 4),
    "resnet-64px": _resnet("ResNet12-GN-16, 64x64x3, 1-shot, K=1", 16, 64, 2),
    "resnet-5shot-k5": _resnet("ResNet12-GN-16, 28x28x3, 5-shot, K=5", 16, 28, 4, shots=5, steps=5),
    "first-conv4": Case("FOMAML, Conv4-64, 28x28x1, 5-shot, K=5", shots=5, steps=5, first_order=True),
    "first-resnet": replace(_resnet("FOMAML, ResNet12-GN-16, 28x28x3, 1-shot, K=1", 16, 28, 4), first_order=True),
    "recompute-k1": Case("recompute, Conv4-64, 28x28x1, 5-shot, K=1", shots=5, tasks=4, recompute=True),
    "recompute-k5": Case("recompute, Conv4-64, 28x28x1, 5-shot, K=5", shots=5, steps=5, tasks=4, recompute=True),
    "recompute-k10": Case("recompute, Conv4-64, 28x28x1, 5-shot, K=10", shots=5, steps=10, tasks=4, recompute=True),
}


def tiny(case: Case) -> Case:
    """Return a case that takes milliseconds, to try the benchmark itself."""
    return replace(case, title=f"tiny {case.title}", width=8, size=16, tasks=2)
