"""The decoding loop, and beam search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter

import numpy as np

from cbedge.decoding.protocol import Constraint, Decoder, GuessSource, LogitsProcessor, Sampler, Token
from cbedge.decoding.samplers import Greedy, log_softmax
from cbedge.decoding.speculative import GuessLength, SpeculationStats

GREEDY = Greedy()


def decode(
    decoder: Decoder,
    logits: np.ndarray,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    *,
    sampler: Sampler = GREEDY,
    processors: Sequence[LogitsProcessor] = (),
    constraint: Constraint | None = None,
    guesser: GuessSource | None = None,
    guess_length: GuessLength | None = None,
    stats: SpeculationStats | None = None,
    opening: Sequence[int] = (),
) -> Iterator[Token]:
    """Generate tokens. Forced and guessed tokens are read in the same pass as the token before them.

    Guesses do not change a greedy draft: all are verified in one pass, and the longest prefix that the model itself
    would have written is accepted (Leviathan et al. 2023, with n-grams as the draft model).

    Args:
        decoder: has read everything before ``logits``.
        logits: float32 [V].
        stop_ids: tokens that end the report; the stop token is yielded last.
        max_new_tokens: maximum number of tokens, stop token included.
        sampler: chooses each token.
        processors: applied to the logits in order.
        constraint: determines which tokens may be written.
        guesser: source of speculative tokens; ``None`` for one token per pass. Must be ``None`` unless greedy.
        guess_length: chooses the number of guesses; keep one per generator.
        stats: updated in place.
        opening: initial tokens of the draft, already read; processors and constraint see them.
    """
    stats, guess_length = stats or SpeculationStats(), guess_length or GuessLength()
    written = [*opening]
    most = len(opening) + max_new_tokens

    choose = partial(_choose, written=written, sampler=sampler, processors=processors, constraint=constraint)
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
        *accepted, token = _verified(rows, guesses, written, stop_ids, choose)
        decoder.rewind(length + 1 + len(accepted))
        stats.passes += 1
        if guesser:  # forced tokens count as guesses that hold
            stats.guessed += len(guesses)
            stats.accepted += len(accepted)
            if not forced:
                guess_length.learn(len(guesses), len(accepted), seconds)
        yield from accepted


def _verified(
    rows: np.ndarray,
    guesses: Sequence[int],
    written: list[int],
    stop_ids: Sequence[int],
    choose: Callable[[np.ndarray], Token],
) -> list[Token]:
    """The tokens that the model chooses: a prefix of the guesses, which is added to ``written``, and one more.

    Args:
        rows: float32 [1 + guesses, V], logits after the last written token and after each guess.
    """
    chosen = [choose(rows[0])]
    for row, guess in zip(rows[1:], guesses, strict=True):
        if chosen[-1].id != guess or guess in stop_ids:
            break
        written.append(guess)
        chosen.append(choose(row))
    return chosen


def beam_search(
    decoder: Decoder,
    logits: np.ndarray,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    width: int,
    processors: Sequence[LogitsProcessor] = (),
    constraint: Constraint | None = None,
    opening: Sequence[int] = (),
) -> list[Token]:
    """Beam search with ``width`` beams: the hypothesis with the highest mean log-probability, stop token included. The
    other arguments are those of :func:`decode`."""
    alive: list[tuple[float, list[Token]]] = [(0.0, [])]
    rows = logits[None]
    finished: list[tuple[float, list[Token]]] = []
    for count in range(1, max_new_tokens + 1):
        options: list[tuple[float, int, int]] = []
        for row, (total, written) in enumerate(alive):
            so_far = [*opening, *(token.id for token in written)]
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
    logits: np.ndarray,
    written: Sequence[int],
    sampler: Sampler,
    processors: Sequence[LogitsProcessor],
    constraint: Constraint | None,
) -> Token:
    if constraint is not None and (forced := constraint.forced(written)):
        return Token(forced[0], _probability(logits, forced[0]))
    if constraint is None or sampler.is_greedy:
        token_id = sampler(_processed(logits, written, processors))
        if constraint is None or constraint.allows(written, token_id):  # computing the whole mask is slower
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
    """Processed logits, with -inf for tokens that the constraint does not allow. If the processors ban all allowed
    tokens, the unprocessed logits are used."""
    processed = _processed(logits, written, processors)
    if constraint is None:
        return processed
    mask = constraint.allowed(written)
    for values in (processed, logits):
        kept = np.where(mask, values, np.float32(-np.inf))
        if np.isfinite(kept.max()):
            return kept
    return processed  # no token of the vocabulary is allowed


def _probability(logits: np.ndarray, token_id: int) -> float:
    return float(np.exp(log_softmax(logits)[token_id]))
