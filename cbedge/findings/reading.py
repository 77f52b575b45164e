"""The reading of a study's radiographs: image embeddings for the language model, and scores of findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cbedge.findings.finding_reader import FindingReader
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
        findings: assessed findings that are present, empty if none reaches its threshold; ``None`` for a model without
            finding scores.
        scores: score of every finding, 0 to 1.
        attention: attention to each patch of the frontal radiograph for these findings (for "abnormal" if there are
            none), float32 [P], class token first.
        has_lateral: whether a lateral radiograph was read.
        calibrated: whether the scores are calibrated probabilities.
        unassessed: findings that the model does not assess reliably on these radiographs.
        unassessed_above: those of them that reach their thresholds.
        uncertain: assessed findings that the scores neither state nor rule out.
    """

    image_embeds: np.ndarray
    findings: tuple[str, ...] | None
    scores: dict[str, float]
    attention: np.ndarray
    has_lateral: bool = False
    calibrated: bool = False
    unassessed: tuple[str, ...] = ()
    unassessed_above: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()


def interpret(
    outputs: Sequence[QFormerOutput],
    findings: ImageFindings | None,
    pooled: Sequence[np.ndarray] = (),
    reader: FindingReader | None = None,
    view: str | None = None,
    familiar: bool = True,
) -> ImageReading:
    """Combine the Q-Former's outputs for the radiographs of a study, and derive its findings from their scores.

    Args:
        outputs: the Q-Former's output for each radiograph, the frontal one first.
        findings: the model's findings; ``None`` for a model without finding scores.
        pooled: class token and mean patch of each radiograph, float32 [1, 2H], for the reader.
        reader: the bundle's calibrated readers; without them, the scores are the Q-Former's.
        view: view of the first radiograph.
        familiar: whether the radiographs resemble those of training.
    """
    embeds = np.concatenate([output.embeds for output in outputs], axis=1)
    attention, has_lateral = outputs[0].attention, len(outputs) > 1
    logits = [output.finding_logits for output in outputs if output.finding_logits is not None]
    if findings is None or len(logits) < len(outputs):
        return ImageReading(embeds, None, {}, attention.mean(0), has_lateral)
    if reader is not None:
        scores = scores_of(reader.logits(pooled, logits, view))
    else:
        scores = scores_of(findings.join(*logits) if has_lateral else logits[0])
    unassessed = findings.unassessed(familiar)
    present = findings.read(scores, unassessed)
    rows = [i for i, name in enumerate(findings.names[: len(attention)]) if name in present] or [0]
    named = dict(zip(findings.names, map(float, scores), strict=True))
    return ImageReading(
        embeds,
        present,
        named,
        attention[rows].mean(0),
        has_lateral,
        reader is not None,
        unassessed,
        findings.above(scores, unassessed),
        findings.uncertain(scores, present, unassessed),
    )
