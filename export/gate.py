"""Fit the gate that refuses other images than chest radiographs (:mod:`cbedge.images.gate`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cbedge.backends import Backend
from cbedge.images.gate import Gate, pooled
from cbedge.images.preprocess import Preprocessing, preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from training.datasets.iu_xray import read_studies

MAX_TRAIN, MAX_VAL = 600, 300
DIRECTIONS = 48
FALSE_ALARMS = 0.005  # of validation radiographs
_MARGIN = 1.1


def fit_gate(backend: Backend, settings: Preprocessing, data: Path, lateral: bool = False) -> Gate | None:
    """The gate for the features of a variant; ``None`` if there are too few radiographs.

    Args:
        backend: its vision encoder computes the features.
        data: IU X-RAY folder; train radiographs give the distribution, validation ones the limit.
        lateral: fit it on lateral radiographs instead of frontal ones.
    """
    rows = {}
    for split, most in (("train", MAX_TRAIN), ("val", MAX_VAL)):
        images = [s.lateral if lateral else s.image for s in read_studies(data, (split,))]
        rows[split] = _features(backend, settings, [image for image in images if image is not None][:most])
    if len(rows["train"]) < 4 * DIRECTIONS or not len(rows["val"]):
        return None
    gate = _distribution(rows["train"])
    scores = [gate.unlikeness(row) for row in rows["val"]]
    gate.limit = float(np.quantile(scores, 1 - FALSE_ALARMS)) * _MARGIN
    return gate


def _features(backend: Backend, settings: Preprocessing, images: list[Path]) -> np.ndarray:
    """Pooled features, float32 [images, 2H]."""
    pixels = (preprocess_radiograph(load_radiograph(image), settings) for image in images)
    found = [pooled(backend.encode_image(values)) for values in pixels]
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def _distribution(rows: np.ndarray) -> Gate:
    mean = rows.mean(0)
    _, singular, directions = np.linalg.svd(rows - mean, full_matrices=False)
    variances = singular**2 / (len(rows) - 1)
    residual = np.zeros_like(mean)
    residual[0] = variances[DIRECTIONS:].sum()  # mean squared length outside the directions
    return Gate(mean, residual, directions[:DIRECTIONS] / np.sqrt(variances[:DIRECTIONS, None]))
