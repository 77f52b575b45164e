"""The model card: what the model is, where it comes from, how good it is, and what it must not be used for."""

from typing import Any

from cbedge.bundles.bundle import Manifest
from cbedge.report import DRAFT_STATEMENT
from export.parity import Parity
from training.datasets.iu_xray import PROVENANCE
from training.datasets.provenance import NO_LICENCE

_OPENED = (
    "Where its image scores reach their thresholds, the draft begins with a fixed sentence for each such finding, and "
    "the language model goes on from there; which sentences those are is said with every draft."
)
_CONSISTENT = (
    "A sentence that goes on to contradict one of them (that the lungs are clear, behind an opacity) is left out, "
    "where it is known by its words."
)

_NOT_COMPARED = (
    "Not compared: the graphs were written layer by layer, for a machine that does not hold the whole model in fp32. "
    "`python -m export` compares."
)
_TEMPLATES = (
    "Where the image scores see nothing abnormal, the draft is a template, word for word: a normal report chosen by "
    "indication and comparison. So a normal draft says what normal reports usually say, not what was looked at. The "
    "sentences of a template that the user gives stand in every draft, without those that contradict the image scores; "
    "the report names these. The impression says again what the draft began with, and what the template concludes "
    "unless that contradicts it. No template has the findings of a report of the training collection."
)
_KNOWN = {PROVENANCE.name: PROVENANCE.population}  # for manifests that do not say it
_BESIDE = ", and the study's lateral one beside it where that is given,"


def model_card(manifest: Manifest, parity: Parity | None, templates: bool = False) -> str:
    """The text of ``MODEL_CARD.md``; it states only what was measured.

    Args:
        manifest: of the bundle.
        parity: ``None`` where nothing was compared.
        templates: drafts keep to the bundle's templates.
    """
    quality, findings, lateral = manifest.quality, manifest.image_findings, manifest.reads_lateral
    side = manifest.preprocessing.image_size
    opened = findings is not None and any(findings.openings)
    lines = [
        f"# {manifest.name} {manifest.version}", "",
        f"**{DRAFT_STATEMENT}**", "",
        "## What it is",
        "InstructBLIP (vision transformer, instruction-aware Q-Former, language model), fine-tuned on radiograph and "
        "report pairs by LoRA in stages with priors in the prompt, after ClinicalBLIP (Ji et al., JMIR Form Res "
        "2024;8:e32690). "
        f"It reads one frontal chest radiograph{_BESIDE if lateral else ''} with its indication and comparison, and "
        "writes findings and impression.",
        *([_OPENED] if opened else []),
        *([_CONSISTENT] if findings is not None and any(findings.denials) else []),
        *([_TEMPLATES] if templates else []),
        "", "## Licence",
        f"{manifest.license}; research use. The licences of the base weights and of the training data (below) hold "
        "too; no image or report is in the weights as a file. The software around them is Apache-2.0.", "",
        "## Base weights",
        *[f"- {b['part']}: {b['origin']}; {b['source']}; licence {b['licence']}" for b in manifest.base_weights], "",
        "## Training data",
        *([_training_data(data) for data in manifest.training_data] or ["- Not recorded."]), "",
        "## Measured quality",
    ]  # fmt: skip
    if quality.get("scores"):
        lines += [
            quality["protocol"],
            "",
            *_table(quality["scores"]),
            "",
            *[f"- {n}" for n in quality.get("notes", ())],
            *_clinical(quality.get("clinical")),
        ]
    else:
        lines.append("Not measured: run `python -m training evaluate`, then export again with `--quality`.")
    lines += [
        "", "## Parity with torch", "", parity.to_markdown() if parity else _NOT_COMPARED, "",
        "## Limits",
        "- Not a medical device; not validated for any clinical use. Never act on a draft that nobody checked.",
        "- It misses findings and invents others; fluent, plausible sentences are no sign that it saw something.",
        "- N-gram scores on such reports are high for a constant normal report too: read them beside the controls.",
        f"- Radiographs are seen at {side} x {side} pixels: small nodules, fine lines and subtle fractures are lost.",
        f"- It sees {'' if lateral else 'no lateral view and '}no earlier study; what it says of a comparison comes "
        "from the given text.",
        *_populations(manifest), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _training_data(record: dict[str, str]) -> str:
    """One entry of the manifest's ``training_data`` as a line of the card."""
    splits, digest = record.get("splits"), record.get("study_list_sha256")
    parts = [
        record.get("detail"), f"{splits} studies" if splits else None,
        f"tags {record['tags']}" if record.get("tags") else None, f"licence {record.get('licence') or NO_LICENCE}",
        record.get("source"), record.get("citation"), f"SHA-256 of the study list {digest}" if digest else None,
    ]  # fmt: skip
    return f"- {record['name']}: {'; '.join(part.rstrip('.') for part in parts if part)}."


def _populations(manifest: Manifest) -> list[str]:
    """Whose radiographs the model knows, as far as its records say."""
    known = [data.get("population") or _KNOWN.get(data["name"], "") for data in manifest.training_data]
    told = [f"- {text}" for text in dict.fromkeys(known) if text]
    return told if told and all(known) else [*told, "- Whose radiographs it was trained on is not stated in full."]


def _clinical(measured: dict[str, Any] | None) -> list[str]:
    """What drafts get right of abnormality and of each finding, from an evaluation's record."""
    if not measured:
        return []
    names = {"balanced_accuracy": "abnormal or normal, balanced accuracy", "finding_f1": "F1 of 13 findings, micro",
             "finding_macro_f1": "macro"}  # fmt: skip
    rows = {row: {text: values[name][0] for name, text in names.items()} for row, values in measured["scores"].items()}
    main, by_finding = next(iter(measured["by_finding"].items()))
    return [
        f"Abnormal by people's tags: {measured['abnormal_studies']} of {measured['studies']}. Findings of drafts and "
        "references are read by `training/findings.py`.", "",
        *_table(rows), "",
        f"By finding, {main} (no figures by age, sex or device: the collection does not tell them):", "",
        "| | precision | recall | F1 | positives |", "| --- |" + " --- |" * 4,
        *[f"| {label} | {s['precision']:.2f} | {s['recall']:.2f} | {s['f1']:.2f} | {s['positives']} |"
          for label, s in by_finding.items()],
    ]  # fmt: skip


def _table(scores: dict[str, dict[str, float]]) -> list[str]:
    names = list(next(iter(scores.values())))
    rows = [f"| {row} | " + " | ".join(f"{values[n]:.3f}" for n in names) + " |" for row, values in scores.items()]
    return ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names), *rows]
