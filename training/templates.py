"""Templates of normal reports in the wording of the training studies, and the classifier that chooses one.

They are chosen so that the best template for each study agrees most with the reports of studies with a similar
indication (:mod:`training.consensus`): a facility location problem, solved greedily (Nemhauser et al. 1978). Every
sentence of a template occurs in at least :data:`SHARED` training reports. No template has the findings of a report of
any split: each is a normal report in which one sentence is removed, added or replaced. So no template is a report of
the collection, whose licence (CC BY-NC-ND) forbids to distribute parts of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from cbedge.drafting.template_parser import read_template
from cbedge.drafting.templates import BUCKETS, Templates, context_features
from cbedge.findings.image_findings import ImageFindings
from cbedge.prompt import ClinicalContext, build_target, split_sections
from cbedge.sentences import normalize, split_text
from training.consensus import ConsensusReports, Pool
from training.datasets.iu_xray import read_studies, records
from training.openings import Sentence

# Chosen on validation studies (docs/research/index.md).
COUNT = 48
STRENGTH = 20.0  # inverse of the classifier's L2 penalty
ADDED = 60  # number of most common sentences that may be added
REPLACED = 4  # number of them that may replace a sentence on the same topic
COMPOSED = 4000  # candidate templates
SHARED = 3  # minimum number of reports with a template's sentence
WITHHELD_WEIGHT = 0.3  # sample weight of a context with withheld indication or comparison
# Comparisons with earlier studies and counts of images, which a template cannot know; and typing errors.
_OF_ONE_STUDY = re.compile(
    r"\b(stable|unchanged|new|interval|increased|decreased|improved|again|previous|prior|otherwise)\b|\d|\.\.", re.I
)

_TOPICS = {
    name: re.compile(words, re.I)
    for name, words in {
        "heart": r"heart|cardi|mediastin|aort|hil(a|ar|um)\b",
        "lungs": r"lung|pulmon|airspace|air space|consolidat|opaci|infiltrat|pneumonia|alveolar|volume",
        "vessels": r"vascul|edema|congest",
        "pleura": r"pleura|effusion|pneumothora|costophrenic",
        "bones": r"bon[ey]|osseous|rib|spine|skelet|fracture|thorax",
        "other": r"diaphragm|soft tissue|nodule|mass|trachea|adenopathy",
    }.items()
}  # a sentence is added only on a topic that the template lacks


def templates_of(findings: ImageFindings, data: Path) -> Templates | None:
    """The templates of the training studies at ``data``, for a model with these findings; ``None`` if the reports share
    no normal sentences."""
    sentences = dict(zip(findings.names, findings.openings, strict=False))
    reports = ConsensusReports(read_studies(data, ("train",)), findings.names[1:], sentences)
    return learn_templates(reports, [record.findings or "" for record in records(data)])


def learn_templates(reports: ConsensusReports, findings: Iterable[str]) -> Templates | None:
    """Compose templates from sentences of reports, and train the classifier that chooses one for a context.

    Args:
        findings: the findings of all reports of the collection, which no template may have.

    Returns:
        ``None`` if too few sentences are shared.
    """
    taken = {sentence_set(text) for text in findings}
    usual, closing = (
        [i for i, row in enumerate(pool.rows) if all(_is_usual(s, reports) for s in row)]
        for pool in (reports.rest, reports.impression)
    )
    composed = _compose([reports.rest.rows[i] for i in usual], reports, taken)
    if len(reports.studies) < 2 or not composed or not closing:
        return None
    contexts, weights, counts = _examples(reports)
    pool = Pool(composed, reports.rest.others)
    agreement = pool.agreement @ weights.T
    chosen = _cover(agreement, COUNT)
    labels = agreement[chosen].argmax(0)
    closings = reports.impression.agreement[closing] @ weights.T
    texts = []
    for place, candidate in enumerate(chosen):
        its = labels == place
        best = closing[int(closings[:, its if its.any() else slice(None)].sum(1).argmax())]
        parts = (pool.rows[candidate], reports.impression.rows[best])
        texts.append(read_template(build_target(*(" ".join(s.text for s in part) for part in parts))))
    check_templates(texts, taken)
    return _learn(contexts, labels, counts, texts)


def sentence_set(findings: str) -> frozenset[str]:
    """The normalized sentences of findings, without order, to compare a template with a report."""
    return frozenset(filter(None, (normalize(sentence) for sentence in split_text(findings))))


def check_templates(texts: Iterable[str], taken: Collection[frozenset[str]]) -> None:
    """Check that no template has the findings of a report.

    Raises:
        ValueError: a template has.
    """
    for text in texts:
        if sentence_set(split_sections(text)[0]) in taken:
            raise ValueError("a template has the findings of a report of the collection: it is not written")


def _compose(
    rows: Sequence[list[Sentence]], reports: ConsensusReports, taken: Collection[frozenset[str]]
) -> list[list[Sentence]]:
    """Normal reports with one sentence removed, added or replaced, none of which equals a report."""
    counts = Counter({s: reports.reports_with[s.text] for row in rows for s in row})
    topics = {s: frozenset(t for t, words in _TOPICS.items() if words.search(s.text)) for s in counts}
    common = [s for s, _ in counts.most_common(ADDED)]
    composed: dict[frozenset[str], list[Sentence]] = {}
    for row in rows:
        spoken = frozenset().union(*(topics[s] for s in row))
        variants = [row, *([*row[:i], *row[i + 1 :]] for i in range(len(row)) if len(row) > 2)]
        variants += [[*row, s] for s in common if topics[s] and not topics[s] & spoken]
        for i, old in enumerate(row):
            alike = (s for s in common if topics[s] == topics[old] and s not in row)
            variants += [[*row[:i], s, *row[i + 1 :]] for s in islice(alike, REPLACED)]
        for variant in variants:
            key = sentence_set(" ".join(s.text for s in variant))
            if key not in taken and len(key) == len(variant):
                composed.setdefault(key, variant)
    return sorted(composed.values(), key=lambda row: -min(counts[s] for s in row))[:COMPOSED]


def _is_usual(sentence: Sentence, reports: ConsensusReports) -> bool:
    return reports.reports_with[sentence.text] >= SHARED and not _OF_ONE_STUDY.search(sentence.text)


def _examples(reports: ConsensusReports) -> tuple[list[ClinicalContext], np.ndarray, np.ndarray]:
    """Contexts, complete and with withheld parts; the weight of each study, float32 [contexts, studies], with sum 1;
    and the sample weight of each context."""
    contexts, counts, rows = [], [], []
    for study in reports.studies:
        whole = replace(study.context, view=None)
        variants = (whole, replace(whole, comparison=None), replace(whole, indication=None))
        for context in dict.fromkeys(variants):
            weights = reports.weights(study, context)
            contexts.append(context)
            counts.append(1.0 if context == whole else WITHHELD_WEIGHT)
            rows.append(weights / weights.sum())
    number = len(reports.studies)
    contexts.append(ClinicalContext())
    counts.append(WITHHELD_WEIGHT * number)
    rows.append(np.full(number, 1 / number, np.float32))
    return contexts, np.stack(rows), np.array(counts)


def _cover(agreement: np.ndarray, count: int) -> list[int]:
    """Choose rows of a matrix [candidates, columns] greedily to maximize the sum of the columns' largest values."""
    best = np.full(agreement.shape[1], agreement.min(), np.float32)
    chosen: list[int] = []
    while len(chosen) < min(count, len(agreement)):
        gain = np.maximum(agreement - best, 0).sum(1)
        if gain.max() <= 0 and chosen:
            break
        chosen.append(int(gain.argmax()))
        best = np.maximum(best, agreement[chosen[-1]])
    return chosen


def _learn(contexts: Sequence[ClinicalContext], labels: np.ndarray, counts: np.ndarray, texts: list[str]) -> Templates:
    """Train the classifier: multinomial logistic regression on hashed character n-grams."""
    weights, bias = np.zeros((BUCKETS, len(texts)), np.float32), np.full(len(texts), -1e6, np.float32)
    known = np.unique(labels)
    if len(known) == 1:
        bias[known] = 0.0
        return Templates(texts, weights, bias)
    features = [context_features(c) for c in contexts]
    places = np.repeat(np.arange(len(features)), [len(f[0]) for f in features])
    columns, values = (np.concatenate([f[i] for f in features]) for i in (0, 1))
    matrix = csr_matrix((values, (places, columns)), (len(features), BUCKETS))
    model = LogisticRegression(C=STRENGTH, max_iter=500).fit(matrix, labels, counts)
    if len(known) == 2:
        weights[:, known[1]], bias[known] = model.coef_[0], (0.0, model.intercept_[0])
    else:
        weights[:, known], bias[known] = model.coef_.T, model.intercept_
    return Templates(texts, weights, bias)
