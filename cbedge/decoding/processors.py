"""Logits processors: bans and penalties, each on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cbedge.decoding.protocol import LogitsProcessor
from cbedge.decoding.settings import Decoding


def _everywhere(token: int) -> bool:
    return True


@dataclass(frozen=True)
class SuppressTokens:
    """Tokens that are never written."""

    token_ids: tuple[int, ...]

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """See :class:`~cbedge.decoding.LogitsProcessor`."""
        logits = logits.copy()
        logits[[*self.token_ids]] = -np.inf
        return logits


@dataclass(frozen=True)
class TokenBias:
    """Adds a number to the logits of some tokens."""

    token_ids: tuple[int, ...]
    bias: float

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """See :class:`~cbedge.decoding.LogitsProcessor`."""
        logits = logits.copy()
        logits[[*self.token_ids]] += np.float32(self.bias)
        return logits


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides the logits of tokens already written by a penalty and multiplies negative ones (Keskar et al. 2019).

    Attributes:
        penalty: above 1.
        applies: to which tokens.
    """

    penalty: float
    applies: Callable[[int], bool] = _everywhere

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """See :class:`~cbedge.decoding.LogitsProcessor`."""
        seen = np.array([token for token in {*written} if self.applies(token)], np.int64)
        logits = logits.copy()
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / self.penalty, values * self.penalty)
        return logits


@dataclass(frozen=True)
class NoRepeatNgram:
    """Never writes a run of tokens a second time.

    Attributes:
        size: tokens of a run.
        applies: which tokens may be banned for it.
    """

    size: int
    applies: Callable[[int], bool] = _everywhere

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """See :class:`~cbedge.decoding.LogitsProcessor`."""
        written, size = list(written), self.size
        if len(written) < size:
            return logits
        logits = logits.copy()
        last = written[len(written) - size + 1 :]
        for start in range(len(written) - size + 1):
            if written[start : start + size - 1] == last and self.applies(written[start + size - 1]):
                logits[written[start + size - 1]] = -np.inf
        return logits


def processors_of(
    settings: Decoding,
    stop_ids: Sequence[int],
    never: Sequence[int] = (),
    begins_word: Callable[[int], bool] | None = None,
) -> tuple[LogitsProcessor, ...]:
    """The processors that settings ask for.

    Args:
        settings: the user's.
        stop_ids: tokens that end a report.
        never: tokens that are never written, beside those of the settings.
        begins_word: repetition is controlled at these tokens alone; ``None`` for all.
    """
    applies = begins_word or _everywhere
    processors: list[LogitsProcessor] = []
    if banned := (*settings.never, *never):
        processors.append(SuppressTokens(banned))
    if settings.stop_bias:
        processors.append(TokenBias(tuple(stop_ids), settings.stop_bias))
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenalty(settings.repetition_penalty, applies))
    if settings.no_repeat:
        processors.append(NoRepeatNgram(settings.no_repeat, applies))
    return tuple(processors)
