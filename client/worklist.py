"""Whom to label next: the patients of whom an adapted model is least sure."""

import json
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from client.adapt.folder import AdaptedModel
from client.records import Table
from common.errors import DataError

__all__ = ["Candidate", "worklist"]


@dataclass(frozen=True)
class Candidate:
    """A patient whose label would help.

    Attributes
    ----------
    patient : str
        Keyed hash; empty for an image that names nobody.
    file : str
        The first of the patient's files.
    images : int
        How many there are.
    entropy : float
        Of the mean probability, as a share of the largest there can be: 0 to 1.
    unlike : bool
        Whether most of the images are unlike those that the model was adapted to.
    """

    patient: str
    file: str
    images: int
    entropy: float
    unlike: bool


def worklist(records: Path, model: AdaptedModel, used: Path) -> list[Candidate]:
    """Return the patients of a file of records by falling predictive entropy; those that supported are left out.

    Images that are unlike the support images come last, whatever their entropy: they need a look before a label.

    Parameters
    ----------
    records : Path
        As `client.predict` wrote them, with the same model.
    used : Path
        ``patients.json`` of the model's folder.

    References
    ----------
    Settles, "Active Learning Literature Survey", 2009, section 3.1 (entropy as the measure of uncertainty).
    """
    if not records.is_file():
        raise DataError("the file of records does not exist: `wardround-site predict` writes it")
    try:
        taken = set(json.loads(used.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise DataError("the model's folder has no patients.json: adapt again, or restore it") from None
    sums: dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    about: dict[str, tuple[str, str]] = {}
    counts: dict[str, list[int]] = {}
    for record in Table(records, model.classes, model.digest).records():
        if record["reason"] or record["patient"] in taken:
            continue
        who = record["patient"] or f"file {record['file']}"
        p = np.array([float(record[f"p {name}"]) for name in model.classes])
        sums[who] = sums[who] + p if who in sums else p
        about.setdefault(who, (record["patient"], record["file"]))
        count = counts.setdefault(who, [0, 0])
        count[0] += 1
        count[1] += str(record["unlike"]) == "True"
    found = []
    for who, total in sums.items():
        p = total / total.sum()
        entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum()) / log(len(p))
        images, unlike = counts[who]
        found.append(Candidate(*about[who], images, entropy, 2 * unlike > images))
    return sorted(found, key=lambda c: (c.unlike, -c.entropy, c.file))
