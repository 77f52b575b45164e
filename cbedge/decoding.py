"""Choose tokens from logits, over a small protocol that any backend can offer: greedy, sampling, beam search,
and lossless speculative decoding with a phrasebook or a template."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np

from cbedge.errors import ContextError
from cbedge.phrasebook import GuessSource

MAX_BEAMS = 8
MAX_GUESSES = 32
_HOPE = 0.9  # how often a guess holds, before any was made
# Least probability of a drawn token, as a share of the likeliest one's (min-p sampling, Nguyen et al. 2024).
MIN_P = 0.02


class Decoder(Protocol):
    """A language model in the middle of one report; it holds the KV cache of what it has read."""

    @property
    def length(self) -> int:
        """Tokens and embeddings read so far."""
        ...

    @property
    def capacity(self) -> int:
        """How many it can hold."""
        ...

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V]."""
        ...

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V]."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all that was read after the first ``length``."""
        ...

    def spread(self, rows: Sequence[int]) -> Decoder:
        """A decoder of many drafts at once: its draft i has read what draft ``rows[i]`` of this one has, and a fresh
        decoder has one draft, 0. ``read`` is for a single draft, ``read_each`` for any number."""
        ...

    def read_each(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V]."""
        ...


class Constraint(Protocol):
    """Says what may be written next, by what is written."""

    def forced(self, written: Sequence[int]) -> Sequence[int]:
        """The tokens that must follow, up to the next choice; empty where there is one."""
        ...

    def allows(self, written: Sequence[int], token: int) -> bool:
        """Whether a token may follow, where none is forced."""
        ...

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        """Which tokens may follow, bool [V]."""
        ...

    def begins_word(self, token: int) -> bool:
        """Whether a token begins a word."""
        ...


class Token(NamedTuple):
    """A token that was written, and the probability that it had there (before any control of repetition)."""

    id: int
    probability: float


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; the default is greedy.

    Attributes:
        temperature: 0 takes the likeliest token; above it tokens are drawn, the more evenly the higher.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        seed: of the draws.
        beams: above 1, beam search with so many hypotheses, compared by mean log-probability.
        repetition_penalty: logits of tokens already written are divided by it, or multiplied where negative
            (Keskar et al. 2019); 1 is none. In a report it acts on tokens that begin a word, so that no word is broken.
        no_repeat: never begin a word that would repeat a run of so many tokens; 0 allows it.
        stop_bias: added to the logits of the tokens that end a report: below 0, drafts become longer, above it shorter.
        never: tokens that are never written; a bundle's own (its ``never_ids``) are added to them.
        keep_to_template: write the sentences of the template that is given, or that the bundle has
            (:mod:`cbedge.templates`); where there is none it does nothing.
        constraint: what may be written; the generator sets it (:mod:`cbedge.constraints`).
        speculative: let the template and the bundle's phrasebook guess ahead where that is faster. It changes no token,
            and is used where the likeliest token is taken.

    Raises:
        ContextError: a value is out of its range, or two exclude each other.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat: int = 0
    stop_bias: float = 0.0
    never: tuple[int, ...] = ()
    speculative: bool = True
    keep_to_template: bool = True
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty", "stop_bias"):
            self._check_type(name, numbers.Real, "a number")
        for name in ("seed", "beams", "no_repeat"):
            self._check_type(name, numbers.Integral, "a whole number")
        for name in ("speculative", "keep_to_template"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ContextError(f"{name} must be True or False, not {type(getattr(self, name)).__name__}")
        ranges = (
            ("temperature", 0 <= self.temperature <= 5, "0 to 5"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("beams", 1 <= self.beams <= MAX_BEAMS, f"1 to {MAX_BEAMS}"),
            ("repetition_penalty", 1 <= self.repetition_penalty <= 10, "1 to 10"),
            ("no_repeat", self.no_repeat >= 0, "0 or more"),
            ("stop_bias", -20 <= self.stop_bias <= 20, "-20 to 20"),
        )
        for name, fits, wanted in ranges:
            if not fits:
                raise ContextError(f"{name} is {getattr(self, name)}; give {wanted}")
        if self.beams > 1 and self.temperature > 0:
            raise ContextError("beams and temperature exclude each other: give one of them")

    def _check_type(self, name: str, kind: type, wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
            raise ContextError(f"{name} must be {wanted}, not {type(value).__name__}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, of those that the controls leave."""
        return self.temperature == 0 and self.beams == 1


PLAIN = Decoding()


@dataclass
class Drafting:
    """What speculative decoding did in one report.

    Attributes:
        steps: passes of the language model after the prefill.
        guessed, accepted: tokens that were guessed ahead, and those that the model would have written too.
    """

    steps: int = 0
    guessed: int = 0
    accepted: int = 0


def greedy(decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int) -> Iterator[Token]:
    """:func:`sample` as :data:`PLAIN` has it: the likeliest token, again and again."""
    return sample(decoder, logits, stop_ids, max_new_tokens, PLAIN)


class GuessLength:
    """How many tokens to guess ahead: the number that promises most tokens a second, from what was measured so far.

    A pass over 1 + k tokens takes longer than over one, and the more so on a CPU; how many guesses hold depends on the
    report. Both are learnt while writing, and nothing is guessed where nothing is to be won. Only speed hangs on it.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        # How often each guess of a pass holds where those before it do: a little optimism to begin with.
        self._holds = np.full(MAX_GUESSES, _HOPE)
        self._passes = 0

    def choose(self) -> int:
        """How many tokens to guess now."""
        if len(self._seconds) < 2:
            measured = next(iter(self._seconds), 0)  # fewer than were asked for, where the guesser knew no more
            return 4 if measured > 4 else 0 if measured else 16
        if self._passes % 32 == 31:  # now and then another, or what was slow once would never be measured again
            return (self._passes // 32) % (MAX_GUESSES + 1)
        tokens = 1 + np.cumsum(np.cumprod(self._holds))  # that a pass is likely to give, with 1 guess, 2, …
        return int((np.concatenate([[1.0], tokens]) / self._costs()).argmax())

    def learn(self, guessed: int, accepted: int, seconds: float) -> None:
        """Take note of one pass."""
        self._passes += 1
        known = self._seconds.get(guessed, seconds)
        # A pass that something else held up says little of the next one.
        self._seconds[guessed] = known + (seconds - known) * (0.5 if seconds < known else 0.1)
        looked_at = min(accepted + 1, guessed)
        self._holds[:looked_at] += 0.1 * ((np.arange(looked_at) < accepted) - self._holds[:looked_at])
        if not guessed:  # hope comes back slowly, so that guessing is tried again
            self._holds += 0.01 * (_HOPE - self._holds)

    def _costs(self) -> np.ndarray:
        """Seconds of a pass with 0 guesses, 1, …: as measured, or on the line through what was measured."""
        sizes = np.array([*self._seconds])
        times = np.array([*self._seconds.values()])
        apart = sizes - sizes.mean()
        slope = apart @ times / (apart @ apart)
        line = times.mean() + slope * (np.arange(MAX_GUESSES + 1) - sizes.mean())
        costs = np.maximum(line, times.min() / 2)
        costs[sizes] = times
        return costs


def speculate(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, guesser: GuessSource,
    length: GuessLength, drafting: Drafting, settings: Decoding = PLAIN, begun: Sequence[int] = (),
) -> Iterator[Token]:  # fmt: skip
    """The tokens of :func:`sample` at temperature 0, in fewer passes.

    The guesser guesses, the model checks all guesses in one pass, and the longest run that it would have written
    itself is kept (Leviathan et al. 2023, with n-grams, or a template, as the draft model).

    Args:
        length: learns how many guesses pay; keep one for each generator.
        drafting: is filled in.
        settings: the controls; temperature and beams are not looked at.
        begun: as for :func:`sample`.
    """
    token = _likeliest(logits, [*begun], stop_ids, settings)
    written = [*begun, token.id]
    most = len(begun) + max_new_tokens
    yield token
    while written[-1] not in stop_ids and len(written) < most:
        room = max(0, min(most - len(written) - 1, decoder.capacity - decoder.length - 1))
        sure = _forced(written, settings)[:room]
        guesses = sure or guesser.guess(written, min(length.choose(), room))
        before = decoder.length
        start = perf_counter()
        rows = decoder.read([written[-1], *guesses])
        seconds = perf_counter() - start
        chosen = [_likeliest(rows[0], written, stop_ids, settings)]
        for at, guess in enumerate(guesses):
            if chosen[-1].id != guess or guess in stop_ids:
                break
            chosen.append(_likeliest(rows[at + 1], [*written, *guesses[: at + 1]], stop_ids, settings))
        held = len(chosen) - 1
        decoder.rewind(before + 1 + held)
        drafting.steps += 1
        if not sure:
            length.learn(len(guesses), held, seconds)
        drafting.guessed += len(guesses)
        drafting.accepted += held
        for token in chosen:
            written.append(token.id)
            yield token


def sample(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, settings: Decoding,
    rng: np.random.Generator | None = None, begun: Sequence[int] = (),
) -> Iterator[Token]:  # fmt: skip
    """Yield the likeliest token, or one drawn, again and again.

    Args:
        decoder: has read everything that ``logits`` follow.
        logits: float32 [V], after the prefill.
        stop_ids: tokens that end the report; they are yielded, as the last one.
        max_new_tokens: tokens to write at most, the stop token counted.
        settings: how a token is chosen.
        rng: draws; default is one of the settings' seed.
        begun: tokens that the draft began with, read already: the controls of repetition count them.
    """
    rng = rng or np.random.default_rng(settings.seed)
    written: list[int] = [*begun]
    most = len(begun) + max_new_tokens
    while True:
        token = _next(logits, written, stop_ids, settings, rng)
        written.append(token.id)
        yield token
        if token.id in stop_ids or len(written) == most:
            return
        sure = _forced(written, settings)[: most - len(written)]
        rows = decoder.read([token.id, *sure]).copy() if sure else decoder.read([token.id])
        for row, token_id in zip(rows, sure, strict=False):  # forced tokens are read at once
            written.append(token_id)
            yield Token(token_id, _probability(row, token_id))
            if token_id in stop_ids or len(written) == most:
                return
        logits = rows[-1]


def beam_search(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, settings: Decoding,
    begun: Sequence[int] = (),
) -> list[Token]:  # fmt: skip
    """The hypothesis of the highest mean log-probability among ``settings.beams``; the stop token is its last one.
    ``begun`` is as for :func:`sample`."""
    width = settings.beams
    alive: list[tuple[float, list[Token]]] = [(0.0, [])]
    rows = logits[None]
    finished: list[tuple[float, list[Token]]] = []
    for count in range(1, max_new_tokens + 1):
        options: list[tuple[float, int, int]] = []
        for row, (total, written) in enumerate(alive):
            so_far = [*begun, *(token.id for token in written)]
            log_probabilities = _log_softmax(_allowed(rows[row], so_far, stop_ids, settings))
            for token_id in np.argpartition(log_probabilities, -2 * width)[-2 * width :]:
                if log_probabilities[token_id] == -np.inf:
                    continue
                options.append((total + float(log_probabilities[token_id]), row, int(token_id)))
        options.sort(key=lambda option: (-option[0], option[1:]))
        going_on, from_rows = [], []
        for total, row, token_id in options:
            written = [*alive[row][1], Token(token_id, _probability(rows[row], token_id))]
            if token_id in stop_ids or count == max_new_tokens:
                finished.append((total / len(written), written))
            else:
                going_on.append((total, written))
                from_rows.append(row)
            if len(going_on) == width or len(finished) >= 2 * width:
                break
        best = max((score for score, _ in finished), default=-np.inf)
        if not going_on or (len(finished) >= width and going_on[0][0] / len(going_on[0][1]) <= best):
            break
        if from_rows != list(range(len(alive))):
            decoder = decoder.spread(from_rows)
        alive = going_on
        rows = decoder.read_each([written[-1].id for _, written in alive])
    return max(finished, key=lambda pair: pair[0])[1]


def _control(logits: np.ndarray, written: list[int], stop_ids: Sequence[int], settings: Decoding) -> np.ndarray:
    """Logits under bans and penalties; with a constraint, repetition is controlled where words begin."""
    if settings.repetition_penalty == 1 and not (settings.no_repeat or settings.stop_bias or settings.never):
        return logits
    logits = logits.copy()
    logits[list(settings.never)] = -np.inf
    logits[list(stop_ids)] += np.float32(settings.stop_bias)

    def may_hinder(token_id: int) -> bool:
        return settings.constraint is None or settings.constraint.begins_word(token_id)

    if settings.repetition_penalty != 1 and written:
        seen = np.array([token_id for token_id in {*written} if may_hinder(token_id)], np.int64)
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / settings.repetition_penalty, values * settings.repetition_penalty)
    size = settings.no_repeat
    if size and len(written) >= size:
        last = written[len(written) - size + 1 :]
        for start in range(len(written) - size + 1):
            if written[start : start + size - 1] == last and may_hinder(written[start + size - 1]):
                logits[written[start + size - 1]] = -np.inf
    return logits


def _forced(written: Sequence[int], settings: Decoding) -> list[int]:
    return [*settings.constraint.forced(written)] if settings.constraint else []


def _allowed(logits: np.ndarray, written: list[int], stop_ids: Sequence[int], settings: Decoding) -> np.ndarray:
    """Logits under all controls, and -inf for what the constraint does not allow; where bans leave nothing of that,
    they do not count."""
    controlled = _control(logits, written, stop_ids, settings)
    if settings.constraint is None:
        return controlled
    mask = settings.constraint.allowed(written)
    for candidates in (controlled, logits):
        kept = np.where(mask, candidates, np.float32(-np.inf))
        if np.isfinite(kept.max()):
            return kept
    return controlled  # a vocabulary without any word that may follow


def _next(
    logits: np.ndarray, written: list[int], stop_ids: Sequence[int], settings: Decoding, rng: np.random.Generator
) -> Token:
    if settings.temperature == 0:
        return _likeliest(logits, written, stop_ids, settings)
    token_id = _draw(_allowed(logits, written, stop_ids, settings), settings, rng)
    return Token(token_id, _probability(logits, token_id))


def _likeliest(logits: np.ndarray, written: list[int], stop_ids: Sequence[int], settings: Decoding) -> Token:
    constraint = settings.constraint
    if constraint is not None and (sure := constraint.forced(written)):
        return Token(sure[0], _probability(logits, sure[0]))
    controlled = _control(logits, written, stop_ids, settings)
    token_id = int(controlled.argmax())
    if constraint is not None and not constraint.allows(written, token_id):  # seldom: the mask costs time
        token_id = int(_allowed(logits, written, stop_ids, settings).argmax())
    return Token(token_id, _probability(logits, token_id))


def _probability(logits: np.ndarray, token_id: int) -> float:
    return float(np.exp(_log_softmax(logits)[token_id]))


def _draw(logits: np.ndarray, settings: Decoding, rng: np.random.Generator) -> int:
    within = np.flatnonzero(logits >= logits.max() + np.log(MIN_P))
    order = within[np.argsort(-logits[within], kind="stable")]
    probabilities = np.exp(_log_softmax(logits[order].astype(np.float64) / settings.temperature))
    kept = int(np.searchsorted(np.cumsum(probabilities), settings.top_p)) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(order[rng.choice(len(probabilities), p=probabilities)])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of logits of which one at least is finite."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
