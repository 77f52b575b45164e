"""What a draft may contain: both headings once and in order, whole sentences, known words, the template verbatim.

After each sentence, the next one is the template's next sentence, a free sentence, the next heading, or the end. A
template's sentence or a heading is forced token by token; the language model reads it, so later text can depend on it.
In a free sentence, the language model may use all words of the lexicon (:mod:`cbedge.drafting.lexicon`), but neither
headings nor stop tokens. A section ends when it repeats itself, or is longer than any report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cbedge.drafting.lexicon import Lexicon
from cbedge.sentences import ends_sentence, normalize

MAX_FREE = 16  # free sentences in a section
MAX_REPEATS = 2  # repeated sentences (which the sentence filter removes) before a section ends
LONG_SENTENCE = 300  # characters: no new word starts after this length
LONGEST_SENTENCE = 400  # characters: the sentence is ended at this length


@dataclass(frozen=True)
class SectionPlan:
    """The content of one section of a draft.

    Attributes:
        heading: token ids of the heading.
        sentences: token ids of the forced sentences, in order.
        max_free: maximum number of free sentences after them.
        earlier: sentences that are already there, such as the opening of the findings.
    """

    heading: tuple[int, ...]
    sentences: tuple[tuple[int, ...], ...] = ()
    max_free: int = MAX_FREE
    earlier: tuple[str, ...] = ()


class _State(NamedTuple):
    section: int
    forced: tuple[int, ...]  # the rest of the current heading or forced sentence
    position: int = 0  # index of the section's next forced sentence
    earlier: tuple[str, ...] = ()  # normalized sentences of the section so far
    free_count: int = 0
    repeats: int = 0
    text: str = ""  # of the current free sentence
    run: str = ""  # its last, unfinished word or gap
    ended: bool = True  # whether the last sentence is complete
    stopped: bool = False


class TokenTexts:
    """The text of each token, and which tokens may continue a word. One instance serves all drafts of a generator.

    Args:
        text_of: maps a token id to the text that it adds.
        size: size of the vocabulary, V.
        special: tokens that are written only where they are forced.
        lexicon: known words; ``None`` allows every word.
        base: an instance for the same tokens with fewer words, whose decoded texts are shared.
    """

    def __init__(
        self,
        text_of: Callable[[int], str],
        size: int,
        special: frozenset[int],
        lexicon: Lexicon | None,
        base: TokenTexts | None = None,
    ):
        self._base = base
        self.text_of, self.size, self.special, self.lexicon = text_of, size, special, lexicon
        self._masks: dict[str, np.ndarray] = {}

    def extended(self, texts: Sequence[str]) -> TokenTexts:
        """This instance with the words of some texts added; itself if it knows them all."""
        if self.lexicon is None or all(map(self.lexicon.knows, texts)):
            return self
        return TokenTexts(self.text_of, self.size, self.special, self.lexicon.extended(texts), self)

    @cached_property
    def _static(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        if self._base is not None:
            return self._base._static
        texts = [self.text_of(token) for token in range(self.size)]
        kinds = (
            lambda token, text: token not in self.special and writable(text),
            lambda _, text: text[:1].isspace(),
            lambda _, text: begins_sentence(text),
            lambda _, text: text.isdigit(),
        )
        masks = [np.array([bool(kind(*pair)) for pair in enumerate(texts)]) for kind in kinds]
        return (texts, *masks)  # type: ignore[return-value]

    @property
    def usable(self) -> np.ndarray:
        """Tokens that may occur in a sentence, bool [V]."""
        return self._static[1]

    @property
    def space_starts(self) -> np.ndarray:
        """Tokens that start with white space, bool [V]."""
        return self._static[2]

    @property
    def sentence_starts(self) -> np.ndarray:
        """Tokens that may start a sentence, bool [V]."""
        return self._static[3]

    @property
    def digits(self) -> np.ndarray:
        """Tokens that consist of digits, bool [V]."""
        return self._static[4]

    def continues(self, run: str, token_text: str) -> bool:
        """Whether a token may follow an unfinished run; a token that ends a sentence must also complete the word."""
        if self.lexicon is None:
            return True
        followed = self.lexicon.follow(run, token_text)
        return followed is not None and (not token_text.endswith((".", "?", "!")) or self.lexicon.complete(followed))

    def continuing(self, run: str) -> np.ndarray:
        """:meth:`continues` for every token, bool [V]."""
        if run not in self._masks:
            texts = self._static[0]
            if self.lexicon is None:
                mask = np.ones(self.size, bool)
            elif run[-1:].isalpha():  # after a complete word, anything but a letter starts a gap
                gap = self.continuing("") if self.lexicon.complete(run) else np.zeros(self.size, bool)
                mask = np.array(
                    [
                        self.continues(run, text) if text[:1].isalpha() else bool(known)
                        for text, known in zip(texts, gap, strict=True)
                    ]
                )
            else:
                mask = np.array([self.continues(run, text) for text in texts])
            self._masks[run] = mask
        return self._masks[run]


def writable(text: str) -> bool:
    """Whether a token's text may occur in a sentence."""
    return bool(text) and "\n" not in text and "\ufffd" not in text


def begins_sentence(text: str) -> bool:
    """Whether a token's text may start a sentence: a space, then a digit or a letter that is not in lower case."""
    return text[:1].isspace() and (text[1:2].isdigit() or (text[1:2].isalpha() and not text[1].islower()))


class DraftConstraint:
    """Determines which tokens may follow any text; implements :class:`cbedge.decoding.Constraint`.

    Args:
        sections: plans of findings and impression.
        opening: token ids of the draft's opening with its heading; ``earlier`` of the first plan has its sentences.
        stop_ids: tokens that end a report.
        tokens: texts of the tokens, and known words.
        full_stop: token id of a full stop.
    """

    def __init__(
        self,
        sections: tuple[SectionPlan, SectionPlan],
        opening: Sequence[int],
        stop_ids: Sequence[int],
        tokens: TokenTexts,
        full_stop: int,
    ):
        self.sections, self._stop, self.tokens, self._full_stop = sections, tuple(stop_ids), tokens, full_stop
        self._text, self._special = tokens.text_of, tokens.special | {*stop_ids}
        first = sections[0]
        root = _State(0, () if opening else first.heading, earlier=tuple(map(normalize, first.earlier)))
        self._states: dict[tuple[int, ...], _State] = {tuple(opening): root}

    def forced(self, written: Sequence[int]) -> list[int]:
        """The tokens that must follow, up to the next free choice; empty if the next token is free."""
        state, run = self._state(tuple(written)), []
        while not state.stopped and (tokens := self._forced_next(state)):
            for token in tokens:
                run.append(token)
                state = self._after(state, token)
        return run

    def allows(self, written: Sequence[int], token: int) -> bool:
        """Whether a token may follow, if none is forced."""
        return self._allowed(self._state(tuple(written)), token)

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        """Which tokens may follow, bool [V]."""
        state = self._state(tuple(written))
        if forced := self._forced_next(state):
            mask = np.zeros(self.tokens.size, bool)
            mask[forced[0]] = True
            return mask
        tokens = self.tokens
        if state.ended:
            mask = tokens.sentence_starts & tokens.continuing("")
            if state.text and state.text.rstrip(".")[-1:].isdigit():
                mask |= tokens.digits & tokens.continuing(state.run)
        else:
            mask = tokens.continuing(state.run).copy()
            if len(state.text) > LONG_SENTENCE:
                mask &= ~tokens.space_starts
        mask &= tokens.usable
        mask[[*self._stop]] = False
        section_end = self._section_end(state)[0]
        if state.section == 0:
            mask[section_end] = False
        if self._may_end_section(state):
            mask[section_end] = True
        return mask

    def begins_word(self, token: int) -> bool:
        """Whether a token starts a word. Repetition is controlled only there, so that no word is broken."""
        text = self._text(token)
        return text[:1].isspace() and text[1:2].isalpha()

    def _state(self, written: tuple[int, ...]) -> _State:
        missing = 0
        while written[: len(written) - missing] not in self._states:
            missing += 1
        state = self._states[written[: len(written) - missing]]
        for at in range(len(written) - missing, len(written)):
            state = self._after(state, written[at])
            self._states[written[: at + 1]] = state
        return state

    def _forced_next(self, state: _State) -> tuple[int, ...]:
        if state.forced:
            return state.forced
        plan = self.sections[state.section]
        if not state.ended:
            return (self._full_stop,) if len(state.text) > LONGEST_SENTENCE else ()
        counted = self._counted(state)
        if counted.position < len(plan.sentences):
            return plan.sentences[counted.position]
        if counted.free_count >= plan.max_free or counted.repeats >= MAX_REPEATS:
            return self._section_end(state)
        return ()

    def _section_end(self, state: _State) -> tuple[int, ...]:
        return self.sections[1].heading if state.section == 0 else self._stop[:1]

    def _counted(self, state: _State) -> _State:
        """The state after counting the free sentence that just ended."""
        if not state.text:
            return state
        sentence = normalize(state.text)
        repeated = sentence in state.earlier
        return state._replace(
            earlier=state.earlier if repeated else (*state.earlier, sentence),
            free_count=state.free_count + 1,
            text="",
            run="",
            repeats=state.repeats + repeated,
        )

    def _may_end_section(self, state: _State) -> bool:
        counted = self._counted(state)
        return state.ended and bool(counted.earlier or counted.position)

    def _after(self, state: _State, token: int) -> _State:
        if state.stopped:
            return state
        plan = self.sections[state.section]
        if state.forced and state.forced[0] == token:
            return state._replace(forced=state.forced[1:])
        if not state.forced and state.ended:
            counted = self._counted(state)
            if counted.position < len(plan.sentences) and plan.sentences[counted.position][0] == token:
                return counted._replace(forced=plan.sentences[counted.position][1:], position=counted.position + 1)
            if token in self._stop:
                return counted._replace(stopped=True)
            if state.section == 0 and token == self.sections[1].heading[0]:
                earlier = tuple(map(normalize, self.sections[1].earlier))
                return _State(1, self.sections[1].heading[1:], earlier=earlier)
            text = self._text(token)
            if state.text and not text[:1].isspace():
                counted, text = state, state.text + text
        elif token in self._stop:
            return state._replace(stopped=True)
        else:
            counted, text = state, state.text + self._text(token)
        lexicon = self.tokens.lexicon
        followed = lexicon.follow(counted.run, self._text(token)) if lexicon else ""
        ended = ends_sentence(text) or (token == self._full_stop and len(state.text) > LONGEST_SENTENCE)
        return counted._replace(forced=(), text=text, run=followed or "", ended=ended)

    def _allowed(self, state: _State, token: int) -> bool:
        section_end = self._section_end(state)
        if state.ended and token == section_end[0]:
            return self._may_end_section(state)
        if token in self._special or (state.section == 0 and token == self.sections[1].heading[0]):
            return False
        text = self._text(token)
        if not writable(text):
            return False
        if state.ended:
            if begins_sentence(text):
                return self.tokens.continues("", text)
            if not (state.text and text.isdigit() and state.text.rstrip(".")[-1:].isdigit()):
                return False
        elif len(state.text) > LONG_SENTENCE and text[0].isspace():
            return False
        return self.tokens.continues(state.run, text)
