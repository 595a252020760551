"""A site as one task: what one patient changes in every sum, by brute force; without clip and noise it is MAML."""

import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from client import session as client_session
from client import site_task
from client.data.episodes import network_input
from client.data.store import Site
from client.ledger import open_ledger
from client.privacy import OUT
from client.session import Session
from client.site_task import MOST_IMAGES, QUERY, SUPPORT, people, roles, site_gradient
from common.contract import check_reply
from common.meta import patients
from common.privacy import mechanism
from common.privacy.mechanism import STEPS
from common.privacy.site_task import sums_of
from common.study import Study
from tests.client.hospitals import ask, instruct, prepared, tiny_study
from tests.client.wards import patient_study, result, session_of, ward, without

Changes = dict[str, bool | int | float | str]

#: The hospitals' own study, made private by patients.
HOSPITALS: Changes = {
    "algorithm.name": "maml",
    "algorithm.inner-rate": 0.5,
    "model.norm": "group",
    "episodes.labels": "fixed",
    "episodes.held-out": "",
    "episodes.per-round": 1,
    "privacy.mechanism": "patient-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.0,
    "privacy.sampling": 0.8,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}

Transcript = tuple[list[NDArray[np.int64]], list[NDArray[np.float64]]]


def transcript(session: Session, number: int, given: list[NDArray[np.float64]] | None = None) -> Transcript:
    """Return the clipped sums that a round takes, and what they gave with noise.

    Where what they gave is ``given``, it is that: the sums of another world that released the same until then.
    """
    totals: list[NDArray[np.int64]] = []
    gave: list[NDArray[np.float64]] = []
    real = mechanism.noised

    def noised(total: NDArray[np.int64], *more: Any) -> NDArray[np.float64]:
        totals.append(total)
        gave.append(real(total, *more) if given is None else given[len(gave)])
        return gave[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_task, "noised", noised)
        site_gradient(session, session.theta, number)
    return totals, gave


def moved(study: Study, session: Session, number: int, every: int = 1) -> list[list[float]]:
    """Return, for every patient, how far they move each of a round's clipped sums, in clip bounds."""
    totals, gave = transcript(session, number)
    changes = []
    for patient in range(0, len(session.site.keys), every):
        fewer = Session(**{**vars(session), "site": without(session.site, patient)})
        others, _ = transcript(fewer, number, gave)
        assert len(others) == len(totals)
        pairs = zip(totals, others, strict=True)
        changes.append([sqrt(sum(int(step) ** 2 for step in one - other)) / STEPS for one, other in pairs])
    return changes


@st.composite
def wards(draw: st.DrawFn) -> list[tuple[int, str, int]]:
    numbers = draw(st.lists(st.integers(0, 255), min_size=2, max_size=20, unique=True))
    kind = st.tuples(st.sampled_from("ab"), st.integers(1, 3))
    return [(number, *draw(kind)) for number in numbers]


def hashed(theta: Mapping[str, Tensor], *seen: Tensor) -> Tensor:
    """Return a vector that only the very same input gives: often opposite, far too long, or no number at all."""
    generator = np.random.default_rng(list(sha256(b"".join(t.contiguous().numpy().tobytes() for t in seen)).digest()))
    size = sum(t.numel() for t in theta.values())
    length = generator.choice([0.01, 1.0, 100.0, 1e30, np.nan])
    axis = np.eye(1, size, int(generator.integers(2)))[0]
    return torch.from_numpy(generator.choice([-1.0, 1.0]) * axis * length)


def wild(patch: pytest.MonkeyPatch) -> None:
    """Let a patient's terms be anything that their images, turned as they are, and the point may tell."""

    def gradient(_: object, at: Mapping[str, Tensor], images: Any, __: object) -> Any:
        return result(at, hashed(at, images.x, images.y, *at.values()))

    def product(_: object, at: Mapping[str, Tensor], along: Mapping[str, Tensor], images: Any, __: object) -> Any:
        return result(at, hashed(at, images.x, images.y, *at.values(), *along.values())).gradient

    patch.setattr(patients, "gradient", gradient)
    patch.setattr(patients, "product", product)


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(
    numbers=wards(),
    name=st.sampled_from(["maml", "fomaml"]),
    steps=st.integers(1, 2),
    sampling=st.sampled_from([0.3, 1.0]),
    number=st.integers(1, 2),
)
def test_no_patient_moves_any_sum_by_more_than_the_bound(
    tmp_path_factory: pytest.TempPathFactory,
    numbers: list[tuple[int, str, int]],
    name: str,
    steps: int,
    sampling: float,
    number: int,
) -> None:
    study = patient_study(
        {
            "algorithm.name": name,
            "algorithm.inner-steps": steps,
            "privacy.sampling": sampling,
            "episodes.shots": 1,
            "episodes.queries": 1,
            "episodes.augment": "image",
        }
    )
    site = ward(tmp_path_factory.mktemp("ward"), numbers)
    chosen = roles(site, study, number)
    with pytest.MonkeyPatch.context() as patch:
        wild(patch)
        changes = moved(study, session_of(study, site), number)
    back = steps if name == "maml" else 0
    for role, change in zip(chosen, changes, strict=True):
        assert max(change) <= 1
        query = change.pop(steps)
        assert len(change) == steps + back
        assert not (query if role != QUERY else any(change))  # a patient is on one side only


def test_the_bound_is_reached_in_every_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = patient_study({"algorithm.inner-steps": 2, "episodes.shots": 1, "episodes.queries": 1})
    session = session_of(study, ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(12)]))

    def longest(_: object, at: Mapping[str, Tensor], *__: object) -> Any:
        return result(at, torch.ones(sum(t.numel() for t in at.values())))

    monkeypatch.setattr(patients, "gradient", longest)
    monkeypatch.setattr(patients, "product", lambda *a: longest(*a).gradient)
    changes = np.array(moved(study, session, 1))
    assert changes.max(0) == pytest.approx(1, abs=1e-3)
    assert changes.max() <= 1


def test_no_patient_of_a_real_site_and_network_moves_any_sum_by_more(tmp_path: Path) -> None:
    study = tiny_study({**HOSPITALS, "privacy.sampling": 1.0, "privacy.clip": 1e-3, "algorithm.inner-steps": 2})
    prepared(study)
    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    changes = np.array(moved(study, session, 1, every=12))
    assert changes.max() <= 1
    assert (changes.max(0) > 0.95).all()  # all are clipped


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["maml", "fomaml"])
def test_without_clip_and_noise_it_is_the_meta_gradient_of_the_site(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, against autograd through losses that are written down here, from images that are found here."""
    changes: Changes = {"algorithm.name": name, "algorithm.inner-steps": steps, "wire.dtype": "float64"}
    study = tiny_study(HOSPITALS | changes)
    prepared(study)
    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    monkeypatch.setattr(site_task, "clipped_sum", lambda rows, _, size: sum(rows, np.zeros(size)))
    monkeypatch.setattr(site_task, "noised", lambda total, _, __, parts, ___: total / parts)
    vector, _ = site_gradient(session, session.theta, 1)
    assert vector.dtype == np.float64
    expected = plain(session, study, 1, second_order=name == "maml")
    assert np.linalg.norm(vector - expected) <= 1e-9 * np.linalg.norm(expected)
    other = plain(session, study, 1, second_order=name != "maml")
    assert np.linalg.norm(vector - other) > 1e-3 * np.linalg.norm(expected)  # the second order can be seen


def plain(session: Session, study: Study, number: int, *, second_order: bool) -> NDArray[np.float64]:
    site, network, spec = session.site, session.engine.network, study.episodes
    chosen, training = roles(site, study, number), site.on_side(["train"])
    assert {SUPPORT, QUERY, OUT} <= set(chosen)

    def loss(theta: Mapping[str, Tensor], role: int, patients: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for patient in np.flatnonzero(chosen == role):
            own = np.flatnonzero(training & (site.patients == patient))
            names = [site.label_names[label] for label in site.labels[own]]
            own = own[[name in spec.class_names for name in names]]
            if not len(own):
                continue
            assert len(own) <= MOST_IMAGES
            x = network_input(site.pixels(own)).double()
            y = torch.tensor([spec.class_names.index(site.label_names[label]) for label in site.labels[own]])
            total = total + F.cross_entropy(network.logits(theta, x), y)
        return total / patients

    theta = {name: t.clone().requires_grad_() for name, t in session.theta.items()}
    phi: Mapping[str, Tensor] = theta
    for _ in range(study.algorithm.inner_steps):
        value = loss(phi, SUPPORT, len(spec.class_names) * spec.shots)
        grads = torch.autograd.grad(value, list(phi.values()), create_graph=second_order)
        phi = {n: p - study.algorithm.inner_rate * g for (n, p), g in zip(phi.items(), grads, strict=True)}
    value = loss(phi, QUERY, len(spec.class_names) * spec.queries)
    grads = torch.autograd.grad(value, list(theta.values()))
    return torch.cat([g.reshape(-1) for g in grads]).numpy()


def test_a_patients_role_is_their_own(tmp_path: Path) -> None:
    study = patient_study({"privacy.sampling": 0.6, "episodes.shots": 1, "episodes.queries": 3, "study.rounds": 50})
    site = ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(120)])
    chosen = np.array([roles(site, study, number) for number in range(1, 51)])
    for gone in (0, 60, 119):
        fewer = np.array([roles(without(site, gone), study, number) for number in range(1, 51)])
        assert np.array_equal(fewer, np.delete(chosen, gone, 1))
    counts = np.array([(chosen == role).sum() for role in (OUT, SUPPORT, QUERY)]) / chosen.size
    assert counts == pytest.approx([0.4, 0.15, 0.45], abs=0.02)
    other = np.array([roles(site, study.override({"study.seed": 1}), number) for number in range(1, 51)])
    for one, two in ((chosen, other), (chosen[1:], chosen[:-1]), (chosen[:, 1:], chosen[:, :-1])):
        assert (((one == OUT) & (two == OUT)).mean()) == pytest.approx(0.16, abs=0.02)


def test_a_patients_images_are_their_own(tmp_path: Path) -> None:
    """Also with more of them than a round takes, and turned."""
    study = patient_study({"episodes.augment": "image"})
    site = ward(tmp_path, [(number, "ab"[number % 2], 1 + number % 12) for number in range(30)])
    site.cache[:] = np.random.default_rng(0).integers(256, size=site.cache.shape)
    everybody = people(site, study, 1, np.ones(30, np.bool_))
    assert everybody is not None
    assert everybody.support.mask is not None
    counts = everybody.support.mask.sum(1).tolist()
    images = np.bincount(site.patients)
    assert counts == np.minimum(images, MOST_IMAGES).tolist()
    for patient in range(30):
        alone = people(site, study, 1, np.arange(30) == patient)
        assert alone is not None
        one, other = alone.task(0).support, everybody.task(patient).support
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)
        again = people(site, study, 2, np.arange(30) == patient)
        assert again is not None
        assert images[patient] == 1 or not torch.equal(again.support.x, alone.support.x)


def test_only_training_images_of_the_studys_classes_are_taken(tmp_path: Path) -> None:
    study = patient_study({"episodes.classes": "c,a"})
    site = ward(tmp_path, [(number, "abc"[number % 3], 2) for number in range(30)])
    site.split[site.patients < 10] = 2
    taken = people(site, study, 1, np.ones(30, np.bool_))
    assert taken is not None
    numbers = {int(n) for n in np.rint(taken.support.x[:, 0, 0, 0, 0].numpy() * 63.75 + 127.5)}
    training = site.cache[np.repeat(np.isin(np.arange(30), np.arange(10, 30)), 2), 0, 0, 0]
    assert numbers == {int(n) for n in training if n % 3 != 1}
    for x, y in zip(taken.support.x[:, 0, 0, 0, 0], taken.support.y[:, 0], strict=True):
        assert int(y) == (0 if round(float(x) * 63.75 + 127.5) % 3 == 2 else 1)  # c before a, as in the study
    assert people(site, study, 1, np.arange(30) < 10) is None


def silent(size: int) -> bytes:
    """Bytes that give a noise of zero."""
    return b"\xff" * size


def test_every_sum_has_noise_of_its_own_and_as_much_as_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nobody in the round too, where noise is all that there is."""
    study = patient_study(
        {"algorithm.inner-steps": 3, "privacy.noise": 1.5, "privacy.sampling": 1e-4, "model.width": 4}
    )
    session = session_of(study, ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(20)]))
    assert (roles(session.site, study, 1) == OUT).all()
    totals, gave = transcript(session, 1)
    assert not any(total.any() for total in totals)
    spec, size = study.episodes, gave[0].size
    expected = [1.5 * sqrt(6) * 0.5 / (2 * spec.shots)] * 7
    expected[3] = 1.5 * 0.5 / (2 * spec.queries)
    for released, deviation in zip(gave, expected, strict=True):
        assert released.std() == pytest.approx(deviation, rel=5 / sqrt(2 * size))
    assert np.abs(np.corrcoef(gave) - np.eye(7)).max() < 5 / sqrt(size)
    # All of it that is sent: the noise of the queries, and that of the three products.
    vector, scalars = site_gradient(session, session.theta, 1)
    assert vector.std() == pytest.approx(sums_of(study).reply_noise, rel=5 / sqrt(2 * size))
    assert set(scalars.values()) == {-1.0}
    calls: list[int] = []

    def urandom(count: int) -> bytes:
        calls.append(count)
        return silent(count)

    monkeypatch.setattr(os, "urandom", urandom)
    assert not site_gradient(session, session.theta, 1)[0].any()
    assert calls == [16 * size] * 7


def test_with_the_research_switch_a_run_repeats_itself_and_has_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(HOSPITALS | {"privacy.research": True, "privacy.figures": "sent", "algorithm.inner-steps": 2})
    prepared(study)
    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    monkeypatch.setattr(os, "urandom", None)
    (one, figures), (same, _), (other, _) = (site_gradient(session, session.theta, n) for n in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not (one == other).any()
    assert figures["loss"] > 0
    assert 0 <= figures["accuracy"] <= 1
    _, gave = transcript(session, 1)
    assert np.abs(np.corrcoef(gave) - np.eye(5)).max() < 0.5  # seeded, and still one noise after the other


@pytest.fixture
def spotless() -> Iterator[Site]:
    """The first of the hospitals, nothing spent."""
    (site, *_) = prepared(tiny_study(HOSPITALS))
    (site.folder / "ledger.sqlite").unlink(missing_ok=True)
    yield site
    (site.folder / "ledger.sqlite").unlink(missing_ok=True)


def test_a_round_is_answered_once_and_spent_once(spotless: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ClientApp: the same bytes again, constants beside them, one line in the ledger, no data read twice."""
    study = tiny_study(HOSPITALS)
    instruction, theta = instruct(study, "train")
    assert theta is not None

    def answer() -> NDArray[np.floating]:
        reply = check_reply(ask(study, 0, instruction, theta).content, instruction, size=theta.size, dtype="float32")
        assert set(reply.scalars.values()) == {-1.0}
        assert reply.vector is not None
        return reply.vector

    first = answer()
    assert first.any()
    with open_ledger(spotless.folder) as ledger:
        (spent,) = ledger.spent()
    assert (spent.rounds.sampling, spent.rounds.noise, spent.rounds.count) == (0.8, 1.0, 1)
    monkeypatch.setattr(Site, "pixels", None)
    assert np.array_equal(answer(), first)
