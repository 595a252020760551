"""From a network with batch statistics to one whose prediction for an image depends on that image alone.

Batch norm with given statistics is an affine map per channel, so the fixed network has the same parameters' names and
shapes: its norms' scales and shifts hold the statistics, and there is nothing else to keep.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from common.models.network import Network, Theta
from common.models.norm import EPSILON, BatchStatNorm

__all__ = ["fix_statistics", "with_fixed_statistics"]


class _FixedNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _affine(x, self.weight, self.bias)


class _Collector(_FixedNorm):
    """Normalises by the batch's statistics, and notes the affine map that it was."""

    def __init__(self, channels: int, found: dict[str, Tensor], name: str) -> None:
        super().__init__(channels)
        self.found, self.name = found, name

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        scale = self.weight * torch.rsqrt(variance + EPSILON)
        shift = self.bias - scale * mean
        self.found[f"body.{self.name}.weight"], self.found[f"body.{self.name}.bias"] = scale, shift
        return _affine(x, scale, shift)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.view(shape) + shift.view(shape)


def with_fixed_statistics(network: Network) -> Network:
    """Return the structure that parameters of `fix_statistics` belong to; a network without batch statistics as it is.

    Only structure: the parameters of the copy mean nothing.
    """
    return _replaced(network, lambda channels, _: _FixedNorm(channels)) if network.body.mixes_rows else network


def fix_statistics(network: Network, theta: Theta, x: Tensor) -> Mapping[str, Tensor]:
    """Return parameters for `with_fixed_statistics` that treat any image as if it stood among some given ones.

    On the given images themselves, logits are those of the network.

    Parameters
    ----------
    network : Network
        As the parameters were trained.
    theta : Theta
        Its parameters; returned as they are where the network has no batch statistics.
    x : Tensor
        Images ``[N, C, *]`` whose statistics every norm takes: the support set.

    References
    ----------
    Bronskill et al., "TaskNorm: Rethinking Batch Normalization for Meta-Learning", 2020, section 3.1 (there MetaBN).
    """
    if not network.body.mixes_rows:
        return theta
    found: dict[str, Tensor] = {}
    collecting = _replaced(network, lambda channels, name: _Collector(channels, found, name))
    with torch.no_grad():
        collecting.features(theta, x)
    return {**theta, **{name: t.detach() for name, t in found.items()}}


def _replaced(network: Network, norm: Callable[[int, str], nn.Module]) -> Network:
    """Return a copy with other norms in place of the batch norms: made from their channels and their names."""
    copy = deepcopy(network)
    for name, module in list(copy.body.named_modules()):
        if isinstance(module, BatchStatNorm):
            owner, _, leaf = name.rpartition(".")
            setattr(copy.body.get_submodule(owner), leaf, norm(module.weight.shape[0], name))
    copy.body.mixes_rows = False  # type: ignore[assignment]
    return copy
