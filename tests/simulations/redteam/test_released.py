"""Attacks on what a run publishes: they win where patients were learned by heart, and are under the study's bound."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from client.data.episodes import network_input
from client.data.image import Recipe
from client.data.store import Site, open_site
from client.session import open_session, virtual_site
from common.meta import Episodes
from common.study import Study
from simulations.engines.inprocess import run_in_process
from simulations.prepare import prepare
from simulations.redteam import halves
from simulations.redteam.bounds import bound_of_the_study
from simulations.redteam.confidence import own_images, patient_logits
from simulations.redteam.figures import Figure
from simulations.redteam.oracle import labels_of, offered, patients, unseen
from simulations.redteam.released import attack_released
from tests.simulations.redteam.scenes import tiny_study, write_source


def learned_by_heart(defence: str, noise: float = 1.1) -> Study:
    """Return a study whose network can tell apart all the patients that it has, and is given the time to."""
    write_source()
    study = tiny_study("linear, first order", defence, noise=noise, rounds=12)
    faster = {"outer.rate": 0.05, "algorithm.inner-rate": 0.1, "episodes.queries": 8}
    return study.override(faster)


def figures(found: dict[str, list[Figure]]) -> dict[str, dict[str, Figure]]:
    return {attack: {figure.name: figure for figure in part} for attack, part in found.items()}


def test_a_theta_that_learned_its_patients_by_heart_tells_who_they_were() -> None:
    found = figures(attack_released(learned_by_heart("none"), 8, np.random.default_rng(0)))
    assert found["LiRA"]["AUC"].value > 0.7
    assert found["RMIA"]["AUC"].value > 0.6
    assert found["LiRA"]["TPR at 1.0% FPR"].value > 0.05
    assert all(figure.bound is None for part in found.values() for figure in part.values())


def test_with_a_guarantee_theta_is_under_the_bound_of_the_whole_study() -> None:
    study = learned_by_heart("episode-clip", noise=2.0).override({"study.rounds": 6})
    found = figures(attack_released(study, 8, np.random.default_rng(0)))
    bound = bound_of_the_study(study)
    assert bound is not None
    for part in found.values():
        assert part["AUC"].bound == bound.area < 0.7
        assert part["AUC"].value < bound.area
        assert not any(figure.broken for figure in part.values())


def test_of_a_patient_left_out_nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    study = learned_by_heart("none").override({"study.rounds": 1})
    before = prepare(study)
    sessions = [open_session(study.run_config(), {"partition-id": number}) for number in range(3)]
    seen: list[list[Site]] = []

    def looked_at(study: Study) -> object:
        seen.append([open_site(virtual_site(study, number), Recipe.of(study.model)) for number in range(3)])
        assert all(site._key for site in seen[-1])  # read before the folder is gone
        return run_in_process(study)

    monkeypatch.setattr(halves, "run_in_process", looked_at)
    generator = np.random.default_rng(0)
    found = [halves.run_half(study, sessions, generator) for _ in range(2)]
    for half, sites in zip(found, seen, strict=True):
        for session, here, site in zip(sessions, half.inside, sites, strict=True):
            all_, own = session.site, patients(session)
            gone = {all_.keys[patient] for patient in own[~here]}
            assert 0.2 < len(gone) / len(own) < 0.8
            assert set(site.keys) == set(all_.keys) - gone
            assert site.generator("train").random() != all_.generator("train").random()
    assert not torch.equal(*(half.theta["head.weight"] for half in found))
    assert [site.keys for site in prepare(study)] == [site.keys for site in before]  # the originals are as they were


def test_a_patients_logit_is_the_mean_over_support_sets_and_images() -> None:
    """Against an inner loop written anew; in one support set, the ways are the classes in another order."""
    study = learned_by_heart("none").override({"algorithm.test-steps": 2, "algorithm.test-rate": 0.3})
    prepare(study)
    session = open_session(study.run_config(), {"partition-id": 0})
    own = own_images(session, np.random.default_rng(0))
    supported, strangers = (
        {row.numpy().tobytes() for row in x}
        for x in (own.supports.support.x.flatten(0, 1), network_input(session.site.pixels(own.strangers)))
    )
    assert len(strangers) > 5
    assert not supported & strangers
    assert not set(own.strangers) - set(unseen(session))
    places, patient = np.concatenate([offered(session)[:4], offered(session)[-3:]]), np.array([0, 0, 1, 1, 1, 2, 2])
    people = session.site.patients.copy()
    people[places] = patient
    session = replace(session, site=replace(session.site, patients=people))
    site, network = session.site, session.engine.network
    drawn = own.supports.take(slice(0, 2))
    y = drawn.support.y.clone()
    y[1] = 1 - y[1]
    drawn = Episodes(drawn.support._replace(y=y), drawn.query, torch.tensor([[0, 1], [1, 0]]))
    x = torch.tensor((site.pixels(places) - np.float32(127.5)) / np.float32(63.75))
    labels = torch.from_numpy(labels_of(session, places))
    values = []
    for number in range(2):
        support = drawn.task(number).support  # without padding
        fast = {name: t.clone().requires_grad_() for name, t in session.theta.items()}
        for _ in range(2):
            loss = F.cross_entropy(network.logits(fast, support.x), support.y)
            slopes = torch.autograd.grad(loss, list(fast.values()))
            fast = {n: (t - 0.3 * s).detach().requires_grad_() for (n, t), s in zip(fast.items(), slopes, strict=True)}
        right = labels if number == 0 else 1 - labels
        p = network.logits(fast, x).double().softmax(-1)[torch.arange(7), right]
        values.append((p / (1 - p)).log().detach().numpy())
    mean = np.mean(values, axis=0)
    expected = [mean[patient == number].mean() for number in range(3)]
    np.testing.assert_allclose(patient_logits(session, session.theta, drawn, places), expected, rtol=1e-4, atol=1e-5)
    only = Episodes(drawn.support, drawn.query, torch.tensor([[0, 2], [0, 2]]))
    told = patient_logits(session, session.theta, only, places)
    assert np.isnan(told).tolist() == [bool((labels[patient == number] == 1).all()) for number in range(3)]
