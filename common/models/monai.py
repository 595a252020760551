"""Image classifiers of MONAI, by name."""

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from common.errors import ModelError

__all__ = ["make_monai"]

DIMENSIONS = {"spatial_dims"}
CHANNELS = {"in_channels", "n_input_channels"}
CLASSES = {"num_classes", "out_channels"}
IMAGE_SIZE = {"image_size", "img_size"}
DOWNLOADS = {"pretrained", "pretrained_url", "weights", "path_or_repo_id"}


def make_monai(
    name: str, arguments: Mapping[str, Any], *, channels: int, classes: int, image_size: int, dimensions: int
) -> nn.Module:
    """Build a network of ``monai.networks.nets``, as MONAI makes it.

    The numbers that the study knows are filled in under the names that the network has for them, and must not be
    in ``arguments``. Pretrained weights are refused: a model of a study is built without the network.

    Parameters
    ----------
    name : str
        A class or function there, such as ``DenseNet121``, ``SEResNet50``, ``resnet18`` or ``ViT``.
    arguments : mapping
        Further keyword arguments. ``ViT`` needs
        ``{"patch_size": 7, "classification": true, "post_activation": null}``.
    channels, classes, image_size, dimensions : int
        As in `common.study.Model`.

    Raises
    ------
    ModelError
        MONAI is not installed, has no such network, or refuses the arguments; or the network takes no class count.
    """
    try:
        import monai.networks.nets as nets  # slow, and most studies do without
    except ImportError as error:
        raise ModelError(f"MONAI cannot be imported ({error}): install it, or use a built-in model") from error
    maker = _find(nets, name)
    parameters = _parameters(maker)
    known = {
        key: value
        for keys, value in (
            (DIMENSIONS, dimensions),
            (CHANNELS, channels),
            (CLASSES, classes),
            (IMAGE_SIZE, image_size),
        )
        for key in keys & parameters.keys()
    }
    if not CLASSES & known.keys():
        raise ModelError(f"monai:{name} takes no class count: choose a classifier, or write a factory")
    if clash := known.keys() & arguments.keys():
        raise ModelError(f"model.arguments sets {', '.join(sorted(clash))}, which follow from the study: remove them")
    if "pretrained" in parameters:
        known["pretrained"] = False
    wanted = parameters | known | dict(arguments)
    if loads := [key for key in DOWNLOADS & wanted.keys() if wanted[key]]:
        raise ModelError(
            f"monai:{name} would load weights ({', '.join(loads)}), but a study starts from its seed: remove the "
            "argument, or write a factory that reads them from a file of your own"
        )
    try:
        return maker(**(known | dict(arguments)))
    except Exception as error:
        raise ModelError(f"monai:{name} refuses its arguments: {error}; check model.arguments") from error


def _find(nets: ModuleType, name: str) -> Callable[..., nn.Module]:
    found = {key: maker for key, maker in vars(nets).items() if _makes_module(maker)}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=5) or ["DenseNet121", "SEResNet50", "EfficientNetBN", "ViT"]
        raise ModelError(f"monai.networks.nets has no network {name!r}; near or usual: {', '.join(near)}")
    return found[name]


def _makes_module(maker: object) -> bool:
    if inspect.isfunction(maker):
        maker = typing.get_type_hints(maker).get("return")
    return inspect.isclass(maker) and issubclass(maker, nn.Module)


def _parameters(maker: Callable[..., nn.Module]) -> dict[str, Any]:
    """Return the defaults of all keyword arguments (None where there is none), also those behind ``**kwargs``."""
    layers: list[Any] = [maker]
    result: type = maker if inspect.isclass(maker) else typing.get_type_hints(maker)["return"]
    layers += [vars(base)["__init__"] for base in result.__mro__ if "__init__" in vars(base)]
    defaults: dict[str, Any] = {}
    for layer in layers[1:] if inspect.isclass(maker) else layers:
        parameters = inspect.signature(layer).parameters.values()
        for p in parameters:
            defaults.setdefault(p.name, None if p.default is p.empty else p.default)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return defaults
