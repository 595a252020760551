"""Indexing: what is new is read, what is gone is gone, what is wrong is set aside, and nothing else happens."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from fcntl import LOCK_EX, flock
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.data.cache import PixelCache, evict, verify
from client.data.catalogue import Split, open_catalogue
from client.data.dicom import read_dicom
from client.data.image import Recipe, prepare
from client.data.index import Counts
from client.data.keys import keyed
from client.data.labels import Labels
from client.data.picture import Reading, Reason
from client.data.pool import CRASHED, TOO_SLOW, Failure
from client.data.report import contents, offer
from client.data.store import open_site
from client.data.worker import Task
from common.errors import DataError, NotPreparedError
from simulations.phantoms import SCANNERS, write_hospital
from tests.client.data.folders import (
    KEY,
    RECIPE,
    cached,
    column,
    dicom,
    grey,
    indexed,
    png,
    rows,
    series,
    snapshot,
    table,
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_hospital(folder, scanner=SCANNERS[0], lesions=("disc", "ring"), patients_per_lesion=4, seed=0, size=32)
    return folder


def numbers(counts: Counts) -> tuple[int, int, int, int]:
    return counts.read, counts.unchanged, counts.refused, counts.gone


def pictures(folder: Path, count: int, start: int = 0) -> Path:
    for number in range(start, start + count):
        png(folder / f"{number:03}.png", grey(number))
    return folder


def shown(number: int) -> NDArray[np.float32]:
    return grey(number).astype(np.float32) / np.float32(255)


def patients(folder: Path, sources: Path, label: str = "a") -> Labels:
    """Return a labels file that gives every picture a patient of its own."""
    names = sorted(path.relative_to(sources).as_posix() for path in sources.rglob("*.png"))
    return Labels(table(folder / "labels.csv", [("path", "patient", "label"), *((n, n, label) for n in names)]), {})


# What is read.


def test_phantoms_are_read_as_their_reader_reads_them(archive: Path, tmp_path: Path) -> None:
    labels = Labels(archive / "labels.csv", {})
    counts = indexed(tmp_path, archive / "dicom", labels=labels, workers=2)
    files = sorted((archive / "dicom").rglob("*.dcm"))
    assert numbers(counts) == (len(files), 0, 0, 0)
    site = tmp_path / "site"
    by_instance = {}
    for path in files:
        [picture] = read_dicom(path, Reading())
        by_instance[keyed(KEY, "SOPInstanceUID", picture.identifiers["SOPInstanceUID"])] = (
            prepare(picture.shown("header"), RECIPE),
            keyed(KEY, "PatientID", picture.identifiers["PatientID"]),
            picture.header.modality,
        )
    found = rows(site, "SELECT slot, instance, own_patient, modality, aside FROM image")
    assert len(found) == len(by_instance) == len(files)
    for slot, instance, patient, modality, aside in found:
        pixels, who, kind = by_instance[instance]
        np.testing.assert_array_equal(cached(site)[slot - 1], pixels)
        assert (patient, modality, aside) == (who, kind, None)
    opened = open_site(site, RECIPE)
    assert opened.label_names == ("disc", "ring")
    assert len(set(opened.patients)) == 8
    with open_catalogue(site / "catalogue.sqlite") as catalogue:
        assert list(verify(site, catalogue)) == []
        assert sum(about["pictures"] for about in offer(catalogue)["classes"].values()) == len(files)


def test_a_second_run_reads_nothing(archive: Path, tmp_path: Path) -> None:
    labels = Labels(archive / "labels.csv", {})
    counts = indexed(tmp_path, archive / "dicom", labels=labels)
    before = snapshot(tmp_path / "site")
    again = indexed(tmp_path, archive / "dicom", labels=labels)
    assert numbers(again) == (0, counts.read, 0, 0)
    assert snapshot(tmp_path / "site") == before
    kept = indexed(tmp_path, archive / "dicom")  # labels stay
    assert numbers(kept) == (0, counts.read, 0, 0)
    assert snapshot(tmp_path / "site") == before


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 70)
    for at, workers in enumerate((1, 3)):
        (tmp_path / str(at)).mkdir()
        indexed(tmp_path / str(at), tmp_path / "in", workers=workers)
    assert snapshot(tmp_path / "0" / "site") == snapshot(tmp_path / "1" / "site")


def test_new_files_are_read_and_changed_ones_again(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 4), tmp_path / "site"
    indexed(tmp_path, source, labels=patients(tmp_path, source))
    old = column(site, "slot")
    png(source / "001.png", grey(50))
    pictures(source, 1, start=4)
    assert numbers(indexed(tmp_path, source, labels=patients(tmp_path, source))) == (2, 3, 0, 0)
    # The changed one has a new slot, and its old pixels are not there any more.
    slots = column(site, "slot")
    assert slots == [1, 3, 4, 5, 6]
    assert old == [1, 2, 3, 4]
    expected = [grey(0), np.zeros((8, 8)), grey(2), grey(3), grey(50), grey(4)]
    np.testing.assert_array_equal(cached(site)[:, 0], expected)
    os.utime(source / "001.png", ns=(1, 1))  # only the time: read again, and the same comes of it
    assert numbers(indexed(tmp_path, source)) == (1, 4, 0, 0)
    np.testing.assert_array_equal(cached(site)[-1, 0], grey(50))


def test_a_removed_file_leaves_nothing_behind(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 3), tmp_path / "site"
    indexed(tmp_path, source, labels=patients(tmp_path, source, "kept"))
    traces = rows(site, "SELECT path, content, patient FROM image WHERE slot = 2")[0]
    key = rows(site, "SELECT key FROM file WHERE unit = (SELECT unit FROM image WHERE slot = 2)")[0][0]
    before = (site / "catalogue.sqlite").read_bytes()
    assert all(trace in before for trace in (*traces, key))
    (source / "001.png").unlink()
    assert numbers(indexed(tmp_path, source, labels=patients(tmp_path, source, "kept"))) == (0, 2, 0, 1)
    assert column(site, "slot") == [1, 3]
    assert rows(site, "SELECT slot FROM cached") == [(1,), (3,)]
    assert not cached(site)[1].any()
    np.testing.assert_array_equal(cached(site)[[0, 2], 0], [grey(0), grey(2)])
    after = (site / "catalogue.sqlite").read_bytes()
    assert not any(trace in after for trace in (*traces, key))
    assert rows(site, "SELECT * FROM wipe") == []
    pictures(source, 1, start=9)
    indexed(tmp_path, source)
    assert column(site, "slot") == [1, 3, 4]  # never 2 again


def test_a_folder_that_is_not_named_keeps_its_pictures(tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "a", 2), pictures(tmp_path / "b", 2, start=10)
    indexed(tmp_path, a, b)
    (a / "000.png").unlink()
    assert numbers(indexed(tmp_path, b)) == (0, 2, 0, 0)
    assert len(column(tmp_path / "site", "slot")) == 4
    assert numbers(indexed(tmp_path, a)) == (0, 1, 0, 1)
    assert len(column(tmp_path / "site", "slot")) == 3


# Recipes and caches.


def test_another_recipe_reads_again_for_its_cache_alone(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 3), tmp_path / "site"
    (source / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    indexed(tmp_path, source, labels=patients(tmp_path, source))
    before = rows(site, "SELECT * FROM image")
    pixels, changed = cached(site), (site / "cache" / RECIPE.digest / "pixels.raw").stat().st_mtime_ns
    large = Recipe(3, 16)
    assert numbers(indexed(tmp_path, source, recipes=[large])) == (3, 1, 0, 0)
    assert rows(site, "SELECT * FROM image") == before
    np.testing.assert_array_equal(cached(site), pixels)
    assert (site / "cache" / RECIPE.digest / "pixels.raw").stat().st_mtime_ns == changed
    np.testing.assert_array_equal(cached(site, large)[1], prepare(shown(1), large))
    # From now on both are kept, whichever is asked for.
    pictures(source, 1, start=3)
    assert numbers(indexed(tmp_path, source)) == (1, 4, 0, 0)
    np.testing.assert_array_equal(cached(site, large)[3], prepare(shown(3), large))
    assert len(open_site(site, RECIPE).labels) == len(open_site(site, large).labels) == 3


def test_an_evicted_cache_comes_back(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 3), tmp_path / "site"
    indexed(tmp_path, source, labels=patients(tmp_path, source), recipes=[RECIPE, Recipe(1, 4)])
    before = snapshot(site)
    with open_catalogue(site / "catalogue.sqlite", new={}) as catalogue:
        evict(site, catalogue, RECIPE)
    with pytest.raises(NotPreparedError):
        open_site(site, RECIPE)
    assert len(open_site(site, Recipe(1, 4)).labels) == 3
    assert numbers(indexed(tmp_path, source)) == (3, 0, 0, 0)
    assert snapshot(site) == before


@pytest.mark.parametrize("how", ["folder removed", "cut off"])
def test_a_cache_that_was_damaged_by_hand_is_filled_again(tmp_path: Path, how: str) -> None:
    source, site = pictures(tmp_path / "in", 3), tmp_path / "site"
    indexed(tmp_path, source, labels=patients(tmp_path, source))
    folder = site / "cache" / RECIPE.digest
    if how == "cut off":
        os.truncate(folder / "pixels.raw", 100)
    else:
        shutil.rmtree(folder)
    pictures(source, 1, start=3)
    assert numbers(indexed(tmp_path, source)) == (4, 0, 0, 0)
    np.testing.assert_array_equal(cached(site)[:, 0], [grey(i) for i in range(4)])


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 3), tmp_path / "site"
    indexed(tmp_path, source)
    path = site / "cache" / RECIPE.digest / "pixels.raw"
    data = bytearray(path.read_bytes())
    data[64 + 5] ^= 1
    path.write_bytes(data)
    with open_catalogue(site / "catalogue.sqlite") as catalogue:
        assert list(verify(site, catalogue)) == [(RECIPE.digest, 2)]


def test_a_study_of_other_dimensions_takes_nothing_from_the_first(tmp_path: Path) -> None:
    source, site, solid = pictures(tmp_path / "in", 2), tmp_path / "site", Recipe(1, 5, dimensions=3)
    volumes = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 5), np.uint8)
    np.savez(source / "set.npz", images=volumes, labels=[0, 1], groups=[5, 6])
    counts = indexed(tmp_path, source, labels=patients(tmp_path, source))
    assert [(path.name, reason) for path, reason in counts.refusals] == [("set.npz", Reason.NOT_FOR_STUDY)]
    before = cached(site)
    # What was refused for a study is read for another, and not again for the same.
    assert numbers(indexed(tmp_path, source, recipes=[solid])) == (3, 0, 0, 0)
    assert numbers(indexed(tmp_path, source, recipes=[solid])) == (0, 3, 0, 0)
    np.testing.assert_array_equal(cached(site)[:2], before)
    np.testing.assert_array_equal(cached(site, solid)[2:, 0], volumes)
    assert len(open_site(site, RECIPE).labels) == len(open_site(site, solid).labels) == 2
    with open_catalogue(site / "catalogue.sqlite") as catalogue:
        assert list(verify(site, catalogue)) == []


def test_without_a_recipe_there_is_a_catalogue_and_no_cache(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 2)
    assert numbers(indexed(tmp_path, source, recipes=[])) == (2, 0, 0, 0)
    assert list((tmp_path / "site").glob("cache/*")) == []
    assert numbers(indexed(tmp_path, source, recipes=[])) == (0, 2, 0, 0)
    assert numbers(indexed(tmp_path, source)) == (2, 0, 0, 0)


# Which files there are.


def test_links_are_not_followed(tmp_path: Path) -> None:
    source, outside = pictures(tmp_path / "in" / "deep", 2).parent, pictures(tmp_path / "outside", 2, start=20)
    (source / "loop").symlink_to(source)
    (source / "out").symlink_to(outside)
    (source / "one.png").symlink_to(outside / "020.png")
    (source / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(source / "pipe")
    counts = indexed(tmp_path, source)
    assert (numbers(counts), counts.links) == ((2, 0, 0, 0), 4)
    # A folder may be named by a link, and it is the same folder.
    (tmp_path / "link").symlink_to(source)
    assert numbers(indexed(tmp_path, tmp_path / "link" / ".." / "in")) == (0, 2, 0, 0)
    assert numbers(indexed(tmp_path, tmp_path / "link")) == (0, 2, 0, 0)


def test_a_sets_names_are_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text('{"label_names": ["x", "y"]}')
    source = tmp_path / "in"
    source.mkdir()
    np.savez(source / "set.npz", images=np.stack([grey(0), grey(1)]), labels=[0, 1], groups=[1, 2])
    (source / "set.json").symlink_to(tmp_path / "outside.json")
    indexed(tmp_path, source)
    assert column(tmp_path / "site", "label") == ["0", "1"]


def test_the_site_folder_may_lie_among_the_images(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 2)
    assert numbers(indexed(source, source)) == (2, 0, 0, 0)
    assert numbers(indexed(source, source)) == (0, 2, 0, 0)
    # And a folder of images may lie in the site folder.
    intake = pictures(source / "site" / "intake", 3, start=5)
    assert numbers(indexed(source, intake)) == (3, 0, 0, 0)


def test_one_file_can_be_named(tmp_path: Path) -> None:
    path = png(tmp_path / "in" / "one.png", grey(0))
    labels = Labels(table(tmp_path / "l.csv", [("path", "label"), ("one.png", "a")]), {})
    assert numbers(indexed(tmp_path, path, labels=labels)) == (1, 0, 0, 0)
    assert column(tmp_path / "site", "label") == ["a"]


def test_folders_must_be_there_and_apart(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in" / "deep", 1).parent
    with pytest.raises(DataError, match="does not exist"):
        indexed(tmp_path, source, tmp_path / "missing")
    for other in (source, source / "deep", source / "deep" / "000.png", tmp_path):
        with pytest.raises(DataError, match="named twice, or lies in another"):
            indexed(tmp_path, source, other)
    assert not (tmp_path / "site").exists()


def test_names_of_any_bytes(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 1)
    folder = os.fsencode(source) + b"/M\xfcller\n"
    os.mkdir(folder)
    os.rename(png(tmp_path / "x.png", grey(1)), folder + b"/R\xf6ntgen.png")
    assert numbers(indexed(tmp_path, source)) == (2, 0, 0, 0)
    assert numbers(indexed(tmp_path, source)) == (0, 2, 0, 0)


def test_what_cannot_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pictures(tmp_path / "in", 2)
    hidden = pictures(source / "hidden", 1, start=5)
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path) == hidden:
            raise PermissionError
        return real(path)

    with monkeypatch.context() as patch:  # root may open everything
        patch.setattr(os, "scandir", scandir)
        counts = indexed(tmp_path, source)
        assert (numbers(counts), counts.refusals) == ((2, 0, 1, 0), [(hidden, Reason.NOT_READABLE)])
        assert numbers(indexed(tmp_path, source)) == (0, 2, 1, 0)
    assert numbers(indexed(tmp_path, source)) == (1, 2, 0, 1)


@pytest.mark.parametrize("kind", [CRASHED, TOO_SLOW])
@pytest.mark.parametrize("volumes", [False, True])
def test_what_a_worker_failed_on_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, volumes: bool
) -> None:
    reading, source = Reading(volumes=volumes), pictures(tmp_path / "in", 3)

    def failing(_: object, tasks: Iterable[Task], **__: object) -> Iterator[tuple[Task, Iterator[Failure]]]:
        for task in tasks:
            yield task, iter([Failure(kind)])

    with monkeypatch.context() as patch:
        patch.setattr("client.data.index.run_in_workers", failing)
        assert numbers(indexed(tmp_path, source, reading=reading)) == (0, 0, 3, 0)
        (source / "000.png").rename(tmp_path / "elsewhere.png")
        assert numbers(indexed(tmp_path, source, reading=reading)) == (0, 0, 2, 1)
        os.utime(source / "001.png", ns=(1, 1))  # as good as another file
        assert numbers(indexed(tmp_path, source, reading=reading)) == (0, 1, 1, 0)
    # One was given up; the other is tried for the second time.
    assert numbers(indexed(tmp_path, source, reading=reading)) == (1, 1, 0, 0)
    assert numbers(indexed(tmp_path, source, reading=reading)) == (0, 2, 0, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_a_file_without_permission_is_read_once_it_has_it(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 2)
    (source / "000.png").chmod(0)
    assert numbers(indexed(tmp_path, source)) == (1, 0, 1, 0)
    (source / "000.png").chmod(0o600)
    assert numbers(indexed(tmp_path, source)) == (1, 1, 0, 0)


def test_what_is_refused_stops_nobody_and_leaves_no_pixels(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 2), tmp_path / "site"
    whole = png(tmp_path / "w.png", grey(30, 64)).read_bytes()
    (source / "000-cut.png").write_bytes(whole[:-200])
    (source / "notes.txt").write_text("nothing")
    (source / "empty").touch()
    np.savez(source / "z.npz", images=np.stack([grey(i) for i in range(9)]), labels=np.arange(9), groups=np.arange(3))
    counts = indexed(tmp_path, source)
    assert numbers(counts) == (2, 0, 4, 0)
    reasons = {path.name: reason for path, reason in counts.refusals}
    assert reasons == {
        "000-cut.png": Reason.NOT_DECODED,
        "notes.txt": Reason.NOT_AN_IMAGE,
        "empty": Reason.NOT_AN_IMAGE,
        "z.npz": Reason.DAMAGED,  # after three of nine pictures: there are only three groups
    }
    assert len(cached(site)) == 2  # not a byte of the three
    with open_catalogue(site / "catalogue.sqlite") as catalogue:
        assert contents(catalogue)["refused"] == {
            Reason.NOT_AN_IMAGE.value: 2,
            Reason.DAMAGED.value: 1,
            Reason.NOT_DECODED.value: 1,
        }
    assert numbers(indexed(tmp_path, source)) == (0, 6, 0, 0)


def test_a_file_that_turns_bad_loses_its_pictures(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 2), tmp_path / "site"
    indexed(tmp_path, source)
    (source / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert numbers(indexed(tmp_path, source)) == (0, 1, 1, 0)
    assert column(site, "slot") == [2]
    assert not cached(site)[0].any()


def test_other_pixels_behind_the_same_stamp_are_not_believed(tmp_path: Path) -> None:
    source, site = tmp_path / "in", tmp_path / "site"
    path = source / "a.bmp.dcm"
    dicom(path, grey(0))
    status = path.stat()
    indexed(tmp_path, source)
    dicom(path, grey(1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    counts = indexed(tmp_path, source, recipes=[Recipe(1, 4)])
    assert [reason for _, reason in counts.refusals] == [Reason.DAMAGED]
    assert column(site, "slot") == []
    assert not cached(site).any()


@pytest.mark.parametrize(("frames", "chosen"), [("all", [0, 1, 2, 3, 4]), ("middle", [2]), ("2", [0, 2, 4])])
def test_frames_of_one_file(tmp_path: Path, frames: str, chosen: list[int]) -> None:
    stack = np.stack([grey(i) for i in range(5)])
    dicom(tmp_path / "in" / "five.dcm", stack, PatientID="p")
    labels = Labels(table(tmp_path / "l.csv", [("PatientID", "label"), ("p", "a")]), {})
    indexed(tmp_path, tmp_path / "in", reading=Reading(frames=frames), labels=labels)
    assert rows(tmp_path / "site", "SELECT frame, label, aside FROM image") == [(n, "a", None) for n in chosen]
    assert len({bytes(pixels) for pixels in cached(tmp_path / "site")}) == len(chosen)


# Settings, keys and locks.


def test_settings_are_fixed(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 1)
    indexed(tmp_path, source)
    changes: dict[str, object] = {
        "reading": Reading(frames="middle"),
        "split": Split(0.1, 0.3),
        "name": "another",
        "number": 3,
    }
    for name, value in changes.items():
        with pytest.raises(DataError, match="that never changes"):
            indexed(tmp_path, source, **{name: value})
    for reading in (Reading(volumes=True), Reading(require_deidentified=True)):
        with pytest.raises(DataError, match="that never changes"):
            indexed(tmp_path, source, reading=reading)
    indexed(tmp_path, source, leave_out_shared=True)


def test_a_lost_key_is_not_replaced(tmp_path: Path) -> None:
    source, site = pictures(tmp_path / "in", 1), tmp_path / "site"
    indexed(tmp_path, source, key=None, labels=patients(tmp_path, source))
    key = (site / "site.key").read_bytes()
    assert len(key) == 32
    assert (site / "site.key").stat().st_mode & 0o777 == 0o600
    (site / "site.key").write_bytes(bytes(32))
    with pytest.raises(DataError, match="not the key that this site was made with"):
        indexed(tmp_path, source)
    (site / "site.key").unlink()
    with pytest.raises(DataError, match="restore it from its backup"):
        indexed(tmp_path, source)
    with pytest.raises(DataError, match="restore it from its backup"):
        open_site(site, RECIPE).generator("x")
    assert not (site / "site.key").exists()
    (site / "site.key").write_bytes(key)
    assert numbers(indexed(tmp_path, source)) == (0, 1, 0, 0)


def test_one_at_a_time(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 1)
    indexed(tmp_path, source)
    with (tmp_path / "site" / "lock").open("rb+") as lock:
        flock(lock, LOCK_EX)
        with pytest.raises(DataError, match="another program is indexing"):
            indexed(tmp_path, source)
    indexed(tmp_path, source)


def test_a_damaged_catalogue_is_said_to_be(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 1)
    indexed(tmp_path, source)
    path = tmp_path / "site" / "catalogue.sqlite"
    path.write_bytes(b"x" * 4096 + path.read_bytes()[4096:])
    with pytest.raises(DataError, match="the catalogue is damaged"):
        indexed(tmp_path, source)


# Labels.


def labelled(tmp_path: Path, *lines: tuple[str, ...], **columns: str) -> list[tuple[object, object]]:
    """Return label and reason of being set aside of every picture."""
    file = table(tmp_path / "labels.csv", lines)
    indexed(tmp_path, tmp_path / "in", labels=Labels(file, columns))
    return [(label, aside) for label, aside in rows(tmp_path / "site", "SELECT label, aside FROM image ORDER BY slot")]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for number, who in enumerate(("p0", "p1")):
        dicom(
            tmp_path / "in" / "deep er" / f"{who}.dcm",
            grey(number),
            PatientID=who,
            StudyInstanceUID=f"1.1.{number}",
            SeriesInstanceUID=f"1.2.{number}",
            SOPInstanceUID=f"1.3.{number}",
            AccessionNumber=f"acc {number}",
        )
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("PatientID", "p1"),
        ("StudyInstanceUID", "1.1.1"),
        ("SeriesInstanceUID", "1.2.1"),
        ("SOPInstanceUID", "1.3.1"),
        ("AccessionNumber", " acc 1 "),
        ("path", "deep er/p1.dcm"),
    ],
)
def test_labels_join_on(two: Path, kind: str, value: str) -> None:
    assert labelled(two, ("note", kind, "label"), ("x", value, "a"), ("x", "other", "b")) == [
        (None, "no label"),
        ("a", None),
    ]
    with open_catalogue(two / "site" / "catalogue.sqlite") as catalogue:
        assert contents(catalogue)["labels"] == {"rows": 2, "repeated": 0, "unmatched": 1}


def test_columns_can_have_other_names(two: Path) -> None:
    found = labelled(two, ("case", "finding"), ("p0", "a"), ("p1", "b"), case="PatientID", finding="label")
    assert found == [("a", None), ("b", None)]


def test_a_row_joins_on_its_most_specific_column(two: Path) -> None:
    lines = [("PatientID", "SOPInstanceUID", "label"), ("p0", "1.3.1", "a"), ("p0", "", "b")]
    assert labelled(two, *lines) == [("b", None), ("a", None)]


def test_several_columns_of_one_file_can_agree_or_not(two: Path) -> None:
    lines = [("PatientID", "path", "label"), ("p0", "", "a"), ("", "deep er/p0.dcm", "a"), ("p1", "", "a")]
    assert labelled(two, *lines, ("", "deep er/p1.dcm", "b")) == [("a", None), ("", "conflicting labels")]
    with open_catalogue(two / "site" / "catalogue.sqlite") as catalogue:
        found = contents(catalogue)
    assert (found["pictures"], found["aside"]) == (1, {"conflicting labels": 1})
    # Set right, it is a picture like any other.
    assert labelled(two, *lines) == [("a", None), ("a", None)]


def test_repeated_blank_and_unmatched_rows(two: Path) -> None:
    lines = [("PatientID", "label"), *[("p0", "a")] * 3, ("p1", ""), ("", ""), ("p2", "a"), ("p3", "b")]
    assert labelled(two, *lines) == [("a", None), (None, "no label")]
    with open_catalogue(two / "site" / "catalogue.sqlite") as catalogue:
        assert contents(catalogue)["labels"] == {"rows": 3, "repeated": 2, "unmatched": 2}


def test_conflicts_within_one_column(two: Path) -> None:
    lines = [("PatientID", "label"), ("p0", "a"), ("p0", "b"), ("p1", "a")]
    assert labelled(two, *lines) == [("", "conflicting labels"), ("a", None)]
    with open_catalogue(two / "site" / "catalogue.sqlite") as catalogue:
        assert offer(catalogue)["classes"].keys() == {"a"}


SECRET = "Kowalska"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (f"PatientID,label\n{SECRET},a,{SECRET}\n", "line 2 of the labels file has 3 cells, not 2"),
        (f"PatientID,label\np0,a\n,{SECRET}\n", "line 3 .* nothing to join it on"),
        (f'PatientID,label\n"{SECRET},a\n', "not CSV"),
        (f"PatientID,label\n{SECRET},{SECRET}{'x' * 64}\n", "line 2 is over 64 characters"),
        (f"PatientID,label\n{SECRET},{SECRET}\x07\n", "line 2 is over 64 characters or not text"),
        (f"{SECRET},label\np0,a\n", "needs a column `label` and one of"),
        (f"PatientID,{SECRET}\np0,a\n", "needs a column `label` and one of"),
        ("PatientID,label,label\np0,a,b\n", "several columns of the labels file are"),
        ("", "needs a column `label`"),
    ],
)
def test_what_is_wrong_with_the_labels_is_said_without_saying_whose(
    tmp_path: Path, text: str, match: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source = pictures(tmp_path / "in", 1)
    indexed(tmp_path, source, labels=patients(tmp_path, source))
    before = snapshot(tmp_path / "site")
    pictures(source, 1, start=1)
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        indexed(tmp_path, source, labels=Labels(tmp_path / "bad.csv", {}))
    assert caught.match(match)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert snapshot(tmp_path / "site") == before  # said before anything was read
    assert capfd.readouterr() == ("", "")


def test_labels_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 1)
    (tmp_path / "latin.csv").write_bytes("PatientID,label\nM\xfcller,a\n".encode("latin-1"))
    with pytest.raises(DataError, match="not text in UTF-8"):
        indexed(tmp_path, source, labels=Labels(tmp_path / "latin.csv", {}))
    with pytest.raises(DataError, match="cannot be opened"):
        indexed(tmp_path, source, labels=Labels(tmp_path / "missing.csv", {}))
    file = table(tmp_path / "l.csv", [("PatientID", "label"), ("p", "a")])
    with pytest.raises(DataError, match=r"no column \['case'\]"):
        indexed(tmp_path, source, labels=Labels(file, {"case": "PatientID"}))
    with pytest.raises(DataError, match=r"--map names \['Name'\]"):
        indexed(tmp_path, source, labels=Labels(file, {"PatientID": "Name"}))


def test_a_label_file_from_a_spreadsheet(two: Path) -> None:
    (two / "labels.csv").write_bytes(b'\xef\xbb\xbf"PatientID","label"\r\n"p0"," a "\r\n"p1","b, c"\r\n')
    indexed(two, two / "in", labels=Labels(two / "labels.csv", {}))
    assert column(two / "site", "label") == ["a", "b, c"]


def test_a_patient_column_groups_pictures_that_name_nobody(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 5)
    lines = [("path", "lesion", "label"), ("000.png", "L1", "a"), ("001.png", "L1", "a"), ("002.png", "L2", "a")]
    # 003 has a label and no patient; the rows of 004 disagree about whose it is.
    lines += [("003.png", "", "a"), ("004.png", "L3", "a"), ("004.png", "L4", "a"), ("004.png", "L3", "a")]
    found = labelled(tmp_path, *lines, lesion="patient")
    assert found == [("a", None)] * 3 + [("a", "no patient")] * 2
    who = column(tmp_path / "site", "patient")
    assert (who[0], who[3], who[4]) == (who[1], None, None)
    assert who[0] != who[2]


def test_a_files_own_patient_comes_before_the_labels(two: Path) -> None:
    labelled(two, ("PatientID", "patient", "label"), ("p0", "other", "a"))
    assert column(two / "site", "patient") == column(two / "site", "own_patient")


# Splits and leaks.


def test_splits_never_change_and_keep_their_shares(tmp_path: Path) -> None:
    source, site = tmp_path / "in", tmp_path / "site"
    source.mkdir()

    def grown(count: int) -> dict[bytes, str]:
        pixels = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 2, 2)
        np.savez(source / f"{count}.npz", images=pixels, labels=np.zeros(count, int), groups=np.arange(count) // 2)
        indexed(tmp_path, source, recipes=[Recipe(1, 2)])
        return dict(rows(site, "SELECT patient, split FROM image"))

    small, large = grown(40), grown(4000)
    assert len(small) == 20
    assert {who: large[who] for who in small} == small
    shares = Counter(large.values())
    assert shares["test"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert shares["validation"] / 2000 == pytest.approx(0.1, abs=0.03)
    assert shares["train"] / 2000 == pytest.approx(0.7, abs=0.03)
    assert rows(site, "SELECT patient FROM image GROUP BY patient HAVING count(DISTINCT split) > 1") == []


def test_another_key_is_another_split(tmp_path: Path) -> None:
    found = []
    for key in (KEY, bytes(32)):
        folder = tmp_path / key.hex()[:4]
        source = pictures(folder / "in", 30)
        indexed(folder, source, labels=patients(folder, source), key=key)
        found.append(column(folder / "site", "split"))
    assert found[0] != found[1]


def shared_pixels(tmp_path: Path, *, apart: bool) -> Path:
    """Write one picture under two patients who are on two sides of the split, or on one."""
    source = tmp_path / "in"
    labels = patients(tmp_path, pictures(source, 30))
    indexed(tmp_path, source, labels=labels)
    split = dict(enumerate(column(tmp_path / "site", "split")))
    first, second = next(
        (a, b) for a in split for b in split if a < b and {split[a], split[b]} <= {"train", "test"}
        and (split[a] != split[b]) == apart
    )  # fmt: skip
    png(source / f"{second:03}.png", grey(first))
    return source


def test_the_same_pixels_on_two_sides_fail_loudly(tmp_path: Path) -> None:
    source, site = shared_pixels(tmp_path, apart=True), tmp_path / "site"
    assert indexed(tmp_path, source).leaks == 1
    with pytest.raises(DataError, match="split leaks"):
        open_site(site, RECIPE)
    counts = indexed(tmp_path, source, leave_out_shared=True)
    assert (counts.leaks, counts.read) == (0, 0)
    assert column(site, "aside").count("same picture of two patients") == 2
    assert len(open_site(site, RECIPE).labels) == 28
    assert indexed(tmp_path, source).leaks == 0  # it stays so


def test_the_same_pixels_on_one_side_are_no_leak(tmp_path: Path) -> None:
    source = shared_pixels(tmp_path, apart=False)
    assert indexed(tmp_path, source).leaks == 0
    assert len(open_site(tmp_path / "site", RECIPE).labels) == 30


def test_the_same_picture_of_one_patient_counts_once(tmp_path: Path) -> None:
    for name in "abc":
        png(tmp_path / "in" / f"{name}.png", grey(0))
    lines = [("path", "patient", "label"), ("b.png", "p", "x"), ("c.png", "p", "x")]
    # The first has no label: what counts is the first that has one.
    assert labelled(tmp_path, *lines) == [(None, "no patient"), ("x", None), ("x", "same picture twice")]


def test_the_same_picture_with_two_labels_is_left_out(tmp_path: Path) -> None:
    for name in "ab":
        png(tmp_path / "in" / f"{name}.png", grey(0))
    lines = [("path", "patient", "label"), ("a.png", "p", "x"), ("b.png", "p", "y")]
    assert [aside for _, aside in labelled(tmp_path, *lines)] == ["conflicting labels"] * 2


def test_pixels_are_compared_before_they_are_prepared(tmp_path: Path) -> None:
    # Two pictures that differ, and look the same at 2 x 2.
    first = np.zeros((32, 32), np.uint8)
    second = first.copy()
    second[5, 5] = 1
    png(tmp_path / "in" / "a.png", first)
    png(tmp_path / "in" / "b.png", second)
    source = tmp_path / "in"
    indexed(tmp_path, source, labels=patients(tmp_path, source), recipes=[Recipe(1, 2)])
    assert len(set(column(tmp_path / "site", "content"))) == 2


# Volumes.

SOLID = Recipe(1, 4, dimensions=3)
VOLUMES = Reading(volumes=True)


def test_series_become_volumes(tmp_path: Path) -> None:
    source, site = tmp_path / "in", tmp_path / "site"
    series(source, 4, name="1.2.1", patient="p1", seed=1)
    series(source, 4, name="1.2.2", patient="p2", seed=2)
    png(source / "note.png", grey(0))
    labels = Labels(table(tmp_path / "l.csv", [("SeriesInstanceUID", "label"), ("1.2.1", "a"), ("1.2.2", "b")]), {})
    options: dict[str, object] = {"recipes": [SOLID], "reading": VOLUMES}
    counts = indexed(tmp_path, source, labels=labels, workers=2, **options)
    assert (numbers(counts), counts.refusals) == ((8, 0, 1, 0), [(source / "note.png", Reason.NOT_FOR_STUDY)])
    assert rows(site, "SELECT label, aside FROM image") == [("a", None), ("b", None)]
    for pixels in cached(site, SOLID):
        means = pixels[0].mean((1, 2))
        assert (np.diff(means) > 0).all()  # slices in the order of their places, not of their names
    before = snapshot(site)
    assert numbers(indexed(tmp_path, source, **options)) == (0, 9, 0, 0)
    assert snapshot(site) == before


def test_a_series_that_changes_is_read_again(tmp_path: Path) -> None:
    source, site = tmp_path / "in", tmp_path / "site"
    options: dict[str, object] = {"recipes": [SOLID], "reading": VOLUMES}
    slices = series(source, 5, patient="p1")
    series(source, 4, name="1.2.2", patient="p2", seed=2)
    indexed(tmp_path, source, **options)
    other = cached(site, SOLID)[1].copy()
    # The last slice goes: the other four are a volume of their own.
    slices[4].unlink()
    assert numbers(indexed(tmp_path, source, **options)) == (4, 4, 0, 1)
    assert column(site, "slot") == [2, 3]
    assert not cached(site, SOLID)[0].any()
    np.testing.assert_array_equal(cached(site, SOLID)[1], other)
    # A slice in between goes: no volume any more.
    slices[1].unlink()
    counts = indexed(tmp_path, source, **options)
    assert numbers(counts) == (0, 4, 3, 1)
    assert {reason for _, reason in counts.refusals} == {Reason.NOT_A_VOLUME}
    assert column(site, "slot") == [2]
    # It comes back.
    series(source, 4, patient="p1")
    assert numbers(indexed(tmp_path, source, **options)) == (4, 4, 0, 0)
    assert column(site, "slot") == [2, 4]
    shutil.rmtree(source)
    source.mkdir()
    assert numbers(indexed(tmp_path, source, **options)) == (0, 0, 0, 8)
    assert not cached(site, SOLID).any()


def test_a_slice_that_moves_to_another_series_changes_both(tmp_path: Path) -> None:
    source, site = tmp_path / "in", tmp_path / "site"
    options: dict[str, object] = {"recipes": [SOLID], "reading": VOLUMES}
    slices = series(source, 4, patient="p1")
    indexed(tmp_path, source, **options)
    content = column(site, "content")
    moved = dicom(
        slices[3], np.full((4, 4), 3, np.int16), SeriesInstanceUID="1.2.9", PatientID="p1",
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 6],
    )  # fmt: skip
    counts = indexed(tmp_path, source, **options)
    assert (counts.read, counts.refusals) == (3, [(moved, Reason.NOT_A_VOLUME)])
    assert len(column(site, "content")) == 1
    assert column(site, "content") != content


def test_another_recipe_for_volumes(tmp_path: Path) -> None:
    source, site = tmp_path / "in", tmp_path / "site"
    series(source, 4)
    indexed(tmp_path, source, recipes=[SOLID], reading=VOLUMES)
    larger = replace(SOLID, size=6)
    assert numbers(indexed(tmp_path, source, recipes=[larger], reading=VOLUMES)) == (4, 0, 0, 0)
    with open_catalogue(site / "catalogue.sqlite") as catalogue:
        assert list(verify(site, catalogue)) == []
    assert rows(site, "SELECT count(*) FROM cached") == [(2,)]
    assert numbers(indexed(tmp_path, source, recipes=[larger], reading=VOLUMES)) == (0, 4, 0, 0)


def test_the_slices_of_a_series_without_volumes_are_pictures_of_one_patient(tmp_path: Path) -> None:
    series(tmp_path / "in", 4)
    indexed(tmp_path, tmp_path / "in")
    assert len(set(column(tmp_path / "site", "own_patient"))) == 1
    assert len(column(tmp_path / "site", "slot")) == 4


def test_the_catalogue_is_read_while_an_index_run_writes(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 3)
    indexed(tmp_path, source, labels=patients(tmp_path, source))
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite", new={}) as writer, closing(writer.database):
        writer.database.execute("BEGIN IMMEDIATE")
        writer.database.execute("DELETE FROM image")
        assert len(open_site(tmp_path / "site", RECIPE).labels) == 3
        writer.database.execute("ROLLBACK")


_KILLED_WRITER = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE image SET label = 'half done', aside = 'half done'")
database.execute("DELETE FROM file")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_undone_by_who_only_reads(tmp_path: Path) -> None:
    source, path = pictures(tmp_path / "in", 100), tmp_path / "site" / "catalogue.sqlite"
    indexed(tmp_path, source, labels=patients(tmp_path, source))
    before = path.read_bytes()
    subprocess.run([sys.executable, "-c", _KILLED_WRITER, str(path)], check=False)
    assert path.with_name("catalogue.sqlite-journal").exists()
    assert path.read_bytes() != before
    assert open_site(tmp_path / "site", RECIPE).label_names == ("a",)
    assert path.read_bytes() == before


def test_pixels_are_overwritten_after_their_picture_is_gone_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, site = pictures(tmp_path / "in", 3), tmp_path / "site"
    indexed(tmp_path, source, labels=patients(tmp_path, source))
    (source / "001.png").unlink()

    def stop(self: PixelCache, slot: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PixelCache, "wipe", stop)
        with pytest.raises(KeyboardInterrupt):
            indexed(tmp_path, source)
    assert column(site, "slot") == [1, 3]
    assert rows(site, "SELECT slot FROM wipe") == [(2,)]
    assert cached(site)[1].any()
    indexed(tmp_path, source)
    assert rows(site, "SELECT slot FROM wipe") == []
    assert not cached(site)[1].any()
