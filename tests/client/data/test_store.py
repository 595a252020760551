"""A site's folder: whole or not there, and no patient in it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.data.catalogue import Split, open_catalogue
from client.data.image import Recipe
from client.data.index import Plan, index
from client.data.store import Site, open_site
from common.errors import DataError, NotPreparedError

KEY = bytes(range(32))
RECIPE = Recipe(1, 8)


def created(folder: Path, patients: Sequence[int], *, each: int = 2, key: bytes = KEY, test: float = 0.3) -> Site:
    """Return a site with some images of each patient; the images tell patient and number."""
    folder.mkdir()
    number = np.repeat(np.array(patients), each) * 4 + np.tile(np.arange(each), len(patients))
    images = np.zeros((len(number), 8, 8), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = number // 256, number % 256
    groups = [f"patient {n // 4}" for n in number]
    np.savez(folder / "set.npz", images=images, labels=number // 4 % 2, groups=groups, label_names=["a", "b"])
    plan = Plan(
        folder / "site", [folder / "set.npz"], [RECIPE], split=Split(0.1, test), name="hospital-4", number=4, key=key
    )
    index(plan)
    return open_site(folder / "site", RECIPE)


def numbers_in(site: Site) -> NDArray[np.int64]:
    pixels = site.pixels(np.arange(len(site.labels))).astype(np.int64)
    return pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 0, 1]


def test_a_site_is_read_as_it_was_indexed(tmp_path: Path) -> None:
    site = created(tmp_path / "a", range(6))
    assert (site.index, site.name, site.label_names) == (4, "hospital-4", ("a", "b"))
    np.testing.assert_array_equal(numbers_in(site), [4 * p + i for p in range(6) for i in range(2)])
    np.testing.assert_array_equal(site.labels, [0, 0, 1, 1] * 3)
    assert len(set(site.patients)) == 6
    np.testing.assert_array_equal(site.patients[::2], site.patients[1::2])
    assert not site.cache.flags.writeable
    raw = next(site.folder.glob("cache/*/pixels.raw"))
    with raw.open("r+b") as file:
        file.write(b"\xff")
    assert site.cache.flat[0] == 255  # mapped: nothing was read beforehand


def test_a_recipe_without_a_cache_is_not_prepared(tmp_path: Path) -> None:
    site = created(tmp_path / "a", range(6))
    with pytest.raises(NotPreparedError, match="wardround-site index --study"):
        open_site(site.folder, Recipe(1, 9))


def test_a_cache_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    site = created(tmp_path / "a", range(6))
    (pixels,) = site.folder.glob("cache/*/pixels.raw")
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(DataError, match="shorter"):
        open_site(site.folder, RECIPE)


def test_a_site_whose_split_leaks_is_not_opened(tmp_path: Path) -> None:
    site = created(tmp_path / "a", range(6))
    with open_catalogue(site.folder / "catalogue.sqlite", new={}) as catalogue:
        catalogue.database.execute("UPDATE meta SET value = '1' WHERE key = 'leaks'")
    with pytest.raises(DataError, match="leaks"):
        open_site(site.folder, RECIPE)


def sides(folder: Path, patients: Sequence[int], *, each: int = 2) -> dict[int, int]:
    """Return each patient's side, by the patient's number."""
    site = created(folder, patients, each=each)
    side = dict(zip((numbers_in(site) // 4).tolist(), site.split.tolist(), strict=True))
    assert all(side[n // 4] == s for n, s in zip(numbers_in(site).tolist(), site.split, strict=True))
    return side


def test_a_patients_side_stays_when_data_are_added(tmp_path: Path) -> None:
    few = sides(tmp_path / "few", range(40))
    assert set(few.values()) == {0, 1, 2}
    more = sides(tmp_path / "more", range(60), each=3)
    assert {patient: more[patient] for patient in few} == few
    assert sides(tmp_path / "again", range(39, -1, -1)) == few


def test_the_test_split_has_the_share_that_was_asked_for_and_grows_with_it(tmp_path: Path) -> None:
    third = created(tmp_path / "third", range(300), each=1).on_side(["test"])
    half = created(tmp_path / "half", range(300), each=1, test=0.5).on_side(["test"])
    assert 0.2 < third.mean() < 0.4
    assert 0.4 < half.mean() < 0.6
    assert (half | ~third).all()
    other = created(tmp_path / "other", range(300), each=1, test=0.5, key=bytes(32)).on_side(["test"])
    assert (other != half).any()  # a split that nobody without the key can tell


def test_the_generator_follows_from_key_and_purpose_alone(tmp_path: Path) -> None:
    site = created(tmp_path / "site", range(4))
    twin = created(tmp_path / "twin", range(9))
    stranger = created(tmp_path / "stranger", range(4), key=bytes(32))

    def numbers(site: Site, *purpose: object) -> tuple[int, ...]:
        return tuple(site.generator(*purpose).integers(2**32, size=4).tolist())

    first = numbers(site, "train", "digest", 1)
    assert numbers(site, "train", "digest", 1) == first
    assert numbers(replace(site), "train", "digest", 1) == first
    assert numbers(open_site(site.folder, RECIPE), "train", "digest", 1) == first
    assert numbers(twin, "train", "digest", 1) == first
    others = [
        numbers(site, "train", "digest", 2),
        numbers(site, "train", "digest", "1"),
        numbers(site, "evaluate", "digest", 1),
        numbers(site, "train", "other", 1),
        numbers(site, "train", "digest", 1, 1),
        numbers(site),
        numbers(stranger, "train", "digest", 1),
    ]
    assert len({first, *others}) == 8


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotPreparedError, match="wardround-site index"):
        open_site(tmp_path / "nowhere", RECIPE)
    assert list(tmp_path.iterdir()) == []
