"""Score a model on the test split of IU X-RAY (R2Gen's), with controls."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from cbedge.prompt import ClinicalContext, build_target, split_sections
from cbedge.provenance import bundle_sha256
from cbedge.report import MARK, Report, Sentence
from training import external
from training.clinical import finding_f1, label_known, validate, with_intervals
from training.controls import (
    best_constant,
    blank,
    commonest_findings,
    consensus,
    neighbours,
    opening_of,
    own,
    swapped,
    withheld,
)
from training.datasets.iu_xray import clean_reference, read_studies
from training.datasets.studies import Study
from training.drafting import Drafter, Encoder, Request, RuntimeDrafter
from training.labelers import Chexbert, outside_scores
from training.ontology import TAGS
from training.probes import KINDS, probe, represent
from training.records import origin, read_drafts, table
from training.scoring import METRICS, PROTOCOL, Scores, score

PACKAGES = ("torch", "transformers", "onnxruntime", "pycocoevalcap")
OPENINGS_ALONE = "opening sentences alone"
PARTS: dict[str, Callable[[Sentence], bool]] = {
    "sentences of basis image": lambda sentence: sentence.basis == "image",
    "sentences of basis template": lambda sentence: sentence.basis == "template",
    "sentences of basis language": lambda sentence: sentence.basis == "language",
    "assessed sentences": lambda sentence: sentence.assessed,
    "unassessed sentences": lambda sentence: not sentence.assessed,
}
_ADDED = (
    "In {same} of {studies} studies a draft names those of the 13 findings that its opening sentences name, and no "
    "other: there the language model adds none of them."
)
CLINICAL = {
    "balanced_accuracy": "abnormal or normal, balanced accuracy",
    "sensitivity": "abnormal studies called so",
    "specificity": "normal studies called so",
    "finding_f1": "F1 of 13 findings, micro",
    "finding_macro_f1": "macro",
    "micro_f1": "F1 of 14 labels, micro",
    "macro_f1": "macro (14)",
}


def evaluate(
    data: Path,
    drafters: list[Drafter],
    encoder: Encoder | None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    image_blind: Drafter | None = None,
    drafts_file: Path | None = None,
    recorded: Path | None = None,
    console: Console | None = None,
    chexbert: Chexbert | None = None,
    radgraph: Path | None = None,
) -> dict[str, Any]:
    """Draft, score, and compare with controls.

    Args:
        drafters: each gets a row; the first also gets the controls with swapped images, blank images and withheld
            indications. It may be empty if there is an image-blind model.
        encoder: a run or a bundle, for the retrieval controls and the linear probes; ``None`` for neither.
        limit: maximum number of studies, for a trial; the record says so.
        seed: random seed of the swap.
        image_blind: a model that was trained without images, for its row.
        drafts_file: JSON Lines file for all drafts and references; it must stay out of the repository.
        recorded: such a file; its drafts are scored, and none is written. The first drafter must be their model.
        chexbert, radgraph: labelers with their weights, see :mod:`training.labelers`.

    Returns:
        A JSON-ready record with ``scores``, ``looks``, ``clinical``, ``outside`` and ``probe``.
    """
    studies = [s for s in read_studies(data, (split,)) if s.findings]
    rows = _recorded(recorded, drafters[0]) if recorded else {}
    studies = [s for s in studies if not rows or s.study_id in rows][:limit]
    references = [clean_reference(s.findings) for s in studies]
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        texts = {name: [rows[s.study_id][name] for s in studies] for name in next(iter(rows.values()), ())}
        texts = texts or _draft_all(drafters, image_blind, studies, seed, progress)
        if drafts_file:
            _write_drafts(drafts_file, studies, texts, next(iter(drafters), None))
        texts |= _parts_alone(drafters, next(iter(texts.values())))
        drafted = {row: [split_sections(t)[0] for t in drafts] for row, drafts in texts.items()}
        findings = {row: [clean_reference(text) for text in drafts] for row, drafts in drafted.items()}
        controls, probed = _controls(encoder, studies, data, progress)
        findings |= controls
    scores = {row: score(drafts, references) for row, drafts in findings.items()}
    clinical = _clinical(studies, findings | drafted)
    return {
        "split": split,
        "studies": len(studies),
        "limited": limit is not None,
        "protocol": PROTOCOL,
        "seed": seed,
        "scores": {row: s.corpus for row, s in scores.items()},
        "intervals": {row: s.intervals() for row, s in scores.items()},
        "looks": _lost_on_swap(next(iter(texts)), scores, clinical),
        "clinical": clinical,
        "outside": outside_scores(findings | drafted, [s.findings for s in studies], chexbert, radgraph),
        "probe": probed,
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    limited = " (limited: a trial, not the whole split)" if record["limited"] else ""
    intervals = record["intervals"]
    scores = [
        (row, *(_with_interval(s[m], intervals[row].get(m)) for m in METRICS)) for row, s in record["scores"].items()
    ]
    lines = [
        f"# IU X-RAY, {record['split']} split: {record['studies']} studies{limited}",
        "",
        f"{origin(record)}. {record['protocol']}.",
        "",
        *table(("", *METRICS), scores),
        "",
    ]
    if looks := record["looks"]:
        cider, f1 = looks["cider_lost_on_swap"], looks["finding_f1_lost_on_swap"]
        lines += [f"Lost when images are swapped: {cider:.1%} of CIDEr, {f1:.1%} of the micro-F1 of findings.", ""]
    lines += _clinical_tables(record["clinical"])
    for name, films in record.get("external", {}).items():
        lines += ["", *external.to_markdown(name, films)]
    if record["outside"]:
        names = list(next(iter(record["outside"].values())))
        rows = [(row, *(f"{values[name]:.3f}" for name in names)) for row, values in record["outside"].items()]
        lines += ["", "## By the field's labelers", "", *table(("", *names), rows)]
    if record["probe"]:
        rows = [(tag, *(f"{v[kind]:.3f}" for kind in KINDS), v["positives"]) for tag, v in record["probe"].items()]
        lines += ["", "## Linear probes of the image side, AUC", "", *table(("", *KINDS.values(), "positives"), rows)]
    return "\n".join(lines) + "\n"


def _clinical_tables(clinical: dict[str, Any]) -> list[str]:
    scored = clinical["scores"].items()
    rows = [(row, *(_with_interval(s[name][0], s[name][1:]) for name in CLINICAL)) for row, s in scored]
    main = next(iter(clinical["by_finding"]))
    found = [
        (label, f"{s['precision']:.2f}", f"{s['recall']:.2f}", f"{s['f1']:.2f}", s["positives"])
        for label, s in clinical["by_finding"][main].items()
    ]
    reader, reference = clinical["reader"], clinical["reference"]
    return [
        "## Findings that drafts name",
        "",
        "Findings of drafts and references are labelled by the rules of `training/findings.py`, not by a radiologist. "
        "Abnormal or normal by the collection's index terms, which its indexers chose from the reports and a program "
        f"added to (abnormal: {clinical['abnormal_studies']} of {clinical['studies']}). 95% bootstrap intervals.",
        "",
        *table(("", *CLINICAL.values()), rows),
        "",
        *([_ADDED.format(**clinical["added"])] if "added" in clinical else []),
        "",
        f"By finding, {main}:",
        "",
        *table(("", "precision", "recall", "F1", "positives"), found),
        "",
        f"The labeler of findings, on the reports of these studies compared with the index terms: abnormal precision "
        f"{reader['abnormal']['precision']:.2f}, recall {reader['abnormal']['recall']:.2f}; over {len(TAGS) - 1} tags "
        f"micro precision {reader['micro']['precision']:.2f}, recall {reader['micro']['recall']:.2f}. The findings "
        f"sections of the references alone name an abnormality in {reference['sensitivity']:.1%} of abnormal and in "
        f"{1 - reference['specificity']:.1%} of normal ones.",
    ]


def _with_interval(value: float, ends: list[float] | None) -> str:
    return f"{value:.3f}" + (f" ({ends[0]:.3f}–{ends[1]:.3f})" if ends else "")


def _lost_on_swap(main: str, scores: dict[str, Scores], clinical: dict[str, Any]) -> dict[str, float]:
    """The shares of CIDEr and of the findings' F1 that swapped images cost; empty without drafts of swapped images."""
    pair = (main, "images swapped")
    if pair[1] not in scores:
        return {}
    ciders = [scores[row].corpus["CIDEr"] for row in pair]
    f1s = [clinical["scores"][row]["finding_f1"][0] for row in pair]
    lost = [(whole - left) / whole if whole else 0.0 for whole, left in (ciders, f1s)]
    return {"cider_lost_on_swap": lost[0], "finding_f1_lost_on_swap": lost[1]}


def _draft_all(
    drafters: list[Drafter], image_blind: Drafter | None, studies: list[Study], seed: int, progress: Progress
) -> dict[str, list[str]]:
    """The drafts of each row of the table."""
    rows: list[tuple[str, Drafter, list[Request]]] = [(one.name, one, own(studies)) for one in drafters]
    if image_blind is not None:
        rows.append((image_blind.name, image_blind, own(studies)))
    template_alone: dict[str, list[str]] = {}
    parts: dict[str, list[str]] = {}
    for main in drafters[:1]:
        rows.append(("images swapped", main, swapped(studies, seed)))
        rows.append(("blank image", main, blank(studies)))
        rows.append(("indication withheld", main, withheld(studies)))
        if (templates := main.templates(own(studies))) is not None:
            rows.append(("without template", main.freely(), own(studies)))
            template_alone["template alone"] = templates
    texts = {}
    for row, drafter, requests in rows:
        task = progress.add_task(row if row == drafter.name else f"{drafter.name}, {row}", total=len(requests))
        reports = drafter.reports(requests, partial(progress.advance, task))
        texts[row] = [report.text.replace(MARK, "") if report else "" for report in reports]
        if drafters and drafter is drafters[0] and not parts:
            parts = by_part(reports)
    return texts | template_alone | parts


def by_part(reports: Sequence[Report | None]) -> dict[str, list[str]]:
    """The findings sections of drafts with the sentences of one basis alone, and with those that are assessed or not.
    Findings are counted over them like over whole drafts: so a row says what the language model adds, or a template."""
    return {
        part: [
            build_target(" ".join(s.text for s in report.sentences if s.section == "findings" and belongs(s)), "")
            if report
            else ""
            for report in reports
        ]
        for part, belongs in PARTS.items()
    }


def _parts_alone(drafters: list[Drafter], drafts: list[str]) -> dict[str, list[str]]:
    """Rows that need no model's sentences: the opening sentences of the drafts, and one template for every study."""
    rows: dict[str, list[str]] = {}
    for main in drafters[:1]:
        findings = main.generator.bundle.manifest.image_findings
        if openings := {sentence for sentence in (findings.openings if findings else ()) if sentence}:
            rows[OPENINGS_ALONE] = [opening_of(draft, openings) for draft in drafts]
        if (templates := main.generator.resources.templates) is not None:
            rows["template of an empty context"] = [templates.choose(ClinicalContext())] * len(drafts)
    return rows


def _controls(
    encoder: Encoder | None, studies: list[Study], data: Path, progress: Progress
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Findings that are not drafted: constant, and from the nearest training images; and the linear probes."""
    train, val = ([s for s in read_studies(data, (split,)) if s.findings] for split in ("train", "val"))
    reports = [clean_reference(s.findings) for s in train]
    rows = {
        "constant": [best_constant(reports)] * len(studies),
        "three commonest findings, always": [commonest_findings([s.findings for s in train])] * len(studies),
    }
    if encoder is None:
        return rows, {}
    groups = {"train": train, "val": val, "studied": studies}
    seen = {}
    for name, group in groups.items():
        task = progress.add_task(f"encoding {name} images", total=len(group))
        seen[name] = represent(encoder, group, partial(progress.advance, task))
    near = neighbours(seen["studied"]["vision"], seen["train"]["vision"])
    rows["nearest image"] = [reports[row[0]] for row in near]
    rows["consensus of 25"] = [consensus([reports[i] for i in row]) for row in near]
    return rows, probe(seen, groups)


def _clinical(studies: list[Study], findings: dict[str, list[str]]) -> dict[str, Any]:
    """Compare the findings that drafts and references name, and abnormality with the collection's index terms."""
    references, _, abnormal = label_known(studies, [s.findings for s in studies])
    labels = {row: label_known(studies, drafts)[0] for row, drafts in findings.items()}
    added = {}
    if OPENINGS_ALONE in labels:
        whole, alone = (labels[row].matrix[:, 1:] for row in (next(iter(findings)), OPENINGS_ALONE))
        added = {"added": {"studies": len(whole), "same": int((whole == alone).all(1).sum())}}
    return {
        **added,
        "studies": len(abnormal),
        "abnormal_studies": int(abnormal.sum()),
        "scores": {row: with_intervals(drafts, references, abnormal) for row, drafts in labels.items()},
        "by_finding": {row: finding_f1(drafts, references) for row, drafts in labels.items()},
        "reference": {
            "sensitivity": float(references.abnormal[abnormal].mean()) if abnormal.any() else 0.0,
            "specificity": float(1 - references.abnormal[~abnormal].mean()) if (~abnormal).any() else 0.0,
        },
        "reader": validate(studies, [f"{s.findings} {s.impression}" for s in studies]),
    }


def _recorded(path: Path, drafter: Drafter) -> dict[str, dict[str, str]]:
    """Study → the drafts of each row of a file that ``evaluate --drafts`` wrote with this model."""
    rows = read_drafts(path)
    if rows and rows[0].get("bundle") not in (None, ours := _bundle_of(drafter)):
        raise ValueError(
            f"{path} has drafts of the bundle {rows[0]['bundle'][:12]}…, and --model is {ours}: give theirs"
        )
    return {row["study_id"]: row["drafts"] for row in rows}


def _bundle_of(drafter: Drafter | None) -> str | None:
    return bundle_sha256(drafter.generator.bundle.folder) if isinstance(drafter, RuntimeDrafter) else None


def _write_drafts(path: Path, studies: list[Study], texts: dict[str, list[str]], main: Drafter | None) -> None:
    bundle = _bundle_of(main)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for i, study in enumerate(studies):
            row = {
                "study_id": study.study_id,
                "bundle": bundle,
                "indication": study.context.indication,
                "findings": study.findings,
                "impression": study.impression,
                "tags": [tag for tag, flag in zip(TAGS, study.tags, strict=True) if flag == 1],
                "drafts": {name: drafts[i] for name, drafts in texts.items()},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
