"""The sums of ``patient-clip``: what they make, and that a round costs what the accountant takes it for."""

from math import exp, sqrt
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import rdp
from scipy.stats import norm
from torch import nn

from common.errors import ModelError
from common.models.network import Network
from common.privacy.accounting import Rounds, epsilon, renyi_epsilon
from common.privacy.gaussian import delta_of
from common.privacy.site_task import Sums, check_network, meta_gradient, sums_of
from common.study import Study

PRIVATE: dict[str, bool | int | float | str] = {
    "algorithm.name": "maml",
    "algorithm.inner-steps": 3,
    "algorithm.inner-rate": 0.2,
    "model.norm": "group",
    "episodes.labels": "fixed",
    "episodes.classes": "a,b,c",
    "episodes.held-out": "",
    "episodes.ways": 3,
    "episodes.shots": 4,
    "episodes.queries": 10,
    "privacy.mechanism": "patient-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.5,
    "privacy.sampling": 0.1,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}


def study(**changes: bool | int | float | str) -> Study:
    return Study.from_run_config(PRIVATE | {key.replace("__", "."): value for key, value in changes.items()})


def test_the_sums_are_those_of_the_study() -> None:
    second, first = sums_of(study()), sums_of(study(algorithm__name="fomaml"))
    assert second == Sums(3, 0.2, True, 12, 30, 0.75)
    assert first == Sums(3, 0.2, False, 12, 30, 0.75)
    assert second.support_noise == pytest.approx(1.5 * sqrt(6) * 0.5)
    assert first.support_noise == pytest.approx(1.5 * sqrt(3) * 0.5)
    assert first.reply_noise == pytest.approx(0.75 / 30)
    assert second.reply_noise == pytest.approx(sqrt((0.75 / 30) ** 2 + 3 * (0.2 * second.support_noise / 12) ** 2))


@pytest.mark.parametrize("curved", [True, False])
def test_of_quadratic_losses_it_makes_the_gradient_that_is_known(curved: bool) -> None:
    """Support (x - s)'A(x - s)/2 and query (x - q)'B(x - q)/2: every step is a product with I - rate A."""
    generator = np.random.default_rng(0)
    a, b = (m @ m.T for m in generator.normal(size=(2, 4, 4)))
    theta, s, q = generator.normal(size=(3, 4))
    sums = Sums(3, 0.1, curved, 1, 1, 0.0)
    got = meta_gradient(sums, theta, lambda x: a @ (x - s), lambda x: b @ (x - q), lambda _, v: a @ v)
    step = np.linalg.matrix_power(np.eye(4) - 0.1 * a, 3)
    at = s + step @ (theta - s)
    assert got == pytest.approx((step if curved else np.eye(4)) @ b @ (at - q), rel=1e-12)


def test_products_are_asked_backwards_at_the_points_of_the_inner_steps() -> None:
    asked: dict[str, list[float]] = {"inner": [], "query": [], "product": []}

    def note(kind: str, value: float) -> Any:
        def sums(at: Any, *_: Any) -> Any:
            asked[kind].append(float(at[0]))
            return np.array([value])

        return sums

    parts = (note("inner", 1.0), note("query", 5.0), note("product", 2.0))
    got = meta_gradient(Sums(3, 0.5, True, 1, 1, 0.0), np.array([10.0]), *parts)
    assert asked == {"inner": [10.0, 9.5, 9.0], "query": [8.5], "product": [9.0, 9.5, 10.0]}
    assert got == pytest.approx([5 - 3 * 0.5 * 2])


def hockey_stick(first: np.ndarray, second: np.ndarray, at: float) -> float:
    return float(np.maximum(first - exp(at) * second, 0).sum())


@pytest.mark.parametrize("sampling", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("share", [1 / 3, 0.8])
def test_two_roles_cost_no_more_than_one_sampled_gaussian(sampling: float, share: float) -> None:
    """All that a round shows of a patient, on a grid: a mixture over out, support and query, each its own direction.

    A support patient's four sums are one direction of length root of 4 in units of the clip, with noise of root of 4.
    """
    noise, cells = 1.0, np.linspace(-8, 9, 1201)
    edges = (cells[1:] + cells[:-1]) / 2
    support, query = np.meshgrid(edges, edges, indexing="ij")

    def mass(*shift: float) -> np.ndarray:
        shown = zip((support, query), shift, strict=True)
        density = np.prod([norm.pdf(axis, by, noise) for axis, by in shown], axis=0)
        return np.asarray(density * (cells[1] - cells[0]) ** 2)

    absent = mass(0, 0)
    present = (1 - sampling) * absent + sampling * (share * mass(1, 0) + (1 - share) * mass(0, 1))
    one = np.diff(norm.cdf(np.linspace(-9, 10, 20001), 0, noise))
    other = np.diff(norm.cdf(np.linspace(-9, 10, 20001), 1, noise))
    claim = (1 - sampling) * one + sampling * other
    for at in (0.0, 0.1, 0.5, 1.0, 2.0):
        assert hockey_stick(present, absent, at) <= hockey_stick(claim, one, at) + 1e-6
        assert hockey_stick(absent, present, at) <= hockey_stick(one, claim, at) + 1e-6


def test_several_sums_on_one_sample_are_one_gaussian_and_not_samples_of_their_own() -> None:
    """Renyi's accountant on the events as they are. Amplified one by one, a round would seem to cost less."""
    plan = study()
    sums, privacy, rounds = sums_of(plan), plan.privacy, 100
    count = sums.of_a_support_patient
    each = dp_accounting.GaussianDpEvent(sums.support_noise / privacy.clip)
    together = dp_accounting.PoissonSampledDpEvent(privacy.sampling, dp_accounting.SelfComposedDpEvent(each, count))
    accountant: Any = rdp.RdpAccountant()
    accountant.compose(together, rounds)
    ours = Rounds(privacy.sampling, privacy.noise, rounds)
    assert renyi_epsilon([ours], 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert epsilon([ours], 1e-5) < accountant.get_epsilon(1e-5)
    apart = Rounds(privacy.sampling, sums.support_noise / privacy.clip, rounds * count)
    assert epsilon([apart], 1e-5) < 0.95 * epsilon([ours], 1e-5)


def test_without_sampling_the_sums_of_a_patient_cost_what_is_claimed() -> None:
    """Every one is a Gaussian mechanism of its own; exactly, for both roles."""
    sums = sums_of(study(privacy__sampling=1.0))
    clip = 0.5
    for mus in ([clip / sums.support_noise] * sums.of_a_support_patient, [clip / sums.query_noise]):
        mu = sqrt(sum(m**2 for m in mus))
        assert mu == pytest.approx(1 / 1.5)
        cost = epsilon([Rounds(1.0, 1.5, 1)], 1e-5)
        assert delta_of(cost, mu) == pytest.approx(1e-5, rel=1e-6)


def test_a_network_that_mixes_patients_is_refused() -> None:
    body: Any = nn.Flatten()
    body.takes_mask, body.mixes_rows, body.channels_last = False, True, False
    network = Network(body, 4, 3)
    with pytest.raises(ModelError, match="depends on the other images of the batch: choose a network with group norm"):
        check_network(study(), network)
    check_network(Study(), network)
    body.mixes_rows = False
    check_network(study(), network)
    assert torch.is_tensor(network.head.weight)
