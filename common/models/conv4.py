"""Conv4: the four-block convolutional network of the few-shot literature."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.models.convolution import convolve
from common.models.norm import BatchStatNorm, make_norm
from common.models.norm_pool import batch_norm_pool
from common.models.pool import max_pool

__all__ = ["Conv4"]


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, norm, 2x2 max-pool and ReLU.

    The convolutions have no bias: a norm follows, so its gradient would be zero. ReLU comes after the pool: both
    are monotone, so the result is the same and the ReLU touches a quarter of the values.

    Parameters
    ----------
    channels : int
        Channels of the images.
    width : int
        Channels of every block.
    norm : {"batch", "group"}
        See `common.models.norm`.

    References
    ----------
    Vinyals et al., "Matching Networks for One Shot Learning", 2016, section 4.1.
    """

    takes_mask = True

    def __init__(self, channels: int, width: int, norm: str) -> None:
        super().__init__()
        sizes = (channels, width, width, width, width)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(make_norm(norm, width) for _ in range(4))
        self.mixes_rows = self.channels_last = norm == "batch"

    @staticmethod
    def feature_size(width: int, image_size: int) -> int:
        """Return how many features an image of some side length gives."""
        return width * (image_size // 16) ** 2

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features ``[N, width * (H // 16) ** 2]`` of images ``[N, C, H, H]``."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            if mask is None and isinstance(norm, BatchStatNorm):
                # The scale's sign goes into the convolution: the joint operation wants a rising map.
                sign = torch.where(norm.weight < 0, -1.0, 1.0)
                x = convolve(x, convolution.weight * sign.view(-1, 1, 1, 1))  # type: ignore[operator]
                x = batch_norm_pool(x.to(norm.weight.dtype), norm.weight * sign, norm.bias)
            else:
                x = max_pool(norm(convolve(x, convolution.weight), mask))  # type: ignore[arg-type]
            x = F.relu(x)
        return torch.flatten(x, 1)
