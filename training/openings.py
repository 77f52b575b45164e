"""Training reports that begin with the opening sentences of drafts.

A draft begins with a sentence for each image finding, and the language model continues
(:mod:`cbedge.findings.image_findings`). A language model that was never trained on such openings continues with its
usual report, repeats the finding, or denies it. So training reports get the same opening, without their own sentences
on these findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cbedge.findings.image_findings import ImageFindings
from cbedge.prompt import build_opening, build_target, split_sections
from cbedge.sentences import split_text
from training.datasets import Study
from training.findings import find_mentions
from training.ontology import DENIALS, ONTOLOGY, TAG_FINDINGS, TAGS


@dataclass(frozen=True)
class Sentence:
    """A sentence of a report, the findings that it mentions, and those of them that it affirms."""

    text: str
    spoken: frozenset[str]
    affirmed: frozenset[str]


def read_sentences(reports: Sequence[str]) -> list[list[Sentence]]:
    """The sentences of each report."""
    parted = [split_text(report) for report in reports]
    unique = sorted({text for row in parted for text in row})
    known = {
        text: Sentence(text, frozenset(m.finding for m in found), frozenset(m.finding for m in found if not m.denied))
        for text, found in zip(unique, find_mentions(unique), strict=True)
    }
    return [[known[text] for text in row] for row in parted]


def with_denials(findings: ImageFindings) -> ImageFindings:
    """The same findings, with contradictions and exclusions from the ontology."""
    pairs = [(name, other) for name in findings.names for other in ONTOLOGY[name].excludes if other in findings.names]
    return replace(findings, denials=tuple(DENIALS.get(name, ()) for name in findings.names), excludes=tuple(pairs))


class Opener:
    """Gives training reports an opening.

    Args:
        sentences: finding → its opening sentence.
        share: share of the studies with such a finding in the prompt whose report gets an opening.
    """

    def __init__(self, sentences: dict[str, str], share: float):
        self.sentences, self.share = sentences, share
        self._read: dict[str, list[Sentence]] = {}

    def __call__(
        self, study: Study, prompted: Sequence[str] | None, tags: Sequence[int], rng: np.random.Generator
    ) -> tuple[str, str]:
        """The opening, and the rest of the report, which starts with a space.

        Args:
            tags: 1, 0 or -1 for each of :data:`~training.ontology.TAGS`; only present findings open a report.

        Returns:
            An empty opening and the unchanged target if no finding opens the report.
        """
        names = [name for name in prompted or () if self.sentences.get(name) and name in TAGS]
        names = [name for name in names if tags[TAGS.index(name)] == 1]
        findings, impression = split_sections(study.target)
        if not names or not findings or "FINDINGS:" not in study.target or rng.random() >= self.share:
            return "", study.target
        said = frozenset(finding for name in names for finding in TAG_FINDINGS[name])
        kept = [s.text for s in self._sentences(study, findings) if not s.spoken & said or s.affirmed - said]
        opening = "".join(build_opening([self.sentences[name] for name in names]))
        rest = build_target(" ".join(kept), impression).removeprefix("FINDINGS: ")
        return opening, f" {rest}"

    def _sentences(self, study: Study, findings: str) -> list[Sentence]:
        if study.study_id not in self._read:
            (self._read[study.study_id],) = read_sentences([findings])
        return self._read[study.study_id]
