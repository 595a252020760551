"""The DICOM side of the phantom hospitals: headers, palette and the bytes of a file."""

from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.sequence import Sequence

from simulations.phantoms.scanners import Scanner

__all__ = ["derived_uid", "derived_uuid", "template", "write_image"]

_NAMESPACE = UUID("6f1c9a52-0d0b-4b8e-9d5e-77617264726e")
_FIELD_OF_VIEW_MM = 320

_AXIAL = {
    "SliceThickness": 5,
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PositionReferenceIndicator": "",
}
_PROJECTION = {
    "ImageType": ["ORIGINAL", "PRIMARY", ""],
    "PresentationIntentType": "FOR PRESENTATION",
    "PixelIntensityRelationship": "LOG",
    "DetectorType": "DIRECT",
    "AcquisitionContextSequence": [],
}
_CT = {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "KVP": 120, "AcquisitionNumber": 1}
_MR = {
    "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
    "ScanningSequence": "SE",
    "SequenceVariant": "NONE",
    "ScanOptions": "",
    "MRAcquisitionType": "2D",
    "RepetitionTime": 500,
    "EchoTime": 15,
    "EchoTrainLength": 1,
}
_CHEST = {
    "BodyPartExamined": "CHEST",
    "ViewPosition": "PA",
    "ImageLaterality": "U",
    "PatientOrientation": ["L", "F"],
}
_BREAST = {
    "BodyPartExamined": "BREAST",
    "ViewPosition": "CC",
    "ImageLaterality": "L",
    "PatientOrientation": ["A", "R"],
    "OrganExposed": "BREAST",
    "PositionerType": "MAMMOGRAPHIC",
    "BreastImplantPresent": "NO",
}
_CODES = {
    "DX": {"AnatomicRegionSequence": ("51185008", "Thorax")},
    "MG": {
        "AnatomicRegionSequence": ("76752008", "Breast"),
        "ViewCodeSequence": ("399162004", "cranio-caudal"),
    },
}
"""SNOMED CT codes that the projection images must hold."""

_PHOTOGRAPH = {"ImageType": ["ORIGINAL", "PRIMARY"], "AcquisitionContextSequence": []}

_MODALITIES: dict[str, tuple[uid.UID, dict[str, Any]]] = {
    "CT": (uid.CTImageStorage, _AXIAL | _CT),
    "MR": (uid.MRImageStorage, _AXIAL | _MR),
    "CR": (uid.ComputedRadiographyImageStorage, {"BodyPartExamined": "CHEST", "ViewPosition": "PA"}),
    "DX": (uid.DigitalXRayImageStorageForPresentation, _PROJECTION | _CHEST),
    "MG": (uid.DigitalMammographyXRayImageStorageForPresentation, _PROJECTION | _BREAST),
    "US": (uid.UltrasoundImageStorage, {"ImageType": ["ORIGINAL", "PRIMARY"]}),
    "XC": (uid.VLPhotographicImageStorage, _PHOTOGRAPH),
}
"""Storage SOP class of each modality, and what its header holds beside the common part."""


def derived_uuid(*parts: object) -> UUID:
    """Return the UUID (RFC 4122, version 5) that belongs to the parts: the same parts, the same UUID."""
    return uuid5(_NAMESPACE, "/".join(map(str, parts)))


def derived_uid(*parts: object) -> uid.UID:
    """Return the UID that belongs to the parts, in the UUID-derived form of DICOM PS3.5 annex B.2."""
    return uid.UID(f"2.25.{derived_uuid(*parts).int}")


def template(scanner: Scanner, size: int) -> Dataset:
    """Return the header that all images of a scanner share.

    Parameters
    ----------
    scanner : Scanner
        The scanner.
    size : int
        Rows and columns, in pixels.

    Returns
    -------
    pydicom.dataset.Dataset
        Everything but what belongs to a patient, a study, a series or an image. It says that no person's
        identity is in the file, because no person is.
    """
    sop_class, particulars = _MODALITIES[scanner.modality]
    header: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 100",
        "SOPClassUID": sop_class,
        "Modality": scanner.modality,
        "Manufacturer": scanner.manufacturer,
        "ManufacturerModelName": scanner.model,
        "ReferringPhysicianName": "",
        "PatientBirthDate": "",
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": "Computer-generated phantom: no person was imaged",
        "BurnedInAnnotation": "NO",
        "LossyImageCompression": "00",
        "Rows": size,
        "Columns": size,
        "SamplesPerPixel": 3 if scanner.photometric == "RGB" else 1,
        "PhotometricInterpretation": scanner.photometric,
        "BitsAllocated": scanner.bits_allocated,
        "BitsStored": scanner.bits_stored,
        "HighBit": scanner.bits_stored - 1,
        "PixelRepresentation": int(scanner.signed),
    }
    header |= particulars
    spacing = [round(_FIELD_OF_VIEW_MM / size, 4)] * 2
    if scanner.modality in ("CT", "MR"):
        header["PixelSpacing"] = spacing
    elif scanner.modality in ("CR", "DX", "MG"):
        header["ImagerPixelSpacing"] = spacing
    if scanner.modality in ("DX", "MG"):
        inverse = scanner.photometric == "MONOCHROME1"
        header["PresentationLUTShape"] = "INVERSE" if inverse else "IDENTITY"
        header["PixelIntensityRelationshipSign"] = 1 if inverse else -1
    if scanner.photometric == "RGB":
        header["PlanarConfiguration"] = 0
    if scanner.photometric == "PALETTE COLOR":
        header |= _palette()
    if scanner.window is not None:
        header["WindowCenter"], header["WindowWidth"] = scanner.window
    if scanner.rescale is not None:
        header["RescaleSlope"], header["RescaleIntercept"] = scanner.rescale
        header["RescaleType"] = "HU" if scanner.modality == "CT" else "US"
    dataset = Dataset()
    for keyword, value in header.items():
        setattr(dataset, keyword, value)
    for keyword, (code, meaning) in _CODES.get(scanner.modality, {}).items():
        setattr(dataset, keyword, Sequence([_code(code, meaning)]))
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.file_meta.TransferSyntaxUID = scanner.transfer_syntax
    # Our own, so that the bytes do not change with the release of the library that writes them.
    dataset.file_meta.ImplementationClassUID = derived_uid("implementation")
    dataset.file_meta.ImplementationVersionName = "WARDROUND"
    return dataset


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    return item


def _palette() -> dict[str, Any]:
    """Return a palette of 256 warm greys, 16 bits each, as a header's attributes."""
    grey = np.linspace(0, 1, 256)
    header: dict[str, Any] = {}
    for name, power in (("Red", 0.85), ("Green", 1.0), ("Blue", 1.3)):
        header[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        header[f"{name}PaletteColorLookupTableData"] = np.rint(65535 * grey**power).astype("<u2").tobytes()
    return header


def write_image(path: Path, dataset: Dataset, pixels: NDArray[np.integer]) -> None:
    """Write one Part 10 file.

    Parameters
    ----------
    path : pathlib.Path
        The file; its folder exists.
    dataset : pydicom.dataset.Dataset
        The complete header; its pixel data are replaced.
    pixels : ndarray
        Stored samples, ``[S, S]`` or ``[S, S, 3]``.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        dataset.compress(syntax, pixels, generate_instance_uid=False)
    else:
        dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dcmwrite(path, dataset, enforce_file_format=True)
