"""Choose tokens from logits: greedy decoding over a small protocol that any backend can offer."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class Decoder(Protocol):
    """A language model in the middle of one report; it holds the KV cache of what it has read."""

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V]."""
        ...

    def step(self, token_id: int) -> np.ndarray:
        """Read one more token; return the logits after it, float32 [V]."""
        ...


def greedy(decoder: Decoder, logits: np.ndarray, stop_ids: tuple[int, ...], max_new_tokens: int) -> Iterator[int]:
    """Yield the likeliest token, again and again.

    Args:
        decoder: has read everything that ``logits`` follow.
        logits: float32 [V], after the prefill.
        stop_ids: tokens that end the report; they are yielded, as the last one.
        max_new_tokens: tokens to write at most, the stop token counted.
    """
    for count in range(1, max_new_tokens + 1):
        token_id = int(logits.argmax())
        yield token_id
        if token_id in stop_ids or count == max_new_tokens:
            return
        logits = decoder.step(token_id)
