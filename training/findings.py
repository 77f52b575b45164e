"""Which findings a report names and which it denies: the clinical reading behind precision, recall and F1.

Phrases (``finding_phrases.yaml``, most from radlabels) are matched with spaCy, and NegEx (Chapman et al., J Biomed
Inform 2001;34:301-310, by negspacy) tells the denied ones. How well this reads is measured against the tags that
people gave (:func:`training.clinical.validate`), and stated wherever its scores are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from training.ontology import TAG_FINDINGS, TAGS

if TYPE_CHECKING:
    from spacy.language import Language

CHEXPERT_FINDINGS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
NO_FINDING = "No Finding"
LABELS = (NO_FINDING, *CHEXPERT_FINDINGS)
_PHRASES = Path(__file__).with_name("finding_phrases.yaml")
_FILLERS = [
    "the",
    "a",
    "an",
    "of",
    "in",
    "is",
    "are",
    "at",
    "within",
    "to",
    "left",
    "right",
    "bilateral",
    "mild",
    "mildly",
    "moderate",
    "moderately",
    "minimal",
    "minimally",
    "slight",
    "slightly",
    "severe",
    "severely",
    "marked",
    "markedly",
    "small",
    "large",
    "also",
    "again",
    "remains",
    "appears",
    "be",
    "stable",
    "somewhat",
    "silhouette",
    "size",
    "and/or",
    "borderline",
    "lateral",
    "posterior",
    "thoracic",
    "lung",
    "thickened",
    "sized",
    "shadow",
    "contour",
    "chronically",
]
# Beside NegEx's own clinical terms: how radiologists deny.
_DENYING = [
    "clear of",
    "free of",
    "without",
    "negative for",
    "no evidence of",
    "no definite",
    "no focal",
    "no acute",
    "no",
    "absence of",
    "rather than",
    "nor",
    "resolution of",
    "resolved",
    "not",
    "unremarkable for",
    "normal without",
]


@dataclass(frozen=True)
class Mention:
    """One place where a report names a finding.

    Attributes:
        finding: CheXpert's name in capitals, or another group's in lower case (``hyperinflation``, ``spine``...).
        start, end: characters of the report.
        denied: whether the report says that it is absent.
    """

    finding: str
    start: int
    end: int
    denied: bool


def find_mentions(reports: Iterable[str]) -> Iterator[list[Mention]]:
    """The mentions in each report, in the order of the text.

    Raises:
        ImportError: spaCy or negspacy is not installed.
    """
    for doc in _pipeline().pipe((re.sub(r"\s", " ", report) for report in reports), batch_size=64):
        yield [Mention(e.label_, e.start_char, e.end_char, bool(e._.negex)) for e in doc.ents]


def positive_findings(reports: Iterable[str]) -> list[frozenset[str]]:
    """The findings of each report that it names and does not deny, groups beyond CheXpert's included."""
    return [frozenset(m.finding for m in mentions if not m.denied) for mentions in find_mentions(reports)]


def chexpert_labels(findings: frozenset[str]) -> frozenset[str]:
    """Positive findings → those of CheXpert's 14; ``No Finding`` where nothing but devices is named.

    As in CheXpert (Irvin et al., AAAI 2019), findings outside the 14 do not take ``No Finding`` away.
    """
    named = findings & frozenset(CHEXPERT_FINDINGS)
    return named if named - {"Support Devices"} else named | {NO_FINDING}


@cache
def _pipeline() -> Language:
    import spacy
    from negspacy.negation import Negex  # noqa: F401  (registers the component)
    from negspacy.termsets import termset

    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer", config={"punct_chars": [".", "?", "!", ";"]})
    ruler: Any = nlp.add_pipe("entity_ruler", config={"overwrite_ents": True})
    phrases = yaml.safe_load(_PHRASES.read_text(encoding="utf-8"))
    ruler.add_patterns(
        [
            {"label": finding, "pattern": _pattern(nlp, phrase)}
            for finding, sources in phrases.items()
            for phrase in (p for source in sources.values() for p in source)
        ]
    )
    terms = termset("en_clinical")
    terms.add_patterns({"preceding_negations": _DENYING, "following_negations": ["has resolved", "have resolved"]})
    nlp.add_pipe("negex", config={"neg_termset": terms.get_patterns()})
    return nlp


def _pattern(nlp: Language, phrase: str) -> list[dict]:
    filler = {"LOWER": {"IN": _FILLERS}, "OP": "*"}
    words = [{"LOWER": token.lower_} for token in nlp.tokenizer(phrase)]
    return [part for word in words for part in (word, filler)][:-1]


def read_tags(reports: Sequence[str]) -> np.ndarray:
    """The tags that reports name, as a reader without the radiograph finds them, bool [reports, TAGS]."""
    found = positive_findings(reports)
    rows = [[bool(f) if tag == "abnormal" else not f.isdisjoint(TAG_FINDINGS[tag]) for tag in TAGS] for f in found]
    return np.array(rows, bool).reshape(-1, len(TAGS))
