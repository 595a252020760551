"""A site's folder: whole or not there, and no patient in it."""

import hashlib
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.data.image import Recipe, SourceImage
from client.data.store import Site, create_site, open_site
from common.errors import DataError, NotPreparedError

KEY = bytes(range(32))
CANARY = "Kowalska^Zofia^19511224"


def images(patients: int, *, each: int = 2, prefix: str = "patient ") -> Iterator[SourceImage]:
    for patient in range(patients):
        for number in range(each):
            pixels = np.full((8, 8), (patient * each + number) % 256, np.uint8)
            yield SourceImage(pixels, f"{prefix}{patient}", "ab"[patient % 2], "CT")


def created(
    folder: Path, source: Iterator[SourceImage], *, key: bytes = KEY, test_fraction: float = 0.3, size: int = 8
) -> Site:
    create_site(
        folder, source, index=4, name="hospital-4", key=key, recipe=Recipe(1, size), test_fraction=test_fraction
    )
    return open_site(folder)


def test_a_site_is_read_as_it_was_written(tmp_path: Path) -> None:
    site = created(tmp_path / "site", images(6))
    assert (site.index, site.name, site.label_names) == (4, "hospital-4", ("a", "b"))
    assert site.pixels.shape == (12, 1, 8, 8)
    np.testing.assert_array_equal(site.pixels[:, 0, 0, 0], np.arange(12))
    np.testing.assert_array_equal(site.labels, [0, 0, 1, 1] * 3)
    assert len(set(site.patients)) == 6
    np.testing.assert_array_equal(site.patients[::2], site.patients[1::2])
    assert not site.pixels.flags.writeable
    assert isinstance(site.pixels, np.memmap)


def test_an_exception_half_way_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "sites" / "site"

    def broken() -> Iterator[SourceImage]:
        yield from images(3)
        assert not folder.exists()  # it appears whole, at the end
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        created(folder, broken())
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(NotPreparedError, match="wardround-lab prepare"):
        open_site(folder)
    created(folder, images(3))  # and nothing is in the way of a second try


VOLUME = SourceImage(np.zeros((8, 8, 8), np.uint8), "p", "a", volume=True)


@pytest.mark.parametrize("source", [[], [VOLUME]], ids=["none", "wrong dimensions"])
def test_a_source_without_a_usable_image_leaves_nothing(tmp_path: Path, source: list[SourceImage]) -> None:
    with pytest.raises(DataError):
        created(tmp_path / "site", iter(source))
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    created(folder, images(3))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="not empty"):
        created(folder, images(5))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_no_patient_can_be_found_in_the_folder(tmp_path: Path) -> None:
    created(tmp_path / "site", images(4, prefix=CANARY))
    everything = b"".join(path.name.encode() + path.read_bytes() for path in (tmp_path / "site").iterdir())
    assert b"hospital-4" in everything
    for patient in (f"{CANARY}{number}" for number in range(4)):
        name = patient.encode()
        # Without the key a hash says nothing; one without a key could be found by trying all names.
        hashes = [hashlib.new(kind, name) for kind in ("md5", "sha1", "sha256", "sha512", "blake2b")]
        traces = [part for h in hashes for part in (h.digest()[:8], h.hexdigest()[:16].encode())]
        for trace in [name, patient.encode("utf-16-le"), name.hex().encode(), CANARY.encode(), b"Zofia", *traces]:
            assert trace not in everything


def test_the_key_is_secret_and_makes_the_hashes(tmp_path: Path) -> None:
    created(tmp_path / "one", images(4))
    created(tmp_path / "two", images(4), key=bytes(32))
    assert stat.S_IMODE((tmp_path / "one" / "site.key").stat().st_mode) == 0o600
    assert (tmp_path / "one" / "site.key").read_bytes() == KEY
    hashes = []
    for name in ("one", "two"):
        database = sqlite3.connect(tmp_path / name / "catalogue.sqlite")
        hashes.append({row[0] for row in database.execute("SELECT patient FROM image")})
        database.close()
    assert len(hashes[0]) == len(hashes[1]) == 4
    assert not hashes[0] & hashes[1]
    assert all(len(value) == 16 for value in hashes[0])


def sides(folder: Path, source: Iterator[SourceImage], patients: list[int]) -> dict[int, bool]:
    """Return each patient's side, by the patient that each image was made from, in order."""
    site = created(folder, source)
    side = dict(zip(patients, site.is_test.tolist(), strict=True))
    assert all(side[patient] == test for patient, test in zip(patients, site.is_test, strict=True))
    return side


def test_a_patients_side_stays_when_data_are_added(tmp_path: Path) -> None:
    few = sides(tmp_path / "few", images(40), [p for p in range(40) for _ in range(2)])
    assert set(few.values()) == {True, False}
    more = sides(tmp_path / "more", images(60, each=3), [p for p in range(60) for _ in range(3)])
    assert {patient: more[patient] for patient in few} == few
    backwards = list(images(40))[::-1]
    again = sides(tmp_path / "again", iter(backwards), [p for p in range(39, -1, -1) for _ in range(2)])
    assert again == few


def test_the_test_split_has_the_share_that_was_asked_for_and_grows_with_it(tmp_path: Path) -> None:
    third = created(tmp_path / "third", images(300, each=1), test_fraction=0.3).is_test
    half = created(tmp_path / "half", images(300, each=1), test_fraction=0.5).is_test
    assert 0.2 < third.mean() < 0.4
    assert 0.4 < half.mean() < 0.6
    assert (half | ~third).all()
    other = created(tmp_path / "other", images(300, each=1), test_fraction=0.5, key=bytes(32)).is_test
    assert (other != half).any()  # a split that nobody without the key can tell


def test_the_generator_follows_from_key_and_purpose_alone(tmp_path: Path) -> None:
    site = created(tmp_path / "site", images(4))
    twin = created(tmp_path / "twin", images(9))
    stranger = created(tmp_path / "stranger", images(4), key=bytes(32))

    def numbers(site: Site, *purpose: object) -> tuple[int, ...]:
        return tuple(site.generator(*purpose).integers(2**32, size=4).tolist())

    first = numbers(site, "train", "digest", 1)
    assert numbers(site, "train", "digest", 1) == first
    assert numbers(replace(site), "train", "digest", 1) == first
    assert numbers(open_site(site.folder), "train", "digest", 1) == first
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
    with pytest.raises(NotPreparedError, match="wardround-lab prepare"):
        open_site(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
