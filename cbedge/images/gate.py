"""Refuse what is no chest radiograph before a report is drafted of it.

A language model writes "the lungs are clear" of a photograph of a cat. The gate compares the vision encoder's features
of an image with those of the radiographs that the model was trained on: how far along their main directions
(Mahalanobis distance, Lee et al. 2018) and how far outside them. It is fitted at export, its limit chosen on validation
studies.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cbedge.errors import BundleError, RadiographError

GATE, LATERAL_GATE = "gate.npy", "gate_lateral.npy"  # files of a bundle
MAX_CHROMA = 0.06
_HEAD_ROWS = 2


class NotAChestRadiograph(RadiographError):
    """The image looks unlike the chest radiographs that the model knows."""


class Gate:
    """Tells chest radiographs from other images.

    Args:
        mean: of the pooled features of known radiographs, float32 [D].
        spread: mean squared length outside the main directions, and the limit of the score: float32 [D], the first two
            used.
        directions: main directions over the square root of their variances, float32 [K, D].
    """

    def __init__(self, mean: np.ndarray, spread: np.ndarray, directions: np.ndarray):
        self.mean, self.directions = mean, directions
        self.outside, self.limit = float(spread[0]), float(spread[1])
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        self._units = directions / lengths

    @classmethod
    def load(cls, path: Path) -> Gate:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is no gate.
        """
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            rows = np.empty(0)
        if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) <= _HEAD_ROWS or not np.isfinite(rows).all():
            raise BundleError(f"{path.name} in {path.parent} is no gate: install or export the bundle again")
        return cls(rows[0], rows[1], rows[_HEAD_ROWS:])

    def save(self, path: Path) -> None:
        """Write the gate as one float32 array: mean, spread, directions."""
        spread = np.zeros_like(self.mean)
        spread[:2] = self.outside, self.limit
        with open(path, "wb") as file:
            np.save(file, np.vstack([self.mean, spread, self.directions]).astype(np.float32), allow_pickle=False)

    def score(self, features: np.ndarray) -> float:
        """How unlike known radiographs an image is, by the encoder's features [1, P, H]; about 1 for one like them."""
        return self.unlikeness(pooled(features)[0])

    def unlikeness(self, row: np.ndarray) -> float:
        """The score of pooled features, float32 [D]."""
        offset = row - self.mean
        along = self.directions @ offset
        rest = offset - self._units.T @ (self._units @ offset)
        return float(np.mean(along**2) + rest @ rest / self.outside) / 2

    def check(self, features: np.ndarray, chroma: float) -> None:
        """Let a chest radiograph pass.

        Args:
            features: of the vision encoder, [1, P, H].
            chroma: how colourful the file is: :attr:`cbedge.images.radiograph.Radiograph.chroma`.

        Raises:
            NotAChestRadiograph: the image is in colour, or unlike known radiographs.
        """
        if chroma > MAX_CHROMA:
            raise NotAChestRadiograph("the image is in colour, a radiograph is grey: give one, or --accept-any-image")
        score = self.score(features)
        if not score <= self.limit:
            raise NotAChestRadiograph(
                f"the image does not look like a chest radiograph (unlikeness {score:.1f}, limit {self.limit:.1f}): "
                "check it, or give --accept-any-image to draft all the same"
            )


def pooled(features: np.ndarray) -> np.ndarray:
    """The vision encoder's features [N, P, H] → class token and mean of the patches, float32 [N, 2H]."""
    return np.concatenate([features[:, 0], features[:, 1:].mean(1)], axis=1).astype(np.float32)
