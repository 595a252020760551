"""``wardround-site predict`` on many generated files: images a second, and the peak memory at two sizes.

``python -m simulations.bench.predict ADAPTED_MODEL --files 20000``
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

__all__ = ["main", "measure"]


def measure(model: Path, folder: Path, files: int) -> dict[str, float]:
    """Write files, predict them in a process of its own, and return seconds, images a second and peak memory (MB)."""
    pictures = folder / f"pictures-{files}"
    generator = np.random.default_rng(0)
    for number in range(files):
        here = pictures / f"{number // 1000:03d}"
        here.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64)).save(here / f"{number:06d}.png")
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "site.key").write_bytes(bytes(32))
    began = time.monotonic()
    command = ["predict", str(pictures), "--model", str(model), "--out", str(folder / f"{files}.csv"), "--anyway"]
    code = (
        "import sys, resource; from client.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    whole = [sys.executable, "-c", code, *command, "--site", str(folder / "site"), "--json"]
    done = subprocess.run(whole, capture_output=True, text=True, check=True, env=os.environ)
    seconds = time.monotonic() - began
    found = json.loads(done.stdout)
    if found["images"] != files:
        raise SystemExit(f"{found['images']} of {files} images were predicted")
    peak = int(done.stderr.split()[-1]) / 1024
    readers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "files": files,
        "seconds": seconds,
        "images/s": files / seconds,
        "peak MB": peak,
        "largest process MB": readers,
    }


def main(
    model: Annotated[Path, typer.Argument(help="Folder of an adapted model.")],
    files: Annotated[int, typer.Option(help="How many; a tenth of them is measured first.")] = 20_000,
) -> None:
    """Print both sizes."""
    with tempfile.TemporaryDirectory() as name:
        for count in (files // 10, files):
            found = measure(model, Path(name), count)
            print("  ".join(f"{what} {value:.0f}" for what, value in found.items()))


if __name__ == "__main__":
    typer.run(main)
