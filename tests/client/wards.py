"""Sites in memory whose patients can be taken away one by one, and learners made for the worst case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.data.keys import load_key
from client.data.store import Site
from client.session import Session
from common.meta import Engine, flatten, make_learner
from common.meta.autodiff import Autodiff
from common.meta.episodes import Episodes
from common.meta.fomaml import Fomaml
from common.meta.learner import EpisodeGradient
from common.models import build
from common.models.network import Network, Theta
from common.study import Study
from tests.client.hospitals import tiny_study

__all__ = ["Hashed", "Recogniser", "patient_study", "private_study", "result", "session_of", "ward", "without"]

_PRIVATE: Mapping[str, bool | int | float | str] = {
    "algorithm.name": "fomaml",
    "model.width": 1,
    "episodes.classes": "a,b",
    "episodes.held-out": "",
    "episodes.ways": 2,
    "episodes.shots": 4,
    "episodes.queries": 16,
    "privacy.mechanism": "episode-clip",
    "privacy.clip": 0.5,
    "privacy.noise": 1.0,
    "privacy.sampling": 1.0,
    "privacy.delta": 1e-5,
    "privacy.figures": "withheld",
}
_BY_PATIENT: Mapping[str, bool | int | float | str] = {
    "algorithm.name": "maml",
    "model.norm": "group",
    "episodes.labels": "fixed",
    "episodes.per-round": 1,
    "privacy.mechanism": "patient-clip",
}


def private_study(changes: Mapping[str, bool | int | float | str] | None = None) -> Study:
    return tiny_study({**_PRIVATE, **(changes or {})})


def patient_study(changes: Mapping[str, bool | int | float | str] | None = None) -> Study:
    """Return the same with the other mechanism: the site is one task."""
    return private_study({**_BY_PATIENT, **(changes or {})})


def ward(folder: Path, patients: Sequence[tuple[int, str, int]], *, size: int = 16) -> Site:
    """Return a site of patients, each a number below 256, a class and so many images; a pixel is the patient's number.

    Patients are in the order of their keys, as at a real site: who is taken away changes the numbers of others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    load_key(folder / "site.key", new=b"k" * 32)
    ordered = sorted(patients, key=lambda patient: _key(patient[0]))
    places = [place for place, (_, _, images) in enumerate(ordered) for _ in range(images)]
    names = sorted({name for _, name, _ in ordered})
    pixels = np.array([ordered[place][0] for place in places], np.uint8)
    return Site(
        folder,
        0,
        "hospital-0",
        np.broadcast_to(pixels[:, None, None, None], (len(places), 1, size, size)).copy(),
        np.arange(len(places)),
        np.array([names.index(ordered[place][1]) for place in places]),
        tuple(names),
        np.array(places, np.int64),
        np.zeros(len(places), np.int8),
        tuple(_key(number) for number, _, _ in ordered),
    )


def _key(number: int) -> bytes:
    return sha256(bytes([number])).digest()[:16]


def without(site: Site, patient: int) -> Site:
    """Return a site without one patient, everything numbered anew as when it is opened."""
    keep = site.patients != patient
    labels, index = np.unique([site.label_names[label] for label in site.labels[keep]], return_inverse=True)
    _, patients = np.unique(site.patients[keep], return_inverse=True)
    left = tuple(site.keys[p] for p in np.unique(site.patients[keep]))
    return replace(
        site,
        slots=site.slots[keep],
        labels=index,
        label_names=tuple(map(str, labels)),
        patients=patients,
        split=site.split[keep],
        keys=left,
    )


def session_of(study: Study, site: Site, learner: Fomaml | None = None) -> Session:
    """Return a session on a site in memory, with a learner of the test's own or the study's."""
    network = build(study.model, classes=study.episodes.ways, seed=0, dtype=torch.float32)
    engine: Any = Engine(learner or make_learner(study.algorithm), network)
    theta = engine.learner.theta(network)
    return Session(study, site, engine, theta, engine, theta)


def _seen(task: Episodes) -> frozenset[float]:
    """Return which patients are in an episode."""
    return frozenset(float(x) for batch in (task.support, task.query) for x in batch.x[:, 0, 0, 0])


@dataclass(frozen=True)
class Hashed(Fomaml):
    """A gradient in a direction and of a length that only the very set of an episode's patients gives."""

    inner_steps: int = 1
    inner_rate: float = 0.1
    test_rate: float = 0.1
    recompute: bool = False

    def episode_gradient(self, network: Network, theta: Theta, task: Episodes, autodiff: Autodiff) -> EpisodeGradient:
        seed = sha256(repr(sorted(_seen(task))).encode()).digest()
        generator = np.random.default_rng(list(seed))
        length = generator.choice([0.01, 1.0, 100.0, 1e30, np.nan])
        size = sum(t.numel() for t in theta.values())
        # Few directions, so that vectors are often opposite.
        vector = generator.choice([-1.0, 1.0]) * np.eye(1, size, int(generator.integers(2)))[0] * length
        return result(theta, torch.from_numpy(vector))


@dataclass(frozen=True)
class Recogniser(Fomaml):
    """One gradient for the bins that it knows, and its opposite for all others: the worst that the sum can meet.

    ``calm`` rounds give the one gradient to all.
    """

    inner_steps: int = 1
    inner_rate: float = 0.1
    test_rate: float = 0.1
    recompute: bool = False
    known: set[frozenset[float]] = field(default_factory=set)
    mode: list[str] = field(default_factory=lambda: ["learn"])

    def episode_gradient(self, network: Network, theta: Theta, task: Episodes, autodiff: Autodiff) -> EpisodeGradient:
        seen, (mode,) = _seen(task), self.mode
        if mode == "learn":
            self.known.add(seen)
        sign = 1.0 if mode == "calm" or seen in self.known else -1.0
        return result(theta, torch.full_like(flatten(theta), 10 * sign))


def result(theta: Theta, vector: Tensor) -> EpisodeGradient:
    """Return a vector ``[D]`` as what a learner gives for a task."""
    sizes = [t.numel() for t in theta.values()]
    parts = torch.split(vector.to(torch.float32), sizes)
    gradient = {name: part.view(t.shape) for (name, t), part in zip(theta.items(), parts, strict=True)}
    return EpisodeGradient(gradient, torch.zeros(()), torch.zeros(()))
