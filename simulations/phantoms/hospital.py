"""A phantom hospital on disk: its patients, their studies, and the labels beside them."""

import csv
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from common.errors import DataError
from simulations.phantoms.anatomy import render
from simulations.phantoms.dicom import derived_uid, derived_uuid, template, write_image
from simulations.phantoms.lesions import LESIONS, Plane
from simulations.phantoms.scanners import Scanner, acquire

__all__ = ["Patient", "patients", "write_hospital"]

_WORDS = (
    "ALFA", "BRAVO", "CHARLIE", "DELTA", "ECHO", "FOXTROT", "GOLF", "HOTEL", "INDIA",
    "JULIETT", "KILO", "LIMA", "MIKE", "NOVEMBER", "OSCAR", "PAPA", "QUEBEC", "ROMEO",
    "SIERRA", "TANGO", "UNIFORM", "VICTOR", "WHISKEY", "XRAY", "YANKEE", "ZULU",
)  # fmt: skip


@dataclass(frozen=True)
class Patient:
    """One patient of a phantom hospital, before any scanner has touched the images.

    Parameters
    ----------
    key : str
        Names the patient among all phantom patients; every identifier in the files derives from it.
    number : int
        Place of the patient in the hospital's archive, from 1; it says nothing about the lesion.
    lesion : str
        One of :data:`~simulations.phantoms.lesions.LESIONS`.
    images : ndarray
        ``[n, S, S]`` float32 in [0, 1], n from 1 to 3.
    studies : tuple of int
        Study of each image, from 1, in order.
    """

    key: str
    number: int
    lesion: str
    images: Plane
    studies: tuple[int, ...]

    def generator(self, purpose: str) -> np.random.Generator:
        """Return this patient's own random stream for one purpose."""
        return _generator(self.key, purpose)


def patients(
    scanner: Scanner, lesions: Sequence[str], patients_per_lesion: int, seed: int, size: int
) -> Iterator[Patient]:
    """Yield a hospital's patients in the order of its archive, which mixes the lesions.

    Takes what :func:`write_hospital` takes. Hospitals that differ in scanner or in seed share no patient.
    """
    hospital = f"{scanner.name}/{seed}"
    cases = [(lesion, case) for lesion in lesions for case in range(patients_per_lesion)]
    for number, place in enumerate(_generator(hospital, "archive").permutation(len(cases)), start=1):
        lesion, case = cases[place]
        key = f"{hospital}/{lesion}/{case}"
        rng = _generator(key, "body")
        count = int(rng.integers(1, 4))
        # A later image may come from a follow-up study.
        studies = 1 + np.cumsum([False, *(rng.random(count - 1) < 0.4)])
        images = render(lesion, rng, count=count, size=size)
        yield Patient(key, number, lesion, images, tuple(studies.tolist()))


def write_hospital(
    folder: Path,
    *,
    scanner: Scanner,
    lesions: Sequence[str],
    patients_per_lesion: int,
    seed: int,
    size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the DICOM archive of a hospital that never was, and its labels.

    The images stand in ``folder/dicom/<patient>/<study>/<image>.dcm``, under names that say nothing about the
    lesion; ``folder/labels.csv`` has the header ``SOPInstanceUID,label`` and one row an image. ``labels.csv``
    appears last and whole: where it stands, the hospital is complete. An interrupted run can be run again.

    Parameters
    ----------
    folder : pathlib.Path
        Where to write; it is made if missing, and must not hold a hospital yet.
    scanner : Scanner
        The hospital's scanner.
    lesions : sequence of str
        Lesion types among the patients, from :data:`~simulations.phantoms.lesions.LESIONS`; each patient has
        one.
    patients_per_lesion : int
        Patients with each type of lesion; each has one to three images.
    seed : int
        Draws everything. The same arguments give the same bytes; give each hospital its own seed.
    size : int
        Rows and columns of an image, in pixels; at least 16.
    progress : callable, optional
        Called after each patient with the number of images written so far.

    Returns
    -------
    int
        Number of images.

    Raises
    ------
    DataError
        If an argument is out of range, or the folder already holds a hospital.
    """
    _check(lesions, patients_per_lesion, size)
    archive, labels = folder / "dicom", folder / "labels.csv"
    if archive.exists() or labels.exists():
        raise DataError(f"{folder} already holds images or labels; choose an empty folder or remove them.")
    # Whatever an interrupted run has left lies under these two names only.
    partial_archive, partial_labels = folder / "dicom.partial", folder / "labels.csv.partial"
    shutil.rmtree(partial_archive, ignore_errors=True)
    partial_archive.mkdir(parents=True)
    header = template(scanner, size)
    written = 0
    with partial_labels.open("w", newline="", encoding="ascii") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("SOPInstanceUID", "label"))
        for patient in patients(scanner, lesions, patients_per_lesion, seed, size):
            for instance_uid in _write_patient(partial_archive, header, scanner, patient):
                rows.writerow((instance_uid, patient.lesion))
            written += len(patient.images)
            if progress is not None:
                progress(written)
    os.replace(partial_archive, archive)
    os.replace(partial_labels, labels)
    return written


def _write_patient(archive: Path, header: Dataset, scanner: Scanner, patient: Patient) -> list[str]:
    """Write one patient's files and return their SOP Instance UIDs; the header is filled in place."""
    rng = patient.generator("header")
    identity = derived_uuid(patient.key)
    header.PatientName = "PHANTOM^" + "^".join(rng.choice(_WORDS, 2))
    header.PatientID = f"PHANTOM-{identity.hex[:12].upper()}"
    header.PatientSex = str(rng.choice(["F", "M", "O"]))
    age = int(rng.integers(20, 85))
    first_day = date(2012, 1, 1) + timedelta(days=int(rng.integers(3650)))
    day = first_day
    pixels = acquire(scanner, patient.images, patient.generator("scanner"))
    instance_uids: list[str] = []
    for number, (study, stored) in enumerate(zip(patient.studies, pixels, strict=True), start=1):
        place = archive / f"{patient.number:05d}" / f"{study}"
        if number == 1 or study != patient.studies[number - 2]:
            place.mkdir(parents=True)
            if number > 1:
                day += timedelta(days=int(rng.integers(30, 500)))
            header.PatientAge = f"{age + (day - first_day).days // 365:03d}Y"
            header.StudyDate = f"{day:%Y%m%d}"
            header.StudyTime = f"{rng.integers(7, 19):02d}{rng.integers(60):02d}{rng.integers(60):02d}"
            header.StudyID = str(study)
            header.AccessionNumber = derived_uuid(patient.key, study).hex[:12].upper()
            header.StudyInstanceUID = derived_uid(patient.key, study, "study")
            header.SeriesInstanceUID = derived_uid(patient.key, study, "series")
            header.SeriesNumber = 1
            if scanner.modality in ("CT", "MR"):
                header.FrameOfReferenceUID = derived_uid(patient.key, study, "frame")
        if scanner.modality in ("CT", "MR"):
            header.ImagePositionPatient = [0, 0, 5 * number]
        header.InstanceNumber = number
        header.SOPInstanceUID = derived_uid(patient.key, study, number)
        write_image(place / f"{number}.dcm", header, stored)
        instance_uids.append(header.SOPInstanceUID)
    return instance_uids


def _generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(derived_uuid(*parts).int)


def _check(lesions: Sequence[str], patients_per_lesion: int, size: int) -> None:
    unknown = sorted(set(lesions) - set(LESIONS))
    if unknown:
        raise DataError(f"Unknown lesion types {', '.join(unknown)}; the phantoms have {', '.join(LESIONS)}.")
    if not lesions or len(set(lesions)) < len(lesions):
        raise DataError("A hospital needs at least one lesion type, each named once; correct the list.")
    if patients_per_lesion < 1 or size < 16:
        raise DataError(
            f"A hospital needs at least 1 patient per lesion, not {patients_per_lesion}, and images of at "
            f"least 16 pixels, not {size}; raise what is too small."
        )
