"""How many tokens to guess ahead, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_GUESSES = 32
_HOPE = 0.9  # how often a guess holds, before any was made


@dataclass
class SpeculationStats:
    """What guessing ahead did in one report.

    Attributes:
        passes: of the language model after the prefill.
        guessed, accepted: tokens that were guessed ahead, and those that the model would have written too.
    """

    passes: int = 0
    guessed: int = 0
    accepted: int = 0


class GuessLength:
    """How many tokens to guess ahead: the number that promises most tokens a second, from what was measured so far.

    A pass over 1 + k tokens takes longer than over one, and the more so on a CPU; how many guesses hold depends on the
    report. Both are learnt while writing, and nothing is guessed where nothing is to be won. It affects only speed.
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
