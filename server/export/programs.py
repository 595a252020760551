"""Theta as safetensors, the network as a PyTorch program and as an ONNX model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from common.canonical import canonical_json
from common.errors import ExportError
from common.quiet import quiet
from server.export.plain import program_bytes
from server.export.source import Predict, Source

__all__ = ["write_onnx", "write_program", "write_safetensors"]

#: Under this name each format keeps the facts, as JSON.
_KEY = "wardround"


def write_safetensors(source: Source, facts: dict[str, Any], folder: Path) -> Predict:
    """Write ``theta.safetensors``, all of theta in the study's type, and the study.

    ``study.toml`` is for people and for another run; with ``study.json``, as a run has it, a site adapts theta.
    """
    path = folder / "theta.safetensors"
    path.write_bytes(save(source.theta, {_KEY: json.dumps(facts)}))
    study = source.study
    (folder / "study.toml").write_text(study.toml(), encoding="utf-8")
    (folder / "study.json").write_bytes(canonical_json({"digest": study.digest, "study": study.run_config()}))
    theta = load_file(path)

    def predict(images: Tensor) -> dict[str, Tensor]:
        images = images.to(next(iter(theta.values())).dtype)
        out = {"features": source.network.features(theta, images)}
        return out | {"logits": source.network.logits(theta, images)} if source.has_head else out

    return predict


def write_program(source: Source, facts: dict[str, Any], folder: Path) -> Predict:
    """Write ``model.pt2``, which ``torch.export.load`` reads."""
    path = folder / "model.pt2"
    path.write_bytes(program_bytes(source.program, {f"{_KEY}.json": json.dumps(facts)}))
    with quiet("torch.export"):
        module = torch.export.load(path).module()
    return lambda images: dict(module(images))


def write_onnx(source: Source, facts: dict[str, Any], folder: Path) -> Predict:
    """Write ``model.onnx``.

    Raises
    ------
    ExportError
        The packages of the extra ``export`` are missing, or the network has an operation that ONNX lacks.
    """
    try:
        import onnx
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401 (PyTorch converts with it)
    except ImportError as error:
        raise ExportError(
            f"ONNX needs a package that is not here ({error.name}): pip install 'wardround[export]', "
            "or leave onnx out with --format"
        ) from None
    path = folder / "model.onnx"
    try:
        # PyTorch warns of its own deprecations, and logs that it lacks torchvision, whose operations no study uses.
        with quiet("torch.onnx", "onnxscript"):
            converted = torch.onnx.export(source.program, dynamo=True, verbose=False, output_names=source.outputs)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"PyTorch cannot convert this network to ONNX ({reason}): leave onnx out with --format"
        ) from error
    assert converted is not None  # only without ``dynamo``
    converted.model.metadata_props[_KEY] = json.dumps(facts)
    converted.save(path)  # in one file, or with one of weights beside it above 2 GB
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def predict(images: Tensor) -> dict[str, Tensor]:
        found = session.run(list(source.outputs), {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(source.outputs, found, strict=True)}

    return predict
