"""Catalogues and caches made by hand, without files to read: what is in them is known."""

from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np

from client.data.cache import PixelCache
from client.data.catalogue import Known, Split, open_catalogue, split_of
from client.data.image import Recipe
from client.data.picture import Header, Reason
from client.data.worker import Entry

KEY = bytes(range(32))
SPLIT = Split(0.2, 0.3)
_CONTENTS = count(1000)


def patients(split: str, number: int) -> list[bytes]:
    """Return keyed hashes of the first patients who are on one side of the split."""
    everybody = (k.to_bytes(16, "big") for k in count(1))
    return list(islice((who for who in everybody if split_of(KEY, who, SPLIT) == split), number))


def picture(
    patient: bytes | None,
    label: str | None,
    header: Header | None = None,
    *,
    shade: int = 0,
    content: int | None = None,
    recipe: Recipe | None = None,
) -> Entry:
    """Return a picture as a worker gives it, all its pixels ``shade``; without ``content``, it is like no other."""
    return Entry(
        {} if patient is None else {"PatientID": patient},
        (next(_CONTENTS) if content is None else content).to_bytes(16, "big"),
        header or Header(),
        0,
        label,
        () if recipe is None else (bytes([shade]) * int(np.prod(recipe.shape)),),
    )


def write_site(
    folder: Path, pictures: Sequence[Entry], *, recipe: Recipe | None = None, refused: Sequence[Reason] = ()
) -> Path:
    """Write a site folder: its catalogue, and its cache where there is a recipe."""
    folder.mkdir(exist_ok=True)
    settings = {
        "name": "site", "number": "0", "frames": "all", "volumes": "no", "deidentified": "no",
        "validation": repr(SPLIT.validation), "test": repr(SPLIT.test),
    }  # fmt: skip
    with open_catalogue(folder / "catalogue.sqlite", new=settings) as catalogue:
        cache = None if recipe is None else PixelCache.open(folder, recipe)
        with catalogue.transaction():
            for number, entry in enumerate(pictures):
                unit = number.to_bytes(16, "big")
                slot = catalogue.add(unit, entry)
                catalogue.remember(unit, b"root", Known(b"stamp", unit, None, 1), 1)
                if cache is not None:
                    cache.write(catalogue, slot, entry.pixels[0])
            for number, reason in enumerate(refused):
                key = b"refused %d" % number
                catalogue.remember(key, b"root", Known(b"stamp", key, reason.name, 1), 1)
            catalogue.settle(KEY)
            leaks = str(catalogue.leaks(KEY))
            catalogue.database.execute("INSERT OR REPLACE INTO meta VALUES ('leaks', ?)", (leaks,))
        if cache is not None:
            cache.close()
    return folder
