"""Find the findings that a report names, and whether it denies them; used for precision, recall and F1.

spaCy matches phrases (``finding_phrases.yaml``, most from radlabels), and NegEx (Chapman et al., J Biomed Inform
2001;34:301-310; negspacy) recognizes denied ones. Every record of scores says how well this agrees with index terms
(:func:`training.clinical.validate`).
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


@dataclass(frozen=True)
class Mention:
    """A mention of a finding in a report.

    Attributes:
        finding: CheXpert's name, or that of another group in lower case (``hyperinflation``, ``spine``...).
        start, end: character positions in the report.
    """

    finding: str
    start: int
    end: int
    denied: bool


def find_mentions(reports: Iterable[str]) -> Iterator[list[Mention]]:
    """The mentions in each report, in text order.

    Raises:
        ImportError: spaCy or negspacy is not installed.
    """
    for doc in _pipeline().pipe((re.sub(r"\s", " ", report) for report in reports), batch_size=64):
        yield [Mention(e.label_, e.start_char, e.end_char, bool(e._.negex)) for e in doc.ents]


def positive_findings(reports: Iterable[str]) -> list[frozenset[str]]:
    """The findings that each report affirms, including those outside CheXpert's."""
    return [frozenset(m.finding for m in mentions if not m.denied) for mentions in find_mentions(reports)]


def chexpert_labels(findings: frozenset[str]) -> frozenset[str]:
    """Positive findings → CheXpert's labels; ``No Finding`` if there are none except devices.

    As in CheXpert (Irvin et al., AAAI 2019), findings outside the 14 do not remove ``No Finding``.
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
    phrases, words = (_read_yaml(f"{name}.yaml") for name in ("finding_phrases", "phrase_words"))
    ruler.add_patterns(
        [
            {"label": finding, "pattern": _pattern(nlp, phrase, words["fillers"])}
            for finding, sources in phrases.items()
            for phrase in (p for source in sources.values() for p in source)
        ]
    )
    terms = termset("en_clinical")
    terms.add_patterns(
        {"preceding_negations": words["negations"], "following_negations": ["has resolved", "have resolved"]}
    )
    nlp.add_pipe("negex", config={"neg_termset": terms.get_patterns()})
    return nlp


def _read_yaml(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _pattern(nlp: Language, phrase: str, fillers: list[str]) -> list[dict]:
    filler = {"LOWER": {"IN": fillers}, "OP": "*"}
    words = [{"LOWER": token.lower_} for token in nlp.tokenizer(phrase)]
    return [part for word in words for part in (word, filler)][:-1]


def read_tags(reports: Sequence[str]) -> np.ndarray:
    """The tags that reports affirm, bool [reports, TAGS]."""
    found = positive_findings(reports)
    rows = [[bool(f) if tag == "abnormal" else not f.isdisjoint(TAG_FINDINGS[tag]) for tag in TAGS] for f in found]
    return np.array(rows, bool).reshape(-1, len(TAGS))
