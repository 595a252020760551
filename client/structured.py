"""Predictions as DICOM structured reports, one for every DICOM file; each references its source instance.

A report is a Comprehensive SR by template TID 1500: the images' probabilities, bounds and conformal set as measurements
and evaluations of groups that name the source instance. It is unverified, and it holds the patient's identity, as every
DICOM object of that patient does: it stays at the site.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import pydicom
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from pydicom.sr.codedict import codes

from client.adapt.folder import AdaptedModel

__all__ = ["structured_report", "write_report"]

#: Codes of our own: a class's name is the site's, and no standard terminology has it.
_SCHEME = "99WARDROUND"


def structured_report(
    model: AdaptedModel, source: pydicom.Dataset, records: Sequence[Mapping[str, Any]]
) -> ComprehensiveSR:
    """Return the report of one source instance.

    Parameters
    ----------
    source : pydicom.Dataset
        The instance; its pixels are not needed.
    records : sequence of mapping
        As `client.predict` writes them: one for each of its frames that was predicted.
    """
    version = str(model.facts["theta digest"])[:16]
    algorithm = AlgorithmIdentification("wardround adapted model", version)
    device = DeviceObserverIdentifyingAttributes(uid=hd.UID(), name="wardround-site predict", model_name=version)
    context = ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))
    frames = int(getattr(source, "NumberOfFrames", 1) or 1)
    groups = [_group(model, source, record, algorithm, many=frames > 1) for record in records]
    content = MeasurementReport(
        observation_context=context,
        procedure_reported=_code("imaging", "Imaging procedure"),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    return ComprehensiveSR(
        evidence=[source],
        content=content[0],
        series_instance_uid=hd.UID(),
        series_number=1,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="wardround",
        is_complete=True,
        is_final=False,
        is_verified=False,
        series_description="DO NOT USE" if model.refusals else "Adapted model, unverified",
    )


def write_report(path: Path, report: ComprehensiveSR) -> None:
    """Write a report: whole or not at all, readable by its owner alone."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        report.save_as(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _group(
    model: AdaptedModel,
    source: pydicom.Dataset,
    record: Mapping[str, Any],
    algorithm: AlgorithmIdentification,
    *,
    many: bool,
) -> MeasurementsAndQualitativeEvaluations:
    numbers = [int(record["frame"]) + 1] if many else None
    image = SourceImageForMeasurementGroup(str(source.SOPClassUID), str(source.SOPInstanceUID), numbers)
    words = {"p": "Probability", "low": "Lower bound of probability", "high": "Upper bound of probability"}
    measurements = [
        Measurement(_code(f"{kind} {name}", f"{word} of {name}"), float(record[f"{kind} {name}"]), codes.UCUM.NoUnits)
        for name in model.classes
        for kind, word in words.items()
    ]
    held = str(record["set"]).replace(";", ", ") or "no class"
    evaluations = [
        QualitativeEvaluation(_code("class", "Most probable class"), _code("c " + record["class"], record["class"])),
        QualitativeEvaluation(
            _code("set", f"Conformal set, {model.calibration.coverage:.0%}"), _code("s " + held, held)
        ),
        QualitativeEvaluation(
            _code("unlike", "Unlike the images adapted to"),
            codes.SCT.Yes if str(record["unlike"]) == "True" else codes.SCT.No,
        ),
    ]
    return MeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(uid=hd.UID(), identifier=f"image {record['frame']}"),
        algorithm_id=algorithm,
        measurements=measurements,
        qualitative_evaluations=evaluations,
        source_images=[image],
    )


def _code(value: str, meaning: str) -> CodedConcept:
    # Code Value has 16 characters and Code Meaning 64 (PS3.5, SH and LO).
    short = value if len(value) <= 16 else hashlib.sha256(value.encode()).hexdigest()[:16]
    return CodedConcept(short, _SCHEME, meaning[:64])
