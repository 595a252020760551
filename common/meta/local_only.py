"""Local-only: what a hospital reaches alone, from a fresh network and its support set."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.meta.autodiff import Autodiff
from common.meta.episodes import Batch, cross_entropy
from common.meta.learner import Learner, State
from common.models.network import Network, Theta

__all__ = ["LocalOnly"]


@dataclass(frozen=True)
class LocalOnly(Learner):
    """Adam from the untrained theta on the support set; nothing is shared and no round runs.

    Parameters
    ----------
    test_rate : float
        Adam's rate.
    """

    test_rate: float

    name: ClassVar[str] = "local-only"

    def adapt(
        self, network: Network, theta: Theta, support: Batch, classes: Tensor, steps: int, autodiff: Autodiff
    ) -> State:
        phi = {name: t.detach().clone().requires_grad_() for name, t in theta.items()}
        optimiser = torch.optim.Adam(phi.values(), lr=self.test_rate)

        def loss(p: Theta) -> Tensor:
            return cross_entropy(network.logits(p, support.x, support.mask), support)

        for _ in range(steps):
            for name, grad in autodiff.inner(loss, phi, second_order=False).items():
                phi[name].grad = grad
            optimiser.step()
        return State({name: t.detach() for name, t in phi.items()}, {})

    def predict(self, network: Network, state: State, batch: Batch) -> Tensor:
        return network.logits(state.fast, batch.x, batch.mask)
