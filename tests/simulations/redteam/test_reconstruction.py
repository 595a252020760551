"""Likeness against plain loops, ratios and matching against images that are known, and the two baselines."""

import math

import numpy as np
import pytest
import torch

from common.meta import Batch, Episodes, flatten
from common.meta.autodiff import EAGER
from common.meta.fomaml import Fomaml
from common.meta.maml import Maml
from simulations.redteam import matching
from simulations.redteam.likeness import as_shown, judge, nearest, psnr, ssim
from simulations.redteam.membership import pictures
from simulations.redteam.networks import smooth
from simulations.redteam.oracle import truth
from simulations.redteam.ratio import ratios
from simulations.redteam.team import Result, attack_run
from tests.simulations.redteam.scenes import tiny_scene


def test_likeness_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 14, 13, generator=generator, dtype=torch.float64)
    assert float(psnr(a, b)) == pytest.approx(-10 * math.log10(float(((a - b) ** 2).mean())))
    assert float(psnr(a, a)) == 100
    x, y = a[0].numpy(), b[0].numpy()
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(4):
        for j in range(3):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, c = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(ssim(a[None], b[None])) == pytest.approx(np.mean(values))
    assert float(ssim(a[None], a[None])) == pytest.approx(1)


def test_a_gain_is_over_the_better_baseline() -> None:
    target = torch.full((1, 12, 12), 0.5, dtype=torch.float64)
    found = torch.stack([target + 0.3, target + 0.01])
    said = judge(target, found, (target + 0.2)[None], target + 0.1)
    assert said.place == 1
    assert said.psnr == pytest.approx(40)
    assert said.psnr_gain == pytest.approx(20)  # the mean is at 20 dB, the other site's at 14
    assert judge(target, found, (target + 0.001)[None], target + 0.1).psnr_gain == pytest.approx(-20)
    assert nearest(torch.stack([target + 0.4, target, target + 0.25]), found) == 1


def test_a_ratio_of_rows_is_an_image_to_the_precision_of_the_wire() -> None:
    scene = tiny_scene("linear, first order", "none", rounds=1)
    release = scene.releases[0]
    found = ratios(scene, release)
    assert found is not None
    session = scene.sessions[release.site]
    seen = as_shown(pictures(session, truth(session, 1).query))
    best = torch.stack([psnr(as_shown(found), image).max() for image in seen])
    assert int((best > 60).sum()) >= 1  # a unit fired for one image alone
    assert ratios(tiny_scene("conv4, first order", "none", rounds=1), release) is None


@pytest.mark.parametrize("learner", [Fomaml(2, 0.2, 0.2), Maml(2, 0.2, 0.2)])
def test_the_simulated_meta_gradient_is_the_learners(learner: Maml) -> None:
    torch.manual_seed(0)
    network = smooth(channels=1, classes=2, image_size=8, dimensions=2, width=3).double()
    theta = network.theta()
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    support, query = (x[:2], y[:2]), (x[2:].requires_grad_(), y[2:])
    mine = matching.simulated(network, theta, support, query, 2, 0.2, second_order=learner.second_order)
    task = Episodes(Batch(*support, None), Batch(query[0].detach(), query[1], None), torch.arange(2))
    exact = flatten(learner.episode_gradient(network, theta, task, EAGER).gradient)
    torch.testing.assert_close(mine.detach(), exact, rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(mine.square().sum(), [query[0]])
    assert slope.abs().max() > 0


def test_an_image_can_be_matched_where_nothing_protects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matching.METHODS, "dlg", 60)
    monkeypatch.setitem(matching.METHODS, "cosine", 1)
    result = attack_run(tiny_scene("sigmoid, first order", "none", rounds=1), "sigmoid, first order", "none")
    gains = {r.target: r.figures[1].value for r in result.rows if r.attack == "gradient matching, dlg"}
    assert gains["query"] > 3
    assert gains["query"] > gains["support"]  # of which the first order says nothing
    assert {p.attack for p in result.pictures} == {"gradient matching, dlg", "gradient matching, cosine"}


def figures(result: Result) -> dict[str, dict[str, float]]:
    return {r.target: {f.name: f.value for f in r.figures} for r in result.rows if r.attack == "ratio inversion"}


def test_ratios_gain_much_without_a_mechanism_and_nothing_with_one() -> None:
    setting = "linear, first order"
    raw = figures(attack_run(tiny_scene(setting, "none", rounds=2), setting, "none"))
    assert raw["query"]["PSNR gain, dB"] > 5
    assert raw["support"]["PSNR gain, dB"] < 1
    private = figures(attack_run(tiny_scene(setting, "episode-clip", rounds=2), setting, "episode-clip"))
    assert private["in the round"]["PSNR gain, dB"] < 0
