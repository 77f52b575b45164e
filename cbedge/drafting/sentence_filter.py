"""The last check of a draft, sentence by sentence: what fails it is left out, and nothing is shown before it passed.

A sentence of the language model's own is left out where it contradicts a finding that the image scores point to (a
small language model may call the lungs clear behind an opacity), where its section says the same already, where it has
a word that nobody knows, and where it does not end. The sentences that open a draft and those of a template are what
they are. A section's heading waits for a sentence under it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

from cbedge.drafting.lexicon import Lexicon
from cbedge.report import DraftToken
from cbedge.sentences import ends_sentence, normalize, sentence_spans


class SentenceFilter:
    """Lets the tokens of a draft through, whole sentences at a time.

    Args:
        denied: what is found in sentences to leave out; ``None`` for nothing.
        lexicon: known words; ``None`` knows all.
        given: sentences that stand as they are, such as a template's.
        affirming: leave out of the findings what denies anything, unless it is given.

    Attributes:
        said: the sentences let through, normalized, of findings and impression.
        unknown: whether a sentence was left out because of a word that nobody knows.
    """

    def __init__(
        self, denied: re.Pattern[str] | None = None, lexicon: Lexicon | None = None, given: Sequence[str] = (),
        affirming: bool = False,
    ):  # fmt: skip
        self._denied, self._lexicon, self._affirming = denied, lexicon, affirming
        self._given = {normalize(sentence) for sentence in given}
        self._whole = {"FINDINGS:", "IMPRESSION:", *given}  # these end where they end, also with "Dr. X."
        self.said: tuple[list[str], list[str]] = ([], [])
        self.unknown = False
        self._section = 0
        self._held: list[DraftToken] = []
        self._heading: list[DraftToken] = []

    def add(self, token: DraftToken) -> Iterator[DraftToken]:
        """One more token; yields those that may be said now."""
        if self._text().strip() in self._whole:
            yield from self._flush()
        self._held.append(token)
        spans = sentence_spans(self._text())
        if len(spans) < 2:
            return
        # A space alone may be a token: it belongs to what follows.
        lengths = accumulate(len(one.piece) for one in self._held)
        ended = 1 + next(at for at, length in enumerate(lengths) if length >= spans[0][1])
        rest, self._held = self._held[ended:], self._held[:ended]
        yield from self._flush()
        self._held = rest

    def end(self) -> Iterator[DraftToken]:
        """What is still held, where the draft ends: a whole sentence; what was begun is left out."""
        yield from self._flush()

    def _flush(self) -> Iterator[DraftToken]:
        held, text, self._held = self._held, self._text().strip(), []
        for place, name in enumerate(("FINDINGS:", "IMPRESSION:")):
            if text == name:
                self._section, self._heading = place, held
                return
        if text.startswith("FINDINGS: "):  # tokens that hold the heading's end and a sentence's beginning
            text = text.removeprefix("FINDINGS: ")
        if self._passes(text):
            self.said[self._section].append(normalize(text))
            heading, self._heading = self._heading, []
            yield from heading
            yield from held

    def _passes(self, text: str) -> bool:
        known = normalize(text)
        if not known or known in self.said[self._section]:
            return False
        if known in self._given:
            return True
        if not ends_sentence(text):
            return False
        if self._denied is not None and self._denied.search(text):
            return False
        if self._affirming and self._section == 0 and DENIES.search(text):
            return False
        if self._lexicon is not None and not self._lexicon.knows(text):
            self.unknown = True
            return False
        return True

    def _text(self) -> str:
        return "".join(token.piece for token in self._held)


DENIES = re.compile(
    r"\b(no|not|without|normal|normally|clear|unremarkable|intact|negative|free|within|sharp|midline)\b", re.IGNORECASE
)
