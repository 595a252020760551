"""A network as the learners see it: a body that makes features, a linear head that makes logits."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from common.errors import ModelError

__all__ = ["Body", "Network", "Theta"]

Theta = Mapping[str, Tensor]


class Body(Protocol):
    """What a body offers besides being a module.

    Attributes
    ----------
    takes_mask : bool
        ``forward(x, mask)`` honours a row mask; only a body that mixes images of a batch needs one.
    mixes_rows : bool
        The features of one image depend on the other images in the call (batch statistics).
    channels_last : bool
        The body runs faster on a CPU in the channels-last memory format.
    """

    takes_mask: bool
    mixes_rows: bool
    channels_last: bool


class Network(nn.Module):
    """A body and a linear head, called with the parameters as an argument.

    Parameters
    ----------
    body : nn.Module
        Maps images ``[N, C, *]`` to features ``[N, F]``; has the attributes of `Body`.
    features, classes : int
        The sizes of the head.

    Raises
    ------
    ModelError
        The body has buffers. Running statistics would leak patients' statistics and break the inner loop.
    """

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)
        if buffers := [name for name, _ in self.named_buffers()]:
            raise ModelError(
                f"the network keeps buffers ({', '.join(buffers[:3])}): wardround shares parameters only; "
                "use batch-statistics or group norm, which keep none"
            )

    def theta(self) -> dict[str, Tensor]:
        """Return a detached copy of all parameters, by name."""
        return {name: p.detach().clone() for name, p in self.named_parameters()}

    def features(self, theta: Theta, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features ``[N, F]`` of images ``[N, C, *]`` under some parameters.

        It swaps parameters into this module while it runs: one module must not serve two threads.
        """
        own = {name.removeprefix("body."): p for name, p in theta.items() if name.startswith("body.")}
        inputs = (x, mask) if self.body.takes_mask else (x,)
        out: Tensor = functional_call(self.body, own, inputs, strict=True)
        return out

    def logits(self, theta: Theta, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits ``[N, classes]`` of images ``[N, C, *]`` under some parameters."""
        return F.linear(self.features(theta, x, mask), theta["head.weight"], theta["head.bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits under the module's own parameters."""
        out: Tensor = self.head(self.body(x))
        return out
