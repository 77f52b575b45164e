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

from cbedge.dicom_file import read_header
from cbedge.dicom_header import PATIENT_AND_STUDY, StudyHeader, holds, study_header, usable
from cbedge.errors import OutputError, RadiographError
from cbedge.report import DRAFT_STATEMENT, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom import Dataset

FORMATS = ("text", "json", "sr", "fhir")
SCHEMA = Path(__file__).parent / "report.schema.json"
_MANUFACTURER = "cbedge"
_SCORE_MEANING = "Image finding score, 0 to 1: ranks, is no probability"
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
    import highdicom
    from pydicom.uid import generate_uid

    study = study_header(header)
    content = _content(report, study)
    identity = _identity(report, study, content)
    uids = [generate_uid(entropy_srcs=[identity, kind] if same_again else None) for kind in ("series", "document")]

    class Document(highdicom.sr.EnhancedSR):
        """Copies patient and study of the checked header, also of an image whose SOP class highdicom does not know."""

        def copy_patient_and_study_information(self, dataset: Dataset) -> None:
            for name in PATIENT_AND_STUDY:
                if name in dataset:
                    self.add(dataset[name])

    document = Document(
        evidence=[study.values], content=content,
        series_instance_uid=uids[0], series_number=_series_number(header), sop_instance_uid=uids[1],
        instance_number=1, manufacturer=_MANUFACTURER, is_complete=False, is_final=False, is_verified=False,
        specific_character_set="ISO_IR 192",  # whatever the header's was: a draft may hold any character
    )  # fmt: skip
    document.ManufacturerModelName = _long_string(report.model)
    document.SoftwareVersions = _long_string(report.model_version)
    document.SeriesDescription = "Draft report, unreviewed"
    file = io.BytesIO()
    document.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _identity(report: Report, study: StudyHeader, content: Dataset) -> str:
    """A hash of all that makes a document: what it copies, the images, what wrote it and every word that it says."""
    parts = [
        {str(element.tag): str(element.value) for element in study.values}, content.to_json(), report.text,
        report.complete, report.image_sha256, report.lateral_sha256, report.view, report.template, report.model,
        report.model_version, report.variant,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _long_string(text: str) -> str:
    """Text that fits an attribute of type LO."""
    return "".join(c if c.isprintable() and c != "\\" else " " for c in text)[:64].strip() or "unknown"


def _series_number(header: Dataset) -> int:
    """High enough not to meet the modality's own series."""
    number = usable(header, "SeriesNumber")
    return 9000 + int(str(number or 0)) % 900


def _left_out(names: Sequence[str]) -> list[str]:
    """A sentence on the attributes that were not usable, where there are any."""
    return (
        [f"Left out of what is copied from the DICOM header, because not usable: {', '.join(names)}."] if names else []
    )


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
    told, left_out = _study(header) if header is not None else ({}, [])
    scores = _score_observation(report, [*report.notes(), *_left_out(left_out)])
    values["contained"].append(scores)
    values["result"].append({"reference": "#image-scores"})
    values |= told
    return json.dumps(json.loads(DiagnosticReport(**values).model_dump_json()), indent=2, ensure_ascii=False)


def _score_observation(report: Report, notes: list[str]) -> dict[str, Any]:
    """The image scores, and what a reader should know beside the text."""
    observation: dict[str, Any] = {
        "resourceType": "Observation", "id": "image-scores", "status": "preliminary",
        "code": {"text": "Image scores of a research model, 0 to 1; they rank findings and are not probabilities"},
        "device": {"reference": "#software"},
        "component": [
            {"code": {"text": name}, "valueQuantity": {"value": round(score, 3)}}
            for name, score in report.finding_scores.items()
        ],
        "note": [{"text": note} for note in notes],
    }  # fmt: skip
    empty = [key for key in ("component", "note") if not observation[key]]
    for key in empty:
        del observation[key]
    if "component" not in observation:
        observation["valueString"] = "none"
    return observation


def _study(header: Dataset) -> tuple[dict[str, Any], list[str]]:
    """Whose study it is, by identifiers alone; and the attributes of those that are not usable."""
    names = ("PatientID", "StudyInstanceUID", "AccessionNumber")
    patient, study, accession = (usable(header, name) for name in names)
    found: dict[str, Any] = {}
    if patient:
        found["subject"] = {"type": "Patient", "identifier": {"value": patient}}
    if study:
        uid = {"system": "urn:dicom:uid", "value": f"urn:oid:{study}"}
        found["imagingStudy"] = [{"type": "ImagingStudy", "identifier": uid}]
    if accession:
        found["identifier"] = [{
            "type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]},
            "value": accession,
        }]  # fmt: skip
    return found, [name for name in names if holds(header, name) and not usable(header, name)]


def _coding(code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": _LOINC, "code": code, "display": display}]}


def _content(report: Report, study: StudyHeader) -> Dataset:
    """The content tree: what wrote it, that it is a draft, what to check first, the sections, the finding scores."""
    from highdicom.sr import (
        CodeContentItem,
        CodedConcept,
        ContainerContentItem,
        ContentSequence,
        ImageContentItem,
        NumContentItem,
        RelationshipTypeValues,
        TextContentItem,
        UIDRefContentItem,
    )
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    contains, context = RelationshipTypeValues.CONTAINS, RelationshipTypeValues.HAS_OBS_CONTEXT
    modifier, inferred = RelationshipTypeValues.HAS_CONCEPT_MOD, RelationshipTypeValues.INFERRED_FROM
    dcm = codes.DCM
    comment = CodedConcept("121106", "DCM", "Comment")

    def image() -> ImageContentItem:
        return ImageContentItem(
            CodedConcept("111040", "DCM", "Original Source"), study.values.SOPClassUID, study.values.SOPInstanceUID,
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
    ]  # fmt: skip
    comments = [DRAFT_STATEMENT, *report.notes(), *_left_out(study.left_out)]
    items += [TextContentItem(comment, text, contains) for text in comments]
    if report.findings:
        items.append(section(_FINDINGS, CodedConcept("121071", "DCM", "Finding"), report.findings))
    if report.impression:
        items.append(section(_IMPRESSION, CodedConcept("121073", "DCM", "Impression"), report.impression))
    for name, score in _scores(report):
        item = TextContentItem(comment, f"Image scores point to: {name}", contains)  # the draft may say otherwise
        number = NumContentItem(
            CodedConcept("score", "99CBEDGE", _SCORE_MEANING), score, CodedConcept("1", "UCUM", "no units"),
            relationship_type=RelationshipTypeValues.HAS_PROPERTIES,
        )  # fmt: skip
        item.ContentSequence = ContentSequence([number, image()])
        items.append(item)
    root = ContainerContentItem(CodedConcept(_REPORT[0], "LN", _REPORT[1]), False, template_id="2000")
    root.ContentSequence = ContentSequence(items)
    return root


def _scores(report: Report) -> list[tuple[str, float]]:
    """The findings whose image scores are above their thresholds, with these."""
    return [
        (name, round(float(report.finding_scores[name]), 3))
        for name in report.image_findings or ()
        if name in report.finding_scores
    ]
