"""Two models on the same studies: how far apart, and whether the difference could be chance."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cbedge.prompt import split_sections
from training.clinical import Labels, clinical_scores, label_reports, paired_difference
from training.datasets.iu_xray import clean_reference
from training.scoring import PROTOCOL, score

CLINICAL = {"finding_f1": "F1 of 13 findings, micro", "balanced_accuracy": "abnormal or normal, balanced accuracy"}


def compare_drafts(first: Path, second: Path, rows: tuple[str | None, str | None] = (None, None)) -> dict[str, Any]:
    """Compare two rows of drafts, of one file or of two, on the studies that both have.

    Args:
        first, second: JSON lines that ``evaluate --drafts`` wrote.
        rows: whose drafts in each; ``None`` is the file's first.

    Returns:
        A JSON-ready record: for each measure both values, the difference (first less second), its 95% interval by
        bootstrap over studies, and the two-sided p-value.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is no drafts file, lacks the row, or the two share no study.
    """
    drafts = [_read(path, row) for path, row in zip((first, second), rows, strict=True)]
    names = [name for name, _ in drafts]
    shared = [study for study in drafts[0][1] if study in drafts[1][1]]
    if not shared:
        raise ValueError(f"{first} and {second} have no study in common")
    given = [[found[study] for study in shared] for _, found in drafts]
    references = [reference for reference, _ in given[0]]
    texts = [[text for _, text in side] for side in given]
    measures = _ngram_differences(texts, references) | _clinical_differences(texts, references)
    return {"first": names[0], "second": names[1], "studies": len(shared), "measures": measures, "protocol": PROTOCOL}


def to_markdown(record: dict[str, Any]) -> str:
    """The comparison as a table."""
    first, second = record["first"], record["second"]
    lines = [
        f"# {first} against {second}",
        "",
        f"{record['studies']} studies. {record['protocol']}. Command: `{record.get('command', 'unknown')}`",
        "",
        f"| | {first} | {second} | difference (95% interval) | p |",
        "| --- |" + " --- |" * 4,
    ]
    for name, m in record["measures"].items():
        span = f"{m['difference']:+.3f} ({m['low']:+.3f} to {m['high']:+.3f})"
        lines.append(f"| {name} | {m['first']:.3f} | {m['second']:.3f} | {span} | {m['p']:.3f} |")
    return "\n".join(lines) + "\n"


def _read(path: Path, row: str | None) -> tuple[str, dict[str, tuple[str, str]]]:
    """The row's name, and study → (findings of the reference, findings of the draft)."""
    found = {}
    name = row
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            given = json.loads(line)
            name = name or next(iter(given["drafts"]))
            if name not in given["drafts"]:
                raise ValueError(f"{path} has no drafts of {name!r}; it has: {', '.join(given['drafts'])}")
            found[given["study_id"]] = given["findings"], split_sections(given["drafts"][name])[0]
        except (KeyError, TypeError, StopIteration, json.JSONDecodeError) as error:
            raise ValueError(f"{path}, line {number}, is not what evaluate --drafts wrote ({error})") from None
    if not found:
        raise ValueError(f"{path} holds no drafts")
    return name or "", found


def _ngram_differences(texts: list[list[str]], references: list[str]) -> dict[str, dict[str, float]]:
    wanted = [clean_reference(r) for r in references]
    sides = [score([clean_reference(t) for t in side], wanted) for side in texts]
    found = {}
    for metric in sides[0].studies:
        a, b = (side.studies[metric] for side in sides)
        difference = paired_difference(partial(_mean, a), partial(_mean, b), len(a))
        found[metric] = {"first": float(a.mean()), "second": float(b.mean()), **difference}
    return found


def _clinical_differences(texts: list[list[str]], references: list[str]) -> dict[str, dict[str, float]]:
    truth = label_reports(references)
    sides = [label_reports(side) for side in texts]
    count = len(references)
    found = {}
    for name, title in CLINICAL.items():
        first, second = (partial(_clinical, name, side, truth) for side in sides)
        values = {"first": first(np.arange(count)), "second": second(np.arange(count))}
        found[title] = values | paired_difference(first, second, count)
    return found


def _clinical(name: str, drafts: Labels, references: Labels, rows: np.ndarray) -> float:
    return clinical_scores(drafts.take(rows), references.take(rows))[name]


def _mean(values: np.ndarray, rows: np.ndarray) -> float:
    return float(values[rows].mean())
