"""Networks to attack: one whose first layer is linear, and one through whose convolutions images can be matched."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.models.network import Network

__all__ = ["first_layer", "linear", "smooth"]


class _Body(nn.Module):
    takes_mask: ClassVar[bool] = False
    mixes_rows: ClassVar[bool] = False
    channels_last: ClassVar[bool] = False


class _Linear(_Body):
    """One linear layer on all pixels, and ReLU."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x.flatten(1)))


class _Smooth(_Body):
    """Two strided convolutions with sigmoids: differentiable as often as one likes, and no pixel is lost in a pool."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 5, padding=2, stride=2)
        self.second = nn.Conv2d(width, width, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.second(torch.sigmoid(self.first(x)))).flatten(1)


def linear(*, channels: int, classes: int, image_size: int, dimensions: int, width: int = 128) -> Network:
    """Return a network of one hidden layer on all pixels: the one that gives its images away.

    A study names it as ``model.name = "factory:simulations.redteam.networks:linear"``.
    """
    return Network(_Linear(channels * image_size**dimensions, width), width, classes)


def smooth(*, channels: int, classes: int, image_size: int, dimensions: int, width: int = 12) -> Network:
    """Return a small convolutional network with sigmoids, for 2-D images of an even side.

    Its numbers are drawn from -0.5 to 0.5.

    References
    ----------
    Zhu, Liu and Han, "Deep Leakage from Gradients", 2019, section 4.1: sigmoids and no strides or pools that lose
    pixels make gradients easy to match, and so does this range.
    """
    network = Network(_Smooth(channels, width), width * (image_size // 2) ** dimensions, classes)
    for tensor in network.parameters():
        nn.init.uniform_(tensor, -0.5, 0.5)
    return network


def first_layer(network: Network) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """Return the name of the layer of the body that sees the images, and the layer; None for one of another kind."""
    for name, layer in network.body.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            return f"body.{name}", layer
    return None
