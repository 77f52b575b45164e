"""Controls for scores: reports that do not use the study's own radiograph, and drafts from changed inputs."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from cbedge.images.radiograph import Radiograph
from cbedge.prompt import split_sections
from cbedge.sentences import split_text
from training.clinical import label_reports
from training.datasets import Study
from training.drafting import Request
from training.findings import LABELS
from training.scoring import rouge_matrix

CONSENSUS = 25
_BLANK_SIDE = 256


def best_constant(train_reports: list[str]) -> str:
    """The training report with the highest mean ROUGE-L to all training reports."""
    candidates = sorted({r for r in train_reports if r})
    return candidates[int(rouge_matrix(candidates, train_reports).mean(1).argmax())]


def commonest_findings(train_reports: Sequence[str], count: int = 3) -> str:
    """A report that names the findings which most training reports name: what can be scored by always saying so."""
    named = label_reports(train_reports).matrix[:, 1:].sum(0)
    return " ".join(f"There is {LABELS[1 + i].lower()}." for i in np.argsort(-named, kind="stable")[:count])


def opening_of(draft: str, openings: Collection[str]) -> str:
    """The opening sentences of a draft's findings, without what the language model or a template continues with."""
    return " ".join(takewhile(lambda sentence: sentence in openings, split_text(split_sections(draft)[0])))


def neighbours(queries: np.ndarray, train: np.ndarray, count: int = CONSENSUS) -> np.ndarray:
    """Indices of the ``count`` nearest training images by cosine of standardized features: int [queries, count]."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    queries, train = (queries - mean) / deviation, (train - mean) / deviation
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    return np.argsort(-(queries @ train.T), axis=1, kind="stable")[:, :count]


def consensus(reports: list[str]) -> str:
    """The report with the highest mean ROUGE-L to the others."""
    return reports[int(rouge_matrix(reports, reports).mean(1).argmax())]


def swapped(studies: list[Study], seed: int = 0) -> list[Request]:
    """Every study with the images of another study and its own indication."""
    order = np.random.default_rng(seed).permutation(len(studies))
    donor = {int(a): int(b) for a, b in zip(order, np.roll(order, 1), strict=True)}
    return [Request(studies[donor[i]].image, s.context, studies[donor[i]].lateral) for i, s in enumerate(studies)]


def withheld(studies: list[Study]) -> list[Request]:
    """Every study with its own images, without indication and comparison."""
    return [Request(s.image, replace(s.context, indication=None, comparison=None), s.lateral) for s in studies]


def blank(studies: list[Study]) -> list[Request]:
    """Every study with uniformly grey images and its own context."""
    grey = np.full((_BLANK_SIDE, _BLANK_SIDE), 0.5, np.float32)
    frontal, lateral = (Radiograph(grey, view, f"blank {view}") for view in ("frontal", "lateral"))
    return [Request(frontal, s.context, lateral if s.lateral else None) for s in studies]


def own(studies: list[Study]) -> list[Request]:
    """Every study unchanged."""
    return [Request(s.image, s.context, s.lateral) for s in studies]
