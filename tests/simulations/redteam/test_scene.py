"""A recorded run is what the sites computed, from whom the oracle names; attacks spend nobody's budget."""

import numpy as np
import pytest
import torch

from client.session import open_session
from common.meta import unflatten
from simulations.prepare import prepare
from simulations.redteam.oracle import offered, truth, unseen
from tests.simulations.redteam.scenes import tiny_scene, tiny_study, write_source


def test_the_oracle_names_the_images_that_the_answer_was_computed_from() -> None:
    scene = tiny_scene("linear, second order", "none", rounds=2)
    assert [(r.round, r.site) for r in scene.releases] == [(n, s) for n in (1, 2) for s in range(3)]
    assert not np.array_equal(scene.releases[0].theta, scene.releases[-1].theta)  # the server stepped
    for release in scene.releases:
        session = scene.sessions[release.site]
        found = truth(session, release.round)
        assert (len(found.support), len(found.query), len(found.roles["support"])) == (6, 8, 6)
        # The mean over images does not depend on their order: the answer comes again from the named images alone.
        site, network = session.site, session.engine.network
        theta = {n: t.double() for n, t in unflatten(torch.tensor(release.theta), session.theta).items()}
        x = [torch.tensor(site.pixels(p)).double().sub(127.5).div(63.75) for p in (found.support, found.query)]
        y = [torch.tensor(site.labels[p]) for p in (found.support, found.query)]
        start = {n: t.clone().requires_grad_() for n, t in theta.items()}
        inner = torch.nn.functional.cross_entropy(network.logits(start, x[0]), y[0])
        steps = torch.autograd.grad(inner, list(start.values()), create_graph=True)
        rate = scene.study.algorithm.inner_rate
        fast = {n: t - rate * g for (n, t), g in zip(start.items(), steps, strict=True)}
        outer = torch.nn.functional.cross_entropy(network.logits(fast, x[1]), y[1])
        exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(outer, list(start.values()))]).numpy()
        np.testing.assert_allclose(release.vector, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("augment", ["none", "image"])
@pytest.mark.parametrize("defence", ["episode-clip", "patient-clip"])
def test_patients_are_in_a_round_or_out_of_it_by_their_coins(defence: str, augment: str) -> None:
    write_source()
    study = tiny_study("linear, first order", defence).override({"episodes.augment": augment})
    prepare(study)
    session = open_session(study.run_config(), {"partition-id": 0})
    train = set(session.site.patients[offered(session)].tolist())
    shares = []
    for number in range(1, 40):
        found = truth(session, number)
        inside = set(np.concatenate(list(found.roles.values())).tolist())
        out = set(found.out.tolist())
        assert inside | out == train
        assert not inside & out
        used = set(session.site.patients[np.concatenate([found.support, found.query])].tolist())
        assert used <= inside
        shares.append(len(inside) / len(train))
    assert abs(np.mean(shares) - 0.5) < 0.06
    assert not set(session.site.patients[unseen(session)].tolist()) & train


def test_attacking_spends_nothing_and_noise_is_fresh() -> None:
    first, second = (tiny_scene("linear, first order", "episode-clip", rounds=1) for _ in range(2))
    np.testing.assert_array_equal(first.releases[0].theta, second.releases[0].theta)
    assert not np.array_equal(first.releases[0].vector, second.releases[0].vector)
    assert not list(first.sessions[0].site.folder.glob("ledger*"))
