"""The network in plain operations, traced: what every format but safetensors holds."""

import copy
import io
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from common.errors import ExportError
from common.models import Network
from common.models.norm import EPSILON, BatchStatNorm
from common.quiet import quiet

__all__ = ["Plain", "PlainPrediction", "program_bytes", "trace"]


class Plain(nn.Module):
    """From images ``[N, C, *]`` to the features and, where theta has a head, the logits, by name.

    Always float32: an image has 8 bits, and onnxruntime convolves in nothing finer. Parameters have theta's names.
    """

    def __init__(self, network: Network, *, head: bool) -> None:
        super().__init__()
        network = copy.deepcopy(network).float().requires_grad_()
        _renew(network)
        self.body = network.body
        self.head = network.head if head else None

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features and the logits by name."""
        features = self.body(images)
        return {"features": features} if self.head is None else {"features": features, "logits": self.head(features)}

    def forward(self, images: Tensor) -> dict[str, Tensor] | Tensor:
        return self.outputs(images)


class PlainPrediction(Plain):
    """The logits alone, or the features where there is no head: MONAI wants one tensor."""

    def forward(self, images: Tensor) -> Tensor:
        return [*self.outputs(images).values()][-1]


class _PlainNorm(nn.Module):
    """`BatchStatNorm` in operations that every runtime has: onnxruntime's own batch norm knows running statistics only.

    Not a `BatchStatNorm`, so that a body does not join it with its pool as `common.models.norm_pool` does.
    """

    def __init__(self, norm: BatchStatNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        over = [0, *range(2, x.dim())]
        centred = x - x.mean(over, keepdim=True)
        variance = centred.square().mean(over, keepdim=True)
        weight, bias = (p.view(-1, *[1] * (x.dim() - 2)) for p in (self.weight, self.bias))
        return centred * torch.rsqrt(variance + EPSILON) * weight + bias


def _renew(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        if isinstance(child, BatchStatNorm):
            setattr(parent, name, _PlainNorm(child))
        else:
            _renew(child)


def trace(module: Plain, image: tuple[int, ...]) -> ExportedProgram:
    """Trace a network for any number of images of one shape.

    ``torch.export`` and not TorchScript, which PyTorch has deprecated: its program loads with PyTorch alone too, runs
    the very operations that were traced, and keeps theta's names and gradients, so that it can also be adapted.

    Raises
    ------
    ExportError
        The network does something that cannot be traced.
    """
    try:
        with quiet("torch.export"):  # PyTorch warns of its own deprecations
            program = torch.export.export(module, (torch.zeros(2, *image),), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # of many kinds, depending on what the network does
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"PyTorch cannot trace this network ({reason}): use --format safetensors") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program


def program_bytes(program: ExportedProgram, extra: Mapping[str, str]) -> bytes:
    """Return a program as a file's content, with some texts in it; PyTorch's own writer aborts on a full disk."""
    out = io.BytesIO()
    with quiet("torch.export"):
        torch.export.save(program, out, extra_files=dict(extra))
    return out.getvalue()
