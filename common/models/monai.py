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

CLASSES = {"num_classes", "out_channels"}
DOWNLOADS = {"pretrained", "pretrained_url", "weights", "path_or_repo_id"}


def make_monai(
    name: str, arguments: Mapping[str, Any], *, channels: int, classes: int, image_size: int, dimensions: int
) -> nn.Module:
    """Build a network of ``monai.networks.nets``, as MONAI makes it.

    The numbers that the study knows are filled in under the names that the network has for them, and must not
    be in ``arguments``. Pretrained weights are refused: a model is built without a connection to anywhere.

    Parameters
    ----------
    name : str
        A class or function there, such as ``DenseNet121``, ``SEResNet50``, ``resnet18`` or ``ViT``.
    arguments : mapping
        Further keyword arguments. ``ViT`` (which needs the package einops) becomes a plain classifier with
        ``{"patch_size": 7, "classification": true, "post_activation": null}``.
    channels, classes, image_size, dimensions : int
        As in `common.study.Model`.

    Raises
    ------
    ModelError
        MONAI is not installed, has no such network, or refuses the arguments; or the network takes no class
        count.
    """
    try:
        from monai.networks import nets  # slow, and most studies do without
    except ImportError as error:
        raise ModelError(f"MONAI cannot be imported ({error}): install it, or use conv4") from error
    maker = _find(nets, name)
    parameters = _parameters(maker)
    names = dict.fromkeys(CLASSES, classes) | {
        "spatial_dims": dimensions,
        "in_channels": channels,
        "n_input_channels": channels,
        "image_size": image_size,
        "img_size": image_size,
    }
    known = {key: value for key, value in names.items() if key in parameters}
    if not CLASSES & known.keys():
        raise ModelError(f"monai:{name} takes no class count: choose a classifier, or write a factory")
    if clash := known.keys() & arguments.keys():
        raise ModelError(f"model.arguments sets {', '.join(sorted(clash))}: remove it, the study sets it already")
    if "pretrained" in parameters:
        known["pretrained"] = False
    wanted = parameters | known | dict(arguments)
    if loads := [key for key in DOWNLOADS & wanted.keys() if wanted[key]]:
        raise ModelError(
            f"monai:{name} would download weights ({', '.join(loads)}), but a study starts from its seed: "
            "remove the argument, or choose another network"
        )
    try:
        return maker(**(known | dict(arguments)))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"monai:{name} cannot be made: {reason}; check model.arguments") from error


def _find(nets: ModuleType, name: str) -> Callable[..., nn.Module]:
    maker: Callable[..., nn.Module] | None = getattr(nets, name, None)
    if maker is None or not _makes_module(maker):
        public = [key for key, value in vars(nets).items() if callable(value)]
        near = difflib.get_close_matches(name, public, n=5) or ["DenseNet121", "SEResNet50", "EfficientNetBN"]
        raise ModelError(f"monai.networks.nets has no network {name!r}; near or usual: {', '.join(near)}")
    return maker


def _makes_module(maker: object) -> bool:
    if inspect.isfunction(maker):
        maker = typing.get_type_hints(maker).get("return")
    return inspect.isclass(maker) and issubclass(maker, nn.Module)


def _parameters(maker: Callable[..., nn.Module]) -> dict[str, Any]:
    """Return all keyword arguments, also those behind ``**kwargs``, with their defaults or None."""
    made: type = maker if inspect.isclass(maker) else typing.get_type_hints(maker)["return"]
    makers = [vars(base)["__init__"] for base in made.__mro__ if "__init__" in vars(base)]
    if not inspect.isclass(maker):
        makers.insert(0, maker)
    defaults: dict[str, Any] = {}
    for function in makers:
        parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            defaults.setdefault(p.name, None if p.default is p.empty else p.default)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return defaults
