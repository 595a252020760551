"""FedAvg and FedProx, the baselines that any honest comparison needs, with fine-tuning at meta-test time."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from common.meta.autodiff import Autodiff
from common.meta.episodes import Batch, Episodes
from common.meta.learner import EpisodeGradient, State
from common.meta.local_sgd import LocalSgd, union
from common.models.network import Network, Theta

__all__ = ["FedAvg", "FedProx"]


class FedAvg(LocalSgd):
    """Local SGD over all of a round's episodes in turn, one classifier over the study's training classes.

    The round's pseudo-gradient is ``theta - phi``: with outer SGD at rate 1 the server's theta is the average of
    the sites' phi, which is FedAvg. At meta-test time the head takes the rows of the task's classes (zeros for a
    class that was never trained), and fine-tuning is SGD on the support set.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017, algorithm 1.
    """

    name: ClassVar[str] = "fedavg"
    per_episode: ClassVar[bool] = False

    def round_gradient(
        self, network: Network, theta: Theta, tasks: Iterable[Episodes], autodiff: Autodiff
    ) -> EpisodeGradient:
        """Return the pseudo-gradient of one site's round over its tasks (no task axis), and their mean loss."""
        phi: Theta = theta
        losses, hits = [], []
        for task in tasks:
            batch = union(task)
            phi, loss, hit = self.descend(network, theta, phi, batch._replace(y=task.classes[batch.y]), autodiff)
            losses.append(loss)
            hits.append(hit)
        move = {name: theta[name] - p for name, p in phi.items()}
        return EpisodeGradient(move, torch.stack(losses).mean(), torch.stack(hits).mean())

    def adapt(
        self, network: Network, theta: Theta, support: Batch, classes: Tensor, steps: int, autodiff: Autodiff
    ) -> State:
        known = (classes >= 0) & (classes < theta["head.bias"].shape[0])
        rows = torch.where(known, classes, 0)
        head = {
            "head.weight": torch.where(known.unsqueeze(-1), theta["head.weight"][rows], 0.0),
            "head.bias": torch.where(known, theta["head.bias"][rows], 0.0),
        }
        return self.fine_tune(network, {**theta, **head}, support, steps, autodiff)


class FedProx(FedAvg):
    """FedAvg with the local objective ``L(phi) + mu/2 |phi - theta|^2``.

    References
    ----------
    Li et al., "Federated Optimization in Heterogeneous Networks", 2020, equation 2.
    """

    name: ClassVar[str] = "fedprox"
