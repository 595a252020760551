"""Membership: exact on a linear first layer, nothing on convolutions, under its bound where there is a guarantee."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.meta import Batch, Episodes, unflatten
from common.privacy import mechanism
from simulations.redteam.cosine import cosine_scores
from simulations.redteam.labels import class_shares
from simulations.redteam.membership import ATTACKS, pictures
from simulations.redteam.oracle import labels_of, offered, unseen
from simulations.redteam.shadow import sides
from simulations.redteam.span import rank
from simulations.redteam.team import Result, attack_run
from tests.simulations.redteam.scenes import tiny_scene


def figures(result: Result, attack: str) -> dict[str, dict[str, float]]:
    return {row.target: {f.name: f.value for f in row.figures} for row in result.rows if row.attack == attack}


@pytest.mark.parametrize(("order", "support"), [("first", False), ("second", True)])
def test_a_linear_layer_gives_away_the_membership_of_every_image_it_saw(order: str, support: bool) -> None:
    setting = f"linear, {order} order"
    result = attack_run(tiny_scene(setting, "none"), setting, "none")
    assert (result.ranks.equal, result.ranks.median_seen) == (18, 14.0 if support else 8.0)
    span = figures(result, "span")
    assert set(span["query"].values()) == {1.0}
    assert span["support"]["AUC"] == 1.0 if support else span["support"]["AUC"] < 0.75
    assert all(figure.bound is None for row in result.rows for figure in row.figures)


def test_the_last_direction_is_told_from_the_rounding_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colour images have 3,072 numbers: what NumPy and PyTorch take for rounding by default hides small directions."""
    scene = tiny_scene("linear, second order", "none", rounds=1)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.linalg.qr(torch.randn(128, 18, generator=generator, dtype=torch.float64))[0]
    inputs = torch.linalg.qr(torch.randn(3072, 18, generator=generator, dtype=torch.float64))[0]
    rows = (outputs * torch.logspace(0, -4, 18, dtype=torch.float64)) @ inputs.T
    for sent, found in ((rows.float(), 18), (rows.float() * 1e-6, 18), (rows.float() * 0, 0)):
        monkeypatch.setattr("simulations.redteam.span._rows", lambda *_, sent=sent: sent.double())
        assert rank(scene, scene.releases[0]) == found
    assert torch.linalg.matrix_rank(rows.float()) < 18


def test_the_rows_of_convolutions_are_full_and_say_nothing_but_angles_do() -> None:
    scene = tiny_scene("conv4, second order", "none", rounds=2)
    result = attack_run(scene, "conv4, second order", "none")
    assert result.ranks.equal == 0
    assert 0.2 < figures(result, "span")["query"]["AUC"] < 0.8
    assert figures(result, "gradient cosine")["query"]["AUC"] > 0.6
    # Which side means "member" is learned from images of the attacker's own.
    for sign in (1.0, -1.0):
        learned = sides(scene, lambda *seen, sign=sign: sign * cosine_scores(*seen), np.random.default_rng(0))
        assert learned["query"] == sign


@pytest.mark.parametrize("defence", ["episode-clip", "patient-clip"])
def test_with_a_guarantee_every_attack_is_under_its_bound(defence: str) -> None:
    setting = "linear, second order"
    result = attack_run(tiny_scene(setting, defence, rounds=8), setting, defence)
    assert not result.broken
    bounds = [figure.bound for row in result.rows for figure in row.figures if row.attack in ATTACKS]
    assert bounds
    assert all(bound is not None and bound < 1 for bound in bounds)


def test_a_mechanism_that_forgets_its_noise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "normal_steps", lambda size, deviation, source: np.zeros(size, np.int64))
    setting = "linear, second order"
    result = attack_run(tiny_scene(setting, "episode-clip", rounds=8), setting, "episode-clip")
    assert any("span on in the round: AUC" in sentence for sentence in result.broken)


def test_the_heads_gradient_tells_the_shares_of_classes() -> None:
    scene = tiny_scene("linear, first order", "none", rounds=1)
    session, release = scene.sessions[0], scene.releases[0]
    places = offered(session)
    labels = labels_of(session, places)
    support = np.concatenate([places[labels == label][:4] for label in (0, 1)])
    theta = unflatten(torch.tensor(release.theta), session.theta)

    def batch(some: NDArray[np.int64]) -> Batch:
        return Batch(pictures(session, some)[None], torch.tensor(labels_of(session, some))[None], None)

    for first in (1, 6, 11):
        query = np.concatenate([places[labels == 0][4 : 4 + first], places[labels == 1][4 : 16 - first]])
        episode = Episodes(batch(support), batch(query), torch.arange(2)[None])
        vector = session.engine.meta_gradient(theta, episode).gradient.numpy()
        shares = class_shares(scene, replace(release, vector=vector), pictures(session, unseen(session)))
        assert shares[0] == pytest.approx(first / 12, abs=0.12)
        assert shares.sum() == pytest.approx(1, abs=1e-5)
