"""What the model reads in a study's radiographs: image embeddings for the language model, and scores of findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cbedge.findings.image_findings import ImageFindings, scores_of


class QFormerOutput(NamedTuple):
    """The Q-Former's answer for one radiograph.

    Attributes:
        embeds: image embeddings for the language model, float32 [1, Q, D].
        attention: how much each finding's query attended to each patch (the first is the class token), float32 [T, P];
            one row for a model without finding scores.
        finding_logits: float32 [T], or ``None`` for such a model.
    """

    embeds: np.ndarray
    attention: np.ndarray
    finding_logits: np.ndarray | None


@dataclass(frozen=True)
class ImageReading:
    """What the model reads in a study's radiograph, or in two.

    Attributes:
        image_embeds: for the language model, float32 [1, Q, D]; Q is twice the number of queries with a lateral one.
        findings: those that the prompt names, empty where none reaches its threshold; ``None`` for a model without
            finding scores.
        scores: of every finding that is looked for, 0 to 1.
        attention: how much each patch was attended to for these findings (for "abnormal" where there is none), float32
            [P], the class token first; of the frontal radiograph.
        has_lateral: a lateral radiograph was read as well.
    """

    image_embeds: np.ndarray
    findings: tuple[str, ...] | None
    scores: dict[str, float]
    attention: np.ndarray
    has_lateral: bool = False


def interpret(outputs: Sequence[QFormerOutput], findings: ImageFindings | None) -> ImageReading:
    """Join the Q-Former's answers for the radiographs of a study, and read its findings off their scores."""
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
