"""The field's n-gram scores."""

import shutil
from contextlib import redirect_stdout
from io import StringIO

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
PROTOCOL = (
    "pycocoevalcap (METEOR 1.5 in Java) on findings, references and drafts cleaned by R2Gen's rules (lower case, no "
    "punctuation but the full stop, de-identification marks kept in references)"
)


def score(drafts: list[str], references: list[str]) -> dict[str, float]:
    """BLEU-1..4 (Papineni 2002), METEOR (Denkowski and Lavie 2014, Java), ROUGE-L (Lin 2004), CIDEr (Vedantam 2015).

    Args:
        drafts, references: cleaned by :func:`clean_reference`, one each a study.

    Raises:
        RuntimeError: there is no Java for METEOR.
        ValueError: the lists are empty or of different length.
    """
    if not drafts or len(drafts) != len(references):
        raise ValueError(
            f"{len(drafts)} drafts against {len(references)} references: give as many of each, at least one"
        )
    if shutil.which("java") is None:
        raise RuntimeError("METEOR runs in Java and there is no java command: install a Java runtime (11 or newer)")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    given = {i: [draft or "."] for i, draft in enumerate(drafts)}
    wanted = {i: [reference] for i, reference in enumerate(references)}
    with redirect_stdout(StringIO()):  # Bleu prints its lengths
        bleu, _ = Bleu(4).compute_score(wanted, given)
        meteor, _ = Meteor().compute_score(wanted, given)
        rouge, _ = Rouge().compute_score(wanted, given)
        cider, _ = Cider().compute_score(wanted, given)
    return dict(zip(METRICS, map(float, (*bleu, meteor, rouge, cider)), strict=True))


def rouge_matrix(reports: list[str], others: list[str]) -> list[list[float]]:
    """ROUGE-L F1 of every report with every other: [reports, others]."""
    from rapidfuzz.distance import LCSseq

    words = [r.split() for r in reports]
    other_words = [o.split() for o in others]
    return [[2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a and b else 0.0 for b in other_words] for a in words]
