"""The part of a DICOM header that a report document copies: patient, study, and identity of the image.

A value is copied if it is valid according to the standard. Lower-case codes and words for a sex are corrected, because
they are unambiguous. Other invalid values are omitted; their attributes are listed, never their values. An image is
refused only if its study, series or instance UID is missing or invalid.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from cbedge.errors import RadiographError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydicom import Dataset

UNREADABLE = "\ufffd"  # replaces a header value whose bytes cannot be decoded

_IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
_STUDY = ("StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")
_EMPTY_IF_MISSING = (*_PATIENT, *_STUDY)
# The Patient, General Study and Patient Study modules, without attributes that require others; then the equipment that
# acquired the image.
_SCALARS = (
    *_EMPTY_IF_MISSING,
    "IssuerOfPatientID",
    "TypeOfPatientID",
    "PatientBirthTime",
    "OtherPatientNames",
    "EthnicGroup",
    "PatientComments",
    "StudyDescription",
    "PhysiciansOfRecord",
    "NameOfPhysiciansReadingStudy",
    "ConsultingPhysicianName",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "AdmittingDiagnosesDescription",
    "MedicalAlerts",
    "Allergies",
    "SmokingStatus",
    "PregnancyStatus",
    "PatientState",
    "Occupation",
    "AdditionalPatientHistory",
    "AdmissionID",
)
_DEVICE = ("Manufacturer", "ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions")
_INSTITUTION = ("InstitutionName", "InstitutionalDepartmentName", "InstitutionAddress", "StationName")
_EQUIPMENT = (*_DEVICE, *_INSTITUTION)
_CODES = ("ProcedureCodeSequence", "AdmittingDiagnosesCodeSequence")
PATIENT_AND_STUDY = (*_SCALARS, *_CODES)
COPIED = (*_IDENTIFIERS, "SOPClassUID", *PATIENT_AND_STUDY, *_EQUIPMENT)  # all attributes that are read here
_CODE = ("CodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning")
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "PatientSex": ("M", "F", "O"),
    "SmokingStatus": ("YES", "NO", "UNKNOWN"),
    "TypeOfPatientID": ("TEXT", "RFID", "BARCODE"),
    "PregnancyStatus": (1, 2, 3, 4),
}
_WORDS = {"PatientSex": {"MALE": "M", "FEMALE": "F", "OTHER": "O"}}
_LONGEST = {"SH": 16, "LO": 64, "ST": 1024, "LT": 10240}
_CLASSES = {"CR": "1.2.840.10008.5.1.4.1.1.1", "DX": "1.2.840.10008.5.1.4.1.1.1.1"}
_UID = re.compile(r"(?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*))+", re.ASCII)
_ROOT = re.compile(r"1\.[1-3]?\d(?!\d)|2\.(?!999)", re.ASCII)  # 2.999 is for examples, and no one issues UIDs below 0
_TIME = re.compile(r"(?:[01]\d|2[0-3])(?:[0-5]\d(?:[0-5]\d(?:\.\d{1,6})?)?)?", re.ASCII)
_AGE = re.compile(r"\d{3}[DWMY]", re.ASCII)
_CODE_STRING = re.compile(r"[A-Z0-9 _]{0,16}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class StudyHeader:
    """The valid part of a header.

    Attributes:
        values: valid elements only. Elements that a document must have are present, possibly empty; the identifiers of
            study, series, image and SOP class are always present.
        left_out: names of the attributes with invalid values.
    """

    values: Dataset
    left_out: tuple[str, ...]


def study_header(header: Dataset) -> StudyHeader:
    """The valid part of a header, for a document that refers to its image.

    Raises:
        RadiographError: the study, series or instance UID is missing or invalid.
    """
    from pydicom import Dataset

    values, left_out = Dataset(), []
    for name in _IDENTIFIERS:
        if not usable(header, name):
            found = "lacks" if not holds(header, name) else "has no valid"
            raise RadiographError(f"the DICOM header {found} {name}, which an SR needs: export it again")
        setattr(values, name, usable(header, name))
    values.SOPClassUID = usable(header, "SOPClassUID") or _class_of(header)
    if not usable(header, "SOPClassUID"):
        left_out.append("SOPClassUID")
    for name in (*_SCALARS, *_EQUIPMENT):
        value = usable(header, name)
        if value is not None:
            setattr(values, name, value)
        elif name in _EMPTY_IF_MISSING:
            setattr(values, name, None)
        if value is None and holds(header, name):
            left_out.append(name)
    for name in _CODES:
        codes = _usable_codes(header, name)
        if codes:
            setattr(values, name, codes)
        elif holds(header, name):
            left_out.append(name)
    return StudyHeader(values, tuple(left_out))


def is_uid(text: str) -> bool:
    """Whether a text is a well-formed unique identifier (PS3.5 9.1)."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def usable(header: Dataset, name: str) -> Any:
    """An attribute's valid value: a number for the VR of a binary number, else text; a list if it can have several.
    ``None`` if there is no valid value."""
    from pydicom.datadict import dictionary_VM, dictionary_VR

    vr, value = dictionary_VR(name), _value(header, name)
    if dictionary_VM(name) == "1":
        return None if _is_list(value) else _checked(name, vr, value)
    values = [_checked(name, vr, v) for v in (value if _is_list(value) else [value])]
    return values if values and None not in values else None


def _value(header: Dataset, name: str) -> Any:
    try:
        return header.get(name)
    except Exception:  # pydicom raises various exceptions for damaged values
        return UNREADABLE


def _is_list(value: Any) -> bool:
    from pydicom.valuerep import PersonName

    return not isinstance(value, str | bytes | PersonName) and hasattr(value, "__iter__")


def holds(header: Dataset, name: str) -> bool:
    """Whether an attribute has a value, valid or not."""
    value = _value(header, name)
    if value is None or (_is_list(value) and not len(value)):
        return False
    return isinstance(value, bytes) or bool(str(value).strip(" \0"))


def _checked(name: str, vr: str, value: Any) -> Any:
    """The value as a number or valid text of its VR, or ``None``."""
    from pydicom.valuerep import PersonName

    if vr == "US":  # the only binary numbers that are copied have a list of values
        return value if isinstance(value, int) and value in _ALLOWED[name] else None
    if isinstance(value, bool) or not isinstance(value, str | int | float | PersonName):
        return None
    if isinstance(value, int | float) and not isinstance(value, str) and vr not in ("DS", "IS"):
        return None
    text = str(getattr(value, "original_string", value) if vr == "DS" else value)
    text = text.rstrip(" \0") if vr in ("ST", "LT") else text.strip(" \0")
    if not text or UNREADABLE in text or not _is_printable(text, vr):
        return None
    if vr in ("CS", "AS") and text.isascii():  # always upper case
        text = text.upper()
    text = _WORDS.get(name, {}).get(text, text)
    if name in _ALLOWED and text not in _ALLOWED[name]:
        return None
    if len(text) > _LONGEST.get(vr, len(text)):
        return None
    check = _CHECKS.get(vr)
    return text if check is None or check(text) else None


def _is_printable(text: str, vr: str) -> bool:
    allowed = "\r\n\t\f" if vr in ("ST", "LT") else ""
    if "\\" in text and vr not in ("ST", "LT"):
        return False
    return not any((c < " " and c not in allowed) or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in text)


def _is_name(text: str) -> bool:
    groups = text.split("=")
    if len(groups) > 3 or any(len(group) > 64 or group.count("^") > 4 for group in groups):
        return False
    return bool(text.strip("^= "))


def _is_date(text: str) -> bool:
    try:  # years such as 0001 and 9999 stand for an unknown date
        return re.fullmatch(r"[12]\d{7}", text, re.ASCII) is not None and bool(date.fromisoformat(text))
    except ValueError:
        return False


_CHECKS: dict[str, Callable[[str], Any]] = {
    "PN": _is_name,
    "DA": _is_date,
    "TM": _TIME.fullmatch,
    "AS": _AGE.fullmatch,
    "CS": _CODE_STRING.fullmatch,
    "UI": lambda text: is_uid(text) and _ROOT.match(text),
    "DS": lambda text: len(text) <= 16 and _DECIMAL.fullmatch(text) and math.isfinite(float(text)),
    "IS": lambda text: len(text) <= 12 and re.fullmatch(r"[+-]?\d+", text, re.ASCII),
}


def _class_of(header: Dataset) -> str:
    """The SOP class of an image whose header lacks it: from the file meta information, or from the modality."""
    meta = getattr(header, "file_meta", None)
    of_file = usable(meta, "MediaStorageSOPClassUID") if meta is not None else None
    return of_file or _CLASSES["CR" if usable(header, "Modality") in ("CR", "RG") else "DX"]


def _usable_codes(header: Dataset, name: str) -> list[Dataset]:
    """The codes of a sequence, without other elements of its items; empty if any of them is invalid."""
    from pydicom import Dataset
    from pydicom.sequence import Sequence

    codes = []
    items = _value(header, name)
    for item in items if isinstance(items, Sequence) else ():
        code = Dataset()
        for part in _CODE:
            value = usable(item, part)
            if value is not None:
                setattr(code, part, value)
        if any(part not in code for part in _CODE if part != "CodingSchemeVersion"):
            return []
        codes.append(code)
    return codes
