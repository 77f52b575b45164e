"""Normal reports in the wording of the house, to one of which a draft keeps.

Radiologists write most of a report by template: the usual sentences on a normal chest, of which they change what the
image shows otherwise. Which template is usual depends on who asks and why, more than on the image. So a bundle holds
some templates and a small linear classifier that chooses one by the words of indication and comparison, for studies in
which nothing abnormal is seen; or a user gives one of their own, for all. While the draft is written, the tokens with
which the template goes on are favoured: the language model leaves it where something else is much likelier (a lexical
constraint, after Hokamp and Liu, ACL 2017, but a soft one). Sentences that contradict what was seen are no part of the
template then.

A bundle's template is made of sentences that several training reports share, and says of no finding that it is there.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cbedge.errors import BundleError, ContextError
from cbedge.phrasebook import GuessSource
from cbedge.prompt import MAX_CONTEXT_CHARACTERS, ClinicalContext, build_target, clean_context, split_sections

BUCKETS = 8192
LENGTHS = (2, 5)  # of the runs of characters that are counted, of a word with a space on either side
# Added to logits; chosen on validation studies (training/RUNS.md).
FAVOUR = 8.0  # for the next token of the template's next sentence
LATER = 3.0  # less, for each sentence that is skipped so
SENTENCE_END = (".", "?", "!", ":")
_SENTENCE = re.compile(r"(?<=[.?!])\s+")


def read_template(text: str) -> str:
    """A normal report as ``FINDINGS: … IMPRESSION: …``, cleaned as the clinical context is; the impression may lack.

    Raises:
        ContextError: it is no text, has no findings or is too long.
    """
    if not isinstance(text, str):
        raise ContextError(f"the template must be text, not {type(text).__name__}")
    if len(text) > MAX_CONTEXT_CHARACTERS:
        raise ContextError(
            f"the template has {len(text):,} characters; at most {MAX_CONTEXT_CHARACTERS:,} are taken: shorten it"
        )
    findings, impression = (clean_context(part) for part in split_sections(text))
    if not findings:
        raise ContextError("the template has no findings: give the sentences of a normal report")
    return build_target(f"{findings}.", f"{impression}." if impression else None)


class Templates:
    """Templates, and which of them is usual for a clinical context.

    Args:
        texts: the templates, each ``FINDINGS: … IMPRESSION: …``.
        weights: of the classifier, float32 [F, K]: features of :func:`context_features`, templates.
        bias: float32 [K].

    Raises:
        ValueError: there is none, or the sizes do not fit.
    """

    def __init__(self, texts: Sequence[str], weights: np.ndarray, bias: np.ndarray):
        if not texts or weights.ndim != 2 or weights.shape[1] != len(texts) or bias.shape != (len(texts),):
            raise ValueError(f"{len(texts)} templates with weights {weights.shape} and bias {bias.shape}")
        self.texts = tuple(texts)
        self._scale = np.maximum(np.abs(weights).max(0), 1e-12).astype(np.float32) / 127
        self._weights = np.round(weights / self._scale).astype(np.int8)
        self._bias = bias.astype(np.float32)

    def choose(self, context: ClinicalContext) -> str:
        """The template that is usual for a context."""
        buckets, values = context_features(context, len(self._weights))
        rows = self._weights[buckets].astype(np.float32)
        return self.texts[int((values @ rows * self._scale + self._bias).argmax())]

    def save(self, path: Path) -> None:
        """Write ``templates.npz``, weights in 8 bits."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file, texts=np.array(self.texts), weights=self._weights, scale=self._scale, bias=self._bias
            )

    @classmethod
    def load(cls, path: Path) -> Templates:
        """Read what :meth:`save` wrote.

        Raises:
            BundleError: the file holds no templates.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                texts = [str(text) for text in arrays["texts"]]
                return cls(texts, arrays["weights"] * arrays["scale"], arrays["bias"])
        except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile):
            raise BundleError(f"{path.name} in {path.parent} holds no templates: export the bundle again") from None


def context_features(context: ClinicalContext, buckets: int = BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """Runs of characters in the words of indication and comparison, hashed and counted: (buckets, values).

    Values are 1 + log of the count, scaled to length 1; both are of one size, int64 and float32.
    """
    counts: Counter[int] = Counter()
    for word in f"{context.indication or ''} | {context.comparison or ''}".split():
        padded = f" {word} "
        for size in range(LENGTHS[0], LENGTHS[1] + 1):
            for start in range(max(1, len(padded) - size + 1)):
                counts[zlib.crc32(padded[start : start + size].encode()) % buckets] += 1
    values = np.array([1 + math.log(count) for count in counts.values()], np.float32)
    return np.array([*counts], np.int64), values / max(float(np.linalg.norm(values)), 1e-12)


class Keeping:
    """Keeps one draft to a template: which tokens go on as it does, and by how much they are favoured.

    What is written is parted after each token that ends a sentence, and so is the template. Where a sentence begins,
    the template's next ones are favoured, the first most; within one that began as the template's, its next token. A
    sentence that the language model passes over is not come back to.

    Args:
        findings, impression: the template's tokens; the impression's are empty where it is left to the language model.
        headings: tokens of the two headings.
        stop_ids: tokens that end a report.
        ends: tokens that end a sentence.
        open_end: something was seen that no sentence says yet: the end of the findings is not favoured before one of
            the language model's own.
        other: guesses where the template does not.
    """

    def __init__(
        self, findings: Sequence[int], impression: Sequence[int], headings: tuple[Sequence[int], Sequence[int]],
        stop_ids: Sequence[int], ends: Collection[int], open_end: bool = False, other: GuessSource | None = None,
    ):  # fmt: skip
        self._ends, self._stop, self._open_end, self._other = ends, tuple(stop_ids), open_end, other
        self._first, self._second = (tuple(heading) for heading in headings)
        self._findings, self._impression = (self._part(tokens) for tokens in (findings, impression))
        self._known: dict[tuple[int, ...], dict[int, float]] = {}

    @property
    def words_findings(self) -> bool:
        """Whether the findings keep to the template, and not the impression alone."""
        return bool(self._findings)

    def favoured(self, written: Sequence[int]) -> dict[int, float]:
        """What is to be added to the logits of which tokens, after what is written of the draft."""
        so_far = tuple(written)
        if so_far not in self._known:  # what is guessed is asked for again when it is checked
            self._known[so_far] = self._favoured(so_far)
        return self._known[so_far]

    def _favoured(self, written: tuple[int, ...]) -> dict[int, float]:
        if len(written) < len(self._first):
            begun = written == self._first[: len(written)]
            return {self._first[len(written)]: FAVOUR} if begun else {}
        sentences = self._part(written)
        now = sentences.pop() if sentences and sentences[-1][-1] not in self._ends else ()
        concluding = self._second in sentences
        template = self._impression if concluding else self._findings
        if not template:
            return {}
        said = sentences[sentences.index(self._second) + 1 :] if concluding else sentences
        last = max((template.index(sentence) for sentence in said if sentence in template), default=-1)
        left = template[last + 1 :]
        after = self._stop[:1] if concluding else self._second
        if not left and not now and self._open_end and not concluding and {*said} <= {self._first, *template}:
            return {}
        added: dict[int, float] = {}
        for skipped, sentence in enumerate([*left, after] if now else left or [after]):
            if sentence[: len(now)] == now and len(sentence) > len(now):
                added.setdefault(sentence[len(now)], FAVOUR - LATER * skipped)
        return added

    def guess(self, written: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow what is written: the template's, and where it has none the other
        source's."""
        guesses: list[int] = []
        while len(guesses) < count:
            so_far = [*written, *guesses]
            added = self.favoured(so_far)
            best = max(added, key=lambda token: added[token], default=None)
            if best is not None and added[best] > 0:
                guesses.append(best)
            elif self._other and (more := self._other.guess(so_far, 1)):
                guesses += more
            else:
                break
        return guesses

    def _part(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        sentences: list[tuple[int, ...]] = []
        start = 0
        for at, token in enumerate(tokens, 1):
            if token in self._ends or at == len(tokens):
                sentences.append(tuple(tokens[start:at]))
                start = at
        return sentences


def without(text: str, denied: re.Pattern[str] | None) -> str:
    """The text without the sentences in which something denied is found."""
    return " ".join(s for s in _SENTENCE.split(text) if not (denied and denied.search(s)))
