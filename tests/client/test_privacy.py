"""The private meta-gradient: what one patient can change, by brute force; and that the noise is nobody's guess."""

import os
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from client import privacy
from client import session as client_session
from client.data.store import Site
from client.privacy import OUT, bins, private_gradient, sum_of_bins
from client.session import Session
from common.contract import check_reply
from common.errors import ContractError
from common.privacy.mechanism import STEPS
from common.study import ALGORITHMS
from tests.client.hospitals import ask, instruct, prepared, tiny_study
from tests.client.wards import Hashed, Recogniser, private_study, session_of, ward, without

#: The hospitals' own study, made private.
HOSPITALS: dict[str, bool | int | float | str] = {
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.0,
    "privacy.sampling": 0.8,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}


@st.composite
def wards(draw: st.DrawFn) -> list[tuple[int, str, int]]:
    numbers = draw(st.lists(st.integers(0, 255), min_size=2, max_size=24, unique=True))
    kind = st.tuples(st.sampled_from("abc"), st.integers(1, 3))
    return [(number, *draw(kind)) for number in numbers]


def moved(study: Any, session: Session, number: int) -> float:
    """Return the most that one patient moves a round's clipped sum, in clip bounds."""
    everybody, _ = sum_of_bins(session, session.theta, number)
    site, most = session.site, 0.0
    for patient in range(len(site.keys)):
        fewer = session_of(study, without(site, patient), session.engine.learner)  # type: ignore[arg-type]
        total, _ = sum_of_bins(fewer, session.theta, number)
        most = max(most, sqrt(sum(int(step) ** 2 for step in everybody - total)) / STEPS)
    return most


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(
    patients=wards(),
    parts=st.integers(1, 6),
    sampling=st.sampled_from([0.3, 1.0]),
    labels=st.sampled_from(["fixed", "shuffled"]),
    number=st.integers(1, 2),
)
def test_no_patient_moves_the_sum_by_more_than_twice_the_bound(
    tmp_path_factory: pytest.TempPathFactory,
    patients: list[tuple[int, str, int]],
    parts: int,
    sampling: float,
    labels: str,
    number: int,
) -> None:
    study = private_study(
        {
            "episodes.per-round": parts,
            "episodes.classes": "a,b,c",
            "episodes.labels": labels,
            "privacy.sampling": sampling,
            "episodes.augment": "image",
            "episodes.shots": 1,
            "episodes.queries": 1,
        }
    )
    site = ward(tmp_path_factory.mktemp("ward"), patients)
    assert moved(study, session_of(study, site, Hashed()), number) <= 2


def test_a_patient_changes_nothing_outside_of_their_bin(tmp_path: Path) -> None:
    study = private_study({"episodes.per-round": 3, "episodes.shots": 1, "episodes.queries": 2})
    site = ward(tmp_path, [(number, "ab"[number % 2], 1 + number % 2) for number in range(40)])
    everybody, chosen = privacy.episodes_of_bins(site, study, 1), bins(site, study, 1)
    assert set(everybody) == {0, 1, 2}
    for patient in range(len(site.keys)):
        fewer = privacy.episodes_of_bins(without(site, patient), study, 1)
        for part in {0, 1, 2} - {chosen[patient]}:
            for side in ("support", "query"):
                one, other = getattr(everybody[part], side), getattr(fewer[part], side)
                assert all(map(torch.equal, one, other))


def test_twice_the_bound_is_reached(tmp_path: Path) -> None:
    """A learner that turns round in another bin: noise for a sensitivity of C would be too little."""
    study = private_study({"episodes.per-round": 3})
    learner = Recogniser()
    site = ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(40)])
    session = session_of(study, site, learner)
    sum_of_bins(session, session.theta, 1)
    learner.mode[:] = ["tell"]
    assert 1.98 < moved(study, session, 1) <= 2


def test_no_patient_of_a_real_site_and_network_moves_it_by_more(tmp_path: Path) -> None:
    study = tiny_study({**HOSPITALS, "privacy.sampling": 1.0, "privacy.clip": 1e-3})
    (site, *_) = prepared(study)
    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    total, result = sum_of_bins(session, session.theta, 1)
    assert result is not None
    assert (result.gradient.norm(dim=1) > 1e-3).all()  # all are clipped
    training = [p for p in range(len(site.keys)) if (site.on_side(["train"]) & (site.patients == p)).any()]
    changes = []
    for patient in training[::3]:
        fewer = Session(**{**vars(session), "site": without(site, patient)})
        other, _ = sum_of_bins(fewer, session.theta, 1)
        changes.append(float(np.linalg.norm((total - other) / STEPS)))
    assert 0.01 < max(changes) <= 2


def test_a_patients_bin_is_their_own(tmp_path: Path) -> None:
    study = private_study({"episodes.per-round": 4, "privacy.sampling": 0.6, "study.rounds": 50})
    site = ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(120)])
    chosen = np.array([bins(site, study, number) for number in range(1, 51)])
    for gone in (0, 60, 119):
        fewer = np.array([bins(without(site, gone), study, number) for number in range(1, 51)])
        assert np.array_equal(fewer, np.delete(chosen, gone, 1))
    counts = np.array([(chosen == part).sum() for part in (OUT, 0, 1, 2, 3)]) / chosen.size
    assert counts == pytest.approx([0.4, 0.15, 0.15, 0.15, 0.15], abs=0.02)
    other = np.array([bins(site, study.override({"study.seed": 1}), number) for number in range(1, 51)])
    for one, two in ((chosen, other), (chosen[1:], chosen[:-1]), (chosen[:, 1:], chosen[:, :-1])):
        assert (((one == OUT) & (two == OUT)).mean()) == pytest.approx(0.16, abs=0.02)


@pytest.mark.parametrize("sampling", [0.0001, 1.0])
def test_nobody_and_everybody(tmp_path: Path, sampling: float) -> None:
    study = private_study({"privacy.sampling": sampling, "model.width": 4})
    session = session_of(study, ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(20)]))
    vector, scalars = private_gradient(session, session.theta, 1)
    assert vector.std() == pytest.approx(1.0 * 2 * 0.5 / 2, rel=0.15)  # z 2C / E, with nobody too
    assert set(scalars.values()) == {-1.0}
    chosen = bins(session.site, study, 1)
    assert (chosen != OUT).all() if sampling == 1 else (chosen == OUT).all()


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "local-only"])
def test_every_learner_has_a_row_for_every_bin(name: str) -> None:
    study = tiny_study({**HOSPITALS, "algorithm.name": name, "episodes.per-round": 3, "privacy.sampling": 1.0})
    prepared(study)
    session = client_session.open_session(study.run_config(), {"partition-id": 0})
    drawn = list(privacy.episodes_of_bins(session.site, study, 1).values())
    result = privacy.gradients(session.engine, session.theta, drawn)
    assert result is not None
    for row, episode in zip(result.gradient, drawn, strict=True):
        assert torch.allclose(row, session.engine.meta_gradient(session.theta, episode).gradient, atol=1e-6)
    vector, _ = private_gradient(session, session.theta, 1)
    assert vector.shape == (sum(t.numel() for t in session.theta.values()),)
    assert vector.dtype == np.float32


def test_noise_comes_from_the_operating_system_and_is_never_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = private_study()
    session = session_of(study, ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(20)]))
    first, second = (private_gradient(session, session.theta, 1)[0] for _ in range(2))
    assert not (first == second).any()
    calls: list[int] = []

    def urandom(size: int) -> bytes:
        calls.append(size)
        return b"\x01" * size

    monkeypatch.setattr(os, "urandom", urandom)
    private_gradient(session, session.theta, 1)
    assert calls == [16 * first.size]


def test_with_the_research_switch_a_run_repeats_itself_and_has_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = private_study({"privacy.research": True, "privacy.figures": "sent"})
    session = session_of(study, ward(tmp_path, [(number, "ab"[number % 2], 1) for number in range(20)]))
    monkeypatch.setattr(os, "urandom", None)
    (one, figures), (same, _), (other, _) = (private_gradient(session, session.theta, n) for n in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not (one == other).any()
    assert figures["loss"] > 0
    assert 0 <= figures["accuracy"] <= 1


def test_a_reply_holds_the_noised_vector_and_constants() -> None:
    study = tiny_study(HOSPITALS)
    prepared(study)
    instruction, theta = instruct(study, "train")
    assert theta is not None
    answers = []
    for _ in range(2):
        content = ask(study, 0, instruction, theta).content
        answers.append(check_reply(content, instruction, size=theta.size, dtype="float32"))
    for answer in answers:
        assert set(answer.scalars.values()) == {-1.0}
        assert answer.vector is not None
        assert answer.vector.std() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("changes", [{}, HOSPITALS])
@pytest.mark.parametrize("number", [0, 3])
def test_a_round_that_the_study_does_not_have_is_refused(
    changes: dict[str, bool | int | float | str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(changes)
    (site, *_) = prepared(study)

    def touched(*_: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(Site, "pixels", touched)
    (site.folder / "incidents.log").unlink(missing_ok=True)
    reply = ask(study, 0, *instruct(study, "train", number=number))
    assert reply.error.code == ContractError.code
    assert "this is not one of them" in (site.folder / "incidents.log").read_text()
    (site.folder / "incidents.log").unlink()
