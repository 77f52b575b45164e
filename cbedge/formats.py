"""A draft in the formats that hospitals exchange: DICOM Structured Report and FHIR R4 DiagnosticReport.

Both say that they are preliminary and unverified, which model wrote them, and of which image. Their libraries come with
the extra ``hospital``; JSON and text need none (:class:`cbedge.report.Report`).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbedge.dicom import read_header
from cbedge.dicom_header import StudyHeader, read_study_header
from cbedge.errors import OutputError, RadiographError
from cbedge.report import DRAFT_STATEMENT, Report

if TYPE_CHECKING:
    from pydicom import Dataset

FORMATS = ("text", "json", "sr", "fhir")
SCHEMA = Path(__file__).parent / "report.schema.json"
_MANUFACTURER = "cbedge"
_CR_STORAGE = "1.2.840.10008.5.1.4.1.1.1"
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

    Of the header, what is valid is copied, in Unicode; a comment names the attributes that were left out.

    Args:
        report: the draft.
        header: the image's, without pixels.
        same_again: derive the document's identifiers from all that makes its text, so that a document that is made
            again after an interruption is the same one to whoever has it already, and any other draft is another.

    Raises:
        RadiographError: there is none, or its identifiers are missing or malformed.
    """
    if header is None:
        raise RadiographError("a DICOM SR belongs to a study: give the radiograph as a DICOM file, or another --format")
    study = read_study_header(header)
    import highdicom
    from pydicom.uid import generate_uid

    identity = [study.sop_instance, _identity(report)]
    uids = [generate_uid(entropy_srcs=[*identity, kind] if same_again else None) for kind in ("series", "document")]
    # highdicom knows by the image's class what to copy; for one that it may not know, another stands for it.
    stand_in = study.sop_class if study.sop_class.startswith(_CR_STORAGE) else _CR_STORAGE
    document = highdicom.sr.EnhancedSR(
        evidence=[study.dataset(stand_in)], content=_content(report, study, stand_in),
        series_instance_uid=uids[0], series_number=9000 + study.series_number % 900, sop_instance_uid=uids[1],
        instance_number=1, manufacturer=_MANUFACTURER, is_complete=False, is_final=False, is_verified=False,
    )  # fmt: skip
    _refer_to(document, study, stand_in)
    document.ManufacturerModelName = report.model[:64]
    document.SoftwareVersions = report.model_version[:64]
    document.SpecificCharacterSet = "ISO_IR 192"  # whatever the header's was: a draft may hold any character
    document.SeriesDescription = "Draft report, unreviewed"
    file = io.BytesIO()
    document.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _identity(report: Report) -> str:
    """A hash of all that makes a document's text."""
    parts = [
        report.text, report.notes(), report.image_sha256, report.lateral_sha256, report.view, report.template,
        report.model, report.model_version, report.variant,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _refer_to(document: Dataset, study: StudyHeader, stand_in: str) -> None:
    """Let references name the image's own class where another stood for it."""
    if stand_in == study.sop_class:
        return

    def mend(dataset: Dataset, element: Any) -> None:
        if element.keyword == "ReferencedSOPInstanceUID" and element.value == study.sop_instance:
            dataset.ReferencedSOPClassUID = study.sop_class

    document.walk(mend)


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
    scores = _score_observation(report)
    values["contained"].append(scores)
    values["result"].append({"reference": "#image-scores"})
    values |= _study(header) if header is not None else {}
    return json.dumps(json.loads(DiagnosticReport(**values).model_dump_json()), indent=2, ensure_ascii=False)


def _score_observation(report: Report) -> dict[str, Any]:
    """The image scores, and what a reader should know beside the text."""
    observation: dict[str, Any] = {
        "resourceType": "Observation", "id": "image-scores", "status": "preliminary",
        "code": {"text": "Image scores of a research model, 0 to 1; they rank findings and are not probabilities"},
        "device": {"reference": "#software"},
        "component": [
            {"code": {"text": name}, "valueQuantity": {"value": round(score, 3)}}
            for name, score in report.finding_scores.items()
        ],
        "note": [{"text": note} for note in report.notes()],
    }  # fmt: skip
    empty = [key for key in ("component", "note") if not observation[key]]
    for key in empty:
        del observation[key]
    if "component" not in observation:
        observation["valueString"] = "none"
    return observation


def _study(header: Dataset) -> dict[str, Any]:
    """Whose study it is, by identifiers alone; those that are malformed are left out."""
    try:
        study = read_study_header(header)
    except RadiographError:
        return {}
    uid = {"system": "urn:dicom:uid", "value": f"urn:oid:{study.study}"}
    found: dict[str, Any] = {"imagingStudy": [{"type": "ImagingStudy", "identifier": uid}]}
    if patient := study.values.get("PatientID"):
        found["subject"] = {"type": "Patient", "identifier": {"value": patient}}
    if accession := study.values.get("AccessionNumber"):
        found["identifier"] = [{
            "type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]},
            "value": accession,
        }]  # fmt: skip
    return found


def _coding(code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": _LOINC, "code": code, "display": display}]}


def _content(report: Report, study: StudyHeader, sop_class: str) -> Dataset:
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
            CodedConcept("111040", "DCM", "Original Source"), sop_class, study.sop_instance,
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
    comments = [*report.notes(), *_scores(report)]
    if study.left_out:
        comments.append(f"Attributes of the image's header that could not be used: {', '.join(study.left_out)}.")
    items += [TextContentItem(CodedConcept("121106", "DCM", "Comment"), text, contains) for text in comments]
    if report.findings:
        items.append(section(_FINDINGS, CodedConcept("121071", "DCM", "Finding"), report.findings))
    if report.impression:
        items.append(section(_IMPRESSION, CodedConcept("121073", "DCM", "Impression"), report.impression))
    root = ContainerContentItem(CodedConcept(_REPORT[0], "LN", _REPORT[1]), False, template_id="2000")
    root.ContentSequence = ContentSequence(items)
    return root


def _scores(report: Report) -> list[str]:
    """A sentence for each finding that the image scores point to."""
    return [
        f"Image score of {name}: {report.finding_scores[name]:.2f} of 1; scores rank and are not probabilities."
        for name in report.image_findings or ()
        if name in report.finding_scores
    ]
