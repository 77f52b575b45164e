"""How unlike the radiographs of training a radiograph is: a measure that warns and never refuses.

The distance from the training radiographs along the principal directions of their vision features (Mahalanobis
distance, Lee et al. 2018) and outside them. Figures that were measured on radiographs like those of training need not
hold for others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cbedge.errors import BundleError
from cbedge.images.gate import pooled

FAMILIARITY = "familiarity.npy"  # file of a bundle
LIMIT = 1.0  # of a familiar radiograph
VIEWS = ("frontal", "lateral")
_HEAD_ROWS = 2


class Familiarity:
    """Distances from the training radiographs of each view.

    Args:
        values: float32 [1 or 2 views, 2 + K, 2H]. For each view: the mean of the pooled features; then the mean squared
            residual outside the principal directions, and median and 99th percentile of the distances of validation
            radiographs; then the principal directions, divided by their standard deviations.
    """

    def __init__(self, values: np.ndarray):
        self.values = values
        directions = values[:, _HEAD_ROWS:]
        self._units = directions / np.linalg.norm(directions, axis=2, keepdims=True)

    @classmethod
    def load(cls, path: Path) -> Familiarity:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file holds something else.
        """
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            values = np.empty(0)
        valid = values.dtype == np.float32 and values.ndim == 3 and 1 <= len(values) <= len(VIEWS)
        if not valid or values.shape[1] <= _HEAD_ROWS or values.shape[2] < 3 or not np.isfinite(values).all():
            raise BundleError(
                f"{path.name} in {path.parent} is not a measure of familiarity: install or export the bundle again"
            )
        return cls(values)

    def save(self, path: Path) -> None:
        """Write one float32 array."""
        with open(path, "wb") as file:
            np.save(file, self.values, allow_pickle=False)

    def unfamiliarity(self, features: np.ndarray, view: str) -> float:
        """How unlike the training radiographs an image is: 0 for the median of validation radiographs and closer, 1 for
        the distance that 1% of them exceed, without an upper bound.

        Args:
            features: vision features, float32 [1, P, H].
            view: a name in :data:`VIEWS`.
        """
        place = min(VIEWS.index(view), len(self.values) - 1)
        typical, far = self.values[place, 1, 1:3]
        distance = self.distances(pooled(features), place)[0]
        return max(0.0, float((distance - typical) / (far - typical)))

    def distances(self, rows: np.ndarray, place: int) -> np.ndarray:
        """Distances of pooled features, float32 [N, 2H], from the training radiographs of a view; about 1 for them."""
        mean, outside, directions = self.values[place, 0], self.values[place, 1, 0], self.values[place, _HEAD_ROWS:]
        offsets = rows - mean
        rest = offsets - (offsets @ self._units[place].T) @ self._units[place]
        return (((offsets @ directions.T) ** 2).mean(1) + (rest**2).sum(1) / outside) / 2
