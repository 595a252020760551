"""What a site says that it has and can offer, against catalogues made by hand and against the sampler."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.catalogue import ASIDE, open_catalogue
from client.data.episodes import draw, make_pool
from client.data.picture import Header, Reason
from client.data.report import ADVICE, contents, offer, statement
from client.data.store import Site
from client.data.worker import Entry
from common import study
from tests.client.data.handmade import patients, picture, write_site

CT, MR = Header("CT", "Maker", "One"), Header("MR", "Maker", "Two")


def offered(folder: Path, pictures: list[Entry]) -> dict[str, Any]:
    with open_catalogue(write_site(folder, pictures) / "catalogue.sqlite") as catalogue:
        return offer(catalogue)


def everybody(label: str, train: int, validation: int = 0, test: int = 0) -> list[Entry]:
    """Return one picture of each of so many patients of a class."""
    sides = {"train": train, "validation": validation, "test": test}
    return [picture(who, label, CT) for split, number in sides.items() for who in patients(split, number)]


def test_the_offer_counts_patients_not_pictures(tmp_path: Path) -> None:
    first, second = patients("train", 2)
    more = [picture(first, "a", CT), picture(first, "a", MR), picture(second, "a", Header()), picture(None, "a", MR)]
    figures = offered(tmp_path, [*everybody("a", 5, 1, 2), *everybody("b", 2, 0, 1), *more])
    assert figures == {
        "pictures": 14,
        "patients": {"train": 5, "validation": 1, "test": 2},
        "leaks": 0,
        "classes": {
            "a": {"pictures": 11, "patients": {"train": 5, "validation": 1, "test": 2}, "largest_shots": 2},
            "b": {"pictures": 3, "patients": {"train": 2, "validation": 0, "test": 1}, "largest_shots": 1},
        },
        "shots_by_ways": {"2": 1},
        "modalities": {"CT": 12, "": 1, "MR": 1},
        "scanners": {"Maker One": 12, "": 1, "Maker Two": 1},
    }


@pytest.mark.parametrize("count", range(2, 8))
def test_the_largest_k_is_the_samplers(tmp_path: Path, count: int) -> None:
    figures = offered(tmp_path, everybody("a", count) + everybody("b", count))
    largest = figures["classes"]["a"]["largest_shots"]
    assert support_patients(count, largest) == largest
    assert support_patients(count, largest + 1) == largest


def support_patients(count: int, shots: int) -> int:
    """Return how many patients support each of two classes, of so many patients each, in drawn episodes."""
    who = np.arange(2 * count)
    site = Site(
        Path(), 0, "", np.broadcast_to(who.astype(np.uint8)[:, None, None, None], (2 * count, 1, 8, 8)),
        who, who // count, ("a", "b"), who, np.zeros(2 * count, np.int8), tuple(bytes([w]) * 16 for w in who),
    )  # fmt: skip
    spec = study.Episodes(labels="fixed", classes="a,b", held_out="", shots=shots, queries=1)
    support = draw(site, make_pool(site, ("a", "b"), 0, ("train",)), spec, 5, np.random.default_rng(0)).support
    assert support.mask is not None
    numbers = {
        len(np.unique(x[mask & (y == way), 0, 0, 0]))
        for x, y, mask in zip(support.x, support.y, support.mask, strict=True)
        for way in (0, 1)
    }
    (number,) = numbers
    return number


def test_contents_give_every_reason_a_count(tmp_path: Path) -> None:
    (who,), (other,) = patients("train", 1), patients("test", 1)
    named = Header(exposed=("PatientName", "StudyDate"), notes=("face",))
    pictures = [
        picture(who, "a", named),
        picture(None, "a"),
        picture(who, None, Header(exposed=("StudyDate",))),
        picture(who, "a", content=1),
        picture(who, "a", content=1),
        picture(who, "a", content=2),
        picture(other, "b", content=2),
    ]
    refused = [Reason.DAMAGED, Reason.CRASHED, Reason.CRASHED]
    with open_catalogue(write_site(tmp_path, pictures, refused=refused) / "catalogue.sqlite") as catalogue:
        had = contents(catalogue)
    assert had == {
        "files": 7,
        "refused": {Reason.CRASHED.value: 2, Reason.DAMAGED.value: 1},
        "pictures": 2,
        "aside": {"conflicting labels": 2, "no label": 1, "no patient": 1, "same picture twice": 1},
        "labels": {"rows": 0, "repeated": 0, "unmatched": 0},
        "identifying": {"StudyDate": 2, "PatientName": 1},
        "notes": {"face": 1},
    }
    assert list(had["refused"]) == [Reason.CRASHED.value, Reason.DAMAGED.value]  # the most frequent first


def test_there_is_advice_for_every_picture_set_aside() -> None:
    assert set(ADVICE) == set(ASIDE)


def test_nothing_to_offer(tmp_path: Path) -> None:
    (sentence,) = statement(offered(tmp_path, [picture(None, "a")]))
    assert sentence.startswith("No picture is ready")


def test_too_few_patients_are_named_with_what_is_needed(tmp_path: Path) -> None:
    said = " ".join(statement(offered(tmp_path, everybody("a", 6, 0, 2) + everybody("b", 1, 0, 1))))
    assert "No training episode can be drawn: that takes two classes with two training patients each" in said
    assert "in no training episode: b (1)." in said
    assert "cannot be tested here" in said
    assert "there is one" in said


def test_what_can_be_offered_is_said_for_few_and_for_many_ways(tmp_path: Path) -> None:
    pictures = everybody("a", 9, 0, 2) + everybody("b", 6, 0, 2) + everybody("c", 2) + everybody("d", 0, 1)
    said = " ".join(statement(offered(tmp_path, pictures)))
    assert "up to 3 ways. Shots, each of another patient: up to 3 with 2 ways, up to 1 with 3 ways." in said
    assert "in no training episode: d (0)." in said
    assert "tested" not in said


def test_of_many_small_classes_some_are_named(tmp_path: Path) -> None:
    pictures = [entry for k in range(20) for entry in everybody(f"class-{k:02}", 1)]
    said = " ".join(statement(offered(tmp_path, pictures)))
    assert "class-07 (1) and 12 more." in said
    assert "class-08" not in said


def test_a_leak_is_said_first(tmp_path: Path) -> None:
    (who,), (other,) = patients("train", 1), patients("test", 1)
    shared = [picture(who, "a", content=1), picture(other, "a", content=1)]
    figures = offered(tmp_path, [*shared, *everybody("a", 4), *everybody("b", 4)])
    assert figures["leaks"] == 1
    assert statement(figures)[0].startswith("The split leaks: 1 ")
