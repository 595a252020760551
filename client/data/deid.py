"""What a header may tell about its picture, and what it says about whose picture it is.

The allow-list is `Header`: modality, manufacturer, model and body part. Everything else is looked at for being there,
never for what it says; a patient's name and number are compared with each other and forgotten.
"""

import re
from collections.abc import Iterator
from typing import Any

from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.uid import (
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from client.data.header import text
from client.data.picture import Header, Reason

__all__ = ["DIRECT", "IDENTIFYING", "PRIVATE", "header_of", "identity_refusal"]

#: Private attributes, counted as one.
PRIVATE = "PrivateAttributes"

#: Attributes that name a patient or tell where to find one. De-identified files hold none of them, but for a
#: pseudonym in PatientName.
DIRECT = (
    "PatientName", "IssuerOfPatientID", "OtherPatientIDs", "OtherPatientIDsSequence", "OtherPatientNames",
    "PatientBirthName", "PatientMotherBirthName", "PatientAddress", "PatientTelephoneNumbers",
    "PatientTelecomInformation", "MedicalRecordLocator", "PatientInsurancePlanCodeSequence", "ResponsiblePerson",
    "ReferencedPatientPhotoSequence", "InsurancePlanIdentification",
)  # fmt: skip

#: After PS3.15 table E.1-1: what can identify a patient, a person, a place or a day; without the UIDs, which a
#: de-identified file has too.
IDENTIFYING = (
    *DIRECT,
    # The patient.
    "PatientID", "PatientBirthDate", "PatientBirthTime", "PatientBirthDateInAlternativeCalendar",
    "PatientDeathDateInAlternativeCalendar", "PatientAge", "PatientSex", "PatientSize", "PatientWeight",
    "PatientComments", "PatientState", "PatientReligiousPreference", "PatientPrimaryLanguageCodeSequence",
    "PatientTransportArrangements", "AdditionalPatientHistory", "Allergies", "MedicalAlerts", "Occupation",
    "EthnicGroup", "MilitaryRank", "BranchOfService", "CountryOfResidence", "RegionOfResidence", "SmokingStatus",
    "PregnancyStatus", "LastMenstrualDate", "SpecialNeeds", "PatientSexNeutered", "ResponsibleOrganization",
    "ConfidentialityConstraintOnPatientDataDescription", "CurrentPatientLocation", "PatientInstitutionResidence",
    # Numbers of the visit and the order.
    "AccessionNumber", "StudyID", "AdmissionID", "IssuerOfAdmissionID", "ServiceEpisodeID",
    "IssuerOfServiceEpisodeID", "RequestedProcedureID", "ScheduledProcedureStepID", "PerformedProcedureStepID",
    "FillerOrderNumberImagingServiceRequest", "PlacerOrderNumberImagingServiceRequest",
    "IssuerOfAccessionNumberSequence", "RequestAttributesSequence", "ReferencedPatientSequence",
    "ReferencedPatientAliasSequence", "OriginalAttributesSequence", "ModifiedAttributesSequence",
    # People.
    "ReferringPhysicianName", "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers",
    "ReferringPhysicianIdentificationSequence", "ConsultingPhysicianName",
    "ConsultingPhysicianIdentificationSequence", "PhysiciansOfRecord", "PhysiciansOfRecordIdentificationSequence",
    "PerformingPhysicianName", "PerformingPhysicianIdentificationSequence", "NameOfPhysiciansReadingStudy",
    "PhysiciansReadingStudyIdentificationSequence", "RequestingPhysician", "ScheduledPerformingPhysicianName",
    "OperatorsName", "OperatorIdentificationSequence", "ReviewerName", "VerifyingObserverName", "PersonName",
    "PersonAddress", "PersonTelephoneNumbers", "PersonIdentificationCodeSequence", "ContentCreatorName",
    "OrderEnteredBy", "OrderCallbackPhoneNumber", "NamesOfIntendedRecipientsOfResults",
    "ScheduledHumanPerformersSequence",
    # Places and machines.
    "InstitutionName", "InstitutionAddress", "InstitutionCodeSequence", "InstitutionalDepartmentName",
    "RequestingService", "StationName", "PerformedStationName", "ScheduledStationName", "PerformedLocation",
    "DeviceSerialNumber", "DeviceUID", "DetectorID", "GantryID", "GeneratorID", "CassetteID", "PlateID",
    "PerformedStationAETitle", "ScheduledStationAETitle", "RetrieveAETitle", "SourceApplicationEntityTitle",
    # Dates.
    "StudyDate", "StudyTime", "SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime",
    "AcquisitionDateTime", "ContentDate", "ContentTime", "AdmittingDate", "AdmittingTime", "DischargeDate",
    "InstanceCreationDate", "InstanceCreationTime", "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime", "PerformedProcedureStepEndDate", "PerformedProcedureStepEndTime",
    "ScheduledProcedureStepStartDate", "ScheduledProcedureStepStartTime", "DateOfSecondaryCapture",
    "TimeOfSecondaryCapture", "IssueDateOfImagingServiceRequest", "OverlayDate", "CurveDate",
    # Free text, where anything can stand.
    "StudyDescription", "SeriesDescription", "ImageComments", "StudyComments", "AcquisitionComments",
    "DerivationDescription", "AdmittingDiagnosesDescription", "ReasonForStudy", "ReasonForTheRequestedProcedure",
    "RequestedProcedureComments", "RequestedProcedureDescription", "PerformedProcedureStepDescription",
    "CommentsOnThePerformedProcedureStep", "ImagingServiceRequestComments", "VisitComments", "ProtocolName",
    "AcquisitionProtocolDescription", "ContributionDescription", "IdentifyingComments", "TextString", "TextComments",
    "UnformattedTextValue", "ContentSequence", "AcquisitionContextSequence", "GraphicAnnotationSequence",
    "EncryptedAttributesSequence",
)  # fmt: skip
_TAGS = tuple((keyword, tag_for_keyword(keyword) or 0) for keyword in IDENTIFYING)

# Where text is often part of the pixels: ultrasound, screen captures, fluoroscopy, scopes, photographs, documents.
_WITH_TEXT = frozenset({
    "US", "IVUS", "BDUS", "SC", "OT", "DOC", "ECG", "XA", "RF", "DF", "CF", "DS", "VF", "ES", "XC", "GM", "SM", "OP",
    "OPT", "OAM", "PX", "IO",
})  # fmt: skip
_CAPTURES = frozenset({
    SecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
})  # fmt: skip
_HEAD = frozenset({
    "HEAD", "HEADNECK", "BRAIN", "FACE", "SKULL", "CALVARIUM", "ORBIT", "ORBITS", "EYE", "EAR", "IAC", "JAW", "MAXILLA",
    "MANDIBLE", "NOSE", "MOUTH", "SINUS", "SINUSES", "PNS", "TMJ", "SELLA", "PITUITARY", "WHOLEBODY",
})  # fmt: skip
_CLEANED_PIXELS = "113101"  # PS3.16 CID 7050, Clean Pixel Data Option
_DUMMIES = frozenset({
    "anon", "anonymous", "anonymized", "anonymised", "deidentified", "removed", "unknown", "none", "noname", "xxx",
})  # fmt: skip


def header_of(dataset: Dataset) -> Header:
    """Return what is kept of a header, and what it says about de-identification.

    Private attributes and `IDENTIFYING` ones are looked for at the top level; what a sequence holds is judged by the
    sequence. `face` is by body part, so a head CT that names none is not seen.
    """
    modality, body_part = _code(dataset, "Modality"), _code(dataset, "BodyPartExamined")
    removed = _code(dataset, "PatientIdentityRemoved") == "YES"
    burned_in = _burned_in(dataset)
    notes = {
        "identity-removed": removed,
        "burned-in": burned_in == "YES",
        "burned-in-unknown": not burned_in and (modality in _WITH_TEXT or dataset.get("SOPClassUID") in _CAPTURES),
        "face": _code(dataset, "RecognizableVisualFeatures") == "YES"
        or (modality in {"CT", "MR"} and not _HEAD.isdisjoint({body_part, *re.split("[ _]", body_part)})),
    }
    return Header(
        modality=modality,
        manufacturer=_clean(dataset, "Manufacturer"),
        scanner=_clean(dataset, "ManufacturerModelName"),
        body_part=body_part,
        exposed=tuple(_exposed(dataset, removed)),
        notes=tuple(note for note, holds in notes.items() if holds),
    )


def identity_refusal(header: Header) -> Reason | None:
    """Return why a site that demands de-identified files sets this one aside, or None.

    It is set aside where the file does not say PatientIdentityRemoved = YES, or says so but still has one of `DIRECT`;
    where text is burned into the pixels, or may be and the file does not say. Dates, places, staff and private
    attributes are reported but refuse nothing: profile options of PS3.15 keep them, and none of them is stored here.
    """
    if "identity-removed" not in header.notes or not set(DIRECT).isdisjoint(header.exposed):
        return Reason.NOT_DEIDENTIFIED
    if "burned-in" in header.notes or "burned-in-unknown" in header.notes:
        return Reason.BURNED_IN
    return None


def _exposed(dataset: Dataset, removed: bool) -> Iterator[str]:
    # Asking the dataset would make a tag of every question.
    held = dict(zip(map(int, dataset.keys()), dataset.values(), strict=True))
    for keyword, tag in [(keyword, tag) for keyword, tag in _TAGS if tag in held]:
        if not _has_value(held[tag]):
            continue
        if keyword == "PatientName" and _is_pseudonym(text(dataset, keyword), text(dataset, "PatientID")):
            continue
        # In a file whose identity was removed the number is a pseudonym.
        if keyword == "PatientID" and removed:
            continue
        yield keyword
    if any(tag >> 16 & 1 for tag in held):
        yield PRIVATE


def _has_value(element: Any) -> bool:
    value = element.value
    return bool(value.strip(b" \0")) if isinstance(value, bytes) else bool(value)


def _is_pseudonym(name: str, number: str) -> bool:
    """Return whether a patient's name is none: the number again, a word like "anonymous", or something with digits."""
    if name == number:
        return True
    parts = [re.sub(r"[\W_]", "", part).casefold() for part in re.split(r"[\^= ]", name)]
    return all(not part or part in _DUMMIES or any(c.isdigit() for c in part) for part in parts)


def _burned_in(dataset: Dataset) -> str:
    methods = dataset.get("DeidentificationMethodCodeSequence") or ()
    if any(text(method, "CodeValue") == _CLEANED_PIXELS for method in methods):
        return "NO"
    said = _code(dataset, "BurnedInAnnotation")
    return said if said in {"YES", "NO"} else ""


def _code(dataset: Dataset, keyword: str) -> str:
    """Return a code string, or nothing where it is none (PS3.5 table 6.2-1)."""
    said = text(dataset, keyword)
    return said if re.fullmatch(r"[A-Z0-9_ ]{1,16}", said) else ""


def _clean(dataset: Dataset, keyword: str) -> str:
    """Return printable text of at most 64 characters, or nothing where it has the form of a person's name."""
    said = text(dataset, keyword)
    return "" if "^" in said else "".join(c if c.isprintable() else " " for c in said)[:64].strip()
