"""Sentences that contradict what opened the draft, left out as they are written.

A draft begins with a sentence for each finding that is told (:mod:`cbedge.image_findings`). A small language model may
go on as it usually does and call the lungs clear behind an opacity. A bundle says by which words such a sentence is
known, and it is not printed; the language model has read it, and goes on after it.
"""

from __future__ import annotations

import re

from cbedge.report import Spoken


class Watch:
    """Lets the tokens of a draft through, whole sentences at a time where there is something to contradict.

    Args:
        denied: what is found in sentences to leave out; ``None`` lets every token through at once.
    """

    def __init__(self, denied: re.Pattern[str] | None):
        self.denied = denied
        self._held: list[Spoken] = []
        self._heading: list[Spoken] = []

    def add(self, word: Spoken) -> list[Spoken]:
        """One more token; returns those that may be said now."""
        if self.denied is None:
            return [word]
        ended = self._text().rstrip().endswith((".", "?", "!", ":")) and word.piece[:1].isspace()
        said = self.end() if ended else []
        self._held.append(word)
        return said

    def end(self) -> list[Spoken]:
        """What is still held, where the sentence or the draft ends; a heading waits for a sentence under it."""
        held, text, self._held = self._held, self._text().strip(), []
        if not text or self.denied is None:
            return held
        if text.endswith(":"):
            self._heading = held
            return []
        if self.denied.search(text):
            return []
        heading, self._heading = self._heading, []
        return [*heading, *held]

    def _text(self) -> str:
        return "".join(word.piece for word in self._held)
