"""From the ``model`` group of a study to a network, the same at every site and at the server."""

import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.models.adopt import adopt
from common.models.conv4 import Conv4
from common.models.monai import make_monai
from common.models.network import Network
from common.models.released import load_body
from common.models.resnet12 import ResNet12
from common.study import Model

__all__ = ["build", "untrained"]

KNOWN = (
    "conv4, resnet12, monai:NAME (a network of monai.networks.nets), factory:package.module:function, and head: before "
    "any of them"
)
HEAD = "head:"  # before a network's name: its body is fixed
START = "start"  # among a network's arguments: the digest of a released theta
POOLING = 16  # conv4 and resnet12 halve the image four times


def build(
    model: Model, *, classes: int, seed: int, dtype: torch.dtype = torch.float32, released: bool = True
) -> Network:
    """Build the network of a study with an initialisation that follows from a seed.

    ``conv4`` and ``resnet12`` draw convolution weights from He's normal distribution (fan-out, ReLU gain);
    every head is drawn as PyTorch does, and MONAI networks and factories keep their own initialisation.
    Values are drawn in float32 and then converted, so that both precisions start at the same point.
    PyTorch's global generators are left as they were.

    Where ``model.arguments`` has a ``start``, the body's values are those of that released theta
    (`common.models.released`) and the seed gives the head alone. With ``head:`` before its name, the network's body
    keeps what it begins with, and theta is the head.

    Parameters
    ----------
    model : Model
        ``name`` is one of ``conv4``, ``resnet12``, ``monai:NAME`` and ``factory:package.module:function``, with or
        without ``head:`` before it. A factory is called with the keywords ``channels``, ``classes``, ``image_size``,
        ``dimensions`` and those of ``arguments``; it returns a `Network`, or a classifier for `common.models.adopt`. It
        draws from PyTorch's generator only.
    classes : int
        The size of the head.
    seed : int
        At least 0 and below 2**63.
    dtype : torch.dtype
        Of all parameters.
    released : bool
        Whether to read the released theta that is named. Without it, names and shapes are the same and the numbers
        mean nothing.

    Raises
    ------
    ModelError
        There is no such network, or it cannot serve this study; the message says why.

    References
    ----------
    He et al., "Delving Deep into Rectifiers", 2015, equation 14.
    """
    network = _build(untrained(model), classes, seed).to(dtype)
    start = _arguments(model).get(START)
    if start is not None and released:
        _start(network, load_body(str(start)))
    if model.name.startswith(HEAD):
        network.fix_body()
    return network


def untrained(model: Model) -> Model:
    """Return a network as it is without what others trained: all of it learns, and starts from the seed."""
    arguments = _arguments(model)
    changes: dict[str, str] = {"name": model.name.removeprefix(HEAD)}
    if arguments.pop(START, None) is not None:
        changes["arguments"] = json.dumps(arguments)
    return model.model_copy(update=changes)


def _start(network: Network, body: Mapping[str, Tensor]) -> None:
    """Set the body's values."""
    own = {name: p for name, p in network.named_parameters() if name.startswith("body.")}
    if {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in body.items()}:
        raise ModelError(
            "the released theta that model.arguments starts from belongs to another network: set model.name, "
            "model.width, model.norm and model.channels as they were where it was trained"
        )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(body[name])


def _build(model: Model, classes: int, seed: int) -> Network:
    kind, _, target = model.name.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        if model.name in {"conv4", "resnet12"}:
            network = _built_in(model, classes)
        elif kind == "monai" and target:
            network = _adopt(make_monai(target, _arguments(model), **_sizes(model, classes)), model, classes)
        elif kind == "factory" and target:
            network = _from_factory(target, model, classes)
        else:
            raise ModelError(f"model.name: no network {model.name!r}; known are {KNOWN}")
    return network


def _built_in(model: Model, classes: int) -> Network:
    if model.dimensions != 2:
        raise ModelError(f"{model.name} takes 2-D images: set model.dimensions = 2 or use a MONAI network")
    if model.image_size < POOLING:
        raise ModelError(f"{model.name} needs model.image-size of at least {POOLING}, not {model.image_size}")
    if _arguments(model):
        raise ModelError(f"{model.name} takes no model.arguments: remove them")
    body: nn.Module
    if model.name == "conv4":
        body = Conv4(model.channels, model.width, model.norm)
        features = Conv4.feature_size(model.width, model.image_size)
    else:
        body = ResNet12(model.channels, model.width, model.norm)
        features = ResNet12.feature_size(model.width)
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return Network(body, features, classes)


def _from_factory(path: str, model: Model, classes: int) -> Network:
    module, _, function = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise ModelError(
            f"factory:{path} cannot be imported ({error}): it must be factory:package.module:function"
        ) from error
    try:
        made = factory(**_sizes(model, classes), **_arguments(model))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"factory:{path} failed ({error!r}): check model.arguments") from error
    if isinstance(made, Network):
        if made.head.out_features != classes:
            raise ModelError(f"factory:{path} made a head of {made.head.out_features} classes, not {classes}")
        return made
    if isinstance(made, nn.Module):
        return _adopt(made, model, classes)
    raise ModelError(f"factory:{path} returned a {type(made).__name__}: return a Network or an nn.Module")


def _adopt(module: nn.Module, model: Model, classes: int) -> Network:
    image = (model.channels, *[model.image_size] * model.dimensions)
    return adopt(module, norm=model.norm, classes=classes, image=image)


def _sizes(model: Model, classes: int) -> dict[str, int]:
    return {
        "channels": model.channels,
        "classes": classes,
        "image_size": model.image_size,
        "dimensions": model.dimensions,
    }


def _arguments(model: Model) -> dict[str, Any]:
    try:
        arguments = json.loads(model.arguments)
    except ValueError as error:
        raise ModelError(f"model.arguments is not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ModelError(f"model.arguments must be a JSON object such as {{}}, not {model.arguments}")
    return arguments
