"""Who was really in a round, and with which images. Attacks never see it: it scores them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client import privacy, site_task
from client.data.augment import SYMMETRIES, transform
from client.data.store import Site
from client.release import plain_episodes
from client.session import Session
from common.meta import Batch, Episodes
from common.pixels import CENTRE, SPREAD

__all__ = ["Places", "Truth", "labels_of", "offered", "patients", "truth", "unseen"]

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Truth:
    """What a site did in one round.

    Attributes
    ----------
    support, query : ndarray
        The site's images that the meta-gradient was computed from.
    roles : dict of str to ndarray
        Patients by what they did, as the mechanism tells them apart: by their own coins where it has coins.
    out : ndarray
        Training patients who were not in the round.
    """

    support: Places
    query: Places
    roles: Mapping[str, Places]
    out: Places


def truth(session: Session, number: int) -> Truth:
    """Return what a site did in a round, drawn anew from its key as its client draws it."""
    return _TRUTHS[session.study.privacy.mechanism](session, number)


def offered(session: Session) -> Places:
    """Return the images that a site's training can use: training patients', of the study's classes."""
    places = np.arange(len(session.site.slots))
    return np.flatnonzero(session.site.on_side(("train",)) & (labels_of(session, places) >= 0))


def patients(session: Session) -> Places:
    """Return the patients whose images a site's training can use, ascending."""
    found: Places = np.unique(session.site.patients[offered(session)])
    return found


def labels_of(session: Session, places: Places) -> Places:
    """Return the labels of some images as the study's head counts them, -1 for a class that it has not."""
    names = session.study.episodes.class_names
    heads = np.array([names.index(n) if n in names else -1 for n in session.site.label_names], np.int64)
    labels: Places = heads[session.site.labels[places]]
    return labels


def unseen(session: Session) -> Places:
    """Return the images of a site's patients who never train, of the study's classes: an attacker's own at best."""
    places = np.arange(len(session.site.slots))
    return np.flatnonzero(session.site.on_side(("test",)) & (labels_of(session, places) >= 0))


def _plain(session: Session, number: int) -> Truth:
    support, query = _used(session.site, [plain_episodes(session, number)])
    helpers, judges = (np.unique(session.site.patients[images]) for images in (support, query))
    roles = {"support": np.setdiff1d(helpers, judges), "query": judges}
    return Truth(support, query, roles, np.setdiff1d(patients(session), np.union1d(helpers, judges)))


def _by_bins(session: Session, number: int) -> Truth:
    study, site, everybody = session.study, session.site, patients(session)
    support, query = _used(site, privacy.episodes_of_bins(site, study, number).values())
    chosen = privacy.bins(site, study, number)[everybody]
    roles = {"in the round": everybody[chosen != privacy.OUT]}
    return Truth(support, query, roles, everybody[chosen == privacy.OUT])


def _by_roles(session: Session, number: int) -> Truth:
    study, site, everybody = session.study, session.site, patients(session)
    chosen = site_task.roles(site, study, number)
    people = [site_task.people(site, study, number, chosen == role) for role in (site_task.SUPPORT, site_task.QUERY)]
    known = _known(site)
    support, query = (_places(known, [] if some is None else [some.support]) for some in people)
    roles = {
        name: everybody[chosen[everybody] == role]
        for name, role in (("support", site_task.SUPPORT), ("query", site_task.QUERY))
    }
    return Truth(support, query, roles, everybody[chosen[everybody] == privacy.OUT])


_TRUTHS: Mapping[str, Callable[[Session, int], Truth]] = {
    "none": _plain,
    "episode-clip": _by_bins,
    "patient-clip": _by_roles,
}


def _used(site: Site, episodes: Iterable[Episodes]) -> tuple[Places, Places]:
    drawn, known = list(episodes), _known(site)
    return _places(known, [e.support for e in drawn]), _places(known, [e.query for e in drawn])


def _places(known: Mapping[bytes, int], batches: Iterable[Batch]) -> Places:
    """Return which of the ``known`` images are in some batches, padding left out."""
    found = set()
    for batch in batches:
        pixels = batch.x.mul(SPREAD).add(CENTRE).round().to(torch.uint8)
        rows = pixels if batch.mask is None else pixels[batch.mask]
        found |= {known[row.numpy().tobytes()] for row in rows.reshape(-1, *pixels.shape[-3:])}
    return np.array(sorted(found), np.int64)


def _known(site: Site) -> dict[bytes, int]:
    """Return each of the site's images by its pixels, turned and mirrored in every way that augmentation does it."""
    images = torch.from_numpy(site.pixels(np.arange(len(site.slots))))
    known: dict[bytes, int] = {}
    for element in reversed(range(SYMMETRIES)):  # an image as it is comes before another one that was turned
        turned = images[None].clone()
        transform(turned, np.full(turned.shape[:2], element))
        known |= {pixels.numpy().tobytes(): place for place, pixels in enumerate(turned[0])}
    return known
