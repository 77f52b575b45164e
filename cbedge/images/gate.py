"""The gate: refuse images that are not chest radiographs (out-of-distribution detection).

A language model writes "the lungs are clear" about a photograph of a cat. The gate compares the vision features of an
image with those of the training radiographs: its distance along their principal directions (Mahalanobis distance, Lee
et al. 2018) and outside them. It is fitted at export; its limit is chosen on validation studies.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cbedge.errors import BundleError, RadiographError

GATE, LATERAL_GATE = "gate.npy", "gate_lateral.npy"  # files of a bundle
MAX_CHROMA = 0.06
_HEAD_ROWS = 2


class NotAChestRadiograph(RadiographError):
    """The image does not look like the chest radiographs that the model was trained on."""


class Gate:
    """Detector of images that are not chest radiographs.

    Args:
        mean: mean of the pooled features of training radiographs, float32 [D].
        scale_and_limit: mean squared residual outside the principal directions, and the limit of the score: the first
            two values of a float32 [D].
        directions: principal directions divided by their standard deviations, float32 [K, D].
    """

    def __init__(self, mean: np.ndarray, scale_and_limit: np.ndarray, directions: np.ndarray):
        self.mean, self.directions = mean, directions
        self.outside, self.limit = float(scale_and_limit[0]), float(scale_and_limit[1])
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        self._units = directions / lengths

    @classmethod
    def load(cls, path: Path) -> Gate:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is not a gate.
        """
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            rows = np.empty(0)
        if rows.dtype != np.float32 or rows.ndim != 2 or len(rows) <= _HEAD_ROWS or not np.isfinite(rows).all():
            raise BundleError(f"{path.name} in {path.parent} is not a gate: install or export the bundle again")
        return cls(rows[0], rows[1], rows[_HEAD_ROWS:])

    def save(self, path: Path) -> None:
        """Write the gate as one float32 array: mean, scale and limit, directions."""
        scale_and_limit = np.zeros_like(self.mean)
        scale_and_limit[:2] = self.outside, self.limit
        with open(path, "wb") as file:
            np.save(
                file, np.vstack([self.mean, scale_and_limit, self.directions]).astype(np.float32), allow_pickle=False
            )

    def score(self, features: np.ndarray) -> float:
        """Distance of an image from the training radiographs, by its features [1, P, H]; about 1 for a similar one."""
        return self.unlikeness(pooled(features)[0])

    def unlikeness(self, row: np.ndarray) -> float:
        """:meth:`score` of pooled features, float32 [D]."""
        offset = row - self.mean
        along = self.directions @ offset
        rest = offset - self._units.T @ (self._units @ offset)
        return float(np.mean(along**2) + rest @ rest / self.outside) / 2

    def check(self, features: np.ndarray, chroma: float) -> None:
        """Raise an error if an image is not a chest radiograph.

        Args:
            features: vision features, float32 [1, P, H].
            chroma: colourfulness of the file, :attr:`cbedge.images.radiograph.Radiograph.chroma`.

        Raises:
            NotAChestRadiograph: the image is in colour, or does not resemble the training radiographs.
        """
        if chroma > MAX_CHROMA:
            raise NotAChestRadiograph(
                "the image is in colour, but radiographs are greyscale: check it, or accept any image "
                "(--accept-any-image, accept_any_image)"
            )
        score = self.score(features)
        if not score <= self.limit:
            raise NotAChestRadiograph(
                f"the image does not look like a chest radiograph (distance {score:.1f}, limit {self.limit:.1f}): "
                "check it, or accept any image (--accept-any-image, accept_any_image)"
            )


def pooled(features: np.ndarray) -> np.ndarray:
    """The vision encoder's features [N, P, H] → class token and mean of the patches, float32 [N, 2H]."""
    return np.concatenate([features[:, 0], features[:, 1:].mean(1)], axis=1).astype(np.float32)
