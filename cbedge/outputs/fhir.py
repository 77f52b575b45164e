"""FHIR R4 DiagnosticReport: preliminary, with the sections and the image scores as contained observations."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cbedge.images.dicom_file import read_header
from cbedge.images.dicom_header import holds, usable
from cbedge.outputs.registry import Source
from cbedge.outputs.wording import FINDINGS, IMPRESSION, REPORT, UNFAMILIARITY, left_out
from cbedge.report import DRAFT_STATEMENT, Report

if TYPE_CHECKING:
    from pydicom import Dataset

_LOINC = "http://loinc.org"


def write(report: Report, source: Source) -> bytes:
    """Write a report as FHIR JSON, with the identifiers of a DICOM source."""
    return (to_fhir(report, read_header(source, needed=False)) + "\n").encode()


def to_fhir(report: Report, header: Dataset | None = None) -> str:
    """A FHIR R4 DiagnosticReport as JSON: status ``preliminary``, the sections as contained observations.

    Args:
        report: the draft.
        header: header of a DICOM image, from which study, accession number and patient identifier are taken.
    """
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    device = {
        "resourceType": "Device",
        "id": "software",
        "status": "active",
        "deviceName": [{"name": report.model, "type": "model-name"}],
        "version": [{"value": f"{report.model_version} {report.variant}"}],
        "note": [{"text": DRAFT_STATEMENT}],
    }
    sections = [
        {
            "resourceType": "Observation",
            "id": name,
            "status": "preliminary",
            "code": _coding(*code),
            "valueString": text,
            "device": {"reference": "#software"},
            **_unassessed(report, name),
        }
        for name, code, text in (("findings", FINDINGS, report.findings), ("impression", IMPRESSION, report.impression))
        if text
    ]
    values: dict[str, Any] = {
        "status": "preliminary",
        "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}]}],
        "code": _coding(*REPORT),
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "contained": [device, *sections],
        "result": [{"reference": f"#{section['id']}"} for section in sections],
        "presentedForm": [
            {
                "contentType": "text/plain; charset=utf-8",
                "title": "Unreviewed draft",
                "data": base64.b64encode(report.to_text().encode()).decode(),
            }
        ],
    }
    if report.impression:
        values["conclusion"] = report.impression
    of_study, unusable = _study(header) if header is not None else ({}, [])
    scores = _score_observation(report, [*report.notes(), *left_out(unusable)])
    values["contained"].append(scores)
    values["result"].append({"reference": "#image-scores"})
    values |= of_study
    return json.dumps(json.loads(DiagnosticReport(**values).model_dump_json()), indent=2, ensure_ascii=False)


def _unassessed(report: Report, section: str) -> dict[str, Any]:
    """A note for each marked sentence of a section."""
    marked = [sentence.text for sentence in report.sentences if sentence.section == section and sentence.marked]
    return {"note": [{"text": f"Not assessed by the model: {text}"} for text in marked]} if marked else {}


def _score_observation(report: Report, notes: list[str]) -> dict[str, Any]:
    """The image scores and the notes."""
    kind = (
        "calibrated probabilities"
        if report.finding_scores_calibrated
        else "they rank findings and are not probabilities"
    )
    observation: dict[str, Any] = {
        "resourceType": "Observation",
        "id": "image-scores",
        "status": "preliminary",
        "code": {"text": f"Image scores of a research model, 0 to 1; {kind}"},
        "device": {"reference": "#software"},
        "component": [
            {"code": {"text": name}, "valueQuantity": {"value": round(score, 3)}}
            for name, score in report.finding_scores.items()
        ],
        "note": [{"text": note} for note in notes],
    }
    if report.unfamiliarity is not None:
        value = {"value": round(report.unfamiliarity, 3)}
        observation["component"].append({"code": {"text": UNFAMILIARITY}, "valueQuantity": value})
    if not report.finding_scores:
        observation["valueString"] = "none"
    return {key: value for key, value in observation.items() if value}


def _study(header: Dataset) -> tuple[dict[str, Any], list[str]]:
    """Identifiers of patient and study, and the names of invalid ones."""
    names = ("PatientID", "StudyInstanceUID", "AccessionNumber")
    patient, study, accession = (usable(header, name) for name in names)
    found: dict[str, Any] = {}
    if patient:
        found["subject"] = {"type": "Patient", "identifier": {"value": patient}}
    if study:
        uid = {"system": "urn:dicom:uid", "value": f"urn:oid:{study}"}
        found["imagingStudy"] = [{"type": "ImagingStudy", "identifier": uid}]
    if accession:
        found["identifier"] = [
            {
                "type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]},
                "value": accession,
            }
        ]
    return found, [name for name in names if holds(header, name) and not usable(header, name)]


def _coding(code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": _LOINC, "code": code, "display": display}]}
