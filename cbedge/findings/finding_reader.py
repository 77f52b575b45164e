"""Calibrated probabilities of findings: linear readers on image features and the Q-Former's scores.

The Q-Former's own scores rank images of the hospital that it was trained on; they are no probabilities, and it knows
only the findings of its training. The readers are logistic regressions, fitted and calibrated at export on films of
several hospitals (``python -m export.findings``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cbedge.errors import BundleError
from cbedge.findings.image_findings import ImageFindings

FINDINGS = "findings.npy"  # file of a bundle
FRONTAL, LATERAL, PAIRED_FRONTAL, PAIRED_LATERAL = range(4)  # rows of the readers


class FindingReader:
    """Linear readers for one radiograph and for a pair of views.

    Args:
        weights: float32 [4, T, 1 + 2H + Q], bias first. A frontal radiograph alone is read by row :data:`FRONTAL`, a
            lateral one alone by :data:`LATERAL`; of both views, :data:`PAIRED_FRONTAL` and :data:`PAIRED_LATERAL` give
            one summand each.
    """

    def __init__(self, weights: np.ndarray):
        self.weights = weights

    @classmethod
    def load(cls, path: Path, findings: ImageFindings) -> FindingReader:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            findings: the findings that it reads.

        Raises:
            BundleError: the file has no readers of these findings.
        """
        try:
            weights = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            weights = np.empty(0)
        shape = (4, len(findings.names))
        if weights.dtype != np.float32 or weights.ndim != 3 or weights.shape[:2] != shape:
            weights = np.empty(0)
        if not weights.size or not np.isfinite(weights).all():
            raise BundleError(
                f"{path.name} in {path.parent} does not read the model's {shape[1]} findings: install or export the "
                "bundle again"
            )
        return cls(weights)

    def save(self, path: Path) -> None:
        """Write the weights as one float32 array."""
        with open(path, "wb") as file:
            np.save(file, self.weights.astype(np.float32), allow_pickle=False)

    def logits(self, pooled: Sequence[np.ndarray], head_logits: Sequence[np.ndarray], view: str | None) -> np.ndarray:
        """Calibrated logits of a study, float64 [T].

        Args:
            pooled: class token and mean patch of each radiograph, float32 [1, 2H].
            head_logits: the Q-Former's finding logits for each, float32 [Q].
            view: view of the first radiograph; the second is a lateral one.
        """
        alone = LATERAL if view == "lateral" else FRONTAL
        rows = (alone,) if len(pooled) == 1 else (PAIRED_FRONTAL, PAIRED_LATERAL)
        total = np.zeros(self.weights.shape[1])
        for row, found, logits in zip(rows, pooled, head_logits, strict=True):
            total += self.weights[row] @ np.concatenate([[1.0], found[0], logits])
        return total
