"""Logits processors: bans, biases and penalties."""

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
    """Bans tokens."""

    token_ids: tuple[int, ...]

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """See :class:`~cbedge.decoding.LogitsProcessor`."""
        logits = logits.copy()
        logits[[*self.token_ids]] = -np.inf
        return logits


@dataclass(frozen=True)
class TokenBias:
    """Adds a bias to the logits of some tokens."""

    token_ids: tuple[int, ...]
    bias: float

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """See :class:`~cbedge.decoding.LogitsProcessor`."""
        logits = logits.copy()
        logits[[*self.token_ids]] += np.float32(self.bias)
        return logits


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive logits of earlier tokens by a penalty and multiplies negative ones (Keskar et al. 2019).

    Attributes:
        penalty: above 1.
        applies: selects the tokens that it affects.
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
    """Bans the repetition of an n-gram.

    Attributes:
        size: tokens of the n-gram.
        applies: selects the tokens that may be banned.
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
    """The logits processors for decoding settings.

    Args:
        settings: decoding settings.
        stop_ids: tokens that end a report.
        never: banned tokens, in addition to those of the settings.
        begins_word: restricts the control of repetition to these tokens; ``None`` for all.
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
