"""The canary audit: what an attacker who knows all but one patient can prove about the client as it is.

The real ClientApp answers 2,000 rounds with a canary among its patients and 2,000 without, in pairs. Its learner is
made for the worst case: it has one gradient for the bins of the world with the canary, and the opposite for all
others, and every second round the one gradient for all. The attacker knows that, and looks at the direction of that
gradient. What they prove must stay under what the study claims. Four wrong clients are each found out.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client import answers as client_answers
from client import privacy
from client.data.store import Site
from common.contract import check_reply
from common.privacy import mechanism
from common.study import Study
from tests.client.audited import ERROR, Scores, found_out, proven
from tests.client.hospitals import ask, instruct
from tests.client.wards import Recogniser, private_study, session_of, ward, without

Patch = pytest.MonkeyPatch

#: Patients of the ward, two classes; the canary is the one of this place.
WARD = [(number, "ab"[number % 2], 1) for number in range(80)]
CANARY = 17


def audit(folder: Path, trials: int, patch: Patch, *, pairs: bool = True) -> tuple[Study, Scores, Scores]:
    """Return the study, and the attacker's scores with and without the canary: ``[trials, 1]``, or 2 with ``pairs``."""
    study = private_study({"study.rounds": 2 * trials, "episodes.per-round": 4})
    assert study.privacy.guaranteed
    learner = Recogniser()
    present = session_of(study, ward(folder / "with", WARD), learner)
    elsewhere = ward(folder / "without", WARD).folder
    absent = session_of(study, replace(without(present.site, CANARY), folder=elsewhere), learner)
    instruction, theta = instruct(study, "train")
    assert theta is not None
    parts, clip = study.episodes.per_round, study.privacy.clip
    scores: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1, 2 * trials + 1, 1 if pairs else 2):
        learner.known.clear()
        asked = replace(instruction, round=number)
        for canary in (True, False):  # the world with the canary first: the learner remembers its bins
            learner.mode[:] = ["calm" if number % 2 == 0 else "learn" if canary else "tell"]
            patch.setattr(client_answers, "open_session", lambda *_, canary=canary: present if canary else absent)
            content = ask(study, 0, asked, theta).content
            vector = check_reply(content, asked, size=theta.size, dtype="float32").vector
            assert vector is not None
            scores[canary].append(float(vector.sum(dtype=np.float64)) * parts / (sqrt(theta.size) * clip))
    loud, calm = (np.array(scores[canary]).reshape(trials, -1) for canary in (True, False))
    return study, loud, calm


@pytest.mark.slow
def test_what_can_be_proven_is_less_than_what_is_claimed(tmp_path: Path, monkeypatch: Patch) -> None:
    study, loud, calm = audit(tmp_path, 1000, monkeypatch)
    assert not found_out(study, loud, calm)
    assert proven(loud, calm, ERROR)[0] > 0.2  # of 1: the audit can see


def half_the_noise(patch: Patch) -> None:
    """Noise calibrated to C, as if the patient's own term were all that they change."""
    patch.setitem(mechanism.SENSITIVITY, "episode-clip", 1.0)


def shuffled_bins(patch: Patch) -> None:
    """Patients shuffled, then dealt out: one less, and all others are dealt anew."""

    def dealt(site: Site, study: Study, number: int) -> NDArray[np.int64]:
        order = np.random.default_rng(number).permutation(len(site.keys))
        out = np.zeros(len(order), np.int64)
        out[order] = np.arange(len(order)) * study.episodes.per_round // len(order)
        return out

    patch.setattr(privacy, "bins", dealt)


def a_tensor_not_clipped(patch: Patch) -> None:
    """The head's last numbers go around the clip."""
    clip = mechanism.on_grid

    def partly(row: NDArray[np.floating], bound: float) -> NDArray[np.int64]:
        out = clip(row, bound)
        out[-2:] = np.trunc(row[-2:] * mechanism.STEPS / bound)
        return out

    patch.setattr(mechanism, "on_grid", partly)


def noise_reused(patch: Patch) -> None:
    """Every second round has the noise of the one before."""
    real = os.urandom
    kept: dict[Path, bytes] = {}

    def source(site: Site, study: Study, number: int) -> Callable[[int], bytes]:
        def draw(size: int) -> bytes:
            if number % 2 or site.folder not in kept:
                kept[site.folder] = real(size)
            return kept[site.folder]

        return draw

    patch.setattr(privacy, "noise_source", source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "trials"),
    [(half_the_noise, 600), (shuffled_bins, 100), (a_tensor_not_clipped, 100), (noise_reused, 150)],
)
def test_a_wrong_client_is_found_out(
    tmp_path: Path, monkeypatch: Patch, mistake: Callable[[Patch], None], trials: int
) -> None:
    mistake(monkeypatch)
    assert found_out(*audit(tmp_path, trials, monkeypatch, pairs=mistake is noise_reused))
