"""Number of speculative tokens, and statistics of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_GUESSES = 32
_PRIOR = 0.9  # assumed acceptance rate of a guess before any measurement


@dataclass
class SpeculationStats:
    """Statistics of speculative decoding for one report.

    Attributes:
        passes: passes of the language model after the prefill.
        guessed, accepted: number of guessed tokens, and of those that the model accepted.
    """

    passes: int = 0
    guessed: int = 0
    accepted: int = 0


class GuessLength:
    """Chooses the number of speculative tokens that maximizes the expected tokens per second.

    A pass over 1 + k tokens takes longer than over one token, in particular on a CPU, and the acceptance rate depends
    on the report. Both are measured during decoding; if speculation does not help, nothing is guessed. Only the speed
    is affected.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        # Acceptance rate of each guess of a pass, given that those before it are accepted; starts optimistic.
        self._acceptance = np.full(MAX_GUESSES, _PRIOR)
        self._passes = 0

    def choose(self) -> int:
        """The number of tokens to guess in the next pass."""
        if len(self._seconds) < 2:
            measured = next(iter(self._seconds), 0)  # fewer than requested if the guesser knew no more
            return 4 if measured > 4 else 0 if measured else 16
        if self._passes % 32 == 31:  # explore, so that sizes that were slow once are measured again
            return (self._passes // 32) % (MAX_GUESSES + 1)
        tokens = 1 + np.cumsum(np.cumprod(self._acceptance))  # expected tokens of a pass with 1, 2, ... guesses
        return int((np.concatenate([[1.0], tokens]) / self._costs()).argmax())

    def learn(self, guessed: int, accepted: int, seconds: float) -> None:
        """Record one pass."""
        self._passes += 1
        known = self._seconds.get(guessed, seconds)
        # Slow passes get little weight, because they are often caused by other processes.
        self._seconds[guessed] = known + (seconds - known) * (0.5 if seconds < known else 0.1)
        verified = min(accepted + 1, guessed)
        self._acceptance[:verified] += 0.1 * ((np.arange(verified) < accepted) - self._acceptance[:verified])
        if not guessed:  # slowly return to the prior, so that guessing is tried again
            self._acceptance += 0.01 * (_PRIOR - self._acceptance)

    def _costs(self) -> np.ndarray:
        """Seconds of a pass with 0, 1, ... guesses: measured, or from a linear fit."""
        seconds = self._seconds.copy()  # drafts in other threads learn too
        sizes, times = np.array([*seconds]), np.array([*seconds.values()])
        apart = sizes - sizes.mean()
        slope = apart @ times / (apart @ apart)
        line = times.mean() + slope * (np.arange(MAX_GUESSES + 1) - sizes.mean())
        costs = np.maximum(line, times.min() / 2)
        costs[sizes] = times
        return costs
