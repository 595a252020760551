"""Meta-SGD: the inner rates are part of theta and get their own true gradient."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from common.meta.episodes import Batch
from common.meta.learner import InnerLoop, State
from common.models.network import Network, Theta

__all__ = ["MetaSgd"]

PREFIX = "rate."


@dataclass(frozen=True)
class MetaSgd(InnerLoop):
    """One learned inner rate per parameter element, or per tensor; at meta-test time they are used as learned.

    References
    ----------
    Li et al., "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017, equations 4 and 5 (``element``);
    Antoniou, Edwards and Storkey, "How to train your MAML", 2019, section 4 (rates per layer: ``tensor``).
    """

    granularity: Literal["element", "tensor"] = "element"

    name: ClassVar[str] = "metasgd"

    def theta(self, network: Network) -> dict[str, Tensor]:
        weights = network.theta()

        def initial(like: Tensor) -> Tensor:
            shape = like.shape if self.granularity == "element" else ()
            return torch.full(shape, self.inner_rate, dtype=like.dtype, device=like.device)

        return weights | {PREFIX + name: initial(t) for name, t in weights.items()}

    def begin(self, network: Network, theta: Theta, support: Batch) -> State:
        rates = {name: t for name, t in theta.items() if name.startswith(PREFIX)}
        return State({name: t for name, t in theta.items() if name not in rates}, rates)

    def rate(self, fixed: Theta, name: str, base: float) -> Tensor | float:
        return fixed[PREFIX + name]
