"""Which images can be made out of an answer, and what that is worth against an attacker who saw nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simulations.redteam.bounds import Bound
from simulations.redteam.figures import Figure, identified, mean
from simulations.redteam.likeness import as_shown, judge, nearest
from simulations.redteam.matching import METHODS, match
from simulations.redteam.membership import pictures
from simulations.redteam.oracle import Places, Truth, offered, unseen
from simulations.redteam.ratio import ratios
from simulations.redteam.scene import Release, Scene

__all__ = ["CANDIDATES", "Picture", "Reconstructed", "reconstruct"]

#: Among how many images one is to be told.
CANDIDATES = 100
#: Images looked for of each role in one release, and pictures kept of each role in a run.
_TARGETS, _SHOWN = 4, 4

Reconstruct = Callable[[Scene, Release], Tensor | None]


@dataclass(frozen=True)
class Picture:
    """An image that was used and the best reconstruction of it, uint8 ``[C, H, W]``, with its PSNR and gain in dB."""

    attack: str
    role: str
    original: NDArray[np.uint8]
    found: NDArray[np.uint8]
    psnr: float
    gain: float


@dataclass(frozen=True)
class Reconstructed:
    """What one attack made of a run: figures for every role, and some pictures, the best first."""

    attack: str
    figures: Mapping[str, tuple[Figure, ...]]
    pictures: tuple[Picture, ...]


def reconstruct(
    scene: Scene, truths: Mapping[Release, Truth], bound: Bound | None, generator: np.random.Generator
) -> list[Reconstructed]:
    """Make every reconstruction that fits the network: ratios of a linear layer, matching of a tiny episode."""
    spec, first = scene.study.episodes, next(iter(truths))
    out = []
    if ratios(scene, first) is not None:
        out.append(_made("ratio inversion", ratios, scene, truths, bound, generator))
    if spec.ways * (spec.shots + spec.queries) <= _TINY and "smooth" in scene.study.model.name:
        some = dict(list(truths.items())[: _RELEASES * len(scene.sessions) : max(1, len(scene.sessions) - 1)])
        for method in METHODS:

            def found(scene: Scene, release: Release, method: str = method) -> Tensor:
                return match(scene, release, method, torch.Generator().manual_seed(release.round))

            out.append(_made(f"gradient matching, {method}", found, scene, some, bound, generator))
    return out


# Gradient matching takes seconds for every release: it is made on few, and only where episodes are tiny.
_TINY, _RELEASES = 8, 2


def _made(
    name: str,
    attack: Reconstruct,
    scene: Scene,
    truths: Mapping[Release, Truth],
    bound: Bound | None,
    generator: np.random.Generator,
) -> Reconstructed:
    found = {release: as_shown(images) for release in truths if (images := attack(scene, release)) is not None}
    figures: dict[str, tuple[Figure, ...]] = {}
    kept: list[Picture] = []
    for role in next(iter(truths.values())).roles:
        gains: list[float] = []
        similar: list[float] = []
        levels: list[float] = []
        hits: list[float] = []
        shown: list[Picture] = []
        for release, images in found.items():
            targets = _targets(scene, release, truths[release], role, generator)
            other = next((found[r] for r in found if r.site != release.site), None)
            if not len(targets) or other is None:
                continue
            session, neighbour = scene.sessions[release.site], scene.sessions[(release.site + 1) % len(scene.sessions)]
            plain = as_shown(pictures(neighbour, unseen(neighbour)[:500])).mean(0)
            crowd = generator.permutation(_of(scene, release, truths[release].out))[: CANDIDATES - 1]
            originals = as_shown(pictures(session, targets))
            judged = [judge(target, images, other, plain) for target in originals]
            others = as_shown(pictures(session, crowd))
            gains.append(float(np.mean([j.psnr_gain for j in judged])))
            similar.append(float(np.mean([j.ssim_gain for j in judged])))
            levels.append(float(np.mean([j.psnr for j in judged])))
            if len(crowd) == CANDIDATES - 1:
                hits.append(float(np.mean([nearest(torch.cat([t[None], others]), images) == 0 for t in originals])))
            shown += [
                Picture(name, role, _bytes(target), _bytes(images[j.place]), j.psnr, j.psnr_gain)
                for target, j in zip(originals, judged, strict=True)
            ]
        if not gains:
            continue
        figures[role] = (
            mean("PSNR, dB", levels),
            mean("PSNR gain, dB", gains),
            mean("SSIM gain", similar),
            *([identified(hits, CANDIDATES, bound)] if hits else []),
        )
        kept += sorted(shown, key=lambda picture: -picture.gain)[:_SHOWN]
    return Reconstructed(name, figures, tuple(kept))


def _targets(scene: Scene, release: Release, truth: Truth, role: str, generator: np.random.Generator) -> Places:
    """Return some images of patients with a role, one of each; without coins, those that were used."""
    session = scene.sessions[release.site]
    images = _of(scene, release, truth.roles[role])
    if not scene.study.privacy.guaranteed:
        images = np.intersect1d(images, np.concatenate([truth.support, truth.query]))
    shuffled = generator.permutation(images)
    _, first = np.unique(session.site.patients[shuffled], return_index=True)
    chosen: Places = generator.permutation(shuffled[first])[:_TARGETS]
    return chosen


def _of(scene: Scene, release: Release, patients: Places) -> Places:
    session = scene.sessions[release.site]
    own = offered(session)
    images: Places = own[np.isin(session.site.patients[own], patients)]
    return images


def _bytes(image: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = image.mul(255).round().to(torch.uint8).numpy()
    return pixels
