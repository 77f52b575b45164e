"""Build a bundle's word list from training reports."""

from pathlib import Path

from cbedge.drafting.lexicon import Lexicon
from cbedge.prompt import split_sections
from training.datasets import open_studies


def lexicon_of(data: Path, limit: int | None = None) -> Lexicon:
    """The words of the training reports at ``data``, or of the first ``limit`` studies."""
    studies = open_studies(data, ("train",), limit)
    return Lexicon.compile(" ".join(split_sections(study.target)) for study in studies)
