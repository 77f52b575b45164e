"""Templates: normal reports whose wording a draft follows, sentence by sentence.

Radiologists write most of a report from a template: standard sentences about a normal chest, edited where the image
differs. Which template is used depends on the referrer and the indication more than on the image. So a bundle has a few
templates, and a small linear classifier that selects one from the words of indication and comparison, for studies in
which no abnormality is detected. A user can give a template instead, which is then used for every study. A template's
sentence is used verbatim, or left out because it contradicts an image finding (:mod:`cbedge.drafting.constraints`).

A bundle's template consists of sentences that several training reports share. It states no abnormal finding, and its
findings section is not that of any single report (:mod:`training.templates`).
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cbedge.errors import BundleError
from cbedge.prompt import ClinicalContext, build_target, split_sections
from cbedge.sentences import split_text

BUCKETS = 8192
LENGTHS = (2, 5)  # of the character n-grams, shortest and longest, of words padded with spaces


@dataclass(frozen=True)
class Template:
    """A normal report, split into sentences.

    Attributes:
        findings, impression: the sentences of each section, each with its full stop; the impression may be empty.
        left_out: what was left out and why, one sentence each.
    """

    findings: tuple[str, ...]
    impression: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The template as one line, ``FINDINGS: … IMPRESSION: …``."""
        return build_target(" ".join(self.findings), " ".join(self.impression) or None)


def split_report(text: str) -> Template:
    """Split a template of a bundle, ``FINDINGS: … IMPRESSION: …``, into its sentences."""
    findings, impression = map(split_text, split_sections(text))
    return Template(tuple(findings), tuple(impression))


class Templates:
    """A set of templates, and a classifier that selects one for a clinical context.

    Args:
        texts: the templates, each ``FINDINGS: … IMPRESSION: …``.
        weights: the classifier's, float32 [F, K]; F features of :func:`context_features`, K templates.
        bias: float32 [K].

    Raises:
        ValueError: there is no template, or the sizes do not match.
    """

    def __init__(self, texts: Sequence[str], weights: np.ndarray, bias: np.ndarray):
        if not texts or weights.ndim != 2 or weights.shape[1] != len(texts) or bias.shape != (len(texts),):
            raise ValueError(f"{len(texts)} templates do not match weights {weights.shape} and bias {bias.shape}")
        self.texts = tuple(texts)
        self._scale = np.maximum(np.abs(weights).max(0), 1e-12).astype(np.float32) / 127
        self._weights = np.round(weights / self._scale).astype(np.int8)
        self._bias = bias.astype(np.float32)

    def choose(self, context: ClinicalContext) -> str:
        """The template for a clinical context."""
        buckets, values = context_features(context, len(self._weights))
        rows = self._weights[buckets].astype(np.float32)
        return self.texts[int((values @ rows * self._scale + self._bias).argmax())]

    def save(self, path: Path) -> None:
        """Write ``templates.npz``, with 8-bit weights."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file, texts=np.array(self.texts), weights=self._weights, scale=self._scale, bias=self._bias
            )

    @classmethod
    def load(cls, path: Path) -> Templates:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file is not a set of templates.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                texts = [str(text) for text in arrays["texts"]]
                return cls(texts, arrays["weights"] * arrays["scale"], arrays["bias"])
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile):
            raise BundleError(
                f"{path.name} in {path.parent} is not a set of templates: export the bundle again"
            ) from None


def context_features(context: ClinicalContext, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Hashed character n-grams of indication and comparison, as (buckets, values): int64 and float32 of equal size.

    A value is 1 + log(count); the values have Euclidean norm 1.
    """
    counts: Counter[int] = Counter()
    for word in f"{context.indication or ''} | {context.comparison or ''}".split():
        padded = f" {word} "
        for size in range(LENGTHS[0], LENGTHS[1] + 1):
            for start in range(max(1, len(padded) - size + 1)):
                counts[zlib.crc32(padded[start : start + size].encode()) % buckets] += 1
    values = np.array([1 + math.log(count) for count in counts.values()], np.float32)
    return np.array([*counts], np.int64), values / max(float(np.linalg.norm(values)), 1e-12)
