"""ANIL: only the head adapts in the inner loop."""

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from common.meta.episodes import Batch, cross_entropy
from common.meta.learner import InnerLoop, State
from common.models.network import Network, Theta

__all__ = ["Anil"]

HEAD = ("head.weight", "head.bias")


class Anil(InnerLoop):
    """The body is shared and fixed within a task, so the support features are computed once.

    References
    ----------
    Raghu et al., "Rapid Learning or Feature Reuse?", 2020, equation 2.
    """

    name: ClassVar[str] = "anil"

    def begin(self, network: Network, theta: Theta, support: Batch) -> State:
        head = {name: theta[name] for name in HEAD}
        fixed = {name: t for name, t in theta.items() if name not in head}
        fixed["support features"] = network.features(theta, support.x, support.mask)
        return State(head, fixed)

    def support_loss(self, network: Network, state: State, support: Batch) -> Tensor:
        logits = F.linear(state.fixed["support features"], *(state.fast[name] for name in HEAD))
        return cross_entropy(logits, support)
