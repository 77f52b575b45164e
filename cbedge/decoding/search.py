"""The decoding loop, and beam search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

import numpy as np

from cbedge.decoding.protocol import Constraint, Decoder, GuessSource, LogitsProcessor, Sampler, Token
from cbedge.decoding.samplers import Greedy, log_softmax
from cbedge.decoding.speculative import GuessLength, SpeculationStats

GREEDY = Greedy()


def decode(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, *, sampler: Sampler = GREEDY,
    processors: Sequence[LogitsProcessor] = (), constraint: Constraint | None = None,
    guesser: GuessSource | None = None, guess_length: GuessLength | None = None,
    stats: SpeculationStats | None = None, begun: Sequence[int] = (),
) -> Iterator[Token]:  # fmt: skip
    """Write tokens one pass after another; forced and guessed tokens are read in one pass with the token before them.

    Guesses change no token of a greedy draft: all are checked in one pass, and the longest run that the model would
    have written itself is kept (Leviathan et al. 2023, with n-grams as the draft model).

    Args:
        decoder: has read everything that ``logits`` follow.
        logits: float32 [V].
        stop_ids: tokens that end the report; they are yielded, as the last one.
        max_new_tokens: tokens to write at most, the stop token counted.
        sampler: chooses each token.
        processors: are applied to the logits in order.
        constraint: which tokens may be written.
        guesser: guesses ahead; ``None`` for one token a pass. It must be ``None`` for a sampler that draws.
        guess_length: learns how many guesses pay; keep one for each generator.
        stats: is filled in.
        begun: tokens that the draft began with, read already; processors and constraint count them.
    """
    stats = SpeculationStats() if stats is None else stats
    guess_length = guess_length or GuessLength()
    written = [*begun]
    most = len(begun) + max_new_tokens

    def choose(row: np.ndarray) -> Token:
        return _choose(row, written, sampler, processors, constraint)

    if max_new_tokens <= 0:
        return
    token = choose(logits)
    while True:
        written.append(token.id)
        yield token
        if token.id in stop_ids or len(written) >= most:
            return
        room = max(0, min(most - len(written) - 1, decoder.capacity - decoder.length - 1))
        forced = [*constraint.forced(written)][:room] if constraint else []
        guesses = forced or (guesser.guess(written, min(guess_length.choose(), room)) if guesser else [])
        length, start = decoder.length, perf_counter()
        rows = decoder.append([token.id, *guesses])
        seconds = perf_counter() - start
        chosen = [choose(rows[0])]
        for row, guess in zip(rows[1:], guesses, strict=True):
            if chosen[-1].id != guess or guess in stop_ids:
                break
            written.append(guess)
            chosen.append(choose(row))
        *held, token = chosen
        decoder.rewind(length + 1 + len(held))
        stats.passes += 1
        if guesser and not forced:
            stats.guessed += len(guesses)
            stats.accepted += len(held)
            guess_length.learn(len(guesses), len(held), seconds)
        yield from held


def beam_search(
    decoder: Decoder, logits: np.ndarray, stop_ids: Sequence[int], max_new_tokens: int, width: int,
    processors: Sequence[LogitsProcessor] = (), constraint: Constraint | None = None, begun: Sequence[int] = (),
) -> list[Token]:  # fmt: skip
    """The hypothesis of the highest mean log-probability among ``width``; the stop token is its last one. The other
    arguments are those of :func:`decode`."""
    alive: list[tuple[float, list[Token]]] = [(0.0, [])]
    rows = logits[None]
    finished: list[tuple[float, list[Token]]] = []
    for count in range(1, max_new_tokens + 1):
        options: list[tuple[float, int, int]] = []
        for row, (total, written) in enumerate(alive):
            so_far = [*begun, *(token.id for token in written)]
            log_probabilities = log_softmax(_allowed(rows[row], so_far, processors, constraint))
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
            decoder = decoder.fork(from_rows)
        alive = going_on
        rows = decoder.step([written[-1].id for _, written in alive])
    return max(finished, key=lambda pair: pair[0], default=(0.0, list[Token]()))[1]


def _choose(
    logits: np.ndarray, written: Sequence[int], sampler: Sampler, processors: Sequence[LogitsProcessor],
    constraint: Constraint | None,
) -> Token:  # fmt: skip
    if constraint is not None and (forced := constraint.forced(written)):
        return Token(forced[0], _probability(logits, forced[0]))
    if constraint is None or sampler.is_greedy:
        token_id = sampler(_processed(logits, written, processors))
        if constraint is None or constraint.allows(written, token_id):  # the mask of all tokens costs time
            return Token(token_id, _probability(logits, token_id))
    token_id = sampler(_allowed(logits, written, processors, constraint))
    return Token(token_id, _probability(logits, token_id))


def _processed(logits: np.ndarray, written: Sequence[int], processors: Sequence[LogitsProcessor]) -> np.ndarray:
    for processor in processors:
        logits = processor(written, logits)
    return logits


def _allowed(
    logits: np.ndarray, written: Sequence[int], processors: Sequence[LogitsProcessor], constraint: Constraint | None
) -> np.ndarray:
    """Processed logits, and -inf for what the constraint does not allow; where the processors leave nothing of that,
    they do not count."""
    processed = _processed(logits, written, processors)
    if constraint is None:
        return processed
    mask = constraint.allowed(written)
    for values in (processed, logits):
        kept = np.where(mask, values, np.float32(-np.inf))
        if np.isfinite(kept.max()):
            return kept
    return processed  # a vocabulary without any token that may follow


def _probability(logits: np.ndarray, token_id: int) -> float:
    return float(np.exp(log_softmax(logits)[token_id]))
