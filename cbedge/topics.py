"""What the findings of a report usually speak of, and how a draft that left something out is asked for it.

A small language model ends many drafts early: it says nothing of the pleura or the bones, which a reader then has to
dictate. Where the findings would end with a topic untouched, the draft is given the first words of a sentence on it,
and the language model, which has read the image, writes the rest (a lexical constraint on greedy decoding, after Hokamp
and Liu, ACL 2017).
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One thing that reports usually speak of.

    Attributes:
        name: for people.
        words: beginnings or parts of words, in lower case; a text that holds one of them speaks of the topic.
        start: the first words of a sentence on it.

    Raises:
        ValueError: there are no words, or no start.
    """

    name: str
    words: tuple[str, ...]
    start: str

    def __post_init__(self) -> None:
        if not all(self.words) or not self.words or not self.start.strip():
            raise ValueError(f"the topic {self.name!r} needs words and a start")


def left_out(topics: Iterable[Topic], findings: str) -> list[Topic]:
    """The topics that a text does not speak of, in order."""
    text = findings.lower()
    return [topic for topic in topics if not any(word in text for word in topic.words)]
