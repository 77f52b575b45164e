"""Reports to learn that agree most with what is written of studies like the one at hand.

Greedy decoding writes a likely report, and of many wordings of the same thing the likeliest one is rarely the nearest
to the others. The report that agrees most, on the average, with those that may be written instead is the minimum Bayes
risk one (Kumar and Byrne 2004); a model that learns such reports writes them greedily, in one pass (MBR finetuning,
Finkelstein et al. 2023). What may be written instead is taken from the training studies whose indication and
comparison read alike: they were worded by the same hands.

What the image shows stays with the image. The sentences that open a draft say what is told
(:mod:`cbedge.findings.image_findings`); what follows them is taken from other studies, and of those nothing that
affirms a finding, or that speaks of one which was told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer

from cbedge.findings.image_findings import any_of
from cbedge.prompt import ClinicalContext, build_opening, build_target, split_sections
from training.batches import told_findings
from training.datasets import Study
from training.ontology import DENIALS, TAG_FINDINGS
from training.openings import Sentence, read_sentences

# Chosen on validation studies (docs/research/index.md).
SHARPNESS = 10.0
WORD_WEIGHT = 2.0
RECALL_WEIGHT = 0.85  # METEOR's
TOLD_DISTANCE = 1.0
# Told of these, an impression does not go on that nothing is acute.
ACUTE = frozenset({"effusion", "opacity", "congestion", "fracture", "pneumothorax"})
# Words that say more of a finding than that it is there: nothing tells them.
_UNKNOWN = re.compile(
    r"\b(left|right|bilateral|bibasilar|basilar|upper|middle|lower|small|tiny|large|mild(ly)?|minimal(ly)?|moderate(ly)?"
    r"|severe(ly)?|marked(ly)?|slight(ly)?|trace|stable|unchanged|new|interval|increased|decreased|improved|chronic)\b",
    re.IGNORECASE,
)


class Pool:
    """Texts to choose from, and how well each agrees with what is written of the known studies."""

    def __init__(self, rows: Sequence[list[Sentence]], others: Sequence[str]):
        unique = {_join(row): row for row in rows if row}
        self.rows, self.others = [*unique.values()], others
        self.agreement = Agreement([*unique], others).matrix if unique else np.zeros((0, len(others)), np.float32)

    def best(self, weights: np.ndarray) -> int | None:
        """The text with the highest expected agreement, for the weights of the known studies; ``None`` of no text."""
        return int((self.agreement @ weights).argmax()) if self.rows else None


class ConsensusReports:
    """What a model learns to write of a training study, instead of the study's own report.

    Attributes:
        studies: those that have a say.
        rest, impression: findings and impressions to choose from, which affirm nothing.
        reports_with: in how many of their sections each sentence is found.

    Args:
        studies: training studies; of more than ``most`` a part is drawn, which the same ``seed`` draws again.
        names: findings that may be told.
        sentences: finding → the sentence that opens a draft where it is told.
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
        self._told = [frozenset(told_findings(s.tags, names) or ()) for s in kept]
        sections = [split_sections(s.target) for s in kept]
        written, impressions = (read_sentences([pair[i] for pair in sections]) for i in (0, 1))
        self._reader = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), lowercase=False, sublinear_tf=True)
        self._contexts = self._reader.fit_transform([_text_of(s.context) for s in kept]) if kept else None
        findings = [pair[0] for pair in sections]
        rest = [[s for s in row if not s.affirmed] for row in written]
        self.rest = Pool(rest, [_join(row) for row in rest])
        self.impression = Pool([r for r in impressions if not _affirmed(r)], [pair[1] for pair in sections])
        self.reports_with = Counter(text for row in (*written, *impressions) for text in {s.text for s in row})
        unopened = [i for i, told in enumerate(self._told) if told and not self._opened(told)]
        whole = [row for row in (written[i] for i in unopened) if _affirmed(row) and not _knows_more(row)]
        self._whole = Pool(whole, findings)

    def _opened(self, told: Iterable[str]) -> list[str]:
        return [name for name in told if self.sentences.get(name)]

    def __call__(self, study: Study, context: ClinicalContext, told: Sequence[str] | None) -> tuple[str, str]:
        """What the report begins with, and what goes on after it.

        Args:
            study: whose report it would be; it has no say in it.
            context: what the prompt says of it.
            told: findings that the prompt tells.

        Returns:
            An empty beginning and the study's own report where nothing is told of it or no other study is known.
        """
        if told is None or self._contexts is None or len(self._told) < 2:
            return "", study.target
        weights = self.weights(study, context)
        wanted = frozenset(told)
        nearer = weights * np.exp([-TOLD_DISTANCE * len(wanted ^ other) for other in self._told])
        weights, nearer = (w.astype(np.float32) / w.sum() for w in (weights, nearer))
        opened = self._opened(told)
        told_of = frozenset(finding for name in told for finding in TAG_FINDINGS.get(name, ()))
        whole = bool(told and not opened and self._whole.rows)
        pool = self._whole if whole else self.rest
        chosen = pool.best(nearer if whole else weights)
        if chosen is None:
            return "", study.target
        denied = any_of([DENIALS.get(name, "") for name in told])
        rest = [s for s in pool.rows[chosen] if whole or not (s.spoken & told_of or (denied and denied.search(s.text)))]
        seen = [s.text for s in rest if s.affirmed] if whole else [self.sentences[name] for name in opened]
        closing = None if ACUTE.intersection(told) else self.impression.best(weights)
        words = " ".join([*seen, *([] if closing is None else [_join(self.impression.rows[closing])])]) or None
        begun = "".join(build_opening([self.sentences[name] for name in opened]))
        target = build_target(_join(rest), words)
        return begun, f" {target.removeprefix('FINDINGS: ')}" if begun else target

    def weights(self, study: Study, context: ClinicalContext) -> np.ndarray:
        """How much each of :attr:`studies` has to say of what is written under a context, but the study itself.

        float32 [studies], not scaled.
        """
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


class Agreement:
    """How well each of some texts agrees with others: ROUGE-L's F1, and the shared words by their rarity.

    Args:
        texts: candidates.
        others: what they are to agree with.

    Attributes:
        matrix: float32 [texts, others].
    """

    def __init__(self, texts: Sequence[str], others: Sequence[str]):
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
        self.matrix = (2 * common / np.maximum(lengths, 1) + WORD_WEIGHT * words).astype(np.float32)
