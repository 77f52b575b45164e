"""AUC of each finding."""

from __future__ import annotations

from typing import Any

import numpy as np

from training.encoder.labels import COMPARED, FINDINGS

LEAST_POSITIVES = 5


def areas(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """AUC of each finding with at least five positives and five negatives.

    Args:
        logits: float [films, findings].
        labels: [films, findings], 1, 0 or -1 (unknown).

    Returns:
        ``auc`` (finding → AUC), ``positives`` (finding → count), ``films``, ``mean`` of all AUC, and ``compared``, the
        mean over those of :data:`~training.encoder.labels.COMPARED` that have an AUC.
    """
    from sklearn.metrics import roc_auc_score

    found, positives = {}, {}
    for column, finding in enumerate(FINDINGS):
        known = labels[:, column] >= 0
        truth = labels[known, column]
        if LEAST_POSITIVES <= truth.sum() <= len(truth) - LEAST_POSITIVES:
            found[finding] = round(float(roc_auc_score(truth, logits[known, column])), 4)
            positives[finding] = int(truth.sum())
    result: dict[str, Any] = {"films": len(labels), "auc": found, "positives": positives}
    if found:
        result["mean"] = float(np.mean(list(found.values())))
        result["compared"] = float(np.mean([found[name] for name in COMPARED if name in found] or [0.0]))
    return result
