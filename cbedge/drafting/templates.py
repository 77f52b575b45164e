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
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cbedge.drafting.template_checks import is_english, private_content, refuse_what_is_no_report
from cbedge.drafting.template_text import HEADING, is_not_drafted, lines_of, section_of
from cbedge.errors import BundleError, ContextError
from cbedge.prompt import SPECIAL_TOKEN, ClinicalContext, build_target, remove_invisible
from cbedge.sentences import normalize, split_text

BUCKETS = 8192
LENGTHS = (2, 5)  # of the character n-grams, shortest and longest, of words padded with spaces
MAX_TEMPLATE_CHARACTERS = 4000
_EMPHASIS = re.compile(r"(\*{2,3})(?=[\w(\[#])([^*\n]+)(?<=\S)\1|^\s*\*{4,}\s*$", re.MULTILINE)  # Markdown, a rule
_DRAFTS_HEADING = re.compile(r"\b(?:FINDINGS|IMPRESSION):")
_ENDED = re.compile(r"[.?!。！？][\"'”’»)\]]*$")


@dataclass(frozen=True)
class Template:
    """A normal report, split into sentences.

    Attributes:
        findings, impression: the sentences of each section, each with its full stop; the impression may be empty.
        english: whether the text is English. Contradictions to image findings can be detected in English only.
        left_out: what was left out and why, one sentence each.
    """

    findings: tuple[str, ...]
    impression: tuple[str, ...]
    english: bool
    left_out: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The template as one line, ``FINDINGS: … IMPRESSION: …``."""
        return build_target(" ".join(self.findings), " ".join(self.impression) or None)


def parse_template(text: str) -> Template:
    """Parse a normal report: prose or a form, with any headings, labels, bullets or numbered items.

    Headings that mean FINDINGS or IMPRESSION (``CONCLUSION:``, ``Final impression``, ``=== BEFUND ===``) start that
    section. What holds for one study or person only is left out: the text of ``INDICATION:``, ``CLINICAL INFO:`` and
    the like, in their line or up to the findings' heading, other text before that heading, and sentences that look like
    a signature, a patient's data or a date. Any other label (``Lungs:``) stays in front of its sentence; a heading on
    its own line is joined by a colon with the line below, and a question with its answer. A line without a full stop
    gets one; bullets, Markdown marks and invisible characters are removed; and a repeated sentence of a section is used
    once. No other character changes. Whatever is left out is told.

    Raises:
        ContextError: the template is not text, has no findings, is too long, is a file name or in another format than
            plain text, or has blanks to fill in, choices to make or a heading inside a sentence.
    """
    if not isinstance(text, str):
        raise ContextError(f"the template must be text, not {type(text).__name__}")
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ContextError(
            f"the template has {len(text):,} characters; the limit is {MAX_TEMPLATE_CHARACTERS:,}: shorten it"
        )
    text = _EMPHASIS.sub(r"\2", remove_invisible(text))
    refuse_what_is_no_report(text)
    while SPECIAL_TOKEN.search(text):
        text = SPECIAL_TOKEN.sub(" ", text)
    sections, left_out = _sections_of(lines_of(text))
    for sentence in (*sections[0], *sections[1]):
        if inner := _DRAFTS_HEADING.search(sentence):
            raise ContextError(
                f"the template has {inner.group()} inside a sentence: put the heading on its own line, and use plain "
                "text"
            )
    if not sections[0]:
        raise ContextError("the template has no findings: give the sentences of a normal report")
    return Template(
        tuple(sections[0]), tuple(sections[1]), is_english([*sections[0], *sections[1]]), tuple(dict.fromkeys(left_out))
    )


def _sections_of(lines: Sequence[tuple[int, str]]) -> tuple[tuple[list[str], list[str]], list[str]]:
    """The sentences of findings and impression in numbered lines, and what was left out."""
    sections: tuple[list[str], list[str]] = ([], [])
    left_out: list[str] = []
    place, signed = 0, False
    passed_over = ""  # heading of what is not drafted, with its line
    names = [start[1] if (start := HEADING.match(f"{line}:")) else "" for _, line in lines]
    starts = [section_of(name, False) for name in names]
    concludes = 1 in starts
    # What stands before the first section if the findings have their heading ("Results" may be any label).
    preamble = any(section == section_of(name, True) == 0 for section, name in zip(starts, names, strict=True))
    for index, (number, line) in enumerate(lines):
        if 0 not in starts[index:]:  # else its text goes on up to the findings or to another label
            passed_over = ""
        for sentence in split_text(line):
            heading = HEADING.match(sentence)
            name, rest = (heading[1], sentence[heading.end() :]) if heading else (sentence.rstrip(" .:："), "")
            section = section_of(name, bool(sections[0]) and not concludes)
            if section is not None:
                place, sentence, passed_over, preamble = section, rest, "", False
            elif heading:
                passed_over = f"{name.upper()} (line {number})" if is_not_drafted(name) else ""
                sentence = rest if passed_over else sentence
            complete = _ENDED.search(sentence)
            signed = signed and section is None and not complete
            if not re.search(r"\w", sentence):
                continue
            sentence = sentence if complete else f"{sentence.rstrip(' ,;')}."
            told = f"Line {number} of the template {{}}: this sentence was left out."
            if passed_over:
                left_out.append(f"The template's {passed_over} holds for one study only and was left out.")
            elif kind := private_content(sentence) or ("a signature" if signed else None):
                signed = kind == "a signature"
                left_out.append(told.format(f"has what looks like {kind}"))
            elif preamble:
                left_out.append(told.format("stands before its findings"))
            elif normalize(sentence) in map(normalize, sections[place]):
                left_out.append(told.format("repeats a sentence of its section"))
            else:
                sections[place].append(sentence)
    return sections, left_out


def read_template(text: str) -> str:
    """Parse a normal report and format it as ``FINDINGS: … IMPRESSION: …``; see :func:`parse_template`.

    Raises:
        ContextError: as :func:`parse_template`.
    """
    return parse_template(text).text


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
