"""A tiny study to attack: three sites of smooth random images, made on the fly."""

from pathlib import Path

import numpy as np

from common.study import Study
from simulations.redteam.scene import Scene, record
from simulations.redteam.settings import attacked

__all__ = ["SOURCE", "TINY", "tiny_scene", "tiny_study", "write_source"]

SOURCE = "npz:~/wardround-redteam.npz"

TINY = Study().override(
    {
        "study.id": "tiny-redteam",
        "study.rounds": 6,
        "sites.held-out": "",
        "model.image-size": 16,
        "model.width": 4,
        "episodes.labels": "fixed",
        "episodes.classes": "a,b",
        "episodes.held-out": "",
        "episodes.ways": 2,
        "episodes.shots": 3,
        "episodes.queries": 4,
        "episodes.per-round": 2,
        "data.source": SOURCE,
        "data.sites": 3,
    }
)


def write_source() -> None:
    path = Path(SOURCE.removeprefix("npz:")).expanduser()
    if path.exists():
        return
    generator = np.random.default_rng(3)
    site, label, patient = np.indices((3, 2, 30)).reshape(3, -1)
    coarse = generator.normal(size=(len(site), 8, 8)).repeat(2, 1).repeat(2, 2)
    images = 128 + 30 * coarse + 10 * label[:, None, None] + generator.normal(0, 8, (len(site), 16, 16))
    np.savez(
        path,
        images=images.clip(0, 255).astype(np.uint8),
        labels=label,
        sites=site,
        groups=[f"{s}/{c}/{p}" for s, c, p in zip(site, label, patient, strict=True)],
        label_names=("a", "b"),
    )


def tiny_scene(setting: str, defence: str, *, noise: float = 1.1, rounds: int = 6) -> Scene:
    """Return a recorded run of the tiny study."""
    write_source()
    return record(tiny_study(setting, defence, noise=noise, rounds=rounds))


def tiny_study(setting: str, defence: str, *, noise: float = 1.1, rounds: int = 6) -> Study:
    """Return the tiny study as it is attacked; the linear layer has more rows than a round has images."""
    study = attacked(TINY.override({"study.rounds": rounds}), setting, defence, 1.0, noise, 0.5)
    return study.override({"model.arguments": '{"width": 36}'}) if setting.startswith("linear") else study
