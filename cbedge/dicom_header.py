"""What a result may copy from an image's header: valid values alone, whatever the modality wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from cbedge.errors import RadiographError

if TYPE_CHECKING:
    from pydicom import Dataset

_UID = re.compile(r"(?=.{1,64}\Z)(0|[1-9]\d*)(\.(0|[1-9]\d*))+\Z")
_TIME = re.compile(r"([01]\d|2[0-3])(?:[0-5]\d(?:(?:[0-5]\d|60)(?:\.\d{1,6})?)?)?\Z")


@dataclass(frozen=True)
class StudyHeader:
    """The part of a header that results copy.

    Attributes:
        values: keyword → text, of the attributes of :data:`COPIED` that are valid.
        left_out: keywords of those that are there and cannot be used.
        sop_class, sop_instance, series, study: UIDs of the image.
        series_number: of the image's series, 0 where it has none.
    """

    values: dict[str, str]
    left_out: tuple[str, ...]
    sop_class: str
    sop_instance: str
    series: str
    study: str
    series_number: int

    def dataset(self, sop_class: str | None = None) -> Dataset:
        """A dataset for libraries that copy from one, every attribute of :data:`COPIED` in it, in Unicode.

        Args:
            sop_class: stands for the image's own; default is that.
        """
        from pydicom import Dataset

        made = Dataset()
        made.SpecificCharacterSet = "ISO_IR 192"
        made.SOPClassUID, made.SOPInstanceUID = sop_class or self.sop_class, self.sop_instance
        made.SeriesInstanceUID, made.StudyInstanceUID = self.series, self.study
        for keyword in COPIED:
            setattr(made, keyword, self.values.get(keyword))
        return made


def read_study_header(header: Dataset) -> StudyHeader:
    """Take what is valid of a header.

    Raises:
        RadiographError: a UID that a result must refer to is missing or malformed; the message names the attribute.
    """
    uids = {}
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        value = _single(header, keyword)
        if value is None:
            raise RadiographError(f"the DICOM header lacks {keyword}, which a result must refer to: export it again")
        if not is_uid(value):
            raise RadiographError(f"the DICOM attribute {keyword} is not a valid UID: export the radiograph again")
        uids[keyword] = value
    values, left_out = {}, []
    for keyword, valid in COPIED.items():
        value = _single(header, keyword)
        if value is None:
            if _is_there(header, keyword):
                left_out.append(keyword)
        elif (usable := valid(value)) is not None:
            values[keyword] = usable
        else:
            left_out.append(keyword)
    number = _single(header, "SeriesNumber") or ""
    return StudyHeader(
        values, tuple(left_out), uids["SOPClassUID"], uids["SOPInstanceUID"], uids["SeriesInstanceUID"],
        uids["StudyInstanceUID"], int(number) if re.fullmatch(r"\d{1,9}", number) else 0,
    )  # fmt: skip


def is_uid(text: str) -> bool:
    """Whether a text is a well-formed unique identifier (PS3.5 9.1)."""
    return _UID.match(text) is not None


def _is_there(header: Dataset, keyword: str) -> bool:
    try:
        value = header.get(keyword)
    except Exception:  # pydicom raises what it likes on damaged values
        return True
    return value is not None and str(value) != "" and (not hasattr(value, "__len__") or len(value) > 0)


def _single(header: Dataset, keyword: str) -> str | None:
    """An attribute's text; ``None`` where it is missing, empty, of several values, or of no text."""
    try:
        value: Any = header.get(keyword)
        if (
            value is None
            or isinstance(value, bytes | list | tuple)
            or type(value).__name__ in ("MultiValue", "Sequence")
        ):
            return None
        return str(value).strip(" \0") or None
    except Exception:  # pydicom raises what it likes on damaged values
        return None


def _text(most: int) -> Callable[[str], str | None]:
    def valid(value: str) -> str | None:
        return value if len(value) <= most and _is_plain(value) else None

    return valid


def _is_plain(value: str) -> bool:
    return value.isprintable() and "\\" not in value and "\ufffd" not in value


def _person(value: str) -> str | None:
    groups = value.split("=")
    fits = len(groups) <= 3 and all(len(group) <= 64 and group.count("^") <= 4 for group in groups)
    return value if fits and _is_plain(value) else None


def _date(value: str) -> str | None:
    if not re.fullmatch(r"\d{8}", value, re.ASCII):
        return None
    try:
        return value if date(int(value[:4]), int(value[4:6]), int(value[6:])).year > 0 else None
    except ValueError:
        return None


def _time(value: str) -> str | None:
    return value if value.isascii() and _TIME.match(value) else None


def _sex(value: str) -> str | None:
    return value.upper() if value.upper() in ("M", "F", "O") else None


# Attributes that results copy, each with what makes its text valid.
COPIED: dict[str, Callable[[str], str | None]] = {
    "PatientName": _person,
    "PatientID": _text(64),
    "PatientBirthDate": _date,
    "PatientSex": _sex,
    "AccessionNumber": _text(16),
    "StudyID": _text(16),
    "StudyDate": _date,
    "StudyTime": _time,
    "StudyDescription": _text(64),
    "ReferringPhysicianName": _person,
}
