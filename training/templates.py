"""Templates of normal reports in the wording of the training studies, and the classifier that chooses one.

They are chosen so that the best of them for each study agrees most with what is written of studies whose indication
reads alike (:mod:`training.consensus`): a facility location problem, solved greedily (Nemhauser et al. 1978). None
holds a sentence that fewer than :data:`SHARED` training reports have, so none is one patient's report.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from cbedge.image_findings import ImageFindings
from cbedge.prompt import ClinicalContext, build_target
from cbedge.templates import BUCKETS, Templates, context_features, read_template
from training.consensus import ConsensusReports
from training.datasets.iu_xray import read_studies
from training.openings import Sentence

# Chosen on validation studies (training/RUNS.md).
COUNT = 48
STRENGTH = 20.0  # of the classifier: the inverse of its L2 penalty
SHARED = 3  # reports that a template's sentence is found in, at the least
WITHHELD_WEIGHT = 0.3  # of a context with indication or comparison withheld, in learning the classifier
# What compares with an earlier study or counts images, which no template knows; and slips of the pen.
_OF_ONE_STUDY = re.compile(
    r"\b(stable|unchanged|new|interval|increased|decreased|improved|again|previous|prior|otherwise)\b|\d|\.\.", re.I
)


def templates_of(findings: ImageFindings, data: Path) -> Templates | None:
    """The templates of the training studies at ``data``, for a model that is told such findings; ``None`` where their
    reports share no normal sentences."""
    sentences = dict(zip(findings.names, findings.openings, strict=False))
    return learn_templates(ConsensusReports(read_studies(data, ("train",)), findings.names[1:], sentences))


def learn_templates(reports: ConsensusReports) -> Templates | None:
    """Choose templates among reports, and learn which is usual for a context; ``None`` where no sentence is shared."""
    shared, closing = (
        [i for i, row in enumerate(pool.rows) if all(_is_usual(s, reports) for s in row)]
        for pool in (reports.rest, reports.impression)
    )
    if len(reports.studies) < 2 or not shared or not closing:
        return None
    contexts, weights, counts = _examples(reports)
    agreement = reports.rest.agreement[shared] @ weights.T
    chosen = _cover(agreement, COUNT)
    labels = agreement[chosen].argmax(0)
    closings = reports.impression.agreement[closing] @ weights.T
    texts = []
    for place, candidate in enumerate(chosen):
        its = labels == place
        best = closing[int(closings[:, its if its.any() else slice(None)].sum(1).argmax())]
        parts = (reports.rest.rows[shared[candidate]], reports.impression.rows[best])
        texts.append(read_template(build_target(*(" ".join(s.text for s in part) for part in parts))))
    return _learn(contexts, labels, counts, texts)


def _is_usual(sentence: Sentence, reports: ConsensusReports) -> bool:
    return reports.reports_with[sentence.text] >= SHARED and not _OF_ONE_STUDY.search(sentence.text)


def _examples(reports: ConsensusReports) -> tuple[list[ClinicalContext], np.ndarray, np.ndarray]:
    """Contexts, whole and with parts withheld; how much each study has to say there, float32 [contexts, studies], of
    sum 1; and how much each context counts."""
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
    """Rows of a matrix [candidates, columns] whose largest value in each column adds up to most, chosen greedily."""
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
    """The classifier: multinomial logistic regression on hashed runs of characters."""
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
