"""Gradient matching through the simulated inner loop: images whose own meta-gradient is the one that was sent.

The attacker simulates the site's whole episode on images of their own, support and query, and moves their pixels until
the meta-gradient fits. Labels are known: an episode has every class equally often. Two ways to fit: ``dlg``, the
squared distance by L-BFGS (Zhu, Liu and Han, "Deep Leakage from Gradients", 2019, algorithm 1), and ``cosine``, the
angle and total variation, by the signs of the gradient in Adam (Geiping, Bauermeister, Droege and Moeller, "Inverting
Gradients", 2020, equation 4).

That it fails proves nothing: the span attack shows that the images can be there all the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.meta import unflatten
from common.models.network import Network, Theta
from simulations.redteam.scene import Release, Scene

__all__ = ["METHODS", "match", "simulated"]

#: Ways to fit, and how many steps each is given.
METHODS = {"dlg": 200, "cosine": 300}
_VARIATION = 1e-3  # weight of the total variation
_BOX = 2.0  # pixels as networks take them are from -2 to 2


def simulated(
    network: Network,
    theta: Theta,
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    steps: int,
    rate: float,
    *,
    second_order: bool,
) -> Tensor:
    """Return the meta-gradient ``[D]`` of one episode as a function of its pixels, to be differentiated again.

    Parameters
    ----------
    support, query : tuple of Tensor
        Images ``[N, C, H, W]`` and labels ``[N]``.
    """
    start = {name: t.detach().requires_grad_() for name, t in theta.items()}
    fast: dict[str, Tensor] = dict(start)
    for _ in range(steps):
        loss = F.cross_entropy(network.logits(fast, support[0]), support[1])
        slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: t - rate * slope for (name, t), slope in zip(fast.items(), slopes, strict=True)}
    loss = F.cross_entropy(network.logits(fast, query[0]), query[1])
    # Also with the first order the end of the steps depends on the pixels: only theta's part is left out.
    wrt = list(start.values()) if second_order else list(fast.values())
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, wrt, create_graph=True)])


def match(scene: Scene, release: Release, method: str, generator: torch.Generator) -> Tensor:
    """Return the images ``[R, C, H, W]`` that fit a release best, support first."""
    study = scene.study
    spec, model, inner = study.episodes, study.model, study.algorithm
    sides = [torch.arange(spec.ways).repeat_interleave(count) for count in (spec.shots, spec.queries)]
    shape = (sum(map(len, sides)), model.channels, *[model.image_size] * model.dimensions)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.5).requires_grad_()
    theta = unflatten(torch.tensor(release.theta, dtype=torch.float64), scene.sessions[release.site].theta)
    target = torch.tensor(release.vector, dtype=torch.float64)

    def gradient() -> Tensor:
        support, query = torch.split(pixels, [len(y) for y in sides])
        return simulated(
            scene.network,
            theta,
            (support, sides[0]),
            (query, sides[1]),
            inner.inner_steps,
            inner.inner_rate,
            second_order=inner.name == "maml",
        )

    _FITS[method](pixels, target, gradient, METHODS[method])
    return pixels.detach().clamp(-_BOX, _BOX)


def _dlg(pixels: Tensor, target: Tensor, gradient: Callable[[], Tensor], steps: int) -> None:
    scale = target.square().sum()
    optimiser = torch.optim.LBFGS([pixels], lr=1.0, max_iter=steps, history_size=50, line_search_fn="strong_wolfe")

    def distance() -> Tensor:
        optimiser.zero_grad()
        loss = (gradient() - target).square().sum() / scale
        (pixels.grad,) = torch.autograd.grad(loss, [pixels])
        return loss

    optimiser.step(distance)  # type: ignore[no-untyped-call]
    if not bool(pixels.isfinite().all()):
        pixels.data.zero_()


def _cosine(pixels: Tensor, target: Tensor, gradient: Callable[[], Tensor], steps: int) -> None:
    optimiser = torch.optim.Adam([pixels], lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [steps * part // 8 for part in (3, 5, 7)], 0.1)
    for _ in range(steps):
        loss = 1 - F.cosine_similarity(gradient(), target, dim=0) + _VARIATION * _variation(pixels)
        (slope,) = torch.autograd.grad(loss, [pixels])
        pixels.grad = slope.sign()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            pixels.clamp_(-_BOX, _BOX)


def _variation(x: Tensor) -> Tensor:
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()


_FITS = {"dlg": _dlg, "cosine": _cosine}
