"""DICOM files as images: rendered as the headers say, or refused."""

from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

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
        Not a DICOM file, no label, no decodable pixels, or several frames. The text never names file or patient.
    """
    try:
        dataset = pydicom.dcmread(path)
        pixels = pixel_array(dataset)
        label = labels[dataset.SOPInstanceUID]
    except (InvalidDicomError, AttributeError, ValueError, RuntimeError):
        raise DataError("a file is not a DICOM image that can be decoded") from None
    except KeyError:
        raise DataError("an image has no row in the labels file") from None
    if dataset.get("NumberOfFrames", 1) > 1:
        raise DataError("an image has several frames: not supported yet")
    if dataset.SamplesPerPixel == 1:
        pixels = _grey(apply_voi_lut(apply_modality_lut(pixels, dataset), dataset), dataset)
    return SourceImage(pixels, str(dataset.PatientID), label, str(dataset.Modality))


def _grey(values: NDArray[np.generic], dataset: pydicom.Dataset) -> NDArray[np.uint8]:
    """Return 0..255 over the range of the display, larger is brighter."""
    values = values.astype(np.float32)
    if "WindowWidth" in dataset or "VOILUTSequence" in dataset:
        low, high = _display_range(dataset)
    else:
        low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-6)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        scaled = 1 - scaled
    out: NDArray[np.uint8] = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    return out


def _display_range(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Return what `apply_voi_lut` maps the ends of the window, or of the table, to."""
    if "VOILUTSequence" in dataset:
        return 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    signed, bits = dataset.PixelRepresentation, dataset.BitsStored
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = (float(dataset.get(k, d)) for k, d in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    return low * slope + intercept, high * slope + intercept
