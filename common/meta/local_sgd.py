"""Learners that run plain SGD at the site and send how far theta moved: Reptile, FedAvg, FedProx."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.meta.autodiff import Autodiff
from common.meta.episodes import Batch, Episodes, accuracy, cross_entropy
from common.meta.learner import Learner, State
from common.models.network import Network, Theta

__all__ = ["LocalSgd", "union"]


def union(task: Episodes) -> Batch:
    """Return a task's support and query images as one batch: local SGD knows no such split."""
    support, query = task.support, task.query
    mask = None
    if support.mask is not None or query.mask is not None:  # a set without padding has no mask
        masks = [torch.ones_like(b.y, dtype=torch.bool) if b.mask is None else b.mask for b in (support, query)]
        mask = torch.cat(masks)
    return Batch(torch.cat([support.x, query.x]), torch.cat([support.y, query.y]), mask)


@dataclass(frozen=True)
class LocalSgd(Learner):
    """SGD steps on a task's images, from theta to phi.

    Parameters
    ----------
    inner_steps : int
        SGD steps on every task's images.
    inner_rate, test_rate : float
        Rates in training and of the fine-tuning at meta-test time.
    proximal : float
        mu of the term ``mu/2 |phi - theta|^2`` (FedProx); 0 without it.
    """

    inner_steps: int
    inner_rate: float
    test_rate: float
    proximal: float = 0.0

    def descend(
        self, network: Network, theta: Theta, phi: Theta, batch: Batch, autodiff: Autodiff
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return phi after the local steps on one batch, and the last step's loss and accuracy."""

        def loss(phi: Theta) -> tuple[Tensor, Tensor]:
            logits = network.logits(phi, batch.x, batch.mask)
            return cross_entropy(logits, batch), accuracy(logits.detach(), batch)

        for _ in range(self.inner_steps):
            grads, value, hits = autodiff.outer(loss, phi)
            phi = {n: p - self.inner_rate * (grads[n] + self.proximal * (p - theta[n])) for n, p in phi.items()}
        return dict(phi), value, hits

    def fine_tune(self, network: Network, theta: Theta, support: Batch, steps: int, autodiff: Autodiff) -> State:
        """Return theta after ``steps`` SGD steps on a support set."""
        phi = dict(theta)
        for _ in range(steps):
            grads = autodiff.inner(
                lambda p: cross_entropy(network.logits(p, support.x, support.mask), support),
                phi,
                second_order=False,
            )
            phi = {name: p - self.test_rate * grads[name] for name, p in phi.items()}
        return State(phi, {})

    def predict(self, network: Network, state: State, batch: Batch) -> Tensor:
        return network.logits(state.fast, batch.x, batch.mask)
