"""The reading of a study's radiographs: image embeddings for the language model, and scores of findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cbedge.findings.image_findings import ImageFindings, scores_of


class QFormerOutput(NamedTuple):
    """The Q-Former's output for one radiograph.

    Attributes:
        embeds: image embeddings for the language model, float32 [1, Q, D].
        attention: attention of each finding's query to each patch (the first is the class token), float32 [T, P];
            one row for a model without finding scores.
        finding_logits: float32 [T]; ``None`` for a model without finding scores.
    """

    embeds: np.ndarray
    attention: np.ndarray
    finding_logits: np.ndarray | None


@dataclass(frozen=True)
class ImageReading:
    """The reading of one study, with one or two radiographs.

    Attributes:
        image_embeds: image embeddings, float32 [1, Q, D]; Q is twice the number of queries with a lateral view.
        findings: findings that are present, empty if none reaches its threshold; ``None`` for a model without
            finding scores.
        scores: score of every finding, 0 to 1.
        attention: attention to each patch of the frontal radiograph for these findings (for "abnormal" if there are
            none), float32 [P], class token first.
        has_lateral: whether a lateral radiograph was read.
    """

    image_embeds: np.ndarray
    findings: tuple[str, ...] | None
    scores: dict[str, float]
    attention: np.ndarray
    has_lateral: bool = False


def interpret(outputs: Sequence[QFormerOutput], findings: ImageFindings | None) -> ImageReading:
    """Combine the Q-Former's outputs for the radiographs of a study, and derive its findings from their scores."""
    embeds, attention, logits = outputs[0]
    for more, _, second in outputs[1:]:
        embeds = np.concatenate([embeds, more], axis=1)
        logits = findings.join(logits, second) if findings and logits is not None and second is not None else None
    has_lateral = len(outputs) > 1
    if findings is None or logits is None:
        return ImageReading(embeds, None, {}, attention.mean(0), has_lateral)
    scores = scores_of(logits)
    present = findings.read(scores)
    rows = [i for i, name in enumerate(findings.names) if name in present] or [0]
    named = dict(zip(findings.names, map(float, scores), strict=True))
    return ImageReading(embeds, present, named, attention[rows].mean(0), has_lateral)
