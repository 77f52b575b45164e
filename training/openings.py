"""Reports to learn that go on where fixed sentences have opened them, as drafts are written.

A draft begins with a sentence for each finding that is told, and the language model goes on
(:mod:`cbedge.findings.image_findings`). One that never saw such a beginning takes up its usual template after it, says
the same again, or denies it. So a report is given the same beginning here, and its own words on those findings are left
out.
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
    """A sentence of a report: the findings that it speaks of, and those of them that it does not deny."""

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
    """The same findings, with what contradicts and what excludes each by the ontology."""
    pairs = [(name, other) for name in findings.names for other in ONTOLOGY[name].excludes if other in findings.names]
    return replace(findings, denials=tuple(DENIALS.get(name, "") for name in findings.names), excludes=tuple(pairs))


class Opener:
    """Opens reports of training studies.

    Args:
        sentences: finding → the sentence that opens a draft where it is told.
        share: of the studies that are told such a finding, how many are opened.
    """

    def __init__(self, sentences: dict[str, str], share: float):
        self.sentences, self.share = sentences, share
        self._read: dict[str, list[Sentence]] = {}

    def __call__(
        self, study: Study, told: Sequence[str] | None, tags: Sequence[int], rng: np.random.Generator
    ) -> tuple[str, str]:
        """What the report begins with, and what is left of it to be learnt, with the space between them.

        Args:
            study: whose report it is.
            told: findings that the prompt tells.
            tags: 1, 0 or -1 for each of :data:`~training.datasets.studies.TAGS`: only what is so opens a report.
            rng: of chance.

        Returns:
            An empty text and the target as it is where nothing opens it.
        """
        names = [name for name in told or () if self.sentences.get(name) and name in TAGS]
        names = [name for name in names if tags[TAGS.index(name)] == 1]
        findings, impression = split_sections(study.target)
        if not names or not findings or "FINDINGS:" not in study.target or rng.random() >= self.share:
            return "", study.target
        said = frozenset(finding for name in names for finding in TAG_FINDINGS[name])
        kept = [s.text for s in self._sentences(study, findings) if not s.spoken & said or s.affirmed - said]
        begun = "".join(build_opening([self.sentences[name] for name in names]))
        rest = build_target(" ".join(kept), impression).removeprefix("FINDINGS: ")
        return begun, f" {rest}"

    def _sentences(self, study: Study, findings: str) -> list[Sentence]:
        if study.study_id not in self._read:
            (self._read[study.study_id],) = read_sentences([findings])
        return self._read[study.study_id]
