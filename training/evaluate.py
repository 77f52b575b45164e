"""Score a model on IU X-RAY's test split (R2Gen's), with the controls that say what the scores mean."""

import json
import platform
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from cbedge.prompt import split_sections
from training.clinical import finding_f1, label_known, validate, with_intervals
from training.controls import best_constant, blank, consensus, neighbours, own, swapped, withheld
from training.datasets.iu_xray import clean_reference, read_studies
from training.datasets.studies import Study
from training.drafting import Drafter, Encoder, Request
from training.labelers import Chexbert, outside_scores
from training.ontology import TAGS
from training.probes import KINDS, probe, represent
from training.scoring import METRICS, PROTOCOL, score

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
    console: Console | None = None,
    chexbert: Chexbert | None = None,
    radgraph: Path | None = None,
) -> dict[str, Any]:
    """Draft, score, and compare with controls.

    Args:
        data: IU X-RAY's folder.
        drafters: each gets a row; the first also gets the swapped-image, blank-image and withheld-indication controls.
            None at all leaves the image-blind model's row.
        encoder: a run or a bundle, for the retrieval controls and the linear probe; ``None`` leaves those out.
        split: ``test`` or ``val``.
        image_blind: a model that was trained without images, for its row.
        limit: only the first so many studies (for a trial; the result says so).
        seed: of the swap and of the constant's candidates.
        drafts_file: JSON lines of every draft beside its reference (data that must stay out of the repository).
        console: where progress is shown.
        chexbert, radgraph: labelers whose weights the user has, see :mod:`training.labelers`.

    Returns:
        A JSON-ready record: ``scores``, ``looks`` (empty without drafters), ``clinical``, ``outside``, ``probe``,
        ``protocol`` and provenance.
    """
    console = console or Console(stderr=True)
    studies = [s for s in read_studies(data, (split,)) if s.findings][:limit]
    train = [s for s in read_studies(data, ("train",)) if s.findings]
    references = [clean_reference(s.findings) for s in studies]
    train_reports = [clean_reference(s.findings) for s in train]
    texts: dict[str, list[str]] = {}
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for drafter in drafters:
            texts[drafter.name] = _draft(drafter, own(studies), drafter.name, progress)
        if image_blind is not None:
            texts[image_blind.name] = _draft(image_blind, own(studies), image_blind.name, progress)
        for main in drafters[:1]:
            texts["images swapped"] = _draft(main, swapped(studies, seed), f"{main.name}, images swapped", progress)
            texts["blank image"] = _draft(main, blank(studies), f"{main.name}, blank image", progress)
            bare = withheld(studies)
            texts["indication withheld"] = _draft(main, bare, f"{main.name}, indication withheld", progress)
            if (templates := main.templates(own(studies))) is not None:
                free = main.freely()
                texts["without template"] = _draft(free, own(studies), f"{main.name}, without template", progress)
                texts["template alone"] = templates
        if drafts_file:
            _write_drafts(drafts_file, studies, texts)
        drafted = {row: [split_sections(t)[0] for t in drafts] for row, drafts in texts.items()}
        findings = {row: [clean_reference(split_sections(t)[0]) for t in drafts] for row, drafts in texts.items()}
        probed: dict[str, Any] = {}
        constant = best_constant(train_reports, seed)
        findings["constant"] = [constant] * len(studies)
        if encoder is not None:
            near, probed = _look(encoder, train, studies, data, progress)
            findings["nearest image"] = [train_reports[row[0]] for row in near]
            findings["consensus of 25"] = [consensus([train_reports[i] for i in row]) for row in near]
    scores = {row: score(drafts, references) for row, drafts in findings.items()}
    clinical = _clinical(studies, findings | drafted)
    looks = {}
    for main in drafters[:1]:
        pair = (main.name, "images swapped")
        looks = {
            "cider_lost_on_swap": _lost(*(scores[row].corpus["CIDEr"] for row in pair)),
            "finding_f1_lost_on_swap": _lost(*(clinical["scores"][row]["finding_f1"][0] for row in pair)),
        }
    return {
        "split": split,
        "studies": len(studies),
        "limited": limit is not None,
        "protocol": PROTOCOL,
        "seed": seed,
        "scores": {row: s.corpus for row, s in scores.items()},
        "intervals": {row: s.intervals() for row, s in scores.items()},
        "looks": looks,
        "clinical": clinical,
        "outside": outside_scores(findings | drafted, [s.findings for s in studies], chexbert, radgraph),
        "probe": probed,
        "date": date.today().isoformat(),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {p: version(p) for p in ("torch", "transformers", "onnxruntime", "pycocoevalcap")},
    }


def write_record(record: dict[str, Any], markdown: str, stem: Path) -> None:
    """Write a record and its tables as ``<stem>.json`` and ``<stem>.md``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown, encoding="utf-8")


def to_markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    limited = " (limited: a trial, not the whole split)" if record["limited"] else ""
    lines = [
        f"# IU X-RAY, {record['split']} split: {record['studies']} studies{limited}",
        "",
        f"{record['date']}. {record['protocol']}. Command: `{record.get('command', 'unknown')}`",
        "",
        "| | " + " | ".join(METRICS) + " |",
        "| --- |" + " --- |" * len(METRICS),
        *[
            f"| {row} | " + " | ".join(_with_interval(s[m], record["intervals"][row].get(m)) for m in METRICS) + " |"
            for row, s in record["scores"].items()
        ],
        "",
        *_looks(record["looks"]),
        "## Findings that drafts name",
        "",
        "Labels of drafts and references by `training/findings.py`; abnormal or normal by curated tags (abnormal: "
        f"{record['clinical']['abnormal_studies']} of {record['clinical']['studies']}). 95% bootstrap intervals.",
        "",
        "| | " + " | ".join(CLINICAL.values()) + " |",
        "| --- |" + " --- |" * len(CLINICAL),
    ]
    for row, scores in record["clinical"]["scores"].items():
        lines.append(f"| {row} | " + " | ".join(_interval(scores[name]) for name in CLINICAL) + " |")
    main = next(iter(record["clinical"]["by_finding"]))
    reader = record["clinical"]["reader"]
    lines += [
        "",
        f"By finding, {main}:",
        "",
        "| | precision | recall | F1 | positives |",
        "| --- |" + " --- |" * 4,
        *[
            f"| {label} | {s['precision']:.2f} | {s['recall']:.2f} | {s['f1']:.2f} | {s['positives']} |"
            for label, s in record["clinical"]["by_finding"][main].items()
        ],
        "",
        f"The reader of findings, on these studies' own reports against curated tags: abnormal precision "
        f"{reader['abnormal']['precision']:.2f}, recall {reader['abnormal']['recall']:.2f}; over {len(TAGS) - 1} tags "
        f"micro precision {reader['micro']['precision']:.2f}, recall {reader['micro']['recall']:.2f}. The references' "
        "findings sections alone name an abnormality in "
        f"{record['clinical']['reference']['sensitivity']:.1%} of abnormal studies and in "
        f"{1 - record['clinical']['reference']['specificity']:.1%} of normal ones.",
    ]
    if record["outside"]:
        names = list(next(iter(record["outside"].values())))
        lines += [
            "",
            "## By the field's labelers",
            "",
            "| | " + " | ".join(names) + " |",
            "| --- |" + " --- |" * len(names),
        ]
        for row, values in record["outside"].items():
            lines.append(f"| {row} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |")
    if record["probe"]:
        lines += [
            "",
            "## Linear probes of the image side, AUC",
            "",
            "| | " + " | ".join(KINDS.values()) + " | positives |",
            "| --- |" + " --- |" * (len(KINDS) + 1),
        ]
        for tag, values in record["probe"].items():
            areas = " | ".join(f"{values[kind]:.3f}" for kind in KINDS)
            lines.append(f"| {tag} | {areas} | {values['positives']} |")
    return "\n".join(lines) + "\n"


def _looks(looks: dict[str, float]) -> list[str]:
    if not looks:
        return []
    cider, f1 = looks["cider_lost_on_swap"], looks["finding_f1_lost_on_swap"]
    return [f"Lost when images are swapped: {cider:.1%} of CIDEr, {f1:.1%} of the micro-F1 of findings.", ""]


def _interval(values: list[float]) -> str:
    return _with_interval(values[0], values[1:])


def _with_interval(value: float, ends: list[float] | None) -> str:
    return f"{value:.3f}" + (f" ({ends[0]:.3f}–{ends[1]:.3f})" if ends else "")


def _lost(whole: float, left: float) -> float:
    return (whole - left) / whole if whole else 0.0


def _draft(drafter: Drafter, requests: list[Request], title: str, progress: Progress) -> list[str]:
    task = progress.add_task(title, total=len(requests))
    return drafter.draft(requests, lambda count: progress.advance(task, count))


def _look(
    encoder: Encoder, train: list[Study], studies: list[Study], data: Path, progress: Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Nearest train images of every study, and the linear probes."""
    groups = {"train": train, "val": [s for s in read_studies(data, ("val",)) if s.findings], "studied": studies}
    seen = {}
    for name, group in groups.items():
        task = progress.add_task(f"encoding {name} images", total=len(group))
        seen[name] = represent(encoder, group, partial(progress.advance, task))
    return neighbours(seen["studied"]["vision"], seen["train"]["vision"]), probe(seen, groups)


def _clinical(studies: list[Study], findings: dict[str, list[str]]) -> dict[str, Any]:
    """Findings that drafts name against those that references name, and abnormality against curated tags."""
    references, _, abnormal = label_known(studies, [s.findings for s in studies])
    labels = {row: label_known(studies, drafts)[0] for row, drafts in findings.items()}
    return {
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


def _write_drafts(path: Path, studies: list[Study], texts: dict[str, list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for i, study in enumerate(studies):
            row = {
                "study_id": study.study_id,
                "indication": study.context.indication,
                "findings": study.findings,
                "impression": study.impression,
                "tags": [tag for tag, flag in zip(TAGS, study.tags, strict=True) if flag == 1],
                "drafts": {name: drafts[i] for name, drafts in texts.items()},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
