"""The meta-gradient of a site as one task, by the mechanism ``patient-clip``.

What one patient does: they are in the round or not, and support or query, by coins that nobody else's presence moves;
and their term in a sum is a function of their own images and of what was released before. So one patient more or less
moves every sum by the clip bound at most. `docs/privacy.md` has the proof and what it leaves out.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.augment import SYMMETRIES, transform
from client.data.episodes import network_input
from client.data.store import Site
from client.privacy import OUT, noise_source
from client.session import Session
from common.contract import TRAIN, Vector
from common.meta import Batch, Episodes, flatten, unflatten
from common.models.network import Theta
from common.privacy.mechanism import clipped_sum, noised
from common.privacy.site_task import Numbers, meta_gradient, sums_of
from common.study import Study

__all__ = ["MOST_IMAGES", "QUERY", "SUPPORT", "people", "roles", "site_gradient"]

#: What a patient does in a round that they are in.
SUPPORT, QUERY = 0, 1

#: Images of a patient in one round. It bounds the memory; what a patient can move is bounded by the clip.
MOST_IMAGES = 8


def site_gradient(session: Session, theta: Theta, number: int) -> tuple[Vector, dict[str, float]]:
    """Return a round's meta-gradient ``[D]``, made of sums with noise, and the scalars that go with it.

    The scalars are constant, but where the study forgoes its guarantee and has figures sent.

    Parameters
    ----------
    number : int
        The round: it draws the patients, always the same ones at this site and in this study. The noise is fresh every
        time, so what was sent once must be sent again and never made again.
    """
    study, site, engine = session.study, session.site, session.engine
    plan, sums, source = study.privacy, sums_of(study), noise_source(site, study, number)
    chosen = roles(site, study, number)
    support, query = (people(site, study, number, chosen == role) for role in (SUPPORT, QUERY))
    start = flatten(theta).double().numpy()
    figures: list[tuple[float, float]] = []

    def released(rows: Iterable[Numbers], deviation: float, patients: int) -> Numbers:
        return noised(clipped_sum(rows, plan.clip, start.size), plan.clip, deviation, patients, source)

    def given(numbers: Numbers) -> Theta:
        return unflatten(torch.from_numpy(numbers.astype(study.wire.dtype)), theta)

    def inner(at: Numbers) -> Numbers:
        rows = [] if support is None else engine.patient_gradients(given(at), support)
        return released((row.gradient.numpy() for row in rows), sums.support_noise, sums.support_patients)

    def outer(at: Numbers) -> Numbers:
        def rows() -> Iterator[Numbers]:
            for row in [] if query is None else engine.patient_gradients(given(at), query):
                figures.append((float(row.loss), float(row.accuracy)))
                yield row.gradient.numpy()

        return released(rows(), sums.query_noise, sums.query_patients)

    def product(at: Numbers, along: Numbers) -> Numbers:
        rows = [] if support is None else engine.patient_products(given(at), given(along), support)
        return released((row.numpy() for row in rows), sums.support_noise, sums.support_patients)

    vector = meta_gradient(sums, start, inner, outer, product).astype(study.wire.dtype)
    scalars = dict.fromkeys(TRAIN, -1.0)
    if plan.research and plan.figures == "sent" and figures:
        scalars = dict(zip(("loss", "accuracy"), np.mean(figures, axis=0).tolist(), strict=True))
    return vector, scalars


def roles(site: Site, study: Study, number: int) -> NDArray[np.int64]:
    """Return ``[P]``, what every patient does in a round, or `OUT`; no patient's depends on who else is there."""
    chosen = np.full(len(site.keys), OUT, np.int64)
    below = int(study.privacy.sampling * 2**64)
    shots, queries = study.episodes.shots, study.episodes.queries
    for patient in range(len(site.keys)):
        coin = site.coin(patient, "role", study.digest, number)
        if int.from_bytes(coin[:8], "big") < below:
            chosen[patient] = SUPPORT if int.from_bytes(coin[8:], "big") % (shots + queries) < shots else QUERY
    return chosen


def people(site: Site, study: Study, number: int, among: NDArray[np.bool_]) -> Episodes | None:
    """Return some patients' training images of the study's classes, a task each without query; None where none has any.

    Which of a patient's images, and how they are turned, follows from a generator of the patient's own.

    Parameters
    ----------
    among : ndarray
        ``[P]``: which patients.
    """
    spec = study.episodes
    known = [spec.class_names.index(name) if name in spec.class_names else -1 for name in site.label_names]
    labels = np.array(known, np.int64)[site.labels]
    usable = np.flatnonzero(site.on_side(("train",)) & (labels >= 0) & among[site.patients])
    if not len(usable):
        return None
    usable = usable[np.argsort(site.patients[usable], kind="stable")]
    patients, starts = np.unique(site.patients[usable], return_index=True)
    slots, mask = np.zeros((len(patients), MOST_IMAGES), np.int64), np.zeros((len(patients), MOST_IMAGES), np.bool_)
    turns = np.zeros((len(patients), MOST_IMAGES), np.int64)
    for row, own in enumerate(np.split(usable, starts[1:])):
        coin = site.coin(int(patients[row]), "images", study.digest, number)
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(coin, "big")))
        picked = generator.permutation(own)[:MOST_IMAGES]
        slots[row, : len(picked)], mask[row, : len(picked)] = picked, True
        turns[row] = generator.integers(SYMMETRIES, size=MOST_IMAGES)
    most = int(mask.sum(1).max())
    slots, mask, turns = slots[:, :most], mask[:, :most], turns[:, :most]
    x, y = network_input(site.pixels(slots)), torch.from_numpy(np.where(mask, labels[slots], 0))
    if spec.augment == "image":
        transform(x, turns)
    nobody = Batch(x[:, :0], y[:, :0], None)
    return Episodes(Batch(x, y, torch.from_numpy(mask)), nobody, torch.arange(len(known)).repeat(len(patients), 1))
