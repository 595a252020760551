"""Phantom hospitals: the same bytes from the same seed, and files that show what was rendered."""

import csv
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

from common.errors import DataError
from simulations.phantoms import LESIONS, SCANNERS, Scanner, write_hospital
from simulations.phantoms.anatomy import render
from simulations.phantoms.hospital import patients
from simulations.phantoms.scanners import acquire

CT = SCANNERS[0]
BY_NAME = pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.name)


def written(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder: its path there, and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def archive(folder: Path) -> list[tuple[Path, Dataset]]:
    """Return the images of a hospital in the order of their paths; none of them is read by force."""
    return [(path, dcmread(path)) for path in sorted((folder / "dicom").rglob("*.dcm"))]


def labels(folder: Path) -> list[tuple[str, str]]:
    with (folder / "labels.csv").open(newline="", encoding="ascii") as file:
        header, *rows = csv.reader(file)
    assert header == ["SOPInstanceUID", "label"]
    return [(uid, label) for uid, label in rows]


def displayed(image: Dataset) -> NDArray[np.float64]:
    """Return what a viewer shows of an image, bright where white, as grey values."""
    pixels = image.pixel_array
    if image.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, image)
    if pixels.ndim == 3:
        return np.asarray(pixels.mean(axis=-1), np.float64)
    shown = np.asarray(apply_voi_lut(apply_modality_lut(pixels, image), image), np.float64)
    return -shown if image.PhotometricInterpretation == "MONOCHROME1" else shown


def centroid_accuracy(rng: np.random.Generator, ways: int, shots: int, queries: int) -> float:
    """Return the accuracy of nearest centroids on 16 x 16 raw pixels of clean images, one episode."""
    per_way = shots + queries
    lesions = rng.choice(LESIONS, ways, replace=False)
    drawn = np.stack([[render(name, rng, count=1, size=64)[0] for _ in range(per_way)] for name in lesions])
    pixels = drawn.reshape(ways, per_way, 16, 4, 16, 4).mean(axis=(3, 5)).reshape(ways, per_way, -1)
    centroids = pixels[:, :shots].mean(axis=1)
    away = np.linalg.norm(pixels[:, shots:, None] - centroids, axis=-1)
    return float((away.argmin(axis=-1) == np.arange(ways)[:, None]).mean())


@BY_NAME
def test_same_seed_same_bytes(scanner: Scanner, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("again", 5), ("b", 6)):
        write_hospital(
            tmp_path / name,
            scanner=scanner,
            lesions=["disc", "haze"],
            patients_per_lesion=1,
            seed=seed,
            size=32,
        )
    first, again, other = (written(tmp_path / name) for name in ("a", "again", "b"))
    assert first == again
    assert not set(first.values()) & set(other.values())


@BY_NAME
def test_files_show_what_was_rendered(scanner: Scanner, tmp_path: Path) -> None:
    lesions = LESIONS[::6]
    count = write_hospital(tmp_path, scanner=scanner, lesions=lesions, patients_per_lesion=1, seed=1)
    images = archive(tmp_path)
    cohort = list(patients(scanner, lesions, 1, 1, 64))
    truth = np.concatenate([patient.images for patient in cohort])
    stored = np.concatenate([acquire(scanner, patient.images, patient.generator("scanner")) for patient in cohort])
    assert count == len(images) == len(truth)
    for (_, image), pixels, clean in zip(images, stored, truth, strict=True):
        assert image.file_meta.TransferSyntaxUID == scanner.transfer_syntax
        assert image.PhotometricInterpretation == scanner.photometric
        assert np.array_equal(image.pixel_array, pixels)
        shown = displayed(image)
        assert len(np.unique(shown)) > 30
        # Over 2 x 2 pixels, because the noise of the worst scanners alone takes more than a tenth.
        blocks = [part.reshape(32, 2, 32, 2).mean(axis=(1, 3)).ravel() for part in (shown, clean)]
        assert np.corrcoef(blocks)[0, 1] > 0.9


def test_window_and_rescale_give_modality_units(tmp_path: Path) -> None:
    """The window of each scanner shows 0 as black and 1 as white, to the noise."""
    for scanner in (scanner for scanner in SCANNERS if scanner.window is not None):
        folder = tmp_path / scanner.name
        write_hospital(folder, scanner=scanner, lesions=["disc"], patients_per_lesion=1, seed=2)
        _, image = archive(folder)[0]
        clean = next(patients(scanner, ["disc"], 1, 2, 64)).images[0]
        centre, width = scanner.window or (0, 0)
        values = apply_modality_lut(image.pixel_array, image).astype(np.float64)
        shown = (values - centre) / width + 0.5
        if scanner.photometric == "MONOCHROME1":
            shown = 1 - shown
        assert abs(np.median(shown - clean)) < 0.02


def test_labels_and_headers_agree_with_the_files(tmp_path: Path) -> None:
    seen: list[int] = []
    count = write_hospital(
        tmp_path,
        scanner=CT,
        lesions=LESIONS[:4],
        patients_per_lesion=6,
        seed=3,
        size=16,
        progress=seen.append,
    )
    images = archive(tmp_path)
    rows = labels(tmp_path)
    assert [uid for uid, _ in rows] == [image.SOPInstanceUID for _, image in images]
    assert count == len(rows) == len({uid for uid, _ in rows}) == seen[-1]
    assert len(seen) == 24
    assert seen == sorted(seen)

    lesion_of = dict(rows)
    lesions, studies, folders, of_study = (defaultdict[str, set[str]](set) for _ in range(4))
    for path, image in images:
        lesions[image.PatientID].add(lesion_of[image.SOPInstanceUID])
        studies[image.PatientID].add(image.StudyInstanceUID)
        folders[path.parts[-3]].add(image.PatientID)
        of_study[image.StudyInstanceUID].add(f"{image.PatientID} {image.StudyDate} {image.SeriesInstanceUID}")
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        assert image.file_meta.MediaStorageSOPClassUID == image.SOPClassUID
        assert all(uid.is_valid for uid in (image.SOPInstanceUID, image.StudyInstanceUID))
        assert str(image.PatientName).startswith("PHANTOM^")
        assert image.PatientIdentityRemoved == "YES"
        assert image.DeidentificationMethod
    assert len(lesions) == 24
    assert all(len(types) == 1 for types in lesions.values())
    assert all(len(same) == 1 for same in (*folders.values(), *of_study.values()))
    assert {len(uids) for uids in studies.values()} >= {1, 2}
    per_patient = np.unique([image.PatientID for _, image in images], return_counts=True)[1]
    assert set(per_patient) == {1, 2, 3}


def test_nothing_but_the_labels_tells_the_lesion(tmp_path: Path) -> None:
    lesions = ["spiculated", "lobulated", "miliary"]
    write_hospital(tmp_path, scanner=CT, lesions=lesions, patients_per_lesion=4, seed=4, size=16)
    order = list(dict.fromkeys(path.parts[-3] for path, _ in archive(tmp_path)))
    assert order == [f"{number:05d}" for number in range(1, 13)]
    names = [label for _, label in labels(tmp_path)]
    assert names != sorted(names, key=lesions.index), "the archive's order gives the lesions away"
    for path, image in archive(tmp_path):
        assert not any(lesion in f"{path.relative_to(tmp_path)} {image}".lower() for lesion in lesions)


def test_interrupted_run_leaves_no_labels_and_can_be_run_again(tmp_path: Path) -> None:
    def interrupt(images: int) -> None:
        if images > 4:
            raise KeyboardInterrupt

    write = partial(write_hospital, scanner=CT, lesions=["disc", "ring"], patients_per_lesion=3, seed=1, size=16)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", progress=interrupt)
    assert not (tmp_path / "cut" / "labels.csv").exists()
    assert not (tmp_path / "cut" / "dicom").exists()
    write(tmp_path / "cut")
    write(tmp_path / "whole")
    assert written(tmp_path / "cut") == written(tmp_path / "whole")
    with pytest.raises(DataError, match="already holds"):
        write(tmp_path / "whole")


def test_labels_appear_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    appeared: list[str] = []

    def replace(source: Path, target: Path) -> None:
        appeared.append(target.name)
        source.rename(target)

    monkeypatch.setattr("simulations.phantoms.hospital.os.replace", replace)
    write_hospital(tmp_path, scanner=CT, lesions=["disc"], patients_per_lesion=1, seed=1, size=16)
    assert appeared == ["dicom", "labels.csv"]


def test_lesions_are_distinct() -> None:
    """The same patient, view and place, each lesion in turn: no two look alike, and none is absent."""
    drawn = np.stack([render(name, np.random.default_rng(1), count=1, size=64)[0] for name in LESIONS])
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert len(set(LESIONS)) == len(LESIONS) >= 12
    away = np.abs(drawn[:, None] - drawn).max(axis=(-1, -2))
    assert away[~np.eye(len(LESIONS), dtype=bool)].min() > 0.1


def test_raw_pixels_do_not_tell_lesions_apart() -> None:
    rng = np.random.default_rng(0)
    accuracies = [centroid_accuracy(rng, ways=5, shots=5, queries=5) for _ in range(10)]
    assert np.mean(accuracies) < 0.4


@pytest.mark.parametrize(
    ("lesions", "patients_per_lesion", "size"),
    [(["disc", "wart"], 1, 64), ([], 1, 64), (["disc", "disc"], 1, 64), (["disc"], 0, 64), (["disc"], 1, 8)],
)
def test_bad_arguments_are_refused(lesions: list[str], patients_per_lesion: int, size: int, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write_hospital(
            tmp_path / "site",
            scanner=CT,
            lesions=lesions,
            patients_per_lesion=patients_per_lesion,
            seed=1,
            size=size,
        )
    assert not (tmp_path / "site").exists()


def test_scanners_differ_in_how_they_write() -> None:
    assert len({scanner.name for scanner in SCANNERS}) == len(SCANNERS) >= 6
    assert len({scanner.transfer_syntax for scanner in SCANNERS}) == 6
    ways = {
        (s.modality, s.photometric, s.bits_stored, s.signed, s.window, s.rescale, s.transfer_syntax) for s in SCANNERS
    }
    assert len(ways) == len(SCANNERS)
