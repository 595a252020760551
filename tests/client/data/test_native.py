"""Native pixels that are taken without pydicom's decoder: the same numbers as with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset

from client.data import dicom, native
from client.data.dicom import read_frames
from client.data.picture import Reading, Refused


def written(path: Path, stored: np.ndarray[Any, Any], bits: int, syntax: str) -> Path:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.CTImageStorage, "1.2.3"
    dataset.Modality, dataset.PatientID = "CT", "one"
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * stored.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = (
        uid.CTImageStorage,
        uid.UID("1.2"),
    )
    dataset.save_as(path, enforce_file_format=True)
    return path


def values(path: Path, reading: Reading) -> list[np.ndarray[Any, Any]]:
    return [frame.values for frame in read_frames(path, reading)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["u1", "i1", "<u2", "<i2"]),
    st.integers(1, 16),
    st.sampled_from([(4, 6), (3, 5), (3, 4, 6)]),
    st.sampled_from([uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian]),
    st.sampled_from(["all", "middle", "2"]),
    st.integers(0, 2**32 - 1),
)
def test_the_second_file_has_what_pydicom_reads(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, bits: int, shape: tuple[int, ...], syntax: str, frames: str,
    seed: int,
) -> None:  # fmt: skip
    folder, rng = tmp_path_factory.mktemp("native"), np.random.default_rng(seed)
    itemsize = np.dtype(dtype).itemsize
    one, two = (rng.integers(0, 256, (*shape, itemsize), np.uint8).view(dtype)[..., 0] for _ in range(2))
    bits, reading = min(bits, 8 * itemsize), Reading(frames=frames)
    first, second = (written(folder / name, s, bits, syntax) for name, s in (("1.dcm", one), ("2.dcm", two)))
    native._LAYOUTS.clear()
    expected = values(second, reading)
    native._LAYOUTS.clear()
    values(first, reading)
    got = values(second, reading)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype.str == theirs.dtype.str
        np.testing.assert_array_equal(ours, theirs)


def test_the_decoder_is_asked_once_for_files_of_one_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native._LAYOUTS.clear()
    stored = np.arange(24, dtype="<u2").reshape(4, 6)
    values(written(tmp_path / "1.dcm", stored, 12, uid.ExplicitVRLittleEndian), Reading())

    def never(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(dicom, "_decoded", never)
        again = written(tmp_path / "2.dcm", stored + np.uint16(1), 12, uid.ExplicitVRLittleEndian)
        np.testing.assert_array_equal(values(again, Reading())[0], stored + 1)
        for other in (stored[:3], stored.astype("<i2")):
            with pytest.raises(Refused):
                values(written(tmp_path / "3.dcm", other, 12, uid.ExplicitVRLittleEndian), Reading())
    with pytest.raises(Refused, match="TOO_MANY_PIXELS"):
        values(again, Reading(max_values=23))
