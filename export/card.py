"""The model card: what the model is, its origin, its measured quality, and its limits."""

from typing import Any

from cbedge.bundles.manifest import Manifest
from cbedge.findings.image_findings import ImageFindings, Measured
from cbedge.report import DRAFT_STATEMENT
from export.parity import Parity
from training import external
from training.datasets.iu_xray import PROVENANCE
from training.datasets.provenance import NO_LICENCE
from training.records import origin

_OPENED = (
    "For each finding whose image score reaches its threshold, the draft starts with a fixed sentence. The language "
    "model continues from there. Every draft states which of its sentences are of this kind."
)
_CONSISTENT = (
    "A later sentence that contradicts such a finding (for example, clear lungs after an opacity) is removed if a "
    "pattern for the finding recognizes it."
)

_NOT_COMPARED = (
    "Not compared: the graphs were exported layer by layer, for machines without enough memory for the whole model in "
    "fp32. `python -m export` compares them."
)
_TEMPLATES = (
    "If no abnormality is detected, the draft is a normal-report template, word for word, selected by indication and "
    "comparison. So a normal draft states what normal reports usually state, not what was examined. A user's template "
    "is used in every draft, without the sentences that contradict the image scores; the report lists these. The "
    "impression repeats the fixed sentences of the findings, followed by the template's impression unless it "
    "contradicts them. No template has the findings section of a training report."
)
_KNOWN = {PROVENANCE.name: PROVENANCE.population}  # for manifests without it
_MODEL = (
    "InstructBLIP (vision transformer, instruction-aware Q-Former, language model), fine-tuned on radiograph and "
    "report pairs by LoRA in stages with priors in the prompt, after ClinicalBLIP's recipe (Ji et al., JMIR Form Res "
    "2024;8:e32690). It reads one frontal chest radiograph{} with indication and comparison, and writes findings and "
    "impression."
)
_LICENCE = (
    "{}; research use. The licences of the base weights and of the training data (below) also apply. The weights "
    "contain no image or report as a file. The software is licensed under Apache-2.0."
)
_AND_LATERAL = ", and optionally the lateral one of the study,"


def model_card(manifest: Manifest, parity: Parity | None, templates: bool = False) -> str:
    """The text of ``MODEL_CARD.md``, with measured values only.

    Args:
        templates: whether drafts follow the bundle's templates.
    """
    data = [_training_data(record) for record in manifest.training_data] or ["- Not recorded."]
    bases = [f"- {b['part']}: {b['origin']}; {b['source']}; licence {b['licence']}" for b in manifest.base_weights]
    sections = {
        "What it is": _description(manifest, templates),
        "Licence": [_LICENCE.format(manifest.license)],
        "Base weights": bases,
        "Training data": data,
        **_findings(manifest.image_findings, manifest.quality),
        "Measured quality": _quality(manifest.quality),
        "Parity with torch": ["", parity.to_markdown() if parity else _NOT_COMPARED],
        "Limits": _limits(manifest),
    }
    lines = [f"# {manifest.name} {manifest.version}", "", f"**{DRAFT_STATEMENT}**", ""]
    for title, content in sections.items():
        lines += [f"## {title}", *content, ""]
    return "\n".join(lines)


def _description(manifest: Manifest, templates: bool) -> list[str]:
    findings = manifest.image_findings
    return [
        _MODEL.format(_AND_LATERAL if manifest.reads_lateral else ""),
        *([_OPENED] if findings is not None and any(findings.openings) else []),
        *([_CONSISTENT] if findings is not None and any(findings.denials) else []),
        *([_TEMPLATES] if templates else []),
    ]


def _findings(findings: ImageFindings | None, quality: dict[str, Any]) -> dict[str, list[str]]:
    """What was measured of each finding, if it was."""
    if findings is None or not findings.standings:
        return {}
    columns = ("AUC at home", "AUC away", "assessed", *findings.operating_points)
    points = [*findings.operating_points.values()]
    rows = [
        f"| {name} | {_interval(standing.home)} | {_interval(standing.away)} | "
        f"{standing.assessed} | {' | '.join(f'{values[i]:.3f}' for values in points)} |"
        for i, (name, standing) in enumerate(zip(findings.names, findings.standings, strict=True))
    ]
    lines = [
        "Scores are calibrated probabilities. AUC with 95% interval and the number of films with the finding, on films "
        "that no reader has seen: at home IU X-RAY's validation films, away the NIH's training films (cross-fitted by "
        "patient). A finding is assessed if the lower bound away is at least .70; if it was not measured there, on "
        "familiar films if the bound at home is. The last columns are the thresholds of the operating points.",
        "",
        "| | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
        *rows,
    ]
    for name, record in quality.get("external", {}).items():
        lines += ["", *external.to_markdown(f"Test films: {name}", record)]
    return {"Image findings": [line.replace("## ", "**", 1) + "**" * line.startswith("## ") for line in lines]}


def _interval(measured: Measured | None) -> str:
    if measured is None:
        return "not measured"
    return f"{measured.auc:.3f} ({measured.low:.3f} to {measured.high:.3f}), {measured.positives} of {measured.films}"


def _quality(quality: dict[str, Any]) -> list[str]:
    if not quality.get("scores"):
        return ["Not measured: run `python -m training evaluate`, then export again with `--quality`."]
    notes = [f"- {note}" for note in quality.get("notes", ())]
    lines = [f"Measured: {origin(quality)}.", ""] if "bundle" in quality else []
    lines += [quality["protocol"], ""]
    return [*lines, *_table(quality["scores"]), "", *notes, *_clinical(quality.get("clinical"))]


def _limits(manifest: Manifest) -> list[str]:
    side = manifest.preprocessing.image_size
    views = "" if manifest.reads_lateral else "lateral views or "
    return [
        "- Not a medical device; not validated for clinical use. Never act on an unchecked draft.",
        "- It misses findings and invents others. Fluent, plausible sentences do not show that a finding was seen.",
        "- A constant normal report also gets high n-gram scores on such data: compare them with the controls.",
        f"- Images are scaled to {side} x {side} pixels: small nodules, fine lines and subtle fractures are lost.",
        f"- It does not see {views}prior studies; statements about a comparison come from the given text.",
        *_populations(manifest),
    ]


def _training_data(record: dict[str, str]) -> str:
    """One entry of the manifest's ``training_data`` as a line of the card."""
    splits, digest = record.get("splits"), record.get("study_list_sha256")
    parts = [
        record.get("detail"),
        f"{splits} studies" if splits else None,
        f"tags {record['tags']}" if record.get("tags") else None,
        f"licence {record.get('licence') or NO_LICENCE}",
        record.get("source"),
        record.get("citation"),
        f"SHA-256 of the study list {digest}" if digest else None,
    ]
    return f"- {record['name']}: {'; '.join(part.rstrip('.') for part in parts if part)}."


def _populations(manifest: Manifest) -> list[str]:
    """The populations of the training data, as far as they are recorded."""
    known = [data.get("population") or _KNOWN.get(data["name"], "") for data in manifest.training_data]
    lines = [f"- {text}" for text in dict.fromkeys(known) if text]
    return lines if lines and all(known) else [*lines, "- The population of the training data is not fully documented."]


def _clinical(measured: dict[str, Any] | None) -> list[str]:
    """Scores of abnormality and of each finding, from the record of an evaluation."""
    if not measured:
        return []
    names = {
        "balanced_accuracy": "abnormal or normal, balanced accuracy",
        "finding_f1": "F1 of 13 findings, micro",
        "finding_macro_f1": "macro",
    }
    rows = {row: {text: values[name][0] for name, text in names.items()} for row, values in measured["scores"].items()}
    main, by_finding = next(iter(measured["by_finding"].items()))
    return [
        f"Abnormal by the collection's index terms, chosen from the reports: {measured['abnormal_studies']} of "
        f"{measured['studies']}. The rules of `training/findings.py` label findings of drafts and references.",
        "",
        *_table(rows),
        "",
        f"By finding, {main} (not by age, sex or device, which the data set does not record):",
        "",
        "| | precision | recall | F1 | positives |",
        "| --- |" + " --- |" * 4,
        *[
            f"| {label} | {s['precision']:.2f} | {s['recall']:.2f} | {s['f1']:.2f} | {s['positives']} |"
            for label, s in by_finding.items()
        ],
    ]


def _table(scores: dict[str, dict[str, float]]) -> list[str]:
    names = list(next(iter(scores.values())))
    rows = [f"| {row} | " + " | ".join(f"{values[n]:.3f}" for n in names) + " |" for row, values in scores.items()]
    return ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names), *rows]
