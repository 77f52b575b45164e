"""The usual n-gram scores of reports."""

import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from typing import Any

import numpy as np

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
PROTOCOL = (
    "pycocoevalcap (METEOR 1.5 in Java) on findings, references and drafts cleaned by R2Gen's rules (lower case, no "
    "punctuation but the full stop, de-identification marks kept in references)"
)


def cider(drafts: list[str], references: list[str]) -> float:
    """CIDEr only, which needs no Java; arguments as in :func:`score`."""
    from pycocoevalcap.cider.cider import Cider

    wanted = {i: [reference] for i, reference in enumerate(references)}
    value, _ = Cider().compute_score(wanted, {i: [draft or "."] for i, draft in enumerate(drafts)})
    return float(value)


@dataclass(frozen=True)
class Scores:
    """N-gram scores of a list of drafts.

    Attributes:
        corpus: metric → score of all drafts together, as it is usually reported.
        studies: metric → float [studies]; the mean equals the corpus score for ROUGE-L and CIDEr, almost for METEOR.
    """

    corpus: dict[str, float]
    studies: dict[str, np.ndarray]

    def intervals(self, resamples: int = 1000, seed: int = 0) -> dict[str, list[float]]:
        """95% bootstrap intervals over studies: metric → [low, high], around the corpus score."""
        rng = np.random.default_rng(seed)
        count = len(next(iter(self.studies.values())))
        rows = rng.integers(count, size=(resamples, count))
        found = {}
        for name, values in self.studies.items():
            ends = np.percentile(values[rows].mean(1), (2.5, 97.5))
            found[name] = [float(end) for end in ends + self.corpus[name] - values.mean()]
        return found


@cache
def _meteor() -> Any:
    """One METEOR for all rows, because its Java process takes longer to start than to score them."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def score(drafts: list[str], references: list[str]) -> Scores:
    """BLEU-1..4 (Papineni 2002), METEOR (Denkowski and Lavie 2014, Java), ROUGE-L (Lin 2004), CIDEr (Vedantam 2015).

    Args:
        drafts, references: cleaned by :func:`~training.datasets.iu_xray.clean_reference`, one each per study.

    Raises:
        RuntimeError: METEOR needs Java, which is not installed.
        ValueError: the lists are empty or of different length.
    """
    if not drafts or len(drafts) != len(references):
        raise ValueError(
            f"{len(drafts)} drafts for {len(references)} references: give the same number of each, at least one"
        )
    if shutil.which("java") is None:
        raise RuntimeError("METEOR needs Java, but there is no java command: install a Java runtime (11 or newer)")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given = {i: [draft or "."] for i, draft in enumerate(drafts)}
    wanted = {i: [reference] for i, reference in enumerate(references)}
    with redirect_stdout(StringIO()):  # Bleu prints its lengths
        bleu, _ = Bleu(4).compute_score(wanted, given)
        meteor, each_meteor = _meteor().compute_score(wanted, given)
        rouge, each_rouge = Rouge().compute_score(wanted, given)
        cider, each_cider = Cider().compute_score(wanted, given)
    corpus = dict(zip(METRICS, map(float, (*bleu, meteor, rouge, cider)), strict=True))
    return Scores(
        corpus, {"METEOR": np.array(each_meteor), "ROUGE-L": np.array(each_rouge), "CIDEr": np.array(each_cider)}
    )


def rouge_matrix(reports: list[str], others: list[str]) -> np.ndarray:
    """ROUGE-L F1 of every pair of reports: float64 [reports, others]; 0 where one is empty."""
    from rapidfuzz.distance import LCSseq
    from rapidfuzz.process import cdist

    words, other_words = ([text.split() for text in texts] for texts in (reports, others))
    common = cdist(words, other_words, scorer=LCSseq.similarity, dtype=np.int32)
    lengths = np.add.outer([len(w) for w in words], [len(w) for w in other_words])
    return 2 * common / np.maximum(lengths, 1)
