"""A draft in the formats that hospitals exchange: DICOM Structured Report and FHIR R4 DiagnosticReport.

Both say that they are preliminary and unverified, which model wrote them, and of which image. Their libraries come with
the extra ``hospital``; JSON and text need none (:class:`cbedge.report.Report`).
"""

from __future__ import annotations

import base64
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbedge.dicom import read_header
from cbedge.errors import OutputError, RadiographError
from cbedge.report import DRAFT_STATEMENT, Report

if TYPE_CHECKING:
    from pydicom import Dataset

FORMATS = ("text", "json", "sr", "fhir")
SCHEMA = Path(__file__).parent / "report.schema.json"
_MANUFACTURER = "cbedge"
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_LOINC = "http://loinc.org"
# LOINC codes; the SR names them with the scheme LN.
_REPORT, _FINDINGS, _IMPRESSION = (
    ("18748-4", "Diagnostic imaging study"), ("59776-5", "Procedure findings"), ("19005-8", "Radiology imaging study"),
)  # fmt: skip


def check_format(name: str) -> None:
    """See that a format is known and its library is installed, before any work is done.

    Raises:
        OutputError: it is not.
    """
    if name not in FORMATS:
        raise OutputError(f"unknown format {name[:20]!r}; give one of: {', '.join(FORMATS)}")
    try:
        if name == "sr":
            import highdicom  # noqa: F401
        if name == "fhir":
            import fhir.resources  # noqa: F401
    except ImportError as error:
        raise OutputError(
            f'--format {name} needs the package {error.name}; type: pip install "cbedge[hospital]"'
        ) from None


def render(report: Report, form: str, source: Path | bytes | None = None) -> bytes:
    """A report in one of :data:`FORMATS`, as the bytes of a file.

    Args:
        report: the draft.
        form: the format.
        source: the radiograph's file, whose header tells patient and study; ``sr`` needs it, ``fhir`` takes it.

    Raises:
        OutputError: the format or its library is not there.
        RadiographError: ``sr`` of a radiograph that is no DICOM file, or whose header lacks its identifiers.
    """
    check_format(form)
    if form == "sr":
        return to_sr(report, read_header(source))
    if form == "fhir":
        return (to_fhir(report, read_header(source, needed=False)) + "\n").encode()
    return ((report.to_json() if form == "json" else report.to_text()) + "\n").encode()


def to_sr(report: Report, header: Dataset | None, same_again: bool = False) -> bytes:
    """An Enhanced SR document in the image's study: preliminary, partial, unverified.

    Args:
        report: the draft.
        header: the image's, without pixels.
        same_again: derive the document's identifiers from image and model, so that a document that is made again after
            an interruption is the same one to whoever has it already.

    Raises:
        RadiographError: there is none, or it lacks its identifiers.
    """
    if header is None:
        raise RadiographError("a DICOM SR belongs to a study: give the radiograph as a DICOM file, or another --format")
    missing = [name for name in _NEEDED if not header.get(name)]
    if missing:
        raise RadiographError(f"the DICOM header lacks {missing[0]}, which an SR must refer to: export it again")
    import highdicom
    from pydicom.uid import generate_uid

    entropy = [str(header.SOPInstanceUID), report.model, report.model_version, report.variant]
    uids = [generate_uid(entropy_srcs=[*entropy, kind] if same_again else None) for kind in ("series", "document")]
    document = highdicom.sr.EnhancedSR(
        evidence=[_evidence(header)], content=_content(report, header),
        series_instance_uid=uids[0], series_number=_series_number(header), sop_instance_uid=uids[1],
        instance_number=1, manufacturer=_MANUFACTURER, is_complete=False, is_final=False, is_verified=False,
    )  # fmt: skip
    document.ManufacturerModelName = report.model[:64]
    document.SoftwareVersions = report.model_version[:64]
    document.SpecificCharacterSet = "ISO_IR 192"  # whatever the header's was: a draft may hold any character
    document.SeriesDescription = "Draft report, unreviewed"
    file = io.BytesIO()
    document.save_as(file, enforce_file_format=True)
    return file.getvalue()


def to_fhir(report: Report, header: Dataset | None = None) -> str:
    """A FHIR R4 DiagnosticReport as JSON: status ``preliminary``, the sections as contained observations.

    Args:
        report: the draft.
        header: the image's, where it is a DICOM file: study, accession number and patient identifier are taken from it.
    """
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    device = {
        "resourceType": "Device", "id": "software", "status": "active",
        "deviceName": [{"name": report.model, "type": "model-name"}],
        "version": [{"value": f"{report.model_version} {report.variant}"}],
        "note": [{"text": DRAFT_STATEMENT}],
    }  # fmt: skip
    sections = [
        {
            "resourceType": "Observation", "id": name, "status": "preliminary", "code": _coding(*code),
            "valueString": text, "device": {"reference": "#software"},
        }
        for name, code, text in (
            ("findings", _FINDINGS, report.findings), ("impression", _IMPRESSION, report.impression),
        )
        if text
    ]  # fmt: skip
    values: dict[str, Any] = {
        "status": "preliminary",
        "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}]}],
        "code": _coding(*_REPORT),
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "contained": [device, *sections],
        "result": [{"reference": f"#{section['id']}"} for section in sections],
        "presentedForm": [{
            "contentType": "text/plain; charset=utf-8", "title": "Unreviewed draft",
            "data": base64.b64encode(report.to_text().encode()).decode(),
        }],
    }  # fmt: skip
    if report.impression:
        values["conclusion"] = report.impression
    values |= _study(header) if header is not None else {}
    return json.dumps(json.loads(DiagnosticReport(**values).model_dump_json()), indent=2, ensure_ascii=False)


def _study(header: Dataset) -> dict[str, Any]:
    """Whose study it is, by identifiers alone."""
    found: dict[str, Any] = {}
    if header.get("PatientID"):
        found["subject"] = {"type": "Patient", "identifier": {"value": str(header.PatientID)}}
    if header.get("StudyInstanceUID"):
        uid = {"system": "urn:dicom:uid", "value": f"urn:oid:{header.StudyInstanceUID}"}
        found["imagingStudy"] = [{"type": "ImagingStudy", "identifier": uid}]
    if header.get("AccessionNumber"):
        found["identifier"] = [{
            "type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]},
            "value": str(header.AccessionNumber),
        }]  # fmt: skip
    return found


def _coding(code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": _LOINC, "code": code, "display": display}]}


def _content(report: Report, header: Dataset) -> Dataset:
    from highdicom.sr import (
        CodeContentItem,
        CodedConcept,
        ContainerContentItem,
        ContentSequence,
        ImageContentItem,
        RelationshipTypeValues,
        TextContentItem,
        UIDRefContentItem,
    )
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    contains, context = RelationshipTypeValues.CONTAINS, RelationshipTypeValues.HAS_OBS_CONTEXT
    modifier, inferred = RelationshipTypeValues.HAS_CONCEPT_MOD, RelationshipTypeValues.INFERRED_FROM
    dcm = codes.DCM

    def image() -> ImageContentItem:
        return ImageContentItem(
            CodedConcept("111040", "DCM", "Original Source"), header.SOPClassUID, header.SOPInstanceUID,
            relationship_type=inferred,
        )  # fmt: skip

    def section(title: tuple[str, str], name: CodedConcept, text: str) -> ContainerContentItem:
        container = ContainerContentItem(CodedConcept(title[0], "LN", title[1]), False, relationship_type=contains)
        item = TextContentItem(name, text, contains)
        item.ContentSequence = ContentSequence([image()])
        container.ContentSequence = ContentSequence([item])
        return container

    # The device's identity follows from what it is, so that two drafts of one model name the same observer.
    observer = generate_uid(entropy_srcs=[report.model, report.model_version, report.variant])
    items = [
        CodeContentItem(
            CodedConcept("121049", "DCM", "Language of Content Item and Descendants"),
            CodedConcept("en", "RFC5646", "English"), modifier,
        ),
        CodeContentItem(CodedConcept("121005", "DCM", "Observer Type"), dcm.Device, context),
        UIDRefContentItem(CodedConcept("121012", "DCM", "Device Observer UID"), observer, context),
        TextContentItem(CodedConcept("121013", "DCM", "Device Observer Name"), _MANUFACTURER, context),
        TextContentItem(CodedConcept("121015", "DCM", "Device Observer Model Name"), report.model, context),
        TextContentItem(CodedConcept("111001", "DCM", "Algorithm Name"), f"{report.model} {report.variant}", context),
        TextContentItem(CodedConcept("111003", "DCM", "Algorithm Version"), report.model_version, context),
        TextContentItem(CodedConcept("121106", "DCM", "Comment"), DRAFT_STATEMENT, contains),
    ]  # fmt: skip
    if report.findings:
        items.append(section(_FINDINGS, CodedConcept("121071", "DCM", "Finding"), report.findings))
    if report.impression:
        items.append(section(_IMPRESSION, CodedConcept("121073", "DCM", "Impression"), report.impression))
    root = ContainerContentItem(CodedConcept(_REPORT[0], "LN", _REPORT[1]), False, template_id="2000")
    root.ContentSequence = ContentSequence(items)
    return root


def _evidence(header: Dataset) -> Dataset:
    """The header with what a document copies from it, present even where the modality left it out."""
    from pydicom import Dataset

    copied = Dataset()
    header.decode()
    copied.update(header)
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                 "StudyDate", "StudyTime", "ReferringPhysicianName"):  # fmt: skip
        if name not in copied:
            setattr(copied, name, None)
    return copied


def _series_number(header: Dataset) -> int:
    """High enough not to meet the modality's own series."""
    try:
        return 9000 + int(header.get("SeriesNumber") or 0) % 900
    except (TypeError, ValueError):
        return 9000
