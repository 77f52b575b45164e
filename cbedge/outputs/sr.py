"""DICOM Enhanced SR in the image's study: preliminary, partial, unverified."""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING

from cbedge.errors import RadiographError
from cbedge.images.dicom_file import read_header
from cbedge.images.dicom_header import PATIENT_AND_STUDY, StudyHeader, study_header, usable
from cbedge.outputs.registry import Source
from cbedge.outputs.wording import FINDINGS, IMPRESSION, REPORT, UNFAMILIARITY, left_out
from cbedge.report import DRAFT_STATEMENT, MARK, Report

if TYPE_CHECKING:
    from highdicom.sr import (
        CodedConcept,
        ContainerContentItem,
        ImageContentItem,
        NumContentItem,
        RelationshipTypeValues,
    )
    from highdicom.sr.value_types import ContentItem
    from pydicom import Dataset

_MANUFACTURER = "cbedge"
_COMMENT = ("121106", "DCM", "Comment")
_SCORE_MEANING = "Image finding score, 0 to 1; ranks, not a probability"
_PROBABILITY_MEANING = "Image finding, calibrated probability"


def check(source: Source) -> None:
    """Check that a radiograph's file has the identifiers that a document needs.

    Raises:
        RadiographError: it is not a DICOM file, or its header lacks identifiers.
    """
    study_header(_required(read_header(source)))


def write(report: Report, source: Source) -> bytes:
    """Write a report as a DICOM file.

    Raises:
        RadiographError: the source is not a DICOM file, or its header lacks identifiers.
    """
    return to_sr(report, read_header(source))


def to_sr(report: Report, header: Dataset | None, same_again: bool = False) -> bytes:
    """Write an Enhanced SR document in the image's study: preliminary, partial, unverified.

    Valid attributes of the header are copied, in Unicode; a comment lists the omitted ones.

    Args:
        report: the draft.
        header: the image's header, without pixels.
        same_again: derive the document's identifiers from its content, so that a document that is written again after
            an interruption has the same identifiers, and a different draft has others.

    Raises:
        RadiographError: there is no header, or its identifiers are missing or invalid.
    """
    header = _required(header)
    study = study_header(header)
    import highdicom
    from pydicom.uid import generate_uid

    content = _content(report, study)
    identity = _identity(report, study, content)
    uids = [generate_uid(entropy_srcs=[identity, kind] if same_again else None) for kind in ("series", "document")]

    class Document(highdicom.sr.EnhancedSR):
        """Copies patient and study from the checked header, for any SOP class of the image."""

        def copy_patient_and_study_information(self, dataset: Dataset) -> None:
            for name in PATIENT_AND_STUDY:
                if name in dataset:
                    self.add(dataset[name])

    document = Document(
        evidence=[study.values],
        content=content,
        series_instance_uid=uids[0],
        series_number=_series_number(header),
        sop_instance_uid=uids[1],
        instance_number=1,
        manufacturer=_MANUFACTURER,
        is_complete=False,
        is_final=False,
        is_verified=False,
        specific_character_set="ISO_IR 192",  # whatever the header's was: a draft may hold any character
    )
    document.ManufacturerModelName = _long_string(report.model)
    document.SoftwareVersions = _long_string(report.model_version)
    document.SeriesDescription = "Draft report, unreviewed"
    file = io.BytesIO()
    document.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _required(header: Dataset | None) -> Dataset:
    if header is None:
        raise RadiographError("a DICOM SR needs a study: give the radiograph as a DICOM file, or another --format")
    return header


def _identity(report: Report, study: StudyHeader, content: Dataset) -> str:
    """A hash of a document's content: copied attributes, images, model and text."""
    parts = [
        {str(element.tag): str(element.value) for element in study.values},
        content.to_json(),
        report.text,
        report.complete,
        report.image_sha256,
        report.lateral_sha256,
        report.view,
        report.template,
        report.model,
        report.model_version,
        report.variant,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _long_string(text: str) -> str:
    """Text that is valid for the VR LO."""
    return "".join(c if c.isprintable() and c != "\\" else " " for c in text)[:64].strip() or "unknown"


def _series_number(header: Dataset) -> int:
    """A number that is unlikely to collide with the modality's series."""
    number = usable(header, "SeriesNumber")
    return 9000 + int(str(number or 0)) % 900


def _content(report: Report, study: StudyHeader) -> Dataset:
    """The content tree: model, draft statement, notes, sections, finding scores."""
    from highdicom.sr import (
        CodedConcept,
        ContainerContentItem,
        ContentSequence,
        RelationshipTypeValues,
        TextContentItem,
    )

    items = _observer_context(report)
    for text in (DRAFT_STATEMENT, *report.notes(), *left_out(study.left_out)):
        items.append(TextContentItem(CodedConcept(*_COMMENT), text, RelationshipTypeValues.CONTAINS))
    if report.findings:
        items.append(_section(report, study, FINDINGS, ("121071", "DCM", "Finding"), report.findings))
    if report.impression:
        items.append(_section(report, study, IMPRESSION, ("121073", "DCM", "Impression"), report.impression))
    items += _scores(report, study)
    if report.unfamiliarity is not None:
        name = CodedConcept("unfamiliarity", "99CBEDGE", UNFAMILIARITY)
        items.append(_number(name, report.unfamiliarity, RelationshipTypeValues.CONTAINS))
    root = ContainerContentItem(CodedConcept(REPORT[0], "LN", REPORT[1]), False, template_id="2000")
    root.ContentSequence = ContentSequence(items)
    return root


def _section(
    report: Report, study: StudyHeader, title: tuple[str, str], kind: tuple[str, str, str], text: str
) -> ContainerContentItem:
    """A section; each of its parts refers to the image, and one that is not assessed has a qualifier."""
    from highdicom.sr import (
        CodeContentItem,
        CodedConcept,
        ContainerContentItem,
        ContentSequence,
        RelationshipTypeValues,
        TextContentItem,
    )

    contains = RelationshipTypeValues.CONTAINS
    container = ContainerContentItem(CodedConcept(title[0], "LN", title[1]), False, relationship_type=contains)
    container.ContentSequence = ContentSequence()
    for part, is_assessed in _parts(report, "findings" if title == FINDINGS else "impression", text):
        qualifier = CodeContentItem(
            CodedConcept("assessment", "99CBEDGE", "Assessment of the statement"),
            CodedConcept("not-assessed", "99CBEDGE", "Not assessed by the model"),
            RelationshipTypeValues.HAS_CONCEPT_MOD,
        )
        item = TextContentItem(CodedConcept(*kind), part, contains)
        item.ContentSequence = ContentSequence([*([] if is_assessed else [qualifier]), _image(study)])
        container.ContentSequence.append(item)
    return container


def _scores(report: Report, study: StudyHeader) -> list[ContentItem]:
    """The image findings with their scores, which are above their thresholds; the draft may say otherwise."""
    from highdicom.sr import CodedConcept, ContentSequence, RelationshipTypeValues, TextContentItem

    score = CodedConcept("score", "99CBEDGE", _SCORE_MEANING)
    if report.finding_scores_calibrated:
        score = CodedConcept("probability", "99CBEDGE", _PROBABILITY_MEANING)
    items: list[ContentItem] = []
    for name in report.image_findings or ():
        if name in report.finding_scores:
            text = f"Image scores point to: {name}"
            item = TextContentItem(CodedConcept(*_COMMENT), text, RelationshipTypeValues.CONTAINS)
            number = _number(score, report.finding_scores[name], RelationshipTypeValues.HAS_PROPERTIES)
            item.ContentSequence = ContentSequence([number, _image(study)])
            items.append(item)
    return items


def _number(name: CodedConcept, value: float, relation: RelationshipTypeValues) -> NumContentItem:
    from highdicom.sr import CodedConcept, NumContentItem

    unit = CodedConcept("1", "UCUM", "no units")
    return NumContentItem(name, round(float(value), 3), unit, relationship_type=relation)


def _image(study: StudyHeader) -> ImageContentItem:
    from highdicom.sr import CodedConcept, ImageContentItem, RelationshipTypeValues

    return ImageContentItem(
        CodedConcept("111040", "DCM", "Original Source"),
        study.values.SOPClassUID,
        study.values.SOPInstanceUID,
        relationship_type=RelationshipTypeValues.INFERRED_FROM,
    )


def _parts(report: Report, section: str, text: str) -> list[tuple[str, bool]]:
    """A section's text in parts: each marked sentence alone, and the sentences between; and whether it is assessed."""
    sentences = [sentence for sentence in report.sentences if sentence.section == section]
    if not any(sentence.marked for sentence in sentences):
        return [(text, True)]
    parts: list[tuple[str, bool]] = []
    for sentence in sentences:
        if sentence.marked:
            parts.append((f"{sentence.text}{MARK}", False))
        elif parts and parts[-1][1]:
            parts[-1] = (f"{parts[-1][0]} {sentence.text}", True)
        else:
            parts.append((sentence.text, True))
    return parts


def _observer_context(report: Report) -> list[ContentItem]:
    """Content items for the language and for the observer, a device that is the same for all drafts of a model."""
    from highdicom.sr import CodeContentItem, CodedConcept, RelationshipTypeValues, TextContentItem, UIDRefContentItem
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    context, modifier = RelationshipTypeValues.HAS_OBS_CONTEXT, RelationshipTypeValues.HAS_CONCEPT_MOD
    observer = generate_uid(entropy_srcs=[report.model, report.model_version, report.variant])
    return [
        CodeContentItem(
            CodedConcept("121049", "DCM", "Language of Content Item and Descendants"),
            CodedConcept("en", "RFC5646", "English"),
            modifier,
        ),
        CodeContentItem(CodedConcept("121005", "DCM", "Observer Type"), codes.DCM.Device, context),
        UIDRefContentItem(CodedConcept("121012", "DCM", "Device Observer UID"), observer, context),
        TextContentItem(CodedConcept("121013", "DCM", "Device Observer Name"), _MANUFACTURER, context),
        TextContentItem(CodedConcept("121015", "DCM", "Device Observer Model Name"), report.model, context),
        TextContentItem(CodedConcept("111001", "DCM", "Algorithm Name"), f"{report.model} {report.variant}", context),
        TextContentItem(CodedConcept("111003", "DCM", "Algorithm Version"), report.model_version, context),
    ]
