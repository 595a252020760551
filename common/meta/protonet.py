"""Prototypical networks: classify by distance to the class means of the support features."""

from typing import ClassVar

import torch
from torch import Tensor

from common.meta.autodiff import Autodiff
from common.meta.episodes import Batch
from common.meta.learner import InnerLoop, State
from common.models.network import Network, Theta

__all__ = ["ProtoNet", "prototypes"]


def prototypes(features: Tensor, support: Batch, ways: int) -> tuple[Tensor, Tensor]:
    """Return the mean feature of every class ``[ways, F]`` and which classes the support holds ``[ways]`` (bool)."""
    member = (support.y.unsqueeze(-1) == torch.arange(ways, device=features.device)).to(features.dtype)
    if support.mask is not None:
        member = member * support.mask.unsqueeze(-1)
    count = member.sum(0)
    return member.T @ features / count.clamp(min=1).unsqueeze(-1), count > 0


class ProtoNet(InnerLoop):
    """No inner loop and no head: theta is the body alone.

    Logits are negative squared Euclidean distances; a class without support is never predicted.

    References
    ----------
    Snell, Swersky and Zemel, "Prototypical Networks for Few-shot Learning", 2017, equations 1 and 2.
    """

    name: ClassVar[str] = "protonet"

    def theta(self, network: Network) -> dict[str, Tensor]:
        return {name: t for name, t in network.theta().items() if name.startswith("body.")}

    def begin(self, network: Network, theta: Theta, support: Batch) -> State:
        features = network.features(theta, support.x, support.mask)
        centres, present = prototypes(features, support, network.head.out_features)
        return State({}, {**theta, "prototypes": centres, "present": present.to(features.dtype)})

    def adapt(
        self, network: Network, theta: Theta, support: Batch, classes: Tensor, steps: int, autodiff: Autodiff
    ) -> State:
        return self.begin(network, theta, support)  # the prototypes are the adaptation, whatever the steps

    def predict(self, network: Network, state: State, batch: Batch) -> Tensor:
        features = network.features(_body(state.fixed), batch.x, batch.mask)
        centres = state.fixed["prototypes"]
        # |f - c|^2 without |f|^2, which no softmax over classes can see.
        logits = 2 * features @ centres.T - centres.square().sum(-1)
        return torch.where(state.fixed["present"] > 0, logits, -torch.inf)


def _body(theta: Theta) -> dict[str, Tensor]:
    return {name: t for name, t in theta.items() if name.startswith("body.")}
