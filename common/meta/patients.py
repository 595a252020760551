"""What one patient adds to a site's loss: the gradient of their images' mean loss, and its Hessian times a vector."""

from torch import Tensor

from common.meta.autodiff import Autodiff
from common.meta.episodes import Batch, accuracy, cross_entropy
from common.meta.learner import EpisodeGradient
from common.models.network import Network, Theta

__all__ = ["gradient", "product"]


def gradient(network: Network, at: Theta, images: Batch, autodiff: Autodiff) -> EpisodeGradient:
    """Return the gradient, the loss and the accuracy of one patient's images (no task axis; masks honoured)."""

    def loss(at: Theta) -> tuple[Tensor, Tensor]:
        logits = network.logits(at, images.x, images.mask)
        return cross_entropy(logits, images), accuracy(logits.detach(), images)

    return EpisodeGradient(*autodiff.outer(loss, at))


def product(network: Network, at: Theta, along: Theta, images: Batch, autodiff: Autodiff) -> dict[str, Tensor]:
    """Return the Hessian of one patient's loss times a vector ``along`` of theta's names and shapes.

    The Hessian is symmetric: it is the gradient's vector-Jacobian product.
    """

    def slope(at: Theta, _: Theta) -> Theta:
        return autodiff.inner(
            lambda p: cross_entropy(network.logits(p, images.x, images.mask), images), at, second_order=True
        )

    return autodiff.pull(slope, at, {}, along)[0]
