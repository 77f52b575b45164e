"""What the Q-Former sees in the radiograph, told to the language model as words in the prompt.

ClinicalBLIP (Ji et al. 2024) puts prior knowledge into the prompt. Here the model's own image findings join it: a
linear head on the Q-Former's output scores findings, and those above their thresholds are named in the prompt. So what
the language model writes of the image can be traced to a score.

A small language model passes over much of what it is told, and falls back on the usual normal report. So the draft can
be opened with a sentence for each finding that is told, and the language model goes on from there (a prefix constraint,
the simplest of the lexical constraints of Hokamp and Liu, ACL 2017). What goes on after it and contradicts it is left
out (:mod:`cbedge.drafting.sentence_filter`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OTHER = "other abnormality"
CONTRARY = (("hyperinflation", "low volume"),)  # of bundles that name no such pairs


@dataclass(frozen=True)
class ImageFindings:
    """Which findings are told, from which score on.

    Attributes:
        names: of the findings; the first stands for "abnormal" and is the gate of all others.
        thresholds: for each name the least score that counts, 0 to 1. Chosen on validation studies.
        openings: for each name the sentence that opens a draft where the finding is told, or an empty text; or nothing
            at all, and no draft is opened.
        denials: for each name a regular expression, case ignored, of sentences that contradict the finding, or an empty
            text; or nothing at all.
        lateral_shares: for each name how much the lateral radiograph weighs beside the frontal one, 0 to 1; or nothing
            at all, and they weigh the same. Chosen on validation studies.
        excludes: pairs of findings that are never told together.

    Raises:
        ValueError: they have not the same length, or are empty; a denial is no regular expression, or a share is out of
            its range.
    """

    names: tuple[str, ...]
    thresholds: tuple[float, ...]
    openings: tuple[str, ...] = ()
    denials: tuple[str, ...] = ()
    lateral_shares: tuple[float, ...] = ()
    excludes: tuple[tuple[str, str], ...] = CONTRARY

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.thresholds):
            raise ValueError(f"{len(self.names)} findings with {len(self.thresholds)} thresholds")
        if self.openings and len(self.openings) != len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.openings)} openings")
        if self.denials and len(self.denials) != len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.denials)} denials")
        if self.lateral_shares and len(self.lateral_shares) != len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.lateral_shares)} shares of the lateral view")
        if not all(0 <= share <= 1 for share in self.lateral_shares):
            raise ValueError(f"the lateral view's shares are {self.lateral_shares}; give 0 to 1")
        self.contradicting(self.names)

    def join(self, frontal: np.ndarray, lateral: np.ndarray) -> np.ndarray:
        """The logits of both radiographs, [..., names], as those of the study."""
        shares = np.array(self.lateral_shares or (0.5,) * len(self.names), frontal.dtype)
        return (1 - shares) * frontal + shares * lateral

    def read(self, scores: Sequence[float] | np.ndarray) -> tuple[str, ...]:
        """The findings to tell, for scores [names]: none below the gate; above it those that reach their thresholds, of
        two that exclude each other the one farther above its own; or :data:`OTHER` where none does."""
        if scores[0] < self.thresholds[0]:
            return ()
        rows = zip(self.names[1:], scores[1:], self.thresholds[1:], strict=True)
        above = {name: float(score) - least for name, score, least in rows if score >= least}
        for pair in self.excludes:
            if above.keys() >= {*pair}:
                del above[min(pair, key=lambda name: above[name])]
        return tuple(above) or (OTHER,)

    def open(self, told: Sequence[str]) -> dict[str, str]:
        """The sentences that open the draft: finding → sentence, for those told that have one."""
        return {name: text for name, text in zip(self.names, self.openings, strict=False) if text and name in told}

    def contradicting(self, told: Sequence[str]) -> re.Pattern[str] | None:
        """What is found in a sentence that contradicts a finding told; ``None`` where nothing is known to.
        :data:`OTHER` is contradicted by what contradicts the first name, "abnormal".

        Raises:
            ValueError: a denial is no regular expression.
        """
        known = {**dict(zip(self.names, self.denials, strict=False)), OTHER: (self.denials or ("",))[0]}
        return any_of([known.get(name, "") for name in told])


def any_of(denials: Sequence[str]) -> re.Pattern[str] | None:
    """One regular expression, case ignored, for all of some denials but the empty ones; ``None`` for none.

    Raises:
        ValueError: one is no regular expression.
    """
    parts = [f"(?:{text})" for text in denials if text]
    try:
        return re.compile("|".join(parts), re.IGNORECASE) if parts else None
    except re.error as error:
        raise ValueError(f"a denial is no regular expression: {error}") from None


def scores_of(logits: np.ndarray) -> np.ndarray:
    """Logits → scores from 0 to 1, of the same shape. They rank images; they are no calibrated probabilities."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -60, 60)))
