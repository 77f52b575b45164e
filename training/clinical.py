"""Clinical efficacy of drafts: precision, recall and F1 of the findings that they name, with intervals.

:mod:`training.findings` labels drafts and references. The usual labeler is CheXbert (Smit et al., EMNLP 2020), but its
weights are not on PyPI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.datasets.studies import Study
from training.findings import LABELS, chexpert_labels, positive_findings, read_tags
from training.ontology import TAGS


@dataclass(frozen=True)
class Labels:
    """The labels of a list of reports.

    Attributes:
        matrix: bool [reports, 14], the columns as :data:`training.findings.LABELS`.
        abnormal: whether any finding is named, including those outside the 14, bool [reports].
    """

    matrix: np.ndarray
    abnormal: np.ndarray

    def take(self, rows: np.ndarray) -> Labels:
        """The labels of some reports."""
        return Labels(self.matrix[rows], self.abnormal[rows])


def label_reports(reports: Sequence[str]) -> Labels:
    """The labels of reports (findings, or findings with impression)."""
    found = positive_findings(reports)
    matrix = np.array([[label in chexpert_labels(f) for label in LABELS] for f in found], bool).reshape(-1, len(LABELS))
    return Labels(matrix, np.array([bool(f) for f in found], bool))


def label_known(studies: Sequence[Study], drafts: Sequence[str]) -> tuple[Labels, Labels, np.ndarray]:
    """For studies with index terms: labels of drafts, labels of references, and whether they are abnormal."""
    known = [i for i, s in enumerate(studies) if s.tags[0] >= 0]
    abnormal = np.array([studies[i].abnormal for i in known], bool)
    references = label_reports([studies[i].findings for i in known])
    return label_reports([drafts[i] for i in known]), references, abnormal


def clinical_scores(drafts: Labels, references: Labels, truly_abnormal: np.ndarray | None = None) -> dict[str, float]:
    """Micro and macro precision, recall and F1 over the 14 labels and over the 13 findings, and abnormality.

    Args:
        drafts, references: labels of the same studies.
        truly_abnormal: bool [studies], by index terms; default is by the references.

    Returns:
        ``micro_*`` and ``macro_*`` over the 14 labels, including ``No Finding``; ``finding_*`` (micro) and
        ``finding_macro_f1`` over the 13 findings; ``balanced_accuracy``, ``accuracy``, ``sensitivity`` and
        ``specificity`` of abnormal studies. Macro means are over the labels that occur in the references.
    """
    scores = {f"micro_{k}": v for k, v in _micro(drafts.matrix, references.matrix).items()}
    scores |= {f"macro_{k}": v for k, v in _macro(drafts.matrix, references.matrix).items()}
    scores |= {f"finding_{k}": v for k, v in _micro(drafts.matrix[:, 1:], references.matrix[:, 1:]).items()}
    scores["finding_macro_f1"] = _macro(drafts.matrix[:, 1:], references.matrix[:, 1:])["f1"]
    truth = references.abnormal if truly_abnormal is None else truly_abnormal
    sensitivity, specificity = _mean(drafts.abnormal[truth]), 1 - _mean(drafts.abnormal[~truth])
    return scores | {
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "accuracy": float((drafts.abnormal == truth).mean()),
        "sensitivity": sensitivity,
        "specificity": specificity,
    }


def finding_f1(drafts: Labels, references: Labels) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of positives of each of the 14 labels."""
    rows = {}
    for i, label in enumerate(LABELS):
        column = slice(i, i + 1)
        rows[label] = _micro(drafts.matrix[:, column], references.matrix[:, column])
        rows[label]["positives"] = int(references.matrix[:, i].sum())
    return rows


def validate(studies: Sequence[Study], reports: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compare the findings that are found in reports with the index terms of the same studies.

    Args:
        studies: studies; those without index terms are skipped.
        reports: their reports, findings with impression.

    Returns:
        tag → precision, recall, F1, positives; and ``micro`` and ``macro`` over all tags except ``abnormal``.
    """
    known = [i for i, s in enumerate(studies) if s.tags[0] >= 0]
    truth = np.array([studies[i].tags for i in known]) == 1
    read = read_tags([reports[i] for i in known])
    rows: dict[str, dict[str, float]] = {}
    for i, tag in enumerate(TAGS):
        rows[tag] = _micro(read[:, i : i + 1], truth[:, i : i + 1]) | {"positives": int(truth[:, i].sum())}
    rows["micro"] = _micro(read[:, 1:], truth[:, 1:]) | {"positives": int(truth[:, 1:].sum())}
    rows["macro"] = _macro(read[:, 1:], truth[:, 1:])
    return rows


def paired_difference(
    first: Callable[[np.ndarray], float],
    second: Callable[[np.ndarray], float],
    count: int,
    resamples: int = 1000,
) -> dict[str, float]:
    """The difference of two models on the same studies, its 95% interval, and the two-sided bootstrap p-value.

    Args:
        first, second: the score of each model for some studies, int [studies] with repeats.
        count: number of studies.
    """
    rng = np.random.default_rng(0)
    rows = [rng.integers(count, size=count) for _ in range(resamples)]
    differences = np.array([first(r) - second(r) for r in rows])
    low, high = np.percentile(differences, (2.5, 97.5))
    whole = np.arange(count)
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    return {
        "difference": first(whole) - second(whole),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * max(tail, 1 / resamples))),
    }


def with_intervals(
    drafts: Labels, references: Labels, truly_abnormal: np.ndarray, resamples: int = 1000
) -> dict[str, Any]:
    """Every score of :func:`clinical_scores` as ``[value, low, high]``."""
    whole = clinical_scores(drafts, references, truly_abnormal)
    rng = np.random.default_rng(0)
    count = len(truly_abnormal)
    samples = []
    for _ in range(resamples):
        rows = rng.integers(count, size=count)
        samples.append(list(clinical_scores(drafts.take(rows), references.take(rows), truly_abnormal[rows]).values()))
    lows, highs = np.percentile(np.array(samples), (2.5, 97.5), axis=0)
    return {name: [value, float(a), float(b)] for (name, value), a, b in zip(whole.items(), lows, highs, strict=True)}


def _micro(drafts: np.ndarray, references: np.ndarray) -> dict[str, float]:
    hits = float((drafts & references).sum())
    return _prf(hits, float(drafts.sum()), float(references.sum()))


def _macro(drafts: np.ndarray, references: np.ndarray) -> dict[str, float]:
    rows = [_micro(drafts[:, [i]], references[:, [i]]) for i in range(drafts.shape[1]) if references[:, i].any()]
    return {k: float(np.mean([row[k] for row in rows])) if rows else 0.0 for k in ("precision", "recall", "f1")}


def _prf(hits: float, named: float, true: float) -> dict[str, float]:
    precision, recall = hits / named if named else 0.0, hits / true if true else 0.0
    return {"precision": precision, "recall": recall, "f1": 2 * hits / (named + true) if named + true else 0.0}


def _mean(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0
