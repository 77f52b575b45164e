"""The findings that the vision encoder learns, and their labels in each collection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from training.datasets.iu_xray import study_tags
from training.ontology import ONTOLOGY, TAGS

FINDINGS = tuple(ONTOLOGY)
# The external evaluation compares these with CheXNet.
COMPARED = (
    "abnormal",
    "cardiomegaly",
    "effusion",
    "atelectasis",
    "opacity",
    "hyperinflation",
    "congestion",
    "scar",
)
UNKNOWN = -1


def iu_labels(terms: Iterable[str]) -> np.ndarray:
    """Labels of a study from its MeSH terms and problems: int8 [findings], 1, 0 or -1 (unknown).

    Args:
        terms: ``problems``, ``mesh_major`` and ``mesh_automatic`` together.
    """
    names = [term.lower() for term in terms]
    tags = dict(zip(TAGS, study_tags(names), strict=True))
    known = tags["abnormal"] != UNKNOWN
    labels = np.full(len(FINDINGS), UNKNOWN, np.int8)
    for column, finding in enumerate(FINDINGS):
        if finding in tags:
            labels[column] = tags[finding]
        elif known:
            present, unsure = ONTOLOGY[finding].iu_xray, ONTOLOGY[finding].iu_xray_unsure
            if any(name.startswith(present) for name in names):
                labels[column] = 1
            elif not any(name.startswith(unsure) for name in names):
                labels[column] = 0
    return labels


def nih_labels(names: Sequence[str]) -> np.ndarray:
    """Labels of a film from its ChestX-ray14 labels (none: "No Finding"): int8 [findings], 1, 0 or -1 (unknown)."""
    labels = np.full(len(FINDINGS), UNKNOWN, np.int8)
    for column, finding in enumerate(FINDINGS):
        if finding == "abnormal":
            labels[column] = bool(names)
        elif ONTOLOGY[finding].nih:  # the labels do not cover the others
            labels[column] = any(name in names for name in ONTOLOGY[finding].nih)
    return labels
