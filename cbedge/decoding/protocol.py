"""Interfaces that the decoding loop uses: decoder, logits processor, sampler, constraint, guess source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Token(NamedTuple):
    """A generated token and its probability before logits processing."""

    id: int
    probability: float


class Decoder(Protocol):
    """Decoding state of a language model, with its KV cache."""

    @property
    def length(self) -> int:
        """Number of embeddings and tokens read so far."""
        ...

    @property
    def capacity(self) -> int:
        """Maximum number of embeddings and tokens."""
        ...

    @property
    def keeps_prompt(self) -> bool:
        """Whether the common prefix of two successive prompts is reused."""
        ...

    @property
    def reused(self) -> int:
        """Number of embeddings of the last prompt that were not read again."""
        ...

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V]."""
        ...

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V], valid until the next call."""
        ...

    def rewind(self, length: int) -> None:
        """Discard everything after the first ``length`` embeddings and tokens."""
        ...

    def fork(self, rows: Sequence[int]) -> Decoder:
        """A decoder of several drafts; draft i is a copy of this decoder's draft ``rows[i]``. A new decoder has one
        draft, 0. ``append`` works with one draft, ``step`` with any number."""
        ...

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V]."""
        ...

    def enlarged(self, capacity: int) -> Decoder:
        """A new decoder of ``capacity`` that has read this decoder's prompt, and nothing else."""
        ...


class LogitsProcessor(Protocol):
    """Changes logits before a token is chosen."""

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """Tokens written so far and logits, float32 [V] → new logits, float32 [V]. The input is not modified."""
        ...


class Sampler(Protocol):
    """Chooses a token.

    Attributes:
        is_greedy: whether it always selects the most probable token.
    """

    is_greedy: bool

    def __call__(self, logits: np.ndarray) -> int:
        """Choose a token by logits, float32 [V]; -inf is never chosen."""
        ...


class Constraint(Protocol):
    """Determines which tokens may be written next."""

    def forced(self, written: Sequence[int]) -> Sequence[int]:
        """The tokens that must follow, up to the next free choice; empty if the next token is free."""
        ...

    def allows(self, written: Sequence[int], token: int) -> bool:
        """Whether a token may follow, if none is forced."""
        ...

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        """Which tokens may follow, bool [V]."""
        ...


class GuessSource(Protocol):
    """Guesses the continuation of a draft; a wrong guess costs time but changes no token."""

    def guess(self, written: Sequence[int], count: int) -> list[int]:
        """Guess up to ``count`` next tokens."""
        ...
