"""Take in a classifier that was written for ordinary training: no state but its parameters, and our head."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from common.errors import ModelError
from common.models.network import Network
from common.models.norm import BatchStatNorm, make_norm

__all__ = ["adopt"]


def adopt(module: nn.Module, *, norm: str, classes: int, image: tuple[int, ...]) -> Network:
    """Turn an image classifier into a `Network`; the module itself is changed.

    - Batch norms become the study's norm, with the epsilon of `common.models.norm`.
    - Instance and layer norms become equal functions in another form: PyTorch's own lose a second-order term
      in a gradient taken outside ``vmap``. Every norm keeps its scale and shift.
    - In-place activations become out-of-place.
    - The module stays in evaluation mode for good, so dropout and stochastic depth do nothing: a
      meta-gradient through random inner steps could not be repeated.
    - The linear layer whose output is the network's output is cut off; `Network` has a new one.

    Parameters
    ----------
    module : nn.Module
        Maps images ``[N, *image]`` to logits ``[N, classes]``, or to a tuple that begins with them.
    norm : {"batch", "group"}
        What batch norms become.
    classes : int
        The size of the head.
    image : tuple of int
        The shape of one image, channels first. The module is tried with it on the meta device, which
        computes no numbers.

    Raises
    ------
    ModelError
        The module keeps buffers or freezes parameters, does not run on such images, or does not end in a
        linear layer with ``classes`` outputs.
    """
    if frozen := [name for name, p in module.named_parameters() if not p.requires_grad]:
        raise ModelError(
            f"the network freezes parameters ({', '.join(frozen[:3])}), but theta is all of them: make them "
            "trainable; algorithm.name = 'anil' adapts the head only"
        )
    body = _Adopted(module, norm)
    if buffers := [name for name, _ in body.net.named_buffers()]:
        raise ModelError(
            f"the network keeps buffers ({', '.join(buffers[:3])}), which theta does not hold: choose a "
            "network without, or write a factory whose forward computes them"
        )
    classifier, features = _find_classifier(body, classes, image)
    owner, _, leaf = classifier.rpartition(".")
    setattr(body.get_submodule(owner), leaf, nn.Identity())
    return Network(body, features, classes)


class _Adopted(nn.Module):
    takes_mask = False
    channels_last = False

    def __init__(self, module: nn.Module, norm: str) -> None:
        super().__init__()
        self.net = module.float()  # as all networks are built; the caller converts
        _renew(self, norm)
        self.mixes_rows = any(isinstance(m, BatchStatNorm) for m in self.modules())
        self.train(False)

    def train(self, mode: bool = True) -> "_Adopted":
        return super().train(False)  # whatever the mode asked for: see `adopt`

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        first: Tensor = out[0] if isinstance(out, tuple | list) else out
        return first


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        # The scale and shift apart: PyTorch's fused form is wrong to second order in a gradient outside vmap.
        x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


def _renew(parent: nn.Module, norm: str) -> None:
    for name, child in parent.named_children():
        new: nn.Module
        if isinstance(child, _BatchNorm):
            new = make_norm(norm, child.num_features)
        elif isinstance(child, _InstanceNorm):
            new = nn.GroupNorm(child.num_features, child.num_features, child.eps, child.affine)
        elif isinstance(child, nn.LayerNorm):
            shift = child.bias is not None
            new = _LayerNorm(child.normalized_shape, child.eps, child.elementwise_affine, shift)
        else:
            if hasattr(child, "inplace"):
                child.inplace = False  # type: ignore[assignment]
            _renew(child, norm)
            continue
        with torch.no_grad():
            for key, value in child.named_parameters():
                new.get_parameter(key).copy_(value)
        setattr(parent, name, new)


def _find_classifier(body: nn.Module, classes: int, image: tuple[int, ...]) -> tuple[str, int]:
    """Return the name and the input width of the linear layer whose output is the network's output."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: calls.append((name, inputs[0], output))

    hooks = [
        layer.register_forward_hook(note(name))
        for name, layer in body.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == classes
    ]
    try:
        theta = {name: torch.empty_like(p, device="meta") for name, p in body.named_parameters()}
        out = functional_call(body, theta, (torch.empty(2, *image, device="meta"),))
    except Exception as error:
        size, reason = " x ".join(map(str, image)), str(error).partition("\n")[0]
        raise ModelError(
            f"the network does not run on images of {size} (channels first): {reason}; check "
            "model.image-size, model.channels, model.dimensions and model.arguments"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for name, given, made in calls:
        if made is out and given.dim() == 2:
            return name, given.shape[1]
    raise ModelError(
        f"the network does not end in a linear layer with {classes} outputs, so its head cannot be found: "
        "give it arguments that make it a classifier with nothing after that layer, or write a factory that "
        "returns a common.models.Network"
    )
