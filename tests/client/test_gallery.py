"""The page of predictions: what it shows, what it does not, and that occlusion finds what matters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.adapt.folder import AdaptedModel
from client.gallery import occlusion, write_gallery
from tests.client.adapt.worlds import images
from tests.client.test_predict import folder, model

__all__ = ["folder", "model"]


@dataclass(frozen=True)
class Corner:
    """Says class 0 by as much as the lower right corner is bright."""

    weights: Any = None

    def logits(self, x: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        bright = x[..., 12:, 12:].mean((1, 2, 3)).double().numpy()
        return np.stack([bright, 0 * bright, 0 * bright], -1)


def test_occlusion_finds_the_corner_that_matters(model: AdaptedModel) -> None:
    seen = replace(model, classifier=Corner())  # type: ignore[arg-type]
    pixels = np.zeros((1, 16, 16), np.uint8)
    pixels[:, 12:, 12:] = 255
    heat = occlusion(seen, pixels)
    assert heat.shape == (16, 16)
    assert heat[12:, 12:].min() > 2 * heat[:10, :10].max()
    assert heat[14:, 14:].mean() == heat.max()


def test_the_page_shows_pictures_and_runs_nothing(model: AdaptedModel, tmp_path: Path) -> None:
    named = [(f"<b>{n}</b>.png", pixels) for n, pixels in enumerate(images(2, 1).pixels)]
    path = tmp_path / "page.html"
    write_gallery(path, replace(model, refusals=("a <reason>",)), named)
    page = path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert page.count("<figure>") == len(named)
    assert page.count("data:image/png") == 2 * len(named)
    assert "&lt;b&gt;0&lt;/b&gt;.png" in page
    assert "DO NOT USE: a &lt;reason&gt;" in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert "90% set is {" in page
