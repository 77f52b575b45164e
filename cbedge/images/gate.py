"""The gate: a classifier that tells upright chest radiographs from all other images, and their views.

A language model writes "the lungs are clear" about a photograph of a cat. The gate is a small network on the vision
encoder's features of an image. It is fitted at export (:mod:`export.gate`) on chest radiographs of several hospitals,
on the same ones mirrored, turned and cropped, and on other images. Whether a radiograph is like those of training is
another question: :mod:`cbedge.images.familiarity`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from cbedge.errors import BundleError, RadiographError

GATE = "gate.npy"  # file of a bundle
CLASSES = ("frontal", "mirrored", "lateral", "upside down", "on its side", "part", "other")
FRONTAL, MIRRORED, LATERAL = range(3)  # the classes of radiographs that can be read
READABLE = 3
MAX_CHROMA = 0.06
_REASONS = {
    "upside down": "the radiograph is upside down: rotate it by 180°",
    "on its side": "the radiograph lies on its side: rotate it by 90°",
    "part": "the image shows only a small part of a chest: give the whole radiograph",
    "other": "the image does not look like a chest radiograph: check it",
}
_IN_COLOUR = "the image is in colour, but radiographs are greyscale: check it"
_ANYWAY = ", or accept any image (--accept-any-image, accept_any_image)"
_FORMAT = 2  # the first value of the file
_HEAD = 5  # format, number of classes, two limits, number of sizes


class NotAChestRadiograph(RadiographError):
    """The image does not look like an upright chest radiograph."""


class Gate:
    """Classifier of images, by the vision encoder's features.

    Args:
        layers: weights float32 [inputs, outputs] and bias float32 [outputs] of each layer; the first one reads
            :func:`halves`, the last one gives the logits of :data:`CLASSES`. Between layers is a ReLU.
        limit: an image is accepted if the log odds of the readable classes reach it.
        mirrored_limit: a frontal radiograph counts as mirrored if the logit of "mirrored" exceeds that of "frontal" by
            more than this.
    """

    def __init__(self, layers: Sequence[tuple[np.ndarray, np.ndarray]], limit: float, mirrored_limit: float):
        self.layers, self.limit, self.mirrored_limit = tuple(layers), limit, mirrored_limit

    @classmethod
    def load(cls, path: Path) -> Gate:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is not a gate, or one of an older version.
        """
        where = f"{path.name} in {path.parent}"
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            values = np.empty(0)
        if values.dtype == np.float32 and values.ndim == 2:
            raise BundleError(
                f"{where} is of an older version of cbedge: export the bundle again, or renew it with "
                "python -m export.revise --gate"
            )
        gate = cls._parse(values)
        if gate is None:
            raise BundleError(f"{where} is not a gate: install or export the bundle again")
        return gate

    @classmethod
    def _parse(cls, values: np.ndarray) -> Gate | None:
        if values.dtype != np.float32 or values.ndim != 1 or len(values) <= _HEAD or not np.isfinite(values).all():
            return None
        version, classes, limit, mirrored_limit, count = values[:_HEAD]
        sizes = values[_HEAD:][: int(count)].astype(int).tolist()
        rest = values[_HEAD + len(sizes) :]
        shapes = [*pairwise(sizes)]
        expected = sum((inputs + 1) * outputs for inputs, outputs in shapes)
        if version != _FORMAT or classes != len(CLASSES) or min(sizes, default=0) < 1 or not shapes:
            return None
        if sizes[-1] != len(CLASSES) or len(rest) != expected:
            return None
        layers = []
        for inputs, outputs in shapes:
            weights, bias, rest = np.split(rest, (inputs * outputs, (inputs + 1) * outputs))
            layers.append((weights.reshape(inputs, outputs), bias))
        return cls(layers, float(limit), float(mirrored_limit))

    def save(self, path: Path) -> None:
        """Write one float32 array: format, number of classes, limits, number of layer sizes, layer sizes, and weights
        and bias of each layer."""
        sizes = [len(self.layers[0][0]), *(len(bias) for _, bias in self.layers)]
        head = [_FORMAT, len(CLASSES), self.limit, self.mirrored_limit, len(sizes), *sizes]
        parts = [np.array(head), *(part.reshape(-1) for layer in self.layers for part in layer)]
        with open(path, "wb") as file:
            np.save(file, np.concatenate(parts).astype(np.float32), allow_pickle=False)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Vision features of one image, float32 [1, P, H] → logits of :data:`CLASSES`, float32 [7]."""
        return self.logits_of(halves(features))[0]

    def logits_of(self, rows: np.ndarray) -> np.ndarray:
        """:func:`halves` of images, float32 [N, 3H] → logits, float32 [N, 7]."""
        for place, (weights, bias) in enumerate(self.layers):
            rows = (np.maximum(rows, 0) if place else rows) @ weights + bias
        return rows

    def is_lateral(self, logits: np.ndarray) -> bool:
        """Whether a readable image looks like a lateral view."""
        return bool(logits[LATERAL] > max(logits[FRONTAL], logits[MIRRORED]))

    def is_mirrored(self, logits: np.ndarray) -> bool:
        """Whether a frontal view looks mirrored."""
        return bool(logits[MIRRORED] - logits[FRONTAL] > self.mirrored_limit)

    def reason(self, logits: np.ndarray, chroma: float) -> str | None:
        """Why an image is not accepted, with a remedy; ``None`` for an upright chest radiograph.

        Args:
            logits: of the image.
            chroma: colourfulness of the file, :attr:`cbedge.images.radiograph.Radiograph.chroma`.
        """
        if chroma > MAX_CHROMA:
            return _IN_COLOUR
        if readable_odds(logits[None])[0] >= self.limit:
            return None
        return _REASONS[CLASSES[READABLE + int(np.argmax(logits[READABLE:]))]]

    def check(self, logits: np.ndarray, chroma: float) -> None:
        """Raise an error with :meth:`reason` if an image is not an upright chest radiograph.

        Raises:
            NotAChestRadiograph: the image is not accepted.
        """
        reason = self.reason(logits, chroma)
        if reason is not None:
            raise NotAChestRadiograph(reason + _ANYWAY)


def readable_odds(logits: np.ndarray) -> np.ndarray:
    """Logits [N, 7] → log odds of the readable classes, [N]."""
    parts = (logits[:, :READABLE], logits[:, READABLE:])
    readable, other = (np.logaddexp.reduce(part.astype(np.float64), axis=1) for part in parts)
    return readable - other


def pooled(features: np.ndarray) -> np.ndarray:
    """The vision encoder's features [N, P, H] → class token and mean of the patches, float32 [N, 2H]."""
    return np.concatenate([features[:, 0], features[:, 1:].mean(1)], axis=1).astype(np.float32)


def halves(features: np.ndarray) -> np.ndarray:
    """Features [N, P, H], class token first → class token, mean of the left and mean of the right patches, float32
    [N, 3H]."""
    count, patches, width = features.shape
    side = math.isqrt(patches - 1)
    grid = features[:, 1 : 1 + side * side].reshape(count, side, side, width)
    middle = side // 2
    left, right = grid[:, :, :middle].mean((1, 2)), grid[:, :, side - middle :].mean((1, 2))
    return np.concatenate([features[:, 0], left, right], axis=1).astype(np.float32)
