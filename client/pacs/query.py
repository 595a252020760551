"""What a hospital asks its PACS for: DICOM keywords and values, and whether a result really matches."""

import re
from collections.abc import Mapping
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword

from common.errors import DataError

__all__ = ["Where", "is_uid", "values"]

# What QIDO-RS matches on the level of a series; everything else is the study's.
_OF_SERIES = {
    "BodyPartExamined",
    "DeviceSerialNumber",
    "InstitutionName",
    "Laterality",
    "Manufacturer",
    "ManufacturerModelName",
    "Modality",
    "PerformedProcedureStepStartDate",
    "ProtocolName",
    "SeriesDate",
    "SeriesDescription",
    "SeriesInstanceUID",
    "SeriesNumber",
    "StationName",
}


class Where:
    """Filters, each on its own level.

    Attributes
    ----------
    study, series : mapping of str to str
        Keyword and wanted value; a study or series belongs only if all of them match.
    study_filters : mapping of str to str
        What the studies are searched by: also the modality, in the form that it has on a study.
    """

    def __init__(self, where: Mapping[str, str]) -> None:
        for key, value in where.items():
            if tag_for_keyword(key) is None or not value:
                # Neither is repeated: the value, and the key of somebody who mistypes, can name a patient.
                raise DataError("--where takes DICOM keywords and values, as in Modality=CT or StudyDate=20200101-")
        self.series = {key: value for key, value in where.items() if key in _OF_SERIES}
        self.study = {key: value for key, value in where.items() if key not in _OF_SERIES}
        modality = {"ModalitiesInStudy": self.series["Modality"]} if "Modality" in self.series else {}
        self.study_filters = modality | self.study

    @staticmethod
    def matches(result: Mapping[str, Any], where: Mapping[str, str]) -> bool:
        """Say whether a result shows all the wanted values; one that does not show them does not match."""
        return all(
            any(_match(value, wanted, dictionary_VR(key)) for value in values(result, key))
            for key, wanted in where.items()
        )


def values(result: Mapping[str, Any], keyword: str) -> list[str]:
    """Return the values of one attribute of a result in DICOM JSON; none where it is missing or malformed."""
    element = result.get(f"{tag_for_keyword(keyword):08X}")
    found = element.get("Value") if isinstance(element, dict) else None
    plain = [v.get("Alphabetic") if isinstance(v, dict) else v for v in found] if isinstance(found, list) else []
    return [str(value) for value in plain if value is not None]


def is_uid(text: str) -> bool:
    """Say whether this may stand in an address; lenient about leading zeros, which real archives have."""
    return re.fullmatch(r"[0-9.]{1,64}", text) is not None and ".." not in text


def _match(value: str, wanted: str, vr: str) -> bool:
    """Match as PS3.4 C.2.2.2 does: list of UIDs, range, wildcard, else the same; letter case does not count."""
    if vr == "UI":
        return value in re.split(r"[,\\]", wanted)
    if vr in {"DA", "TM", "DT"} and "-" in wanted:
        first, _, last = wanted.partition("-")
        return (not first or value >= first) and (not last or value[: len(last)] <= last)
    pattern = re.escape(wanted).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(pattern, value, re.IGNORECASE | re.DOTALL) is not None
