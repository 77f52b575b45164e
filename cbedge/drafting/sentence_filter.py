"""The last check of a draft, sentence by sentence: sentences that fail it are removed before anything is shown.

A free sentence of the language model is removed if it contradicts an image finding (a small language model may write
that the lungs are clear after it stated an opacity), if an earlier sentence of its section has all its words, so that
it repeats or contradicts that sentence, if it has an unknown word, or if it is incomplete or a fragment; beside a
user's template also if it states a finding without an image score, or in the impression if it is not understood.
Opening sentences and template sentences are fixed and always pass. A section heading is held back until a sentence
follows.

Sentences that the model does not assess are marked or left out as the user chose (:mod:`cbedge.drafting.assessment`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

from cbedge.drafting.assertions import is_fragment, stated_by, understood
from cbedge.drafting.assessment import LEFT_OUT_TOKEN, MARK_TOKEN, Assessment
from cbedge.drafting.lexicon import Lexicon
from cbedge.findings.image_findings import OTHER, AnyPattern
from cbedge.report import OMITTED, DraftToken
from cbedge.sentences import ends_sentence, normalize, sentence_spans


class SentenceFilter:
    """Passes on the tokens of a draft, one accepted sentence at a time.

    Args:
        denied: matches sentences to remove; ``None`` for no such check.
        lexicon: known words; ``None`` accepts every word.
        fixed: sentences that always pass, such as a template's.
        affirming: remove sentences of the findings section that deny something, unless they are fixed.
        supported: the only findings that free sentences may state, and that those of the impression have to be
            understood to agree with; ``None`` for no such check.
        assessment: tells which sentences are not assessed; ``None`` for no such check.

    Attributes:
        accepted: the accepted sentences, normalized, of findings and impression.
        left_out: the sentences that were left out because they are not assessed, normalized.
        has_unknown_word: whether a sentence was removed because of an unknown word.
    """

    def __init__(
        self,
        denied: AnyPattern | None = None,
        lexicon: Lexicon | None = None,
        fixed: Sequence[str] = (),
        affirming: bool = False,
        supported: Collection[str] | None = None,
        assessment: Assessment | None = None,
    ):
        self._denied, self._lexicon, self._affirming, self._supported = denied, lexicon, affirming, supported
        self._fixed = {normalize(sentence) for sentence in fixed}
        self._indivisible = {"FINDINGS:", "IMPRESSION:", *fixed}  # not split at full stops inside, as in "Dr. X."
        self._assessment = assessment
        self.accepted: tuple[list[str], list[str]] = ([], [])
        self.left_out: tuple[set[str], set[str]] = (set(), set())
        self.has_unknown_word = False
        self._section = 0
        self._pending: list[DraftToken] = []
        self._heading: list[DraftToken] = []

    def add(self, token: DraftToken) -> Iterator[DraftToken]:
        """Add a token; yields the tokens of the sentences accepted so far."""
        if self._text().strip() in self._indivisible:
            yield from self._flush()
        self._pending.append(token)
        spans = sentence_spans(self._text())
        if len(spans) < 2:
            return
        # A token may be a single space, which belongs to the next sentence.
        lengths = accumulate(len(one.piece) for one in self._pending)
        ended = 1 + next(at for at, length in enumerate(lengths) if length >= spans[0][1])
        rest, self._pending = self._pending[ended:], self._pending[:ended]
        yield from self._flush()
        self._pending = rest

    def end(self) -> Iterator[DraftToken]:
        """End the draft: yields the last sentence if it is complete and accepted."""
        yield from self._flush()
        if self._section == 0:
            yield from self._end_findings()

    def _flush(self) -> Iterator[DraftToken]:
        pending, text, self._pending = self._pending, self._text().strip(), []
        for place, name in enumerate(("FINDINGS:", "IMPRESSION:")):
            if text == name:
                if place:
                    yield from self._end_findings()
                self._section, self._heading = place, pending
                return
        begins = text.startswith(
            "FINDINGS: "
        )  # one token may span the end of the heading and the start of the sentence
        text = text.removeprefix("FINDINGS: ")
        if not self._passes(text):
            return
        marked = self._assessment is not None and self._assessment.is_marked(text)
        if marked and self._assessment is not None and self._assessment.shown_as == OMITTED:
            self.left_out[self._section].add(normalize(text))
            self._heading = [DraftToken("FINDINGS:", None)] if begins else self._heading
            return
        self.accepted[self._section].append(normalize(text))
        heading, self._heading = self._heading, []
        yield from heading
        yield from pending
        if marked:
            yield MARK_TOKEN

    def _end_findings(self) -> Iterator[DraftToken]:
        """Say that nothing is left of the findings if all were left out."""
        if self.left_out[0] and not self.accepted[0]:
            heading, self._heading = self._heading, []
            yield from [*heading, LEFT_OUT_TOKEN]

    def _passes(self, text: str) -> bool:
        normalized = normalize(text)
        if not normalized or normalized in self.accepted[self._section]:
            return False
        if normalized in self._fixed:
            return True
        if not ends_sentence(text) or self._adds_nothing(normalized) or is_fragment(text):
            return False
        if self._denied is not None and self._denied.search(text):
            return False
        if self._affirming and self._section == 0 and DENIES.search(text):
            return False
        if self._supported is not None and not self._agrees(text, self._supported):
            return False
        if self._lexicon is not None and not self._lexicon.knows(text):
            self.has_unknown_word = True
            return False
        return True

    def _agrees(self, text: str, present: Collection[str]) -> bool:
        """Whether a free sentence states only findings that are present. One of the impression also has to be
        understood; if all that is known is an abnormal score, only the conclusion says that."""
        if not self._section:
            return {*stated_by(text)} <= {*present} - {OTHER}
        return {*present} != {OTHER} and understood(text, present)

    def _adds_nothing(self, normalized: str) -> bool:
        """Whether an accepted sentence of the section has all words of a sentence, apart from function words."""
        words = _content(normalized)
        return any(words <= _content(accepted) for accepted in self.accepted[self._section])

    def _text(self) -> str:
        return "".join(token.piece for token in self._pending)


def _content(normalized: str) -> set[str]:
    """The words of a sentence that say something; of words with the same meaning, one."""
    return {_SAME.get(word, word) for word in normalized.split()} - _FUNCTION_WORDS


_SAME = {"osseous": "bony", "skeletal": "bony", "abnormality": "finding"} | dict.fromkeys(
    ("abnormalities", "findings", "pathology"), "finding"
)
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and any are as at be been both by evidence for has have identified in is it its no not noted of on or "
        "present seen that the there these this to visualized was were with without",
    )
)
DENIES = re.compile(
    r"\b(no|not|without|normal|normally|clear|unremarkable|intact|negative|free|within|sharp|midline)\b", re.IGNORECASE
)
