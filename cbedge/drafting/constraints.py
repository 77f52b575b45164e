"""What a draft may say next: both headings once and in order, whole sentences, whole words, a template word for word.

A draft is made of steps between sentences. After each sentence, the next step is the template's next sentence, a
sentence of the language model's own, the next heading or the end. A template's sentence and a heading are forced token
by token; the language model reads them, so what follows knows them. In a sentence of its own, the language model is
free within the lexicon's words (:mod:`cbedge.drafting.lexicon`); headings and the stop token are out of reach there. A
section that says the same sentence twice, or that has more sentences than any report, comes to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from cbedge.drafting.lexicon import Lexicon
from cbedge.sentences import ends_sentence, normalize

MAX_OWN = 16  # sentences of the language model's own in a section
MAX_REPEATS = 2  # sentences that a section may repeat (they are left out of the draft) before it ends
LONG_SENTENCE = 300  # characters: from here on no further word begins
LONGEST_SENTENCE = 400  # characters: here it ends


@dataclass(frozen=True)
class SectionPlan:
    """What one section of a draft holds.

    Attributes:
        heading: its tokens.
        sentences: tokens of the sentences that are forced, in order.
        own: how many sentences the language model may add behind them.
        said: the sentences that stand there before, such as those that open the findings.
    """

    heading: tuple[int, ...]
    sentences: tuple[tuple[int, ...], ...] = ()
    own: int = MAX_OWN
    said: tuple[str, ...] = ()


class _State(NamedTuple):
    section: int
    forced: tuple[int, ...]  # what is left of the heading or sentence that was begun
    at: int = 0  # the section's next forced sentence
    said: tuple[str, ...] = ()  # normalized sentences of the section
    own: int = 0
    repeats: int = 0
    text: str = ""  # of the language model's own sentence that was begun
    run: str = ""  # its last word or gap
    ended: bool = True  # between two sentences
    stopped: bool = False


class TokenTexts:
    """What each token adds to a text, and which tokens continue which words; a generator keeps one for all drafts.

    Args:
        text_of: the text that a token adds.
        size: how many tokens there are.
        special: tokens that are never written but where they are forced.
        lexicon: known words; ``None`` lets every word through.
        base: the same tokens with fewer words, whose texts are decoded already.
    """

    def __init__(
        self, text_of: Callable[[int], str], size: int, special: frozenset[int], lexicon: Lexicon | None,
        base: TokenTexts | None = None,
    ):  # fmt: skip
        self._base = base
        self.text_of, self.size, self.special, self.lexicon = text_of, size, special, lexicon
        self._masks: dict[str, np.ndarray] = {}

    def extended(self, texts: Sequence[str]) -> TokenTexts:
        """The same with the words of some texts as well; itself where it knows them all."""
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
        """Tokens that may stand in a sentence, bool [V]."""
        return self._static[1]

    @property
    def spaced(self) -> np.ndarray:
        """Tokens that begin with white space, bool [V]."""
        return self._static[2]

    @property
    def beginning(self) -> np.ndarray:
        """Tokens that may begin a sentence, bool [V]."""
        return self._static[3]

    @property
    def digits(self) -> np.ndarray:
        """Tokens of digits alone, bool [V]."""
        return self._static[4]

    def continues(self, run: str, token_text: str) -> bool:
        """Whether a token continues known words behind the begun run; one that ends a sentence ends the word too."""
        if self.lexicon is None:
            return True
        followed = self.lexicon.follow(run, token_text)
        return followed is not None and (not token_text.endswith((".", "?", "!")) or self.lexicon.complete(followed))

    def continuing(self, run: str) -> np.ndarray:
        """The same for every token, bool [V]."""
        if run not in self._masks:
            texts = self._static[0]
            if self.lexicon is None:
                mask = np.ones(self.size, bool)
            elif run[-1:].isalpha():  # behind a whole word anything but a letter begins a gap
                gap = self.continuing("") if self.lexicon.complete(run) else np.zeros(self.size, bool)
                mask = np.array([
                    self.continues(run, text) if text[:1].isalpha() else bool(known)
                    for text, known in zip(texts, gap, strict=True)
                ])  # fmt: skip
            else:
                mask = np.array([self.continues(run, text) for text in texts])
            self._masks[run] = mask
        return self._masks[run]


def writable(text: str) -> bool:
    """Whether a token's text may stand in a sentence."""
    return bool(text) and "\n" not in text and "\ufffd" not in text


def begins_sentence(text: str) -> bool:
    """Whether a token's text may begin a sentence: a space and a digit, or a letter that is not in lower case."""
    return text[:1].isspace() and (text[1:2].isdigit() or (text[1:2].isalpha() and not text[1].islower()))


class DraftConstraint:
    """Says for everything that may be written what may follow it; a :class:`cbedge.decoding.Constraint`.

    Args:
        sections: plans of findings and impression.
        begun: tokens that the draft begins with, its heading among them, which ``said`` of the first plan describes.
        stop_ids: tokens that end a report.
        tokens: their texts, and known words.
        full_stop: the token of a full stop.
    """

    def __init__(
        self, sections: tuple[SectionPlan, SectionPlan], begun: Sequence[int], stop_ids: Sequence[int],
        tokens: TokenTexts, full_stop: int,
    ):  # fmt: skip
        self.sections, self._stop, self.tokens, self._full_stop = sections, tuple(stop_ids), tokens, full_stop
        self._text, self._special = tokens.text_of, tokens.special | {*stop_ids}
        first = sections[0]
        root = _State(0, () if begun else first.heading, said=tuple(map(normalize, first.said)))
        self._states: dict[tuple[int, ...], _State] = {tuple(begun): root}

    def forced(self, written: Sequence[int]) -> list[int]:
        """The tokens that must follow what is written, up to the next choice; empty where there is one."""
        state, run = self._state(tuple(written)), []
        while not state.stopped and (tokens := self._must(state)):
            for token in tokens:
                run.append(token)
                state = self._after(state, token)
        return run

    def allows(self, written: Sequence[int], token: int) -> bool:
        """Whether a token may follow, where none is forced."""
        return self._allowed(self._state(tuple(written)), token)

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        """Which tokens may follow, bool [V]."""
        state = self._state(tuple(written))
        if must := self._must(state):
            mask = np.zeros(self.tokens.size, bool)
            mask[must[0]] = True
            return mask
        tokens = self.tokens
        if state.ended:
            mask = tokens.beginning & tokens.continuing("")
            if state.text and state.text.rstrip(".")[-1:].isdigit():
                mask |= tokens.digits & tokens.continuing(state.run)
        else:
            mask = tokens.continuing(state.run).copy()
            if len(state.text) > LONG_SENTENCE:
                mask &= ~tokens.spaced
        mask &= tokens.usable
        mask[[*self._stop]] = False
        leaving = self._leaving(state)[0]
        if state.section == 0:
            mask[leaving] = False
        if self._may_leave(state):
            mask[leaving] = True
        return mask

    def begins_word(self, token: int) -> bool:
        """Whether a token begins a word: there alone a control of repetition acts, so that it breaks none."""
        text = self._text(token)
        return text[:1].isspace() and text[1:2].isalpha()

    def between_sentences(self, written: Sequence[int]) -> bool:
        """Whether what is written ends with a whole sentence or heading."""
        state = self._state(tuple(written))
        return not state.forced and state.ended

    def _state(self, written: tuple[int, ...]) -> _State:
        missing = 0
        while written[: len(written) - missing] not in self._states:
            missing += 1
        state = self._states[written[: len(written) - missing]]
        for at in range(len(written) - missing, len(written)):
            state = self._after(state, written[at])
            self._states[written[: at + 1]] = state
        return state

    def _must(self, state: _State) -> tuple[int, ...]:
        if state.forced:
            return state.forced
        plan = self.sections[state.section]
        if not state.ended:
            return (self._full_stop,) if len(state.text) > LONGEST_SENTENCE else ()
        settled = self._settled(state)
        if settled.at < len(plan.sentences):
            return plan.sentences[settled.at]
        if settled.own >= plan.own or settled.repeats >= MAX_REPEATS:
            return self._leaving(state)
        return ()

    def _leaving(self, state: _State) -> tuple[int, ...]:
        return self.sections[1].heading if state.section == 0 else self._stop[:1]

    def _settled(self, state: _State) -> _State:
        """With the sentence of its own that ended counted."""
        if not state.text:
            return state
        said = normalize(state.text)
        repeated = said in state.said
        return state._replace(
            said=state.said if repeated else (*state.said, said), own=state.own + 1, text="", run="",
            repeats=state.repeats + repeated,
        )  # fmt: skip

    def _may_leave(self, state: _State) -> bool:
        settled = self._settled(state)
        return state.ended and bool(settled.said or settled.at)

    def _after(self, state: _State, token: int) -> _State:
        if state.stopped:
            return state
        plan = self.sections[state.section]
        if state.forced and state.forced[0] == token:
            return state._replace(forced=state.forced[1:])
        if not state.forced and state.ended:
            settled = self._settled(state)
            if settled.at < len(plan.sentences) and plan.sentences[settled.at][0] == token:
                return settled._replace(forced=plan.sentences[settled.at][1:], at=settled.at + 1)
            if token in self._stop:
                return settled._replace(stopped=True)
            if state.section == 0 and token == self.sections[1].heading[0]:
                said = tuple(map(normalize, self.sections[1].said))
                return _State(1, self.sections[1].heading[1:], said=said)
            text = self._text(token)
            if state.text and not text[:1].isspace():
                settled, text = state, state.text + text
        elif token in self._stop:
            return state._replace(stopped=True)
        else:
            settled, text = state, state.text + self._text(token)
        lexicon = self.tokens.lexicon
        followed = lexicon.follow(settled.run, self._text(token)) if lexicon else ""
        ended = ends_sentence(text) or (token == self._full_stop and len(state.text) > LONGEST_SENTENCE)
        return settled._replace(forced=(), text=text, run=followed or "", ended=ended)

    def _allowed(self, state: _State, token: int) -> bool:
        leaving = self._leaving(state)
        if state.ended and token == leaving[0]:
            return self._may_leave(state)
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
