"""What of a draft the model does not assess on these radiographs, and how the draft shows it.

A sentence is not assessed if it states or denies a finding that the model does not assess reliably
(:meth:`cbedge.findings.image_findings.ImageFindings.unassessed`), has no score for, or neither states nor rules out on
these radiographs (:meth:`~cbedge.findings.image_findings.ImageFindings.uncertain`), or if it is not in English. By
default it is marked. A sentence that such a finding's score speaks against is marked whatever the user chose, unless it
is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from cbedge.drafting.assertions import may_concern
from cbedge.errors import OptionError
from cbedge.findings.image_findings import AnyPattern, ImageFindings
from cbedge.report import MARK, MARKED, OMITTED, DraftToken, Sentence
from cbedge.sentences import normalize

SHOWN_AS = (MARKED, OMITTED, "plain")
MARK_TOKEN = DraftToken(MARK, None)
LEFT_OUT_TOKEN = DraftToken(" Left out: this model does not assess it.", None)


def check_shown_as(name: str) -> None:
    """Check the name of a way to show unassessed sentences.

    Raises:
        OptionError: there is no such way.
    """
    if not isinstance(name, str) or name not in SHOWN_AS:
        raise OptionError(f"unknown way to show unassessed sentences {str(name)[:20]!r}; give mark, omit or plain")


@dataclass(frozen=True)
class Assessment:
    """Tells which sentences of a draft are not assessed.

    Attributes:
        unassessed: the findings that are not assessed, each with the expressions of sentences that contradict it.
        above: those of them whose scores reach their thresholds.
        openings: the sentences that state image findings, normalized; they are assessed.
        foreign: sentences in another language than English, normalized.
        shown_as: one of :data:`SHOWN_AS`.
        uncertain: the assessed findings that the scores neither state nor rule out, each with its expressions.
            Sentences on them count as not assessed.
    """

    unassessed: dict[str, tuple[str, ...]]
    above: tuple[str, ...] = ()
    openings: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()
    shown_as: str = MARKED
    uncertain: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def findings_of(self, sentence: str) -> tuple[str, ...]:
        """The unassessed and uncertain findings that a sentence states or denies, of one in another language all."""
        normalized = normalize(sentence)
        if normalized in self.openings:
            return ()
        if normalized in self.foreign:
            return (*self.unassessed, *self.uncertain)
        rows = (*self.unassessed.items(), *self.uncertain.items())
        return tuple(name for name, denials in rows if _concerns(sentence, name, denials))

    def label(self, sentence: Sentence) -> Sentence:
        """The sentence with what is known of it."""
        found = self.findings_of(sentence.text)
        assessed = not found and normalize(sentence.text) not in self.foreign
        marked = self.shown_as != OMITTED and self._is_marked(sentence.text, assessed, found)
        return replace(sentence, assessed=assessed, unassessed=found, marked=marked)

    def is_marked(self, sentence: str) -> bool:
        """Whether the draft marks a sentence, or leaves it out if unassessed sentences are left out."""
        found = self.findings_of(sentence)
        return self._is_marked(sentence, not found and normalize(sentence) not in self.foreign, found)

    def _is_marked(self, sentence: str, assessed: bool, found: tuple[str, ...]) -> bool:
        return not assessed and (self.shown_as in (MARKED, OMITTED) or not {*found}.isdisjoint(self.above))


def compile_expressions(findings: ImageFindings) -> None:
    """Compile the regular expressions that drafts need, so that a process's first draft need not wait for it.

    Raises:
        BundleError: a denial is not a regular expression.
    """
    for name in findings.names:
        may_concern("Nothing.", name)  # it denies something and names nothing, so all words are looked for
        AnyPattern(findings.denials_of(name)).search("")


@lru_cache(4096)  # templates repeat their sentences, and drafts of a language model are much alike
def _concerns(sentence: str, finding: str, denials: tuple[str, ...]) -> bool:
    return may_concern(sentence, finding) or AnyPattern(denials).search(sentence)
