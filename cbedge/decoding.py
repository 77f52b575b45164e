"""Choose tokens from logits, over a small protocol that any backend can offer: greedy, sampling, beam search, and
lossless speculative decoding with a phrasebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np

from cbedge.errors import ContextError
from cbedge.phrasebook import Phrasebook

MAX_BEAMS = 8
MAX_GUESSES = 8
PLAUSIBLE = 0.2  # of the likeliest token's probability: the least that a guided token has


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

    def copy(self) -> Decoder:
        """Another decoder that has read the same."""
        ...


class Token(NamedTuple):
    """A token that was written, and the probability that the model gave it there (before any control of repetition)."""

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
            (Keskar et al. 2019); 1 is none.
        no_repeat: never write a run of so many tokens twice; 0 allows it.
        stop_bias: added to the logits of the tokens that end a report: below 0, drafts become longer, above it shorter.
        speculative: let the bundle's phrasebook guess ahead where that is faster. It changes no token, and is used
            where the likeliest token is taken and nothing guides the draft.

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
    speculative: bool = True

    def __post_init__(self) -> None:
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

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, of those that the controls leave."""
        return self.temperature == 0 and self.beams == 1


PLAIN = Decoding()


@dataclass
class Drafting:
    """What speculative decoding did in one report.

    Attributes:
        steps: passes of the language model after the prefill.
        guessed, accepted: tokens that the phrasebook proposed, and those that the model would have written too.
    """

    steps: int = 0
    guessed: int = 0
    accepted: int = 0


class GuidedDecoder:
    """Two decoders that read the same draft under two prompts: one is told what is seen, one that nothing is.

    What they expect is weighed as by classifier-free guidance (Ho and Salimans 2022; for text Sanchez et al. 2023):
    ``untold + weight (told - untold)``, among tokens that the told one finds plausible (Li et al. 2023). So the draft
    says what was seen, where a small language model left to itself falls back on the usual normal report.

    Args:
        told, untold: each has read its own prompt.
        weight: 1 is the told one alone.
    """

    def __init__(self, told: Decoder, untold: Decoder, weight: float):
        self.told, self.untold, self.weight = told, untold, weight

    @property
    def length(self) -> int:
        """What the told one has read."""
        return self.told.length

    @property
    def capacity(self) -> int:
        """What can be read, of the tighter one, counted as the told one's."""
        return self.told.length + min(d.capacity - d.length for d in (self.told, self.untold))

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read the same embeddings after both prompts."""
        return self.weigh(self.told.prefill(embeds), self.untold.prefill(embeds))

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the weighed logits after each, float32 [tokens, V]."""
        return self.weigh(self.told.read(token_ids), self.untold.read(token_ids))

    def rewind(self, length: int) -> None:
        """Forget all that was read after the first ``length`` of the told one."""
        forgotten = max(0, self.told.length - length)
        self.untold.rewind(self.untold.length - forgotten)
        self.told.rewind(length)

    def copy(self) -> GuidedDecoder:
        """Another pair that has read the same."""
        return GuidedDecoder(self.told.copy(), self.untold.copy(), self.weight)

    def weigh(self, told: np.ndarray, untold: np.ndarray) -> np.ndarray:
        """Logits of both, float32 [..., V] → what is to be chosen from."""
        return guide(told, untold, self.weight)


def guide(told: np.ndarray, untold: np.ndarray, weight: float) -> np.ndarray:
    """Logits under both prompts, float32 [..., V], weighed; what the told prompt finds implausible comes after all
    else, in the told prompt's order."""
    weighed = untold + np.float32(weight) * (told - untold)
    least = told.max(-1, keepdims=True) + np.float32(np.log(PLAUSIBLE))
    return np.where(told >= least, weighed, told - np.float32(1e4))


def greedy(decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int) -> Iterator[Token]:
    """:func:`sample` as :data:`PLAIN` has it: the likeliest token, again and again."""
    return sample(decoder, logits, stop_ids, max_new_tokens, PLAIN)


class GuessLength:
    """How many tokens to guess ahead: the number that promises most tokens a second, from what was measured so far.

    A pass over 1 + k tokens takes longer than over one, and the more so on a CPU; how often guesses hold depends on the
    report. Both are learnt while writing, and nothing is guessed where nothing is to be won. Only speed hangs on it.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._held, self._tried = 3.0, 4.0  # a little optimism to begin with
        self._passes = 0

    def choose(self) -> int:
        """How many tokens to guess now."""
        if len(self._seconds) < 2:
            return 4 if 4 not in self._seconds else 0
        best = max(range(MAX_GUESSES + 1), key=self._tokens_per_second)
        if self._passes % 16 == 15:  # now and then a neighbour, or what was slow once would never be measured again
            best = min(best + 1, MAX_GUESSES) if self._passes % 32 == 15 else max(best - 1, 0)
        return best

    def learn(self, guessed: int, accepted: int, seconds: float) -> None:
        """Take note of one pass."""
        self._passes += 1
        known = self._seconds.get(guessed)
        self._seconds[guessed] = seconds if known is None else 0.7 * known + 0.3 * seconds
        if guessed:
            self._held = 0.95 * self._held + accepted
            self._tried = 0.95 * self._tried + min(accepted + 1, guessed)
        else:  # hope comes back slowly, so that guessing is tried again
            self._held = 0.99 * self._held + 0.03
            self._tried = 0.99 * self._tried + 0.04

    def _tokens_per_second(self, guesses: int) -> float:
        share = min(0.99, self._held / self._tried)
        return (1 - share ** (guesses + 1)) / (1 - share) / self._cost(guesses)

    def _cost(self, guesses: int) -> float:
        """Seconds of a pass: as measured, or on the line through what was measured."""
        if guesses in self._seconds:
            return self._seconds[guesses]
        sizes = np.array(sorted(self._seconds))
        times = np.array([self._seconds[size] for size in sizes])
        slope, start = np.polyfit(sizes, times, 1)
        return max(float(start + slope * guesses), float(times.min()) / 2)


def speculate(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, phrasebook: Phrasebook,
    length: GuessLength, drafting: Drafting, settings: Decoding = PLAIN,
) -> Iterator[Token]:  # fmt: skip
    """The tokens of :func:`sample` at temperature 0, in fewer passes.

    The phrasebook guesses, the model checks all guesses in one pass, and the longest run that it would have written
    itself is kept (Leviathan et al. 2023, with a draft model of n-grams).

    Args:
        length: learns how many guesses pay; keep one for each generator.
        drafting: is filled in.
        settings: the controls; temperature and beams are not looked at.
    """
    token = _likeliest(logits, [], stop_ids, settings)
    written = [token.id]
    yield token
    while written[-1] not in stop_ids and len(written) < max_new_tokens:
        room = min(max_new_tokens - len(written) - 1, decoder.capacity - decoder.length - 1)
        guesses = phrasebook.guess(written, min(length.choose(), max(0, room)))
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
        length.learn(len(guesses), held, seconds)
        drafting.steps += 1
        drafting.guessed += len(guesses)
        drafting.accepted += held
        for token in chosen:
            written.append(token.id)
            yield token


def sample(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, settings: Decoding
) -> Iterator[Token]:
    """Yield the likeliest token, or one drawn, again and again.

    Args:
        decoder: has read everything that ``logits`` follow.
        logits: float32 [V], after the prefill.
        stop_ids: tokens that end the report; they are yielded, as the last one.
        max_new_tokens: tokens to write at most, the stop token counted.
        settings: how a token is chosen.
    """
    rng = np.random.default_rng(settings.seed)
    written: list[int] = []
    while True:
        if settings.temperature == 0:
            token = _likeliest(logits, written, stop_ids, settings)
        else:
            token_id = _draw(_control(logits, written, stop_ids, settings), settings, rng)
            token = Token(token_id, _probability(logits, token_id))
        written.append(token.id)
        yield token
        if token.id in stop_ids or len(written) == max_new_tokens:
            return
        logits = decoder.read([token.id])[-1]


def beam_search(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, settings: Decoding
) -> list[Token]:
    """The hypothesis of the highest mean log-probability among ``settings.beams``; the stop token is its last one.

    Hypotheses share one batch of one each, so memory and time are those of as many reports.
    """
    width = settings.beams
    alive: list[tuple[float, list[Token], Decoder, np.ndarray]] = [(0.0, [], decoder, logits)]
    finished: list[tuple[float, list[Token]]] = []
    for count in range(1, max_new_tokens + 1):
        options = []
        for row, (total, written, _, last) in enumerate(alive):
            log_probabilities = _log_softmax(_control(last, [token.id for token in written], stop_ids, settings))
            for token_id in np.argpartition(log_probabilities, -2 * width)[-2 * width :]:
                options.append((total + float(log_probabilities[token_id]), row, int(token_id)))
        options.sort(key=lambda option: (-option[0], option[1:]))
        going_on = []
        for total, row, token_id in options:
            written = [*alive[row][1], Token(token_id, _probability(alive[row][3], token_id))]
            if token_id in stop_ids or count == max_new_tokens:
                finished.append((total / len(written), written))
            else:
                going_on.append((total, written, row))
            if len(going_on) == width or len(finished) >= 2 * width:
                break
        best = max((score for score, _ in finished), default=-np.inf)
        if not going_on or (len(finished) >= width and going_on[0][0] / len(going_on[0][1]) <= best):
            break
        alive = [
            (total, written, branch, branch.read([written[-1].id])[-1])
            for (total, written, _), branch in zip(going_on, _branches(alive, going_on), strict=True)
        ]
    return max(finished, key=lambda pair: pair[0])[1]


def _branches(alive: list, going_on: list) -> list[Decoder]:
    """A decoder for each hypothesis that goes on; the last to use one takes it as it is, the others a copy."""
    uses = [row for _, _, row in going_on]
    return [alive[row][2] if row not in uses[i + 1 :] else alive[row][2].copy() for i, row in enumerate(uses)]


def _control(logits: np.ndarray, written: list[int], stop_ids: Sequence[int], settings: Decoding) -> np.ndarray:
    if settings.repetition_penalty == 1 and not settings.no_repeat and not settings.stop_bias:
        return logits
    logits = logits.copy()
    logits[list(stop_ids)] += np.float32(settings.stop_bias)
    if settings.repetition_penalty != 1 and written:
        seen = np.unique(written)
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / settings.repetition_penalty, values * settings.repetition_penalty)
    size = settings.no_repeat
    if size and len(written) >= size:
        last = written[len(written) - size + 1 :]
        for start in range(len(written) - size + 1):
            if written[start : start + size - 1] == last:
                logits[written[start + size - 1]] = -np.inf
    return logits


def _likeliest(logits: np.ndarray, written: list[int], stop_ids: Sequence[int], settings: Decoding) -> Token:
    token_id = int(_control(logits, written, stop_ids, settings).argmax())
    return Token(token_id, _probability(logits, token_id))


def _probability(logits: np.ndarray, token_id: int) -> float:
    return float(np.exp(_log_softmax(logits)[token_id]))


def _draw(logits: np.ndarray, settings: Decoding, rng: np.random.Generator) -> int:
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(_log_softmax(logits[order].astype(np.float64) / settings.temperature))
    kept = int(np.searchsorted(np.cumsum(probabilities), settings.top_p)) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(order[rng.choice(len(probabilities), p=probabilities)])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
