"""What the decoding loop needs from a backend, a draft's policy and a guesser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Token(NamedTuple):
    """A token that was written, and the probability that it had there, before any processor."""

    id: int
    probability: float


class Decoder(Protocol):
    """A language model in the middle of one report; it holds the KV cache of what it has read."""

    @property
    def length(self) -> int:
        """Embeddings and tokens read so far."""
        ...

    @property
    def capacity(self) -> int:
        """How many it can hold."""
        ...

    @property
    def keeps_prompt(self) -> bool:
        """Whether another prompt need not be read where it begins as the last one did."""
        ...

    @property
    def reused(self) -> int:
        """Embeddings of the last prompt that were not read again."""
        ...

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V]."""
        ...

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V], valid until the next call."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all that was read after the first ``length``."""
        ...

    def fork(self, rows: Sequence[int]) -> Decoder:
        """A decoder of several drafts: its draft i has read what draft ``rows[i]`` of this one has. A new decoder has
        one draft, 0. ``append`` is for one draft, ``step`` for any number."""
        ...

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V]."""
        ...

    def enlarged(self, capacity: int) -> Decoder:
        """A new decoder for ``capacity`` that has read the prompt that this one keeps, and nothing else."""
        ...


class LogitsProcessor(Protocol):
    """Changes logits before a token is chosen."""

    def __call__(self, written: Sequence[int], logits: np.ndarray) -> np.ndarray:
        """The tokens written so far and logits, float32 [V] → other logits, float32 [V]; the given ones stay as they
        are."""
        ...


class Sampler(Protocol):
    """Chooses a token.

    Attributes:
        is_greedy: it always takes the likeliest token.
    """

    is_greedy: bool

    def __call__(self, logits: np.ndarray) -> int:
        """A token by logits, float32 [V]; -inf is never chosen."""
        ...


class Constraint(Protocol):
    """Says which tokens may be written next."""

    def forced(self, written: Sequence[int]) -> Sequence[int]:
        """The tokens that must follow, up to the next choice; empty where there is one."""
        ...

    def allows(self, written: Sequence[int], token: int) -> bool:
        """Whether a token may follow, where none is forced."""
        ...

    def allowed(self, written: Sequence[int]) -> np.ndarray:
        """Which tokens may follow, bool [V]."""
        ...


class GuessSource(Protocol):
    """Guesses how a draft goes on; a wrong guess costs time and changes no token."""

    def guess(self, written: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow what is written."""
        ...
