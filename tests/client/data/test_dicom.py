"""DICOM files as a display shows them; the oracle is PS3.3 written out by hand, and the phantom that was scanned."""

import csv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from client.data.dicom import read_dicom
from common.errors import DataError
from simulations.phantoms import SCANNERS, write_hospital
from simulations.phantoms.hospital import patients

NAME = "Kowalska^Zofia"
BY_NAME = pytest.mark.parametrize("scanner", range(len(SCANNERS)), ids=lambda i: SCANNERS[i].name)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's remarks on damaged files


@dataclass(frozen=True)
class Hospital:
    """Files in the order of the patients, and each one's label and clean image."""

    files: list[Path]
    labels: dict[str, str]
    truth: list[NDArray[np.float32]]
    lesions: list[str]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Hospital]:
    out = []
    for number, scanner in enumerate(SCANNERS):
        folder = tmp_path_factory.mktemp(scanner.name)
        plan: dict[str, Any] = {"lesions": ("disc", "ring"), "seed": number, "size": 32}
        write_hospital(folder, scanner=scanner, patients_per_lesion=1, **plan)
        with (folder / "labels.csv").open(newline="") as file:
            labels = {row["SOPInstanceUID"]: row["label"] for row in csv.DictReader(file)}
        everyone = list(patients(scanner, plan["lesions"], 1, number, 32))
        truth = [image for patient in everyone for image in patient.images]
        lesions = [patient.lesion for patient in everyone for _ in patient.images]
        out.append(Hospital(sorted((folder / "dicom").rglob("*.dcm")), labels, truth, lesions))
    return out


def by_hand(image: Dataset, stored: NDArray[Any]) -> NDArray[np.float64]:
    """Return what a display shows, 0..255: PS3.3 C.11.1 (rescale), C.11.2.1.2.1 (window), C.7.6.3.1.2 (palette)."""
    if image.PhotometricInterpretation == "RGB":
        return stored.astype(float)
    if image.PhotometricInterpretation == "PALETTE COLOR":
        tables = [
            np.frombuffer(image[f"{c}PaletteColorLookupTableData"].value, "<u2") for c in ("Red", "Green", "Blue")
        ]
        return np.stack([table[stored] for table in tables], axis=-1) / 65535 * 255
    x = stored.astype(float) * float(image.get("RescaleSlope", 1)) + float(image.get("RescaleIntercept", 0))
    if "WindowWidth" in image:
        centre, width = float(image.WindowCenter), float(image.WindowWidth)
        shown = ((x - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    else:
        shown = (x - x.min()) / (x.max() - x.min())
    return 255 * (1 - shown if image.PhotometricInterpretation == "MONOCHROME1" else shown)


@BY_NAME
def test_every_scanners_images_are_what_the_standard_says(hospitals: list[Hospital], scanner: int) -> None:
    hospital = hospitals[scanner]
    assert len(hospital.files) == len(hospital.truth) >= 2
    for path, lesion, truth in zip(hospital.files, hospital.lesions, hospital.truth, strict=True):
        header = dcmread(path)
        image = read_dicom(path, hospital.labels)
        assert image.pixels.dtype == np.uint8
        expected = by_hand(header, header.pixel_array)
        assert image.pixels.shape == expected.shape
        assert np.abs(image.pixels - expected).max() <= 0.5 + 1e-6
        assert (image.patient, image.label, image.modality) == (header.PatientID, lesion, SCANNERS[scanner].modality)
        assert not image.volume
        grey = image.pixels.mean(-1) if image.pixels.ndim == 3 else image.pixels
        # Bright where the phantom is bright, whatever the scanner's photometric interpretation.
        assert np.corrcoef(grey.ravel(), truth.ravel())[0, 1] > 0.6


def make_file(path: Path, pixels: NDArray[Any], **values: Any) -> Path:
    """Write a minimal file; a value of None leaves the element out."""
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    elements: dict[str, Any] = {
        "SOPClassUID": SecondaryCaptureImageStorage,
        "SOPInstanceUID": "1.2.3",
        "PatientID": "one",
        "PatientName": NAME,
        "Modality": "OT",
        "Rows": pixels.shape[-3 if colour else -2],
        "Columns": pixels.shape[-2 if colour else -1],
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "BitsAllocated": pixels.itemsize * 8,
        "BitsStored": pixels.itemsize * 8,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes() + b"\0" * (pixels.nbytes % 2),
    }
    if colour:
        elements["PlanarConfiguration"] = 0
    elements |= values
    elements.setdefault("HighBit", elements["BitsStored"] - 1)
    dataset = Dataset()
    for name, value in elements.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset.save_as(path, enforce_file_format=True)
    return path


def read(path: Path) -> NDArray[np.uint8]:
    return read_dicom(path, {"1.2.3": "a"}).pixels


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def table(entries: NDArray[np.uint16], first: int = 0, bits: int = 16) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = entries.astype("<u2").tobytes()
    return item


def squared(values: NDArray[Any]) -> NDArray[np.uint16]:
    return (values.astype(float) ** 2).astype(np.uint16)


CASES: dict[str, tuple[NDArray[Any], dict[str, Any], Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    # What is stored, the header, and the shares of white that must be shown.
    "no window: the image's own range": (RAMP // 2 + 20, {}, lambda x: (x - 20) / 127),
    "MONOCHROME1": (RAMP, {"PhotometricInterpretation": "MONOCHROME1"}, lambda x: 1 - x / 255),
    "window": (RAMP, {"WindowCenter": 100, "WindowWidth": 51}, lambda x: (x - 99.5) / 50 + 0.5),
    "the first of several windows": (
        RAMP,
        {"WindowCenter": [100, 9], "WindowWidth": [51, 2]},
        lambda x: (x - 99.5) / 50 + 0.5,
    ),
    "an empty window is none": (RAMP // 2, {"WindowCenter": "", "WindowWidth": ""}, lambda x: x / 127),
    "rescale and window": (
        RAMP.astype(np.int16) - 100,
        {"RescaleSlope": 2, "RescaleIntercept": -10, "WindowCenter": 0.5, "WindowWidth": 101},
        lambda x: (2 * x - 10) / 100 + 0.5,
    ),
    "a slope below zero": (
        RAMP,
        {"RescaleSlope": -1, "RescaleIntercept": 0, "WindowCenter": -99.5, "WindowWidth": 51},
        lambda x: (-x + 100) / 50 + 0.5,
    ),
    "a modality table and a window": (
        RAMP,
        {"ModalityLUTSequence": [table(squared(np.arange(256)))], "WindowCenter": 30000.5, "WindowWidth": 20001},
        lambda x: (x**2 - 30000) / 20000 + 0.5,
    ),
    "a VOI table": (
        RAMP,
        {"VOILUTSequence": [table(squared(np.arange(256)))]},
        lambda x: x**2 / 65535,
    ),
    "a VOI table comes before a window": (
        RAMP,
        {"VOILUTSequence": [table(squared(np.arange(256)))], "WindowCenter": 9, "WindowWidth": 2},
        lambda x: x**2 / 65535,
    ),
    "12 bits in a window": (
        RAMP.astype(np.uint16) * 16,
        {"BitsStored": 12, "WindowCenter": 2048.5, "WindowWidth": 4001},
        lambda x: (x - 2048) / 4000 + 0.5,
    ),
    "one grey only": (RAMP * 0 + 7, {}, lambda x: x * 0),
    "8-bit colour": (np.stack([RAMP, 255 - RAMP, RAMP // 2], -1), {}, lambda x: x / 255),
    "16-bit colour": (np.stack([RAMP, 255 - RAMP, RAMP], -1).astype(np.uint16) * 257, {}, lambda x: x / 65535),
    "12-bit colour": (
        np.stack([RAMP, 255 - RAMP, RAMP], -1).astype(np.uint16) * 16,
        {"BitsStored": 12},
        lambda x: x / 4095,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_the_header_says_is_done(tmp_path: Path, case: str) -> None:
    stored, header, share = CASES[case]
    shown = read(make_file(tmp_path / "image.dcm", stored, **header))
    assert shown.shape == stored.shape
    assert np.abs(shown - 255 * share(stored.astype(np.float64)).clip(0, 1)).max() <= 0.51


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_colour_is_looked_up(tmp_path: Path, bits: int) -> None:
    grey = np.arange(256, dtype=np.uint16)
    channels = {"Red": grey, "Green": 255 - grey, "Blue": (grey * 3) % 256}
    scale, kind = (1, "u1") if bits == 8 else (257, "<u2")
    header: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in channels.items():
        header[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        header[f"{name}PaletteColorLookupTableData"] = (entries * scale).astype(kind).tobytes()
    shown = read(make_file(tmp_path / "image.dcm", RAMP, **header))
    np.testing.assert_array_equal(shown, np.stack([entries[RAMP] for entries in channels.values()], -1))


BROKEN: dict[str, dict[str, Any]] = {
    "no patient": {"PatientID": None},
    "an empty patient": {"PatientID": ""},
    "no instance": {"SOPInstanceUID": None},
    "no rows": {"Rows": None},
    "too few bytes": {"PixelData": b"\0" * 100},
    "several frames": {"NumberOfFrames": 2, "PixelData": RAMP.tobytes() * 2},
    "a window of no width": {"WindowCenter": 10, "WindowWidth": 0},
    "a palette without a table": {"PhotometricInterpretation": "PALETTE COLOR"},
    "an unknown photometric interpretation with a window": {
        "PhotometricInterpretation": "HSV", "WindowCenter": 10, "WindowWidth": 20,
    },
    "no pixels": {"PixelData": None},
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_shown_is_refused_without_naming_anybody(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "Kowalska_Zofia"
    folder.mkdir()
    with pytest.raises(DataError) as refusal:
        read(make_file(folder / "image.dcm", RAMP, **BROKEN[case]))
    assert_says_nothing(refusal.value)


def assert_says_nothing(error: DataError) -> None:
    for word in ("Kowalska", "Zofia", "/", ".dcm", "1.2.3"):
        assert word not in str(error)
    assert error.__suppress_context__ or error.__context__ is None
    assert error.__cause__ is None


def test_what_is_no_dicom_file_or_has_no_label(tmp_path: Path) -> None:
    folder = tmp_path / "Kowalska_Zofia"
    folder.mkdir()
    (folder / "text.dcm").write_text(f"{NAME} has no image")
    for path in (folder / "text.dcm", folder / "missing.dcm", folder):
        with pytest.raises(DataError, match="not a DICOM image") as refusal:
            read(path)
        assert_says_nothing(refusal.value)
    with pytest.raises(DataError, match="labels file"):
        read_dicom(make_file(folder / "image.dcm", RAMP), {"1.2.4": "a"})


def test_a_decoder_that_panics_is_a_refusal(hospitals: list[Hospital], monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """What a decoder written in Rust raises: no Exception."""

    def panic(_: object) -> None:
        raise Panic("index out of bounds")

    monkeypatch.setattr("client.data.dicom._displayed", panic)
    with pytest.raises(DataError, match="not a DICOM image"):
        read_dicom(hospitals[0].files[0], hospitals[0].labels)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(hospitals: list[Hospital], data: st.DataObject) -> None:
    hospital = hospitals[data.draw(st.sampled_from([0, 1, 4, 7]))]
    path = hospital.files[0].with_suffix(".damaged")
    content = bytearray(hospital.files[0].read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        # Most of what can go wrong stands in the header.
        place = data.draw(st.one_of(st.integers(0, 1500), st.integers(0, len(content) - 1))) % len(content)
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    try:
        image = read_dicom(path, hospital.labels)
    except DataError as refusal:
        text = str(refusal)
    else:
        text = ""
        assert image.pixels.dtype == np.uint8
        assert image.pixels.ndim in {2, 3}
    path.unlink()
    assert "damaged" not in text
    assert "PHANTOM" not in text


def test_real_files_of_many_makes(shared_data: Path, tmp_path: Path) -> None:
    shown: dict[str, NDArray[np.uint8]] = {}
    refused: dict[str, str] = {}
    with zipfile.ZipFile(shared_data / "dicom" / "dicom_variety_dev.zip") as archive:
        for info in archive.infolist():
            if info.is_dir() or info.file_size > 60_000:  # the large ones add time and nothing new
                continue
            path = Path(archive.extract(info, tmp_path))
            uid = str(dcmread(path, stop_before_pixels=True, force=True).get("SOPInstanceUID"))
            try:
                shown[path.name] = read_dicom(path, {uid: "a"}).pixels
            except DataError as refusal:
                refused[path.name] = str(refusal)
    assert len(shown) > 35
    assert all(pixels.dtype == np.uint8 for pixels in shown.values())
    assert not [name for name, text in refused.items() if name in text]
    sixteen, eight = (shown[f"SC_rgb_rle{bits}.dcm"].astype(int) for bits in ("_16bit", ""))
    assert np.abs(sixteen - eight).max() <= 1  # the same test image
    syntaxes = ("", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded")
    same = [shown[f"MR_small{syntax}.dcm"] for syntax in syntaxes]
    assert all((pixels == same[0]).all() for pixels in same)
    assert "several frames" in refused["SC_rgb_rle_2frame.dcm"]
    assert "names no patient" in refused["JPEGLSNearLossless_08.dcm"]
    for name in ("reportsi.dcm", "rtplan.dcm", "MR_truncated.dcm"):
        assert "not a DICOM image that can be decoded" in refused[name]
