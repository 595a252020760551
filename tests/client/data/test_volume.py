"""Slices make one volume, in their order in the patient, or none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset

from client.data.picture import Picture, Reading, Reason, Refused
from client.data.volume import read_volume

AXIAL = [1, 0, 0, 0, 1, 0]
SAGITTAL = [0, 1, 0, 0, 0, -1]
BODY = np.random.default_rng(3).integers(-100, 1500, (5, 6, 7)).astype(np.int16)


def item(**values: Any) -> Dataset:
    out = Dataset()
    for keyword, value in values.items():
        setattr(out, keyword, value)
    return out


def write(path: Path, pixels: NDArray[np.int16], **values: Any) -> Path:
    image = Dataset()
    elements: dict[str, Any] = {
        "SOPClassUID": uid.CTImageStorage,
        "SOPInstanceUID": uid.generate_uid(),
        "SeriesInstanceUID": "1.2",
        "PatientID": "one",
        "Modality": "CT",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "ImageOrientationPatient": AXIAL,
        "PixelData": pixels.tobytes(),
    } | values
    for keyword, value in elements.items():
        if value is not None:
            setattr(image, keyword, value)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    image.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, change: Callable[[int], dict[str, Any]] = lambda _: {}) -> list[Path]:
    """Write BODY's slices, the top one first."""
    files = [
        write(folder / f"{k}.dcm", BODY[k], **({"ImagePositionPatient": [0, 0, 2.5 * k - 10]} | change(k)))
        for k in range(len(BODY))
    ]
    return files[::-1]


def read(files: list[Path], **reading: Any) -> Picture:
    return read_volume(files, Reading(**reading))


def test_slices_are_sorted_along_their_normal(tmp_path: Path) -> None:
    volume = read(series(tmp_path))
    assert volume.volume
    np.testing.assert_array_equal(volume.values, BODY)
    assert dict(volume.identifiers) == {"PatientID": "one", "SeriesInstanceUID": "1.2"}
    assert volume.place is not None
    assert volume.place.depth == -10
    # The other way round in the patient: the normal of a sagittal slice is -x.
    back = series(tmp_path, lambda k: {"ImageOrientationPatient": SAGITTAL, "ImagePositionPatient": [2.5 * k, 3, 4]})
    np.testing.assert_array_equal(read(back).values, BODY[::-1])


def test_one_window_for_all_slices(tmp_path: Path) -> None:
    files = series(tmp_path, lambda k: {"WindowCenter": 0 if k == 2 else 999, "WindowWidth": 1001})
    hu = BODY - 1024.0
    shown = read(files).shown("header")
    assert shown.dtype == np.float32
    np.testing.assert_allclose(shown, ((hu + 0.5) / 1000 + 0.5).clip(0, 1), atol=1e-5)
    np.testing.assert_allclose(read(files).shown("bone"), ((hu - 399.5) / 1799 + 0.5).clip(0, 1), atol=1e-5)
    with pytest.raises(ValueError, match="no window"):
        read(files).shown("lungs")


def test_without_a_window_the_whole_volume_is_the_range_and_each_slice_has_its_slope(tmp_path: Path) -> None:
    files = series(tmp_path, lambda k: {"Modality": "PT", "RescaleSlope": k + 1, "RescaleIntercept": 0})
    real = BODY * np.arange(1.0, 6.0)[:, None, None]
    expected = (real - real.min()) / (real.max() - real.min())
    np.testing.assert_allclose(read(files).shown("lung"), expected, atol=1e-6)


def test_an_enhanced_file_is_a_volume_whatever_the_order_of_its_frames(tmp_path: Path) -> None:
    order = [3, 0, 4, 1, 2]
    own = [item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 1.5 * k])]) for k in order]
    rescale = item(RescaleSlope=1, RescaleIntercept=-1000, RescaleType="HU")
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)], PixelValueTransformationSequence=[rescale]
    )
    path = write(
        tmp_path / "enhanced.dcm", BODY[order], SOPClassUID=uid.EnhancedCTImageStorage, SOPInstanceUID="1.2.3",
        NumberOfFrames=5, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=own,
        RescaleSlope=None, RescaleIntercept=None, ImageOrientationPatient=None,
    )  # fmt: skip
    volume = read([path], frames="middle")
    np.testing.assert_array_equal(volume.values, BODY)
    assert volume.identifiers["SOPInstanceUID"] == "1.2.3"
    hu = BODY - 1000.0
    np.testing.assert_allclose(volume.shown("lung"), ((hu + 600.5) / 1499 + 0.5).clip(0, 1), atol=1e-5)


NONE: dict[str, Callable[[int], dict[str, Any]]] = {
    "a slice is missing": lambda k: {"ImagePositionPatient": [0, 0, 2.5 * k + 2.5 * (k > 2)]},
    "a slice is doubled": lambda k: {"ImagePositionPatient": [0, 0, 2.5 * min(k, 3)]},
    "gaps differ": lambda k: {"ImagePositionPatient": [0, 0, 2.5 * k + 0.3 * (k == 2)]},
    "all in one place": lambda _: {"ImagePositionPatient": [0, 0, 0]},
    "no position": lambda k: {"ImagePositionPatient": None} if k == 1 else {},
    "a position of nothing": lambda k: {"ImagePositionPatient": [0, 0]} if k == 1 else {},
    "a skew orientation": lambda k: {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]} if k == 1 else {},
    "another orientation": lambda k: {"ImageOrientationPatient": SAGITTAL} if k == 1 else {},
    "another shape": lambda k: {"Rows": 7, "Columns": 6} if k == 1 else {},
    "another patient": lambda k: {"PatientID": "two"} if k == 1 else {},
    "another series": lambda k: {"SeriesInstanceUID": "1.3"} if k == 1 else {},
    "inverted": lambda k: {"PhotometricInterpretation": "MONOCHROME1"} if k == 1 else {},
}


@pytest.mark.parametrize("case", NONE)
def test_what_makes_no_volume(tmp_path: Path, case: str) -> None:
    with pytest.raises(Refused) as refusal:
        read(series(tmp_path, NONE[case]))
    assert refusal.value.reason == Reason.NOT_A_VOLUME


def test_rounded_positions_are_even(tmp_path: Path) -> None:
    files = series(tmp_path, lambda k: {"ImagePositionPatient": [0, 0, round(0.625 * k, 1)]})
    with pytest.raises(Refused, match="NOT_A_VOLUME"):  # 0.6, 0.6, 0.7: more than a tenth
        read(files)
    np.testing.assert_array_equal(
        read(series(tmp_path, lambda k: {"ImagePositionPatient": [0, 0, round(0.625 * k, 2)]})).values, BODY
    )


def test_one_slice_none_or_a_refused_one(tmp_path: Path) -> None:
    files = series(tmp_path)
    for some in (files[:1], []):
        with pytest.raises(Refused, match="NOT_A_VOLUME"):
            read(some)
    files[2].write_bytes(b"nothing")
    with pytest.raises(Refused, match="NOT_AN_IMAGE"):
        read(files)


def test_a_volume_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    files = series(tmp_path)
    assert read(files, max_values=BODY.size).values.size == BODY.size
    with pytest.raises(Refused, match="TOO_MANY_PIXELS"):
        read(files, max_values=BODY.size - 1)
