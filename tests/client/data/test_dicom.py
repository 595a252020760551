"""DICOM files as a display shows them; the oracle is PS3.3 written out by hand, and the phantom that was scanned."""

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import DataElement, Dataset, Sequence, dcmread, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames, itemize_frame

from client.data.dicom import read_dicom
from client.data.picture import Picture, Reading, Reason, Refused
from client.data.windows import WINDOWS, window_names
from common import study
from simulations.phantoms import SCANNERS, write_hospital
from simulations.phantoms.hospital import patients

NAME = "Kowalska^Zofia"
BY_NAME = pytest.mark.parametrize("scanner", range(len(SCANNERS)), ids=lambda i: SCANNERS[i].name)


@dataclass(frozen=True)
class Hospital:
    """Files in the order of the patients, and each one's clean image."""

    files: list[Path]
    truth: list[NDArray[np.float32]]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Hospital]:
    out = []
    for number, scanner in enumerate(SCANNERS):
        folder = tmp_path_factory.mktemp(scanner.name)
        plan: dict[str, Any] = {"lesions": ("disc", "ring"), "seed": number, "size": 32}
        write_hospital(folder, scanner=scanner, patients_per_lesion=1, **plan)
        everyone = list(patients(scanner, plan["lesions"], 1, number, 32))
        truth = [image for patient in everyone for image in patient.images]
        out.append(Hospital(sorted((folder / "dicom").rglob("*.dcm")), truth))
    return out


def by_hand(image: Dataset, stored: NDArray[Any]) -> NDArray[np.float64]:
    """Return what a display shows, 0 to 1: PS3.3 C.11.1 (rescale), C.11.2.1.2.1 (window), C.7.6.3.1.2 (palette)."""
    if image.PhotometricInterpretation == "RGB":
        return stored / 255.0
    if image.PhotometricInterpretation == "PALETTE COLOR":
        tables = [
            np.frombuffer(image[f"{c}PaletteColorLookupTableData"].value, "<u2") for c in ("Red", "Green", "Blue")
        ]
        return np.stack([table[stored] for table in tables], axis=-1) / 65535
    x = stored.astype(float) * float(image.get("RescaleSlope", 1)) + float(image.get("RescaleIntercept", 0))
    if "WindowWidth" in image:
        centre, width = float(image.WindowCenter), float(image.WindowWidth)
        shown = ((x - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    else:
        shown = (x - x.min()) / (x.max() - x.min())
    return 1 - shown if image.PhotometricInterpretation == "MONOCHROME1" else shown


@BY_NAME
def test_every_scanners_images_are_what_the_standard_says(hospitals: list[Hospital], scanner: int) -> None:
    hospital = hospitals[scanner]
    assert len(hospital.files) == len(hospital.truth) >= 2
    for path, truth in zip(hospital.files, hospital.truth, strict=True):
        header = dcmread(path)
        [picture] = read_dicom(path, Reading())
        shown = picture.shown("header")
        assert shown.dtype == np.float32
        expected = by_hand(header, header.pixel_array)
        assert shown.shape == expected.shape
        assert np.abs(shown - expected).max() < 1e-5
        np.testing.assert_array_equal(picture.values, header.pixel_array)
        assert (picture.identifiers["PatientID"], picture.header.modality) == (header.PatientID, header.Modality)
        assert set(picture.identifiers.values()) <= {str(element.value) for element in header}
        assert not picture.volume
        grey = shown.mean(-1) if shown.ndim == 3 else shown
        # Bright where the phantom is bright, whatever the scanner's photometric interpretation.
        assert np.corrcoef(grey.ravel(), truth.ravel())[0, 1] > 0.6


def make_file(path: Path, pixels: NDArray[Any], **values: Any) -> Path:
    """Write a minimal file; a value of None leaves the element out."""
    syntax = values.pop("syntax", uid.ExplicitVRLittleEndian)
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    elements: dict[str, Any] = {
        "SOPClassUID": uid.SecondaryCaptureImageStorage,
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
    if "HighBit" not in elements:
        elements["HighBit"] = elements["BitsStored"] - 1
    dataset = Dataset()
    for name, value in elements.items():
        if isinstance(value, DataElement):
            dataset[name] = value
        elif value is not None:
            setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = uid.UID("1.2.3")
    dataset.save_as(path, enforce_file_format=True)
    return path


def read(path: Path, reading: Reading = Reading()) -> list[Picture]:  # noqa: B008 - frozen
    return list(read_dicom(path, reading))


def shown(path: Path, window: str = "header") -> NDArray[np.float32]:
    [picture] = read(path)
    return picture.shown(window)


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
    "a VOI table of 8 bits, shorter than the image's range": (
        RAMP.astype(np.uint16) * 16,
        {"BitsStored": 12, "VOILUTSequence": [table(np.arange(256, dtype=np.uint16), first=1000, bits=8)]},
        lambda x: (x - 1000) / 255,
    ),
    "a VOI table of 8 bits with many entries": (
        RAMP.astype(np.uint16) * 16,
        {"BitsStored": 12, "VOILUTSequence": [table(np.arange(4096, dtype=np.uint16) // 16, bits=8)]},
        lambda x: x // 16 / 255,
    ),
    "a VOI table, far exceeded": (
        RAMP.astype(np.uint32) * 2**16,
        {"VOILUTSequence": [table(np.arange(256, dtype=np.uint16) * 257)]},
        lambda x: x / 255,
    ),
    "a modality table larger than what is stored": (
        RAMP,
        {"ModalityLUTSequence": [table(np.arange(4096, dtype=np.uint16))], "WindowCenter": 128, "WindowWidth": 256},
        lambda x: x / 255,
    ),
    "an exact window": (
        RAMP,
        {"WindowCenter": 100, "WindowWidth": 50, "VOILUTFunction": "LINEAR_EXACT"},
        lambda x: (x - 100) / 50 + 0.5,
    ),
    "a sigmoid": (
        RAMP,
        {"WindowCenter": 100, "WindowWidth": 50, "VOILUTFunction": "SIGMOID"},
        lambda x: 1 / (1 + np.exp(-4 * (x - 100) / 50)),
    ),
    "padding is black and counts for nothing": (
        np.where(RAMP < 16, -2000, RAMP.astype(np.int16)),
        {"PixelPaddingValue": -2000, "PhotometricInterpretation": "MONOCHROME1"},
        lambda x: np.where(x == -2000, 0, 1 - (x - 16) / 239),
    ),
    "padding with the wrong sign": (
        np.where(RAMP < 16, -2000, RAMP.astype(np.int16)),
        {"PixelPaddingValue": DataElement(0x00280120, "US", 63536)},
        lambda x: (x - 16) / 239,
    ),
    "a slope alone": (
        RAMP, {"RescaleSlope": 2, "WindowCenter": 200.5, "WindowWidth": 101}, lambda x: (2 * x - 200) / 100 + 0.5,
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
    out = shown(make_file(tmp_path / "image.dcm", stored, **header))
    assert out.shape == stored.shape
    assert np.abs(out - share(stored.astype(np.float64)).clip(0, 1)).max() < 1e-5


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_palette_colour_is_looked_up(tmp_path: Path, bits: int, segmented: bool) -> None:
    grey = np.arange(256, dtype=np.uint16)
    channels = {"Red": grey, "Green": 255 - grey, "Blue": (grey * 3) % 256}
    scale, kind = (1, "u1") if bits == 8 else (257, "<u2")
    header: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in channels.items():
        data = entries * scale
        if segmented:  # one discrete segment, PS3.3 C.7.9.2.1
            data = np.concatenate([[0, 128], data[:128], [0, 128], data[128:]])
        header[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        keyword = f"{name}PaletteColorLookupTableData"
        header["Segmented" * segmented + keyword] = data.astype(kind).tobytes()
    out = shown(make_file(tmp_path / "image.dcm", RAMP, **header))
    expected = np.stack([entries[RAMP] for entries in channels.values()], -1) / 255
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_a_palette_holds_its_last_colour_beyond_its_end(tmp_path: Path) -> None:
    header: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        header[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        header[f"{name}PaletteColorLookupTableData"] = np.arange(256, dtype=np.uint8).tobytes()
    out = shown(make_file(tmp_path / "image.dcm", RAMP.astype(np.uint16) * 2, **header))
    np.testing.assert_allclose(out[..., 0], (RAMP * 2.0).clip(0, 255) / 255, atol=1e-6)


def test_named_windows_are_for_ct_in_hu(tmp_path: Path) -> None:
    stored = RAMP.astype(np.int16) * 10
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 0, "WindowWidth": 2000}
    ct = make_file(tmp_path / "ct.dcm", stored, Modality="CT", **rescale)
    for name, (centre, width) in WINDOWS.items():
        expected = ((stored - 1024.0 - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
        assert np.abs(shown(ct, name) - expected).max() < 1e-5
    for number, header in enumerate(({"Modality": "MR"}, {"Modality": "CT", "RescaleType": "US"})):
        other = make_file(tmp_path / f"{number}.dcm", stored, **rescale, **header)
        np.testing.assert_array_equal(shown(other, "lung"), shown(other))
    with pytest.raises(ValueError, match="no window 'lungs'"):
        shown(ct, "lungs")
    assert window_names()[0] == "header"


def test_float_pixels_and_holes_in_them(tmp_path: Path) -> None:
    values = RAMP.astype(np.float32) / 10
    values[0, :4] = np.nan, np.inf, -np.inf, np.nan
    header: dict[str, Any] = {
        "FloatPixelData": values.tobytes(),
        "PixelData": None,
        "BitsStored": None,
        "PixelRepresentation": None,
    }
    header |= {"HighBit": 15, "BitsAllocated": 32}
    out = shown(make_file(tmp_path / "image.dcm", values, **header))
    expected = (values - 0.4) / 25.1
    expected[0, :4] = 0
    np.testing.assert_allclose(out, expected, atol=1e-6)
    out = shown(make_file(tmp_path / "image.dcm", values, **header, WindowCenter=10.5, WindowWidth=11))
    np.testing.assert_allclose(out[1:], ((values[1:] - 10) / 10 + 0.5).clip(0, 1), atol=1e-6)


def test_bits_are_unpacked_and_one_is_white(tmp_path: Path) -> None:
    bits = (RAMP % 3 == 0).astype(np.uint8)
    frames = np.stack([bits, 1 - bits, np.ones_like(bits)])
    header = {"BitsAllocated": 1, "BitsStored": 1, "NumberOfFrames": 3}
    path = make_file(tmp_path / "image.dcm", bits, **header, PixelData=np.packbits(frames, bitorder="little").tobytes())
    assert [picture.frame for picture in read(path)] == [0, 1, 2]
    np.testing.assert_array_equal([picture.shown("header") for picture in read(path)], frames)


@pytest.mark.parametrize(
    ("rule", "chosen"), [("all", [0, 1, 2, 3, 4]), ("middle", [2]), ("2", [0, 2, 4]), ("3", [0, 3]), ("9", [0])]
)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_the_frames_that_are_asked_for(tmp_path: Path, syntax: uid.UID, rule: str, chosen: list[int]) -> None:
    frames = np.stack([np.full((16, 16), k, np.uint8) for k in range(5)])
    path = make_file(tmp_path / "image.dcm", RAMP, NumberOfFrames=5, PixelData=frames.tobytes())
    if syntax == uid.RLELossless:
        dataset = dcmread(path)
        dataset.compress(syntax)
        dataset.save_as(path)
    pictures = read(path, Reading(frames=rule))
    assert [picture.frame for picture in pictures] == chosen
    assert [int(picture.values.max()) for picture in pictures] == chosen


def item(**values: Any) -> Dataset:
    out = Dataset()
    for keyword, value in values.items():
        setattr(out, keyword, value)
    return out


def test_functional_groups_say_how_a_frame_is_shown_and_where_it_lies(tmp_path: Path) -> None:
    shared = item(
        PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-10, RescaleType="US")],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    own = [
        item(
            FrameVOILUTSequence=[item(WindowCenter=100.5 + k, WindowWidth=101)],
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2.5 * k])],
        )
        for k in range(2)
    ]
    path = make_file(
        tmp_path / "image.dcm",
        RAMP,
        SOPClassUID=uid.EnhancedMRImageStorage,
        NumberOfFrames=2,
        PixelData=RAMP.tobytes() * 2,
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(own),
    )
    for k, picture in enumerate(read(path, Reading(volumes=True))):
        expected = ((2.0 * RAMP - 10 - (100 + k)) / 100 + 0.5).clip(0, 1)
        np.testing.assert_allclose(picture.shown("header"), expected, atol=1e-6)
        assert picture.place is not None
        assert picture.place.depth == 2.5 * k


def test_identifiers_are_those_that_the_file_has(tmp_path: Path) -> None:
    [picture] = read(
        make_file(tmp_path / "image.dcm", RAMP, PatientID=" one ", AccessionNumber="", StudyInstanceUID="1.2")
    )
    assert dict(picture.identifiers) == {"PatientID": "one", "StudyInstanceUID": "1.2", "SOPInstanceUID": "1.2.3"}
    [picture] = read(make_file(tmp_path / "image.dcm", RAMP, PatientID=" ", IssuerOfPatientID="x"))
    assert "PatientID" not in picture.identifiers


def jpeg(rows: int, columns: int, marker: int) -> bytes:
    """Return a stream that declares a shape and holds nothing."""
    frame = bytes([0xFF, marker, 0, 11, 8]) + rows.to_bytes(2, "big") + columns.to_bytes(2, "big") + b"\x01\x01\x11\x00"
    return b"\xff\xd8" + frame + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\xff\xd9"


def jpeg2000(rows: int, columns: int) -> bytes:
    size = b"".join(n.to_bytes(4, "big") for n in (columns, rows, 0, 0, columns, rows, 0, 0))
    return b"\xff\x4f\xff\x51\x00\x29\x00\x00" + size + b"\x00\x01\x07\x01\x01\xff\xd9"


BROKEN: dict[str, tuple[Reason, dict[str, Any]]] = {
    "no rows": (Reason.NOT_DECODED, {"Rows": None}),
    "too few bytes": (Reason.NOT_DECODED, {"PixelData": b"\0" * 100}),
    "fewer frames than declared": (Reason.NOT_DECODED, {"NumberOfFrames": 2}),
    "an absurd number of frames": (Reason.NOT_DECODED, {"NumberOfFrames": 2**31 - 1}),
    "a window of no width": (Reason.NOT_DECODED, {"WindowCenter": 10, "WindowWidth": 0}),
    "a slope of nothing": (Reason.NOT_DECODED, {"RescaleSlope": 0, "RescaleIntercept": 1}),
    "an unknown window function": (
        Reason.NOT_DECODED, {"WindowCenter": 10, "WindowWidth": 9, "VOILUTFunction": "CUBIC"},
    ),
    "a palette without a table": (Reason.NOT_DECODED, {"PhotometricInterpretation": "PALETTE COLOR"}),
    "an unknown photometric interpretation": (Reason.NOT_DECODED, {"PhotometricInterpretation": "HSV"}),
    "pixels in the high bits": (Reason.NOT_DECODED, {"BitsStored": 6, "HighBit": 7}),
    "no pixels": (Reason.NO_PIXELS, {"PixelData": None}),
    "too large a frame": (Reason.TOO_MANY_PIXELS, {"Rows": 60_000, "Columns": 60_000}),
    "a report": (Reason.SOP_CLASS, {"SOPClassUID": uid.BasicTextSRStorage}),
    "no SOP class": (Reason.SOP_CLASS, {"SOPClassUID": None}),
    "a video": (Reason.TRANSFER_SYNTAX, {"syntax": uid.MPEG2MPML, "PixelData": encapsulate([b"\0\0"])}),
    "a JPEG stream larger than its header says": (
        Reason.NOT_DECODED, {"syntax": uid.JPEGBaseline8Bit, "PixelData": encapsulate([jpeg(60_000, 60_000, 0xC0)])},
    ),
    "a JPEG-LS stream larger than its header says": (
        Reason.NOT_DECODED, {"syntax": uid.JPEGLSLossless, "PixelData": encapsulate([jpeg(60_000, 60_000, 0xF7)])},
    ),
    "a JPEG 2000 stream larger than its header says": (
        Reason.NOT_DECODED, {"syntax": uid.JPEG2000, "PixelData": encapsulate([jpeg2000(60_000, 60_000)])},
    ),
    "a JPEG 2000 stream of nothing": (
        Reason.NOT_DECODED, {"syntax": uid.JPEG2000, "PixelData": encapsulate([jpeg2000(16, 16)])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_shown_is_refused_without_naming_anybody(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason, header = BROKEN[case]
    decoded: list[object] = []
    if "stream larger" in case:
        monkeypatch.setattr("client.data.dicom._decoded", lambda *arguments: decoded.append(arguments))
    folder = tmp_path / "Kowalska_Zofia"
    folder.mkdir()
    path = make_file(folder / "image.dcm", RAMP, **header)
    with pytest.raises(Refused) as refusal:
        shown(path)
    assert refusal.value.reason == reason
    assert not decoded
    assert_says_nothing(refusal.value)


def assert_says_nothing(error: Refused) -> None:
    assert str(error) == error.reason.name
    assert error.__context__ is None
    assert error.__cause__ is None


def test_what_is_no_dicom_file_or_too_large(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(f"{NAME} has no image")
    (tmp_path / "empty").write_bytes(b"")
    image = make_file(tmp_path / "image.dcm", RAMP)
    (tmp_path / "start").write_bytes(image.read_bytes()[:140])
    for name, reason in {
        "text": Reason.NOT_AN_IMAGE,
        "empty": Reason.NOT_AN_IMAGE,
        "start": Reason.SOP_CLASS,
        "missing": Reason.NOT_READABLE,
        ".": Reason.NOT_READABLE,
    }.items():
        with pytest.raises(Refused) as refusal:
            read(tmp_path / name)
        assert refusal.value.reason == reason
        assert_says_nothing(refusal.value)
    with pytest.raises(Refused, match="TOO_LARGE"):
        read(image, Reading(max_file_bytes=image.stat().st_size - 1))


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_a_picture_without_a_preamble_is_read(tmp_path: Path, syntax: uid.UID) -> None:
    bare = tmp_path / "bare.dcm"
    for sop_class, readable in ((uid.CTImageStorage, True), (uid.RTPlanStorage, False)):
        content = make_file(tmp_path / "image.dcm", RAMP, syntax=syntax, SOPClassUID=sop_class).read_bytes()
        meta = 12 + int.from_bytes(content[140:144], "little")
        for part in (content[132:], content[132 + meta :]):  # without a preamble, and without group 2 too
            bare.write_bytes(part)
            if readable:
                np.testing.assert_array_equal(read(bare)[0].values, RAMP)
            else:
                with pytest.raises(Refused, match="NOT_AN_IMAGE"):
                    read(bare)


@pytest.mark.parametrize("preamble", [True, False])
def test_a_deflated_file_is_inflated_within_a_bound(tmp_path: Path, preamble: bool) -> None:
    pixels = np.zeros((512, 512), np.uint16)
    path = make_file(tmp_path / "image.dcm", pixels, syntax=uid.DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 3000
    if not preamble:
        path.write_bytes(path.read_bytes()[132:])
    np.testing.assert_array_equal(read(path)[0].values, pixels)
    with pytest.raises(Refused, match="TOO_MANY_PIXELS"):
        read(path, Reading(max_file_bytes=500_000))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Refused, match="DAMAGED"):
        read(path)


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    pixels = np.zeros((4096, 4096), np.uint16)
    path = make_file(tmp_path / "image.dcm", pixels, syntax=uid.DeflatedExplicitVRLittleEndian)
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="TOO_MANY_PIXELS"):
            read(path, Reading(max_values=2**16))
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_a_decoder_that_panics_is_a_refusal(hospitals: list[Hospital], monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """What a decoder written in Rust raises: no Exception."""

    def panic(*_: object) -> None:
        raise Panic(NAME)

    monkeypatch.setattr("client.data.dicom._decoded", panic)
    monkeypatch.setattr("client.data.layout._LAYOUTS", {})
    with pytest.raises(Refused, match="NOT_DECODED") as refusal:
        read(hospitals[0].files[0])
    assert_says_nothing(refusal.value)


@settings(max_examples=200)
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
        for picture in read_dicom(path, Reading(max_values=2**20)):
            out = picture.shown("header")
            assert out.dtype == np.float32
            assert out.ndim in {2, 3}
            assert 0 <= out.min() <= out.max() <= 1
    except Refused as refusal:
        assert_says_nothing(refusal)
    finally:
        path.unlink()


def test_frames_in_several_fragments_are_whole(tmp_path: Path) -> None:
    dataset = dcmread(make_file(tmp_path / "image.dcm", np.tile(RAMP, (4, 4))))
    dataset.compress(uid.JPEG2000Lossless)
    stream = next(generate_frames(dataset.PixelData, number_of_frames=1))
    fragments = b"".join(itemize_frame(stream, 2))
    dataset.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0" + fragments
    dataset.save_as(tmp_path / "image.dcm")
    np.testing.assert_array_equal(read(tmp_path / "image.dcm")[0].values, np.tile(RAMP, (4, 4)))


def test_a_study_can_ask_for_exactly_the_windows_there_are() -> None:
    assert sorted(window_names()) == sorted(study.WINDOWS)


@pytest.mark.parametrize(("bits", "colour"), [(8, False), (8, True), (12, False), (16, False)])
def test_jpeg_is_read_to_the_last_bit_or_refused_where_it_was_cut(tmp_path: Path, bits: int, colour: bool) -> None:
    shape = (40, 30, 3) if colour else (40, 30)
    pixels = np.random.default_rng(bits).integers(2**bits, size=shape).astype(np.uint8 if bits == 8 else np.uint16)
    stream = bytes(imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=bits))

    def write(frame: bytes) -> Path:
        syntax = uid.JPEGLosslessSV1
        return make_file(tmp_path / "image.dcm", pixels, syntax=syntax, PixelData=encapsulate([frame]), BitsStored=bits)

    [picture] = read(write(stream))
    np.testing.assert_array_equal(picture.values, pixels)
    for length in (len(stream) // 2, len(stream) - 4, len(stream) - 2):
        with pytest.raises(Refused, match="NOT_DECODED"):
            read(write(stream[:length]))
