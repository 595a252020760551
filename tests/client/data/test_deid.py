"""What is kept of a header, what it exposes, and when a site that demands de-identified files refuses one."""

import io
import logging
import pickle
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, uid
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileMetaDataset

from client.data.deid import DIRECT, IDENTIFYING, PRIVATE, header_of, identity_refusal
from client.data.dicom import read_dicom
from client.data.picture import Reading, Reason, Refused

CANARY = "Brzeczyszczykiewicz"


def dataset(**values: Any) -> Dataset:
    out = Dataset()
    for keyword, value in ({"Modality": "CT", "SOPClassUID": uid.CTImageStorage} | values).items():
        setattr(out, keyword, value)
    return out


CLEAN = {"PatientIdentityRemoved": "YES", "BurnedInAnnotation": "NO"}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom, on writing what is no manufacturer
def test_only_four_values_are_kept_and_cleaned() -> None:
    rest = dict.fromkeys(("InstitutionName", "PatientName", "StudyDescription"), CANARY)
    kept = header_of(
        dataset(
            BodyPartExamined="CHEST", Manufacturer="SIEMENS\n" + "x" * 99, ManufacturerModelName="東芝 Aquilion", **rest
        )
    )
    assert (kept.modality, kept.body_part, kept.scanner) == ("CT", "CHEST", "東芝 Aquilion")
    assert kept.manufacturer == "SIEMENS " + "x" * 56
    assert CANARY not in repr(kept)
    odd = header_of(
        dataset(Modality="ct of " + CANARY, BodyPartExamined="Pani " + CANARY, Manufacturer=f"{CANARY}^Jan")
    )
    assert (odd.modality, odd.body_part, odd.manufacturer) == ("", "", "")


def test_identifying_attributes_are_named_never_quoted() -> None:
    plain = dataset(
        PatientName=f"{CANARY}^Jan", PatientID="7", StudyDate="20200101", InstitutionName="", StudyTime=None
    )
    plain.private_block(0x0011, CANARY, create=True).add_new(1, "LO", CANARY)
    exposed = header_of(plain).exposed
    assert set(exposed) == {"PatientName", "PatientID", "StudyDate", PRIVATE}
    assert set(DIRECT) <= set(IDENTIFYING)
    assert len(set(IDENTIFYING)) == len(IDENTIFYING)
    assert all(tag_for_keyword(keyword) for keyword in IDENTIFYING)
    # With identity removed the number is a pseudonym.
    assert "PatientID" not in header_of(dataset(PatientID="7", **CLEAN)).exposed


@pytest.mark.parametrize(
    ("name", "pseudonym"),
    [
        ("", True), ("ANON^ANONYMOUS", True), ("LIDC-0001", True), ("case12^site3", True), ("same", True),
        ("Kowalska^Zofia", False), ("Kowalska", False), ("Anonymous^Kowalska", False), ("Kowalska^Z1", False),
    ],
)  # fmt: skip
def test_what_passes_for_a_pseudonym(name: str, pseudonym: bool) -> None:
    header = header_of(dataset(PatientName=name, PatientID="same", **CLEAN))
    assert ("PatientName" not in header.exposed) == pseudonym
    assert identity_refusal(header) == (None if pseudonym else Reason.NOT_DEIDENTIFIED)


NOTES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a CT that says nothing": ({}, set()),
    "identity removed": ({"PatientIdentityRemoved": "YES"}, {"identity-removed"}),
    "identity not removed": ({"PatientIdentityRemoved": "NO"}, set()),
    "burned in": ({"BurnedInAnnotation": "YES"}, {"burned-in"}),
    "ultrasound that does not say": ({"Modality": "US"}, {"burned-in-unknown"}),
    "ultrasound that says no": ({"Modality": "US", "BurnedInAnnotation": "NO"}, set()),
    "ultrasound that says something else": ({"Modality": "US", "BurnedInAnnotation": "MAYBE"}, {"burned-in-unknown"}),
    "a captured screen of a CT": ({"SOPClassUID": uid.SecondaryCaptureImageStorage}, {"burned-in-unknown"}),
    "a head": ({"BodyPartExamined": "HEAD"}, {"face"}),
    "a head and neck": ({"BodyPartExamined": "HEAD_NECK"}, {"face"}),
    "a head, by X-ray": ({"BodyPartExamined": "HEAD", "Modality": "DX"}, set()),
    "a face, it says": ({"RecognizableVisualFeatures": "YES"}, {"face"}),
}


@pytest.mark.parametrize("case", NOTES)
def test_notes(case: str) -> None:
    values, notes = NOTES[case]
    assert set(header_of(dataset(**values)).notes) == notes


def test_cleaned_pixels_are_not_burned_in() -> None:
    method = Dataset()
    method.CodeValue = "113101"
    notes = header_of(dataset(Modality="US", DeidentificationMethodCodeSequence=[method])).notes
    assert "burned-in-unknown" not in notes


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, Reason.NOT_DEIDENTIFIED),
        (CLEAN, None),
        (CLEAN | {"PatientAddress": CANARY}, Reason.NOT_DEIDENTIFIED),
        (CLEAN | {"StudyDate": "20200101", "InstitutionName": "x"}, None),
        (CLEAN | {"BurnedInAnnotation": "YES"}, Reason.BURNED_IN),
        ({"PatientIdentityRemoved": "YES", "Modality": "US"}, Reason.BURNED_IN),
    ],
)
def test_who_demands_de_identified_files_gets_no_others(
    tmp_path: Path, values: dict[str, Any], reason: Reason | None
) -> None:
    path = write(tmp_path / "image.dcm", **values)
    assert len(list(read_dicom(path, Reading()))) == 1
    if reason is None:
        assert len(list(read_dicom(path, Reading(require_deidentified=True)))) == 1
    else:
        with pytest.raises(Refused) as refusal:
            list(read_dicom(path, Reading(require_deidentified=True)))
        assert refusal.value.reason == reason


def write(path: Path, **values: Any) -> Path:
    pixels = np.arange(64, dtype=np.uint8)
    image = dataset(
        SOPInstanceUID="1.2.3", Rows=8, Columns=8, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=pixels.tobytes(), **values,
    )  # fmt: skip
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    image.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file that has its patient's name wherever one can stand."""
    folder = tmp_path_factory.mktemp("named")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(
            folder / "image.dcm", PatientName=f"{CANARY}^Jan", PatientID=CANARY, AccessionNumber=CANARY[:16],
            InstitutionName=CANARY, PatientBirthDate=CANARY[:8], PatientAge=CANARY, StudyDescription=CANARY,
            NumberOfFrames="1", WindowCenter="30", WindowWidth="50",
        )  # fmt: skip
    return path.read_bytes()


def attempt(path: Path) -> Refused | None:
    try:
        for picture in read_dicom(path, Reading(max_values=2**20)):
            picture.shown("header")
            assert CANARY not in repr(picture.header)
    except Refused as refusal:
        return refusal
    return None


@settings(max_examples=150)
@given(data=st.data())
def test_nobody_is_named_whatever_is_wrong(
    named: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(named)
    for _ in range(data.draw(st.integers(0, 5))):
        content[data.draw(st.integers(128, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp(CANARY) / f"{CANARY}.dcm"
    path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(140, len(content))))])
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            refusal = attempt(path)
    finally:
        logging.getLogger().removeHandler(handler)
        path.unlink()
    assert not caught
    assert log.getvalue() == ""
    if refusal:
        assert CANARY not in repr(refusal) + str(refusal) + repr(pickle.dumps(refusal.args))
        assert refusal.__context__ is refusal.__cause__ is None
        # Source lines and the class only.
        assert CANARY not in "".join(traceback.format_exception(refusal))
