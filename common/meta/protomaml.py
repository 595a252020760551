"""ProtoMAML: MAML whose head starts at the prototypes of the support set."""

from typing import ClassVar

import torch
from torch import Tensor

from common.meta.episodes import Batch
from common.meta.learner import InnerLoop, State
from common.meta.protonet import prototypes
from common.models.network import Network, Theta

__all__ = ["ProtoMaml"]

#: The bias of a class without support: its probability is zero to working precision and stays so.
ABSENT = -1e4


class ProtoMaml(InnerLoop):
    """Theta is the body; a task's head is ``W = 2 c``, ``b = -|c|^2``, and adapts together with the body.

    The meta-gradient flows through the prototypes too.

    References
    ----------
    Triantafillou et al., "Meta-Dataset", 2020, section 3 (Proto-MAML).
    """

    name: ClassVar[str] = "protomaml"

    def theta(self, network: Network) -> dict[str, Tensor]:
        return {name: t for name, t in network.theta().items() if name.startswith("body.")}

    def begin(self, network: Network, theta: Theta, support: Batch) -> State:
        features = network.features(theta, support.x, support.mask)
        centres, present = prototypes(features, support, network.head.out_features)
        bias = torch.where(present, -centres.square().sum(-1), ABSENT)
        return State({**theta, "head.weight": 2 * centres, "head.bias": bias}, {})
