"""Compare two models on the same studies, with intervals and p-values."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cbedge.prompt import split_sections
from training.clinical import Labels, clinical_scores, label_reports, paired_difference
from training.datasets.iu_xray import clean_reference
from training.records import drafts_of, origin, read_drafts, table
from training.scoring import PROTOCOL, score

CLINICAL = {"finding_f1": "F1 of 13 findings, micro", "balanced_accuracy": "abnormal or normal, balanced accuracy"}


def compare_drafts(first: Path, second: Path, rows: tuple[str | None, str | None] = (None, None)) -> dict[str, Any]:
    """Compare two rows of drafts, of one file or of two, on the studies that both have.

    Args:
        first, second: JSON Lines files of ``evaluate --drafts``.
        rows: name of the row in each file; ``None`` for the first.

    Returns:
        A JSON-ready record: for each measure both values, the difference (first minus second), its 95% bootstrap
        interval over studies, and the two-sided p-value.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not a drafts file or lacks the row, or they have no study in common.
    """
    sides = [_read(path, row) for path, row in zip((first, second), rows, strict=True)]
    shared = [study for study in sides[0][1] if study in sides[1][1]]
    if not shared:
        raise ValueError(f"{first} and {second} have no study in common")
    references = [sides[0][1][study][0] for study in shared]
    texts = [[found[study][1] for study in shared] for _, found in sides]
    measures = _ngram_differences(texts, references) | _clinical_differences(texts, references)
    names = {"first": sides[0][0], "second": sides[1][0]}
    return names | {"studies": len(shared), "measures": measures, "protocol": PROTOCOL}


def to_markdown(record: dict[str, Any]) -> str:
    """The comparison as a table."""
    first, second = record["first"], record["second"]
    lines = [
        f"# {first} against {second}",
        "",
        f"{origin(record)}. {record['studies']} studies. {record['protocol']}.",
        "",
    ]
    rows = []
    for name, m in record["measures"].items():
        span = f"{m['difference']:+.3f} ({m['low']:+.3f} to {m['high']:+.3f})"
        rows.append((name, f"{m['first']:.3f}", f"{m['second']:.3f}", span, f"{m['p']:.3f}"))
    lines += table(("", first, second, "difference (95% interval)", "p"), rows)
    return "\n".join(lines) + "\n"


def _read(path: Path, row: str | None) -> tuple[str, dict[str, tuple[str, str]]]:
    """The row's name, and study → findings of reference and draft."""
    rows = read_drafts(path)
    name, drafts = drafts_of(path, rows, row)
    pairs = [(r["findings"], split_sections(draft)[0]) for r, draft in zip(rows, drafts, strict=True)]
    return name, dict(zip([r["study_id"] for r in rows], pairs, strict=True))


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
