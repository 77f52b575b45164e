"""Consensus reports: training targets that agree most with the reports of similar studies.

Greedy decoding writes a probable report, but among many wordings of the same content the most probable one is rarely
close to the others. The report with the highest mean agreement with the possible ones minimizes the Bayes risk (Kumar
and Byrne 2004); a model that is trained on such reports writes them greedily (MBR finetuning, Finkelstein et al. 2023).
The possible reports are those of training studies with a similar indication and comparison.

Findings come from the image only. The opening sentences state the findings in the prompt
(:mod:`cbedge.findings.image_findings`). The sentences after them come from other studies; they affirm no finding and
mention none of those in the prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer

from cbedge.findings.image_findings import AnyPattern
from cbedge.prompt import ClinicalContext, build_opening, build_target, split_sections
from training.batches import prompted_findings
from training.datasets import Study
from training.ontology import DENIALS, TAG_FINDINGS
from training.openings import Sentence, read_sentences

# Chosen on validation studies (docs/research/index.md).
SHARPNESS = 10.0
WORD_WEIGHT = 2.0
RECALL_WEIGHT = 0.85  # METEOR's
PROMPT_DISTANCE = 1.0
# With one of these, the impression must not continue that nothing is acute.
ACUTE = frozenset({"effusion", "opacity", "congestion", "fracture", "pneumothorax"})
# Words that say more about a finding than that it is present, which is not known.
_UNKNOWN = re.compile(
    r"\b(left|right|bilateral|bibasilar|basilar|upper|middle|lower|small|tiny|large|mild(ly)?|minimal(ly)?|moderate(ly)?"
    r"|severe(ly)?|marked(ly)?|slight(ly)?|trace|stable|unchanged|new|interval|increased|decreased|improved|chronic)\b",
    re.IGNORECASE,
)


class Pool:
    """Candidate texts, and the agreement of each with the texts of the known studies."""

    def __init__(self, rows: Sequence[list[Sentence]], others: Sequence[str]):
        unique = {_join(row): row for row in rows if row}
        self.rows, self.others = [*unique.values()], others
        self.agreement = agreement([*unique], others) if unique else np.zeros((0, len(others)), np.float32)

    def best(self, weights: np.ndarray) -> int | None:
        """The text with the highest mean agreement for some weights of the known studies; ``None`` without texts."""
        return int((self.agreement @ weights).argmax()) if self.rows else None


class ConsensusReports:
    """Training targets that replace the studies' own reports.

    Attributes:
        studies: the studies whose reports are compared.
        rest, impression: candidate findings and impressions that affirm no finding.
        reports_with: number of sections with each sentence.

    Args:
        names: findings that the prompt may list.
        sentences: finding → the sentence that opens a draft.
        most: maximum number of studies; more are sampled.
    """

    def __init__(
        self, studies: Sequence[Study], names: Sequence[str], sentences: dict[str, str], seed: int = 0, most: int = 4000
    ):
        rows = np.arange(len(studies))
        if len(rows) > most:
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
        drawn = [studies[int(i)] for i in rows]
        kept = [s for s in drawn if s.tags[0] >= 0 and split_sections(s.target)[0]]
        self.sentences, self.studies = sentences, kept
        self._rows = {study.study_id: i for i, study in enumerate(kept)}
        self._prompted = [frozenset(prompted_findings(s.tags, names) or ()) for s in kept]
        sections = [split_sections(s.target) for s in kept]
        written, impressions = (read_sentences([pair[i] for pair in sections]) for i in (0, 1))
        self._reader = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), lowercase=False, sublinear_tf=True)
        self._contexts = self._reader.fit_transform([_text_of(s.context) for s in kept]) if kept else None
        findings = [pair[0] for pair in sections]
        rest = [[s for s in row if not s.affirmed] for row in written]
        self.rest = Pool(rest, [_join(row) for row in rest])
        self.impression = Pool([r for r in impressions if not _affirmed(r)], [pair[1] for pair in sections])
        self.reports_with = Counter(text for row in (*written, *impressions) for text in {s.text for s in row})
        unopened = [i for i, prompted in enumerate(self._prompted) if prompted and not self._opened(prompted)]
        whole = [row for row in (written[i] for i in unopened) if _affirmed(row) and not _knows_more(row)]
        self._whole = Pool(whole, findings)

    def _opened(self, prompted: Iterable[str]) -> list[str]:
        return [name for name in prompted if self.sentences.get(name)]

    def __call__(self, study: Study, context: ClinicalContext, prompted: Sequence[str] | None) -> tuple[str, str]:
        """The opening and the rest of a study's target.

        Args:
            study: the study; its own report is not compared.
            context: the clinical context in the prompt.
            prompted: findings in the prompt, or ``None``.

        Returns:
            An empty opening and the study's own report if ``prompted`` is ``None`` or no other study is known.
        """
        if prompted is None or self._contexts is None or len(self._prompted) < 2:
            return "", study.target
        weights = self.weights(study, context)
        wanted = frozenset(prompted)
        nearer = weights * np.exp([-PROMPT_DISTANCE * len(wanted ^ other) for other in self._prompted])
        weights, nearer = (w.astype(np.float32) / w.sum() for w in (weights, nearer))
        opened = self._opened(prompted)
        mentioned = frozenset(finding for name in prompted for finding in TAG_FINDINGS.get(name, ()))
        whole = bool(prompted and not opened and self._whole.rows)
        pool = self._whole if whole else self.rest
        chosen = pool.best(nearer if whole else weights)
        if chosen is None:
            return "", study.target
        denied = AnyPattern(tuple(text for name in prompted for text in DENIALS.get(name, ())))
        rest = [s for s in pool.rows[chosen] if whole or not (s.spoken & mentioned or denied.search(s.text))]
        seen = [s.text for s in rest if s.affirmed] if whole else [self.sentences[name] for name in opened]
        closing = None if ACUTE.intersection(prompted) else self.impression.best(weights)
        words = " ".join([*seen, *([] if closing is None else [_join(self.impression.rows[closing])])]) or None
        opening = "".join(build_opening([self.sentences[name] for name in opened]))
        target = build_target(_join(rest), words)
        return opening, f" {target.removeprefix('FINDINGS: ')}" if opening else target

    def weights(self, study: Study, context: ClinicalContext) -> np.ndarray:
        """The weight of each of :attr:`studies` in a context, float32 [studies], not normalized; 0 for the study."""
        assert self._contexts is not None
        alike = (self._reader.transform([_text_of(context)]) @ self._contexts.T).toarray()[0]
        weights = np.exp(SHARPNESS * alike)
        if study.study_id in self._rows:
            weights[self._rows[study.study_id]] = 0.0
        return weights.astype(np.float32)


def _text_of(context: ClinicalContext) -> str:
    return f"{context.indication or ''} | {context.comparison or ''}"


def _join(row: Sequence[Sentence]) -> str:
    return " ".join(s.text for s in row)


def _affirmed(row: Sequence[Sentence]) -> frozenset[str]:
    return frozenset().union(*(s.affirmed for s in row))


def _knows_more(row: Sequence[Sentence]) -> bool:
    return any(s.affirmed and _UNKNOWN.search(s.text) for s in row)


def agreement(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Agreement of each text with others, float32 [texts, others]: F1 of ROUGE-L, plus the shared words weighted by
    rarity."""
    texts, others = [t.lower() for t in texts], [o.lower() for o in others]
    counts = CountVectorizer(token_pattern=r"[^\s.,;:]+", binary=True).fit(others)
    rarity = TfidfTransformer(norm=None).fit(counts.transform(others)).idf_ - 0.9
    left, right = counts.transform(texts).astype(np.float32), counts.transform(others).astype(np.float32)
    shared = (left.multiply(rarity[None]).tocsr().astype(np.float32) @ right.T).toarray()
    precision = shared / np.maximum(left @ rarity, 1e-6)[:, None]
    recall = shared / np.maximum(right @ rarity, 1e-6)[None]
    words = precision * recall / np.maximum(RECALL_WEIGHT * precision + (1 - RECALL_WEIGHT) * recall, 1e-6)
    letters: dict[str, str] = {}
    a, b = (
        [
            "".join(letters.setdefault(w, chr(0x4E00 + len(letters))) for w in re.findall(r"[^\s.,;:]+|\.", t))
            for t in group
        ]
        for group in (texts, others)
    )
    common = cdist(a, b, scorer=LCSseq.similarity, dtype=np.float32, workers=-1)
    lengths = np.array([len(t) for t in a])[:, None] + np.array([len(t) for t in b])[None]
    return (2 * common / np.maximum(lengths, 1) + WORD_WEIGHT * words).astype(np.float32)
