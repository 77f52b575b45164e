"""Classify from the image whether a radiograph is a lateral view, and whether it is mirrored.

Two linear classifiers on the vision encoder's features. Neither needs manual labels: mirrored images are made by
flipping, and data sets state which images are lateral views.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from cbedge.errors import BundleError

FILM_VIEW = "film_view.npy"  # file of a bundle
LATERAL, MIRRORED = 0, 1  # rows of the classifiers


class FilmView:
    """Classifier of lateral and mirrored radiographs.

    Args:
        weights: float32 [2, 3H], rows :data:`LATERAL` and :data:`MIRRORED`.
        bias: float32 [2].
        limits: float32 [2], decision thresholds of the logits.
    """

    def __init__(self, weights: np.ndarray, bias: np.ndarray, limits: np.ndarray):
        self.weights, self.bias, self.limits = weights, bias, limits

    @classmethod
    def load(cls, path: Path) -> FilmView:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is not such a classifier.
        """
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            rows = np.empty(0)
        if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) != 2 or not np.isfinite(rows).all():
            raise BundleError(
                f"{path.name} in {path.parent} is not a view classifier: install or export the bundle again"
            )
        return cls(rows[:, 2:], rows[:, 0], rows[:, 1])

    def save(self, path: Path) -> None:
        """Write one float32 array [2, 2 + 3H]: bias, limit, weights."""
        rows = np.concatenate([self.bias[:, None], self.limits[:, None], self.weights], axis=1)
        with open(path, "wb") as file:
            np.save(file, rows.astype(np.float32), allow_pickle=False)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Vision features of one image, float32 [1, P, H] → logits, float32 [2]."""
        return self.weights @ halves(features)[0] + self.bias

    def is_lateral(self, features: np.ndarray) -> bool:
        """Whether the image looks like a lateral view."""
        return bool(self.logits(features)[LATERAL] > self.limits[LATERAL])

    def is_mirrored(self, features: np.ndarray) -> bool:
        """Whether a frontal view looks mirrored."""
        return bool(self.logits(features)[MIRRORED] > self.limits[MIRRORED])


def halves(features: np.ndarray) -> np.ndarray:
    """Features [N, P, H], class token first → class token, mean of the left and mean of the right patches, float32
    [N, 3H]."""
    count, patches, width = features.shape
    side = math.isqrt(patches - 1)
    grid = features[:, 1 : 1 + side * side].reshape(count, side, side, width)
    middle = side // 2
    left, right = grid[:, :, :middle].mean((1, 2)), grid[:, :, side - middle :].mean((1, 2))
    return np.concatenate([features[:, 0], left, right], axis=1).astype(np.float32)
