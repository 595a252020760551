"""The network as a MONAI bundle that needs MONAI and PyTorch, nothing of wardround.

The layout and the keys are those of MONAI's bundle specification; ``models/model.pt2`` beside the weights makes the
network itself, which has no class in MONAI.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ExportError
from common.pixels import CENTRE, SPREAD
from common.quiet import quiet
from server.export.facts import readme
from server.export.plain import PlainPrediction, program_bytes, trace
from server.export.source import Predict, Source

__all__ = ["write_bundle"]


def write_bundle(source: Source, facts: dict[str, Any], folder: Path) -> Predict:
    """Write the bundle's folder, named for the study.

    Raises
    ------
    ExportError
        MONAI is not installed.
    """
    try:
        import monai
    except ImportError as error:
        raise ExportError(f"MONAI cannot be imported ({error}): install it, or leave monai out with --format") from None
    root = folder / f"{source.study.study.id}-bundle"
    for part in ("configs", "models", "docs"):
        (root / part).mkdir(parents=True)
    module = PlainPrediction(source.network, head=source.has_head)
    (root / "models" / "model.pt2").write_bytes(program_bytes(trace(module, source.image), {}))
    weights = io.BytesIO()
    torch.save(module.state_dict(), weights)
    (root / "models" / "model.pt").write_bytes(weights.getvalue())
    for name, content in (("metadata", _metadata(facts, monai.__version__)), ("inference", _inference(facts))):
        (root / "configs" / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (root / "LICENSE").write_text(_LICENCE, encoding="utf-8")
    (root / "docs" / "README.md").write_text(readme(facts, _USE.format(suffix=_suffix(facts))), encoding="utf-8")
    return _loaded(root, source.outputs[-1])


def _loaded(root: Path, output: str) -> Predict:
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_config(root / "configs" / "inference.json")
    parser.read_meta(root / "configs" / "metadata.json")
    parser["bundle_root"], parser["device"] = str(root), "cpu"
    with quiet("torch.export", "monai"):
        network, inferer = parser.get_parsed_content("network"), parser.get_parsed_content("inferer")
        parser.get_parsed_content("initialize")  # takes the weights of model.pt
    return lambda images: {output: inferer(images, network)}


def _metadata(facts: dict[str, Any], monai_version: str) -> dict[str, Any]:
    given, study = facts["input"], facts["study"]
    output, (_, size) = [*facts["outputs"].items()][-1]
    logits = output == "logits"
    classes = facts["classes"] or [f"class {i} of whatever it is adapted to" for i in range(size)]
    tensor = {"modality": "n/a", "dtype": "float32", "is_patch_data": False}
    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": f"theta {facts['theta']} of the study {study['digest']}"},
        "monai_version": monai_version,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {},
        "name": study["title"] or study["id"],
        "task": "Starting point for few-shot classification" if facts["needs_adaptation"] else "Classification",
        "description": f"Theta of the study {study['id']}, by federated {facts['algorithm']}: see docs/README.md",
        "authors": f"the sites of the study {study['id']}",
        "copyright": f"the sites of the study {study['id']}",
        "intended_use": "Research, not diagnosis",
        "network_data_format": {
            "inputs": {
                "image": tensor
                | {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": given["shape"][1],
                    "spatial_shape": given["shape"][2:],
                    "value_range": [_scaled(value) for value in given["pixels"]],
                    "channel_def": dict(enumerate(("red", "green", "blue") if given["colour"] == "RGB" else ("grey",))),
                }
            },
            "outputs": {
                "pred": tensor
                | {
                    "type": "tuples",
                    "format": "classes" if logits else "latent",
                    "num_channels": size,
                    "spatial_shape": [],
                    "value_range": [],
                    "channel_def": dict(enumerate(classes)) if logits else {0: "features"},
                }
            },
        },
        "wardround": facts,
    }


def _scaled(pixel: float) -> float:
    return (pixel - CENTRE) / SPREAD


def _inference(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "imports": ["$import glob", "$import json", "$import pathlib", "$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_path": "$@bundle_root + '/predictions.json'",
        "datalist": f"$sorted(glob.glob(@dataset_dir + '/*{_suffix(facts)}'))",
        # Unflattened, so that it is a module as others are: train() and eval() can be called, and change nothing.
        "network_def": "$torch.export.unflatten(torch.export.load(@bundle_root + '/models/model.pt2'))",
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _transforms(facts["input"])},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 32, "num_workers": 0},
        "inferer": {"_target_": "SimpleInferer"},
        "predictions": "$torch.no_grad()(lambda: [row for batch in @dataloader for row in "
        "@inferer(batch['image'].to(@device), @network).tolist()])()",
        "initialize": [
            "$@network.load_state_dict(torch.load(@ckpt_path, map_location=@device, weights_only=True))",
        ],
        "run": ["$pathlib.Path(@output_path).write_text(json.dumps(dict(zip(@datalist, @predictions))))"],
    }


def _transforms(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps from a picture's file to the network, as a site's own preparation does them."""
    channels, size = given["shape"][1], given["shape"][-1]
    flat = len(given["shape"]) == 4
    resize = "torch.nn.functional.interpolate({}, {}, mode='bilinear', antialias=True)"
    if flat:
        colours = {
            "_target_": "PILReader",
            "converter": "$lambda image: image.convert('RGB')",
            "reverse_indexing": False,
        }
        return [
            {"_target_": "LoadImaged", "keys": "image", "reader": colours},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            *([] if channels == 3 else [_each("x.mean(0, keepdim=True)")]),
            _each(resize.format("x[None]", (size, size)) + "[0]"),
            *_SCALE,
        ]
    return [
        {"_target_": "LoadImaged", "keys": "image", "reader": "NumpyReader"},
        {"_target_": "EnsureChannelFirstd", "keys": "image", "channel_dim": "no_channel"},
        _each(resize.format("x", (size, size))),
        # Along the depth as if it were the rows of one very wide picture, whose columns stay.
        _each(resize.format("x.flatten(2)[None]", (size, size * size)) + f"[0].reshape(1, {size}, {size}, {size})"),
        *([] if channels == 1 else [_each(f"x.repeat({channels}, 1, 1, 1)")]),
        *_SCALE,
    ]


def _each(expression: str) -> dict[str, Any]:
    return {"_target_": "Lambdad", "keys": "image", "func": f"$lambda x: {expression}"}


_SCALE = [
    _each("x.clip(0, 255).round()"),
    _each(f"(x - {CENTRE}) / {SPREAD}"),
    {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32", "track_meta": False},
]


def _suffix(facts: dict[str, Any]) -> str:
    return ".png" if len(facts["input"]["shape"]) == 4 else ".npy"


_LICENCE = """\
The configuration files of this bundle were written by wardround and may be used under the Apache License 2.0.

The weights were learned at the sites of the study. Their licence is for these sites to give; this file grants none.
Replace it when they have.
"""

_USE = """\
`models/model.pt2` is the network, `models/model.pt` its weights; adapted weights under that name are used instead. The
network gives one tensor, the logits or, where there are none, the features. With MONAI and PyTorch, and images as
*{suffix} in a folder:

    from monai.bundle import ConfigWorkflow

    config = "configs/inference.json"
    workflow = ConfigWorkflow(config, workflow_type="inference", dataset_dir="FOLDER", output_path="OUT.json")
    workflow.initialize()
    workflow.run()\
"""
