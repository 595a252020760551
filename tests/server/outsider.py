"""Run as a program, isolated: loads exports with wardround out of reach, as whoever is given one does.

    python -I outsider.py IMAGES.safetensors OUT.safetensors EXPORT ...

For each export, the outputs of all formats for the images ``[N, C, *]`` of every batch size go into ``OUT``.
"""

import json
import sys
from pathlib import Path

for name in ("common", "client", "server", "deploy", "simulations"):
    sys.modules[name] = None  # type: ignore[assignment]

import onnxruntime  # type: ignore[import-untyped]  # noqa: E402
import torch  # noqa: E402
from monai.bundle.config_parser import ConfigParser  # noqa: E402
from monai.bundle.workflows import ConfigWorkflow  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main(images: str, out: str, *exports: str) -> None:
    found = {}
    batches = load_file(images)
    for export in map(Path, exports):
        facts = {"wardround.json": ""}
        module = torch.export.load(export / "model.pt2", extra_files=facts).module()
        session = onnxruntime.InferenceSession(export / "model.onnx", providers=["CPUExecutionProvider"])
        (bundle,) = export.glob("*-bundle")
        parser = ConfigParser()
        parser.read_config(bundle / "configs" / "inference.json")
        parser["bundle_root"] = str(bundle)
        network = parser.get_parsed_content("network").eval()
        scale = json.loads(facts["wardround.json"])["input"]
        for key, pixels in batches.items():
            case, size = key.split("/")
            if case != export.parent.name:
                continue
            x = (pixels.float() - scale["centre"]) / scale["spread"]
            with torch.no_grad():
                for name, value in module(x).items():
                    found[f"{case}/{size}/torch/{name}"] = value
                found[f"{case}/{size}/monai/pred"] = network(x)
            names = [output.name for output in session.get_outputs()]
            for name, value in zip(names, session.run(names, {"images": x.numpy()}), strict=True):
                found[f"{case}/{size}/onnx/{name}"] = torch.from_numpy(value)
            if size == "7" and pixels.dim() == 4:
                found[f"{case}/workflow"] = by_workflow(bundle, pixels, export.parent)
    save_file({name: value.contiguous() for name, value in found.items()}, out)


def by_workflow(bundle: Path, pixels: torch.Tensor, folder: Path) -> torch.Tensor:
    (folder / "images").mkdir()
    for i, image in enumerate(pixels):
        picture = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
    workflow = ConfigWorkflow(
        str(bundle / "configs" / "inference.json"),
        workflow_type="inference",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(folder / "images"),
        output_path=str(folder / "predictions.json"),
    )
    workflow.initialize()
    workflow.run()
    rows = json.loads((folder / "predictions.json").read_text())
    return torch.tensor([rows[name] for name in sorted(rows)])


if __name__ == "__main__":
    main(*sys.argv[1:])
