"""117 real files of many makes against the catalogue beside them: read to the same numbers, or refused."""

import contextlib
import csv
import logging
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.data.catalogue import open_catalogue
from client.data.dicom import read_dicom
from client.data.image import Recipe
from client.data.index import Plan, index
from client.data.picture import Picture, Reading, Reason, Refused


@dataclass(frozen=True)
class Outcome:
    """What the catalogue says of a file, and what reading it gave."""

    row: dict[str, str]
    pictures: list[Picture] | None
    reason: Reason | None


@pytest.fixture(scope="module")
def outcomes(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    source, folder = shared_data / "dicom", tmp_path_factory.mktemp("variety")
    if not (source / "dicom_variety_dev.zip").is_file():
        pytest.skip("the DICOM files are not here: shared/data/dicom/dicom_variety_dev.zip is missing")
    with zipfile.ZipFile(source / "dicom_variety_dev.zip") as archive:
        archive.extractall(folder)
    out: dict[str, Outcome] = {}
    with (source / "dicom_catalog.tsv").open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            try:
                out[row["file"]] = Outcome(row, list(read_dicom(folder / row["file"], Reading())), None)
            except Refused as refusal:
                out[row["file"]] = Outcome(row, None, refusal.reason)
    return out


def test_every_file_is_read_to_the_catalogues_numbers_or_refused(outcomes: dict[str, Outcome]) -> None:
    wrong = []
    for name, outcome in outcomes.items():
        readable = outcome.row["pixels"].startswith("ok")
        if outcome.pictures is None or not readable:
            wrong += [name] * ((outcome.pictures is None) == readable)
            continue
        ends = [end for picture in outcome.pictures for end in (picture.values.min(), picture.values.max())]
        shape = outcome.pictures[0].values.shape
        if len(outcome.pictures) > 1:
            shape = (len(outcome.pictures), *shape)
        same_range = (str(min(ends)), str(max(ends))) == (outcome.row["px_min"], outcome.row["px_max"])
        wrong += [name] * (not same_range or outcome.row["pixels"] != f"ok {shape}")
    assert len(outcomes) > 100
    assert not wrong


def test_why_files_are_refused(outcomes: dict[str, Outcome]) -> None:
    assert Counter(outcome.reason for outcome in outcomes.values() if outcome.reason) == {
        Reason.SOP_CLASS: 13,
        Reason.NOT_AN_IMAGE: 4,
        Reason.NOT_DECODED: 4,
    }
    for name, reason in {
        "reportsi.dcm": Reason.SOP_CLASS,
        "rtstruct.dcm": Reason.NOT_AN_IMAGE,
        "MR_truncated.dcm": Reason.NOT_DECODED,
        "JPEG-lossy.dcm": Reason.NOT_DECODED,
    }.items():
        assert outcomes[f"pydicom_wheel/{name}"].reason == reason


def test_everything_that_is_read_can_be_shown(outcomes: dict[str, Outcome]) -> None:
    for outcome in outcomes.values():
        for picture in outcome.pictures or ():
            shown = picture.shown("header")
            assert shown.dtype == np.float32
            assert shown.shape[:2] == picture.values.shape[:2]
            assert shown.shape[2:] in {(), (3,)}
            assert 0 <= shown.min() <= shown.max() <= 1
            assert picture.header.modality == outcome.row["modality"]


def shown(outcomes: dict[str, Outcome], name: str) -> NDArray[Any]:
    pictures = outcomes[f"pydicom_wheel/{name}.dcm"].pictures
    assert pictures is not None
    return pictures[0].shown("header")


def test_one_picture_in_many_syntaxes_is_one_picture(outcomes: dict[str, Outcome]) -> None:
    syntaxes = ("", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded")
    same = [shown(outcomes, f"MR_small{syntax}") for syntax in syntaxes]
    assert all((picture == same[0]).all() for picture in same)
    sixteen, eight = (shown(outcomes, f"SC_rgb_rle{bits}") for bits in ("_16bit", ""))
    assert np.abs(sixteen - eight).max() < 1 / 255
    # The same test image in colour spaces of its own, by lossy JPEG: the stripes are red, green, blue at the same rows.
    plain = shown(outcomes, "SC_rgb_dcmtk_+eb+cr")
    for name in (
        "SC_rgb_dcmtk_+eb+cy+n1",
        "SC_rgb_dcmtk_+eb+cy+np",
        "SC_rgb_jpeg_dcmtk",
        "SC_ybr_full_422_uncompressed",
    ):
        assert np.abs(shown(outcomes, name) - plain).mean() < 0.02, name


def test_nothing_of_a_file_is_said(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level(logging.DEBUG)
    warnings.simplefilter("always")
    with zipfile.ZipFile(shared_data / "dicom" / "dicom_variety_dev.zip") as archive:
        # Files that pydicom remarks upon.
        for name in ("badVR", "MR_truncated", "no_meta", "SC_rgb_jpeg_app14_dcmd", "JPEG-lossy", "UN_sequence"):
            path = Path(archive.extract(f"pydicom_wheel/{name}.dcm", tmp_path))
            with contextlib.suppress(Refused):
                for picture in read_dicom(path, Reading()):
                    picture.shown("header")
    assert not caplog.records
    assert not recwarn.list


def test_the_indexer_reads_or_refuses_each_of_them_once(
    outcomes: dict[str, Outcome], shared_data: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(shared_data / "dicom" / "dicom_variety_dev.zip") as archive:
        archive.extractall(tmp_path / "files")
    plan = Plan(tmp_path / "site", [tmp_path / "files"], [Recipe(1, 32)], workers=2)
    first, second = index(plan), index(plan)
    readable = {name for name, outcome in outcomes.items() if outcome.row["pixels"].startswith("ok")}
    refused = {path.relative_to(tmp_path / "files").as_posix() for path, _ in first.refusals}
    assert refused == outcomes.keys() - readable
    assert first.read == len(readable)
    assert (second.read, second.refused, second.unchanged) == (0, 0, len(outcomes))
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite") as catalogue:
        (images,) = catalogue.database.execute("SELECT count(*) FROM image").fetchone()
    assert images == sum(len(outcome.pictures) for outcome in outcomes.values() if outcome.pictures)
