"""Pixels that are taken without pydicom's decoders: the same numbers as with them."""

from pathlib import Path
from typing import Any

import jpeg_ls
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

from client.data import dicom, layout
from client.data.dicom import read_frames
from client.data.picture import Reading, Refused


def written(
    path: Path, stored: np.ndarray[Any, Any], bits: int, syntax: str, *, error: int = 0, table: bool = False
) -> Path:
    """Write a file; with JPEG-LS, values can be wrong by so much, and a table of offsets can come first."""
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
    if syntax in uid.JPEGLSTransferSyntaxes:
        bare = stored.astype(f"u{stored.itemsize}")
        frames = [bytes(jpeg_ls.encode_array(frame, error)) for frame in (bare if bare.ndim == 3 else [bare])]
        dataset.PixelData = encapsulate(frames, has_bot=table)
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = (
        uid.CTImageStorage,
        uid.UID("1.2"),
    )
    dataset.save_as(path, enforce_file_format=True)
    return path


def values(path: Path, reading: Reading) -> list[np.ndarray[Any, Any]]:
    return [frame.values for frame in read_frames(path, reading)]


@settings(max_examples=60)
@given(
    st.sampled_from(["u1", "i1", "<u2", "<i2"]),
    st.integers(1, 16),
    st.sampled_from([(24, 36), (23, 35), (3, 20, 24)]),
    st.sampled_from([uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.JPEGLSLossless]),
    st.sampled_from(["all", "middle", "2"]),
    st.integers(0, 2**32 - 1),
)
def test_the_second_file_has_what_pydicom_reads(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, bits: int, shape: tuple[int, ...], syntax: str, frames: str,
    seed: int,
) -> None:  # fmt: skip
    folder, rng = tmp_path_factory.mktemp("layout"), np.random.default_rng(seed)
    itemsize = np.dtype(dtype).itemsize
    one, two = (rng.integers(0, 256, (*shape, itemsize), np.uint8).view(dtype)[..., 0] for _ in range(2))
    bits, reading = min(bits, 8 * itemsize), Reading(frames=frames)
    if syntax == uid.JPEGLSLossless and seed % 2:  # as they should be; otherwise they have more bits than are said
        one, two = (values & np.array(2**bits - 1).astype(values.dtype) for values in (one, two))
    first, second = (written(folder / name, s, bits, syntax) for name, s in (("1.dcm", one), ("2.dcm", two)))
    layout._LAYOUTS.clear()
    expected = values(second, reading)
    layout._LAYOUTS.clear()
    values(first, reading)
    got = values(second, reading)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype.str == theirs.dtype.str
        np.testing.assert_array_equal(ours, theirs)


def test_the_decoder_is_asked_once_for_files_of_one_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout._LAYOUTS.clear()
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


def test_of_jpeg_ls_the_stream_is_decoded_and_nothing_else_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout._LAYOUTS.clear()
    stored = np.arange(24 * 24, dtype="<u2").reshape(24, 24) * np.uint16(7)
    near = uid.JPEGLSNearLossless
    values(written(tmp_path / "1.dcm", stored, 12, near, error=1), Reading())
    (lies,) = layout._LAYOUTS.values()
    assert (lies.count, lies.shape, lies.coded) == (1, (24, 24), True)

    def never(*_: object) -> None:
        raise AssertionError

    other = stored[::-1].copy()
    alike = written(tmp_path / "2.dcm", other, 12, near, error=1)
    # One that is described in other words: another error, a table of offsets, another transfer syntax, another size.
    different = [
        written(tmp_path / "3.dcm", other, 12, near, error=2),
        written(tmp_path / "4.dcm", other, 12, near, error=1, table=True),
        written(tmp_path / "5.dcm", other, 12, uid.JPEGLSLossless, error=1),
        written(tmp_path / "6.dcm", other[:20], 12, near, error=1),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(dicom, "_decoded", never)
        np.testing.assert_allclose(values(alike, Reading())[0].astype(int), other, atol=1)
        assert not (values(alike, Reading())[0] == other).all()
        for path in different[:1] + different[2:]:
            with pytest.raises(Refused):
                values(path, Reading())
        with pytest.raises(Refused, match="TOO_MANY_PIXELS"):
            values(alike, Reading(max_values=24 * 24 - 1))
    for path in different:
        values(path, Reading())

    whole = alike.read_bytes()
    alike.write_bytes(whole.replace(b"\xff\xd9", b"\xff\xd8"))
    with pytest.raises(Refused, match="NOT_DECODED"):
        values(alike, Reading())


def test_signs_are_left_to_pydicom(tmp_path: Path) -> None:
    layout._LAYOUTS.clear()
    stored = np.arange(-12, 12, dtype="<i2").reshape(4, 6)
    np.testing.assert_array_equal(
        values(written(tmp_path / "1.dcm", stored, 16, uid.JPEGLSLossless), Reading())[0], stored
    )
    assert not layout._LAYOUTS
