"""The canary audit of ``patient-clip``: what can an attacker who knows all but one patient prove of the client?

The real ClientApp answers up to 1,000 rounds, half of them with a canary among its patients, in pairs; once in rounds
where the canary is a query patient, once in rounds where it supports. Everybody's terms are made for the worst case:

- *Query.* Everybody's gradient is the clip bound long, in one direction; those who are query patients only in the world
  without the canary have the opposite.
- *Support.* So are all inner gradients and products, but that the canary's are longer before they are clipped. Query
  gradients tell how far the inner step went, and the inner rate is so large that their own noise is small beside that:
  both of the canary's terms can be seen at once.

The attacker subtracts what the others add, whose roles they know. In every second round the canary adds nothing, for
the mutant that uses noise twice. What is proven must stay under what is claimed. Five wrong clients are found out.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from client import answers as client_answers
from client import site_task
from client.data.episodes import network_input
from client.data.store import Site
from client.site_task import QUERY, SUPPORT, roles
from common.contract import check_reply
from common.meta import flatten, patients
from common.privacy import mechanism
from common.privacy.site_task import sums_of
from common.study import Study
from tests.client.audited import Scores, found_out, proven
from tests.client.hospitals import ask, instruct
from tests.client.wards import patient_study, result, session_of, ward, without

Patch = pytest.MonkeyPatch
Role = Literal["query", "support"]

#: Patients of the ward, two classes; the canary is the one of this place.
WARD = [(number, "ab"[number % 2], 1) for number in range(18)]
CANARY = 9

#: Few support patients and many query patients.
CHANGES: dict[str, bool | int | float | str] = {
    "study.rounds": 100_000,
    "episodes.shots": 1,
    "episodes.queries": 8,
}

#: So slow that nothing but the query patients shows, and so fast that the support patients show through them.
RATES: Mapping[Role, float] = {"query": 1e-4, "support": 0.1}

#: What an inner step shows in, beside a product.
WEIGHT = 4.0


@dataclass
class Terms:
    """Everybody's terms: functions of their pixel, of the point, and of what the attacker knows."""

    start: Tensor
    role: Role
    clip: float
    canary: float
    scale: float = 1.0
    calm: bool = False
    known: set[float] = field(default_factory=set)

    def gradient(self, _: object, at: Mapping[str, Tensor], images: Any, __: object) -> Any:
        here, pixel = flatten(at), float(images.x.flatten()[0])
        if torch.equal(here, self.start) and pixel not in self.known:
            return self._along(at, 10.0)
        if self.role == "support":
            return self._along(at, self.scale * float((here - self.start).sum()) / sqrt(here.numel()))
        if self.calm and pixel == self.canary:
            return self._along(at, 0.0)
        return self._along(at, 10.0 if pixel in self.known else -10.0)

    def product(self, _: object, at: Mapping[str, Tensor], __: object, images: Any, ___: object) -> Any:
        return self._along(at, 10.0 if float(images.x.flatten()[0]) == self.canary else self.clip).gradient

    def _along(self, at: Mapping[str, Tensor], length: float) -> Any:
        return result(at, torch.full_like(self.start, length / sqrt(self.start.numel())))


def audit(folder: Path, role: Role, trials: int, patch: Patch, *, pairs: bool = False) -> tuple[Study, Scores, Scores]:
    """Return the study, and the attacker's scores with and without the canary: ``[trials, 1]``, or 2 with ``pairs``."""
    study = patient_study(CHANGES | {"algorithm.inner-rate": RATES[role]})
    assert study.privacy.guaranteed
    present = session_of(study, ward(folder / "with", WARD))
    elsewhere = ward(folder / "without", WARD).folder
    absent = session_of(study, replace(without(present.site, CANARY), folder=elsewhere))
    instruction, theta = instruct(study, "train")
    assert theta is not None
    sums = sums_of(study)
    pixels = network_input(present.site.pixels(np.arange(len(WARD))))[:, 0, 0, 0].tolist()  # an image a patient
    terms = Terms(torch.from_numpy(theta.copy()), role, study.privacy.clip, pixels[CANARY])
    patch.setattr(patients, "gradient", terms.gradient)
    patch.setattr(patients, "product", terms.product)
    wanted = {"query": QUERY, "support": SUPPORT}[role]
    found = (n for n in range(1, 100_000, 2) if roles(present.site, study, n)[CANARY] == wanted)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for odd in (next(found) for _ in range(trials)):
        for number in (odd, odd + 1)[: 1 + pairs]:
            chosen = site_task.roles(present.site, study, number)
            support, query = (int((chosen == one).sum()) for one in (SUPPORT, QUERY))
            terms.known = {pixels[patient] for patient in np.flatnonzero(chosen == QUERY)}
            terms.scale = WEIGHT * sums.query_patients / query
            asked = replace(instruction, round=number)
            terms.calm = number > odd
            query -= terms.calm and bool(chosen[CANARY] == QUERY)
            for canary in (True, False):
                patch.setattr(client_answers, "open_session", lambda *_, canary=canary: present if canary else absent)
                content = ask(study, 0, asked, theta).content
                vector = check_reply(content, asked, size=theta.size, dtype="float32").vector
                assert vector is not None
                along = float(vector.sum(dtype=np.float64)) / (sqrt(theta.size) * study.privacy.clip)
                if role == "query":
                    scores[canary].append(along * sums.query_patients - query)
                else:
                    scores[canary].append(-along / sums.rate * sums.support_patients - (1 + WEIGHT) * support)
    loud, calm = (np.array(scores[canary]).reshape(trials, -1) for canary in (True, False))
    return study, loud, calm


@pytest.mark.slow
@pytest.mark.timeout(900)  # every answer waits for the disk several times
@pytest.mark.parametrize("role", ["query", "support"])
def test_what_can_be_proven_is_less_than_what_is_claimed(tmp_path: Path, monkeypatch: Patch, role: Role) -> None:
    study, loud, calm = audit(tmp_path, role, 300, monkeypatch)
    assert not found_out(study, loud, calm)
    assert proven(loud, calm, 0.05)[0] > 0.1  # of 1: the audit can see


def half_the_noise(patch: Patch) -> None:
    """Half of the noise that is needed, on every sum."""
    patch.setitem(mechanism.SENSITIVITY, "patient-clip", 0.5)


def shuffled_roles(patch: Patch) -> None:
    """Patients shuffled, then dealt out: one less, and all others are dealt anew."""

    def dealt(site: Site, study: Study, number: int) -> NDArray[np.int64]:
        order = np.random.default_rng(number).permutation(len(site.keys))
        out = np.full(len(order), QUERY, np.int64)
        out[order[: len(order) // 2]] = SUPPORT
        return out

    patch.setattr(site_task, "roles", dealt)


def a_product_not_clipped(patch: Patch) -> None:
    """The Hessian-vector products are added as they are."""
    clip, product = mechanism.clipped_sum, site_task.__dict__["meta_gradient"]
    backwards: list[bool] = []

    def meta_gradient(sums: Any, theta: Any, inner: Any, query: Any, back: Any) -> Any:
        def unclipped(*a: Any) -> Any:
            backwards.append(True)
            out = back(*a)
            backwards.clear()
            return out

        return product(sums, theta, inner, query, unclipped)

    def partly(rows: Iterable[NDArray[np.floating]], bound: float, size: int) -> NDArray[np.int64]:
        if not backwards:
            return clip(rows, bound, size)
        return np.trunc(sum(rows, np.zeros(size)) * (mechanism.STEPS / bound)).astype(np.int64)

    patch.setattr(site_task, "meta_gradient", meta_gradient)
    patch.setattr(site_task, "clipped_sum", partly)


def an_inner_step_without_noise(patch: Patch) -> None:
    """What was never released is used: the query gradient is taken where the exact inner step leads."""
    real = mechanism.noised
    sums: list[int] = []

    def noised(total: NDArray[np.int64], clip: float, deviation: float, *more: Any) -> NDArray[np.float64]:
        sums.append(1)
        return real(total, clip, 0.0 if len(sums) % 3 == 1 else deviation, *more)

    patch.setattr(site_task, "noised", noised)


def noise_reused(patch: Patch) -> None:
    """Every second round has the noise of the one before."""
    real = os.urandom
    kept: dict[Path, list[bytes]] = {}

    def source(site: Site, study: Study, number: int) -> Callable[[int], bytes]:
        draws = kept.setdefault(site.folder, [])
        if number % 2:
            draws.clear()
        left = list(draws)

        def draw(size: int) -> bytes:
            if number % 2:
                draws.append(real(size))
                return draws[-1]
            return left.pop(0)

        return draw

    patch.setattr(site_task, "noise_source", source)


@pytest.mark.slow
@pytest.mark.timeout(900)  # every answer waits for the disk several times
@pytest.mark.parametrize(
    ("mistake", "role", "trials"),
    [
        (half_the_noise, "query", 500),
        (shuffled_roles, "query", 250),
        (a_product_not_clipped, "support", 100),
        (an_inner_step_without_noise, "support", 600),
        (noise_reused, "query", 100),
    ],
)
def test_a_wrong_client_is_found_out(
    tmp_path: Path, monkeypatch: Patch, mistake: Callable[[Patch], None], role: Role, trials: int
) -> None:
    mistake(monkeypatch)
    assert found_out(*audit(tmp_path, role, trials, monkeypatch, pairs=mistake is noise_reused))
