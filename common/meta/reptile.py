"""Reptile: move theta towards every task's adapted weights."""

from typing import ClassVar

from torch import Tensor

from common.meta.autodiff import Autodiff
from common.meta.episodes import Batch, Episodes
from common.meta.learner import EpisodeGradient, State
from common.meta.local_sgd import LocalSgd, union
from common.models.network import Network, Theta

__all__ = ["Reptile"]


class Reptile(LocalSgd):
    """The pseudo-gradient of a task is ``(theta - phi) / inner_rate``, phi after SGD on all its images.

    References
    ----------
    Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms", 2018, algorithm 2 and the remark below
    it on ``(phi - W) / alpha`` as a gradient for Adam.
    """

    name: ClassVar[str] = "reptile"

    def episode_gradient(self, network: Network, theta: Theta, task: Episodes, autodiff: Autodiff) -> EpisodeGradient:
        """Return the pseudo-gradient of one task (no task axis)."""
        phi, loss, hits = self.descend(network, theta, theta, union(task), autodiff)
        return EpisodeGradient({n: (theta[n] - p) / self.inner_rate for n, p in phi.items()}, loss, hits)

    def adapt(
        self, network: Network, theta: Theta, support: Batch, classes: Tensor, steps: int, autodiff: Autodiff
    ) -> State:
        return self.fine_tune(network, theta, support, steps, autodiff)
