"""DICOM files as images: rendered as the headers say, or refused."""

from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import pixel_array

from client.data.image import SourceImage
from common.errors import DataError

__all__ = ["read_dicom"]


def read_dicom(path: Path, labels: dict[str, str]) -> SourceImage:
    """Read a single-frame image and its label.

    Parameters
    ----------
    path : Path
        A DICOM Part 10 file.
    labels : dict
        From SOPInstanceUID to label.

    Raises
    ------
    DataError
        Not a DICOM file, no label, no patient, no decodable pixels, or several frames. The text never names file or
        patient.
    """
    try:
        dataset = pydicom.dcmread(path)
        frames = int(dataset.get("NumberOfFrames") or 1)
        pixels = _displayed(dataset) if frames == 1 else None
        instance, patient = str(dataset.SOPInstanceUID), str(dataset.get("PatientID") or "")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        # A damaged file trips pydicom and its decoders anywhere, and their text quotes the file. Decoders written in
        # Rust panic with a class that is no Exception.
        raise DataError("a file is not a DICOM image that can be decoded") from None
    if pixels is None:
        raise DataError("an image has several frames: not supported yet")
    if not patient:
        raise DataError("an image names no patient: without PatientID its patient cannot be kept on one side")
    if instance not in labels:
        raise DataError("an image has no row in the labels file")
    return SourceImage(pixels, patient, labels[instance], str(dataset.get("Modality") or ""))


def _displayed(dataset: pydicom.Dataset) -> NDArray[np.uint8]:
    """Return grey ``[H, W]`` or colour ``[H, W, 3]`` as a display shows it, 0..255, larger is brighter."""
    pixels = pixel_array(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(pixels, dataset)[..., :3]
        return _bytes(colours / np.iinfo(colours.dtype).max)
    if dataset.SamplesPerPixel == 1:
        return _grey(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset), dataset)
    return _bytes(pixels / (2.0**dataset.BitsStored - 1))


def _grey(stored: NDArray[np.generic], dataset: pydicom.Dataset) -> NDArray[np.uint8]:
    values = np.asarray(stored, np.float64)
    low, high = _display_range(dataset) or (float(values.min()), float(values.max()))
    shares = (values - low) / (high - low) if high != low else np.zeros_like(values)
    return _bytes(1 - shares if dataset.PhotometricInterpretation == "MONOCHROME1" else shares)


def _bytes(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    out: NDArray[np.uint8] = (shares.clip(0, 1) * 255).round().astype(np.uint8)
    return out


def _display_range(dataset: pydicom.Dataset) -> tuple[float, float] | None:
    """Return what `apply_voi_lut` maps the ends of the window, or of the table, to; None where it does nothing."""
    tables = dataset.get("VOILUTSequence")
    if tables and None not in (tables[0].get("LUTDescriptor"), tables[0].get("LUTData")):
        return 0.0, 2.0 ** tables[0].LUTDescriptor[2] - 1
    if None in (dataset.get("WindowCenter"), dataset.get("WindowWidth")):
        return None
    bits = dataset.BitsStored
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0.0, 2.0**bits - 1)
    if modality := dataset.get("ModalityLUTSequence"):
        low, high = 0.0, 2.0 ** modality[0].LUTDescriptor[2] - 1
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        return low, high
    return low * float(slope) + float(intercept), high * float(slope) + float(intercept)
