"""Headers that are taken apart without pydicom: what it reads, or nothing."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, uid
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

from client.data import dicom
from client.data.header import plain_dataset, text
from client.data.picture import Reading
from simulations.phantoms import SCANNERS, write_hospital

CODES = ["AE", "CS", "LO", "PN", "SH", "UI", "UN", "US", None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return an explicit, an implicit, a compressed and a deflated file."""
    found = []
    for syntax in (
        uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.JPEGLSLossless, uid.DeflatedExplicitVRLittleEndian,
    ):  # fmt: skip
        folder = tmp_path_factory.mktemp("hospital")
        scanner = replace(SCANNERS[0], transfer_syntax=syntax)
        write_hospital(folder, scanner=scanner, lesions=("disc",), patients_per_lesion=1, seed=0, size=16)
        found.append(min((folder / "dicom").rglob("*.dcm")))
    return found


def plain(path: Path) -> Dataset | None:
    with path.open("rb") as file:
        return plain_dataset(file)


def raw(dataset: Dataset) -> Iterator[tuple[object, ...]]:
    for tag, element in sorted(zip(dataset.keys(), dataset.values(), strict=True)):
        assert isinstance(element, RawDataElement)
        yield tag, element.VR, element.length, element.value, element.value_tell, element.is_implicit_VR


def same(ours: Dataset, path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom, "plain_dataset", lambda _: None)
        theirs = dicom._parse(path, Reading())
    assert list(raw(ours)) == list(raw(theirs))
    assert ours.original_encoding == theirs.original_encoding
    assert ours.original_character_set == theirs.original_character_set
    assert ours.file_meta.TransferSyntaxUID == theirs.file_meta.TransferSyntaxUID


def test_plain_files_are_read_as_pydicom_reads_them(files: list[Path]) -> None:
    for path in files[:3]:
        ours = plain(path)
        assert ours is not None
        same(ours, path)
    assert plain(files[3]) is None


@pytest.mark.parametrize("kind", [0, 2])
@pytest.mark.parametrize("change", ["cut", "longer", "no preamble", "characters", "sequence", "after the pixels"])
def test_what_is_not_plain_is_left_to_pydicom(files: list[Path], tmp_path: Path, change: str, kind: int) -> None:
    path = tmp_path / "changed.dcm"
    data = files[kind].read_bytes()
    changed = {
        "cut": data[:-2],
        "longer": data + b"\0\0",
        "no preamble": data.replace(b"DICM", b"MCID", 1),
        "characters": data.replace(b"ISO_IR", b"\0SO_IR", 1),
        "after the pixels": data + b"\xfc\xff\xfc\xffOB\0\0\2\0\0\0\0\0",
    }
    if change == "sequence":
        dataset = pydicom.dcmread(files[kind])
        dataset.ReferencedStudySequence = [Dataset()]
        dataset["ReferencedStudySequence"].is_undefined_length = True
        dataset.save_as(path)
    else:
        path.write_bytes(changed[change])
    assert plain(path) is None


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_header_is_read_as_pydicom_reads_it_or_left(files: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files[:3]))
    content = bytearray(path.read_bytes())
    last = len(content) - (1 if path == files[2] else 600)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(128, last))] = data.draw(st.integers(0, 255))
    damaged = path.with_suffix(".damaged")
    damaged.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (ours := plain(damaged)) is not None:
            same(ours, damaged)


@settings(max_examples=500)
@given(
    st.sampled_from(["PatientID", "PatientName", "SOPClassUID", "Modality"]),
    st.sampled_from(CODES),
    st.binary(max_size=12) | st.text(st.characters(max_codepoint=126), max_size=12).map(str.encode),
    st.sampled_from(["iso8859", "shift_jis", "gb18030", "utf8"]),
)
def test_text_is_what_pydicom_says(keyword: str, code: str | None, value: bytes, encoding: str) -> None:
    def dataset() -> Dataset:
        tag = BaseTag(pydicom.datadict.tag_for_keyword(keyword) or 0)
        out = Dataset({tag: RawDataElement(tag, code, len(value), value, 0, code is None, True)})
        out.set_original_encoding(code is None, True, [encoding])
        return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            said = dataset().get(keyword)
        except Exception:  # pydicom's own refusals come through
            with pytest.raises(Exception):  # noqa: B017, PT011
                text(dataset(), keyword)
            return
        assert text(dataset(), keyword) == ("" if said is None else str(said).strip(" \0"))


def test_an_element_that_is_not_there_has_no_text() -> None:
    assert text(Dataset(), "PatientID") == ""
