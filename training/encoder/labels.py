"""The findings that the vision encoder learns, and what each collection says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from training.datasets.iu_xray import study_tags
from training.findings import TAGS

ADDED = ("consolidation", "edema", "pleural thickening")
FINDINGS = (*TAGS, *(name for name in ADDED if name not in TAGS))
# Those that the external evaluation compares with CheXNet.
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

# IU X-RAY: a finding is present when a term starts with one of the first words; it is unknown when none does, but a
# term starts with one of the second words.
_IU_TERMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "consolidation": (
        ("consolidation", "airspace disease", "lung consolidation"),
        ("pneumonia", "infiltrate", "opacity"),
    ),
    "edema": (
        ("pulmonary edema", "edema", "interstitial pulmonary edema", "alveolar edema", "chronic edema"),
        ("pulmonary congestion", "congestion", "heart failure"),
    ),
    "pleural thickening": (("thickening/pleura", "pleural thickening"), ("thickening", "pleural diseases")),
}
# NIH ChestX-ray14: the labels that make a finding present. The labels know nothing of the other findings.
_NIH_LABELS: dict[str, tuple[str, ...]] = {
    "cardiomegaly": ("Cardiomegaly",),
    "effusion": ("Effusion",),
    "atelectasis": ("Atelectasis",),
    "opacity": ("Infiltration", "Consolidation", "Pneumonia", "Edema"),
    "nodule": ("Nodule", "Mass"),
    "hyperinflation": ("Emphysema",),
    "congestion": ("Edema",),
    "scar": ("Fibrosis", "Pleural_Thickening"),
    "hernia": ("Hernia",),
    "pneumothorax": ("Pneumothorax",),
    "consolidation": ("Consolidation",),
    "edema": ("Edema",),
    "pleural thickening": ("Pleural_Thickening",),
}


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
            present, unsure = _IU_TERMS[finding]
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
        elif finding in _NIH_LABELS:
            labels[column] = any(name in names for name in _NIH_LABELS[finding])
    return labels
