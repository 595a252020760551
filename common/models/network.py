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

    Attributes
    ----------
    fixed : dict of str to Tensor
        The body's parameters by name where they are constants and no part of theta (`fix_body`); else empty.

    Raises
    ------
    ModelError
        The body has buffers. Running statistics would leak patients' statistics and break the inner loop.
    """

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, classes)
        self.fixed: dict[str, Tensor] = {}
        if buffers := [name for name, _ in self.named_buffers()]:
            raise ModelError(
                f"the network keeps buffers ({', '.join(buffers[:3])}): wardround shares parameters only; "
                "use batch-statistics or group norm, which keep none"
            )

    def fix_body(self) -> None:
        """Make the body's present values constants: theta is the head alone, and so is all that learns and is sent."""
        # No buffers and no parameters: moved to another device or to none, a copy of this module keeps them.
        self.fixed = {name: p.detach() for name, p in self.named_parameters() if name.startswith("body.")}

    def theta(self) -> dict[str, Tensor]:
        """Return a detached copy of all parameters that are not fixed, by name."""
        return {name: p.detach().clone() for name, p in self.named_parameters() if name not in self.fixed}

    def features(self, theta: Theta, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features ``[N, F]`` of images ``[N, C, *]`` under some parameters.

        Where these have no body, it is the fixed one. It swaps parameters into this module while it runs: one module
        must not serve two threads.
        """
        own = {name.removeprefix("body."): p for name, p in theta.items() if name.startswith("body.")}
        if not own:
            own = {name.removeprefix("body."): p.to(x.device) for name, p in self.fixed.items()}
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
