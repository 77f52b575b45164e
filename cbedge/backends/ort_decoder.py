"""A decoder-only language model on ONNX Runtime, with an in-place KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbedge.backends.kv_cache import bind_cache, empty_cache, to_ortvalue

if TYPE_CHECKING:
    import onnxruntime

    from cbedge.backends.ort import OnnxBackend


class OnnxDecoder:
    """Decoding state of the language model, for one or several drafts.

    Keys and values are on the session's device, in buffers of full capacity that the graph updates in place (past and
    present share memory). So a token needs no copy of the cache, and rewinding is free.

    Args:
        backend: whose sessions are used.
        capacity: maximum number of embeddings and tokens.
        drafts: number of drafts.

    Attributes:
        reused: embeddings of the last prompt that were not read again.
    """

    def __init__(self, backend: OnnxBackend, capacity: int, drafts: int = 1):
        self.capacity, self.drafts = capacity, drafts
        self.length = 0
        self._backend, self._session = backend, backend._decoder
        self._binding = self._session.io_binding()
        self._room = self._hold_cache()
        self._logits = np.empty(0, np.float32)
        self._options: onnxruntime.RunOptions | None = None
        self._prompt, self.reused = np.empty((0, backend.shapes.hidden_size), np.float32), 0

    def _hold_cache(self) -> int:
        """Bind an empty cache; returns its capacity."""
        # The session reads and writes these arrays directly.
        self._arrays = empty_cache(self._backend, self.capacity, self.drafts)
        self._cache = {name: to_ortvalue(array, self._backend.memory) for name, array in self._arrays.items()}
        bind_cache(self._binding, self._cache)
        return self.capacity

    @property
    def keeps_prompt(self) -> bool:
        """Whether the common prefix of two prompts is reused. This is the case on a CPU, whose kernels compute
        bit-identical keys and values regardless of the other embeddings in a pass. For GPU kernels this is not
        verified."""
        return self._backend.provider.is_repeatable

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V].

        An earlier prompt is discarded, except for a common prefix if :attr:`keeps_prompt` is true.
        """
        known = self._prompt[: max(0, embeds.shape[1] - 2)]  # a single row would use other kernels: see append
        differing = np.flatnonzero((known != embeds[0, : len(known)]).any(-1))
        self.reused = int(differing[0]) if len(differing) else len(known)
        self.rewind(self.reused)
        logits = self._run(embeds[:, self.reused :], 1)[0, 0].copy()
        if self.keeps_prompt:
            self._prompt = embeds[0]
        return logits

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V], valid until the next call.

        A single token is read twice, and the copy is discarded: kernels for one row differ from those for several rows
        in the last digits, so a speculative token could rarely get another result than a token that is read alone. A
        GPU is not slower with two: 3.3 ms instead of 3.7 ms with 7B in 4 bits on an H100
        (``benchmarks/results/gpu_h100.md``).
        """
        alone = len(token_ids) == 1 and self.length + 2 <= self.capacity
        rows = self._read(np.array([[*token_ids, *token_ids] if alone else token_ids], np.int64))
        if alone:
            self.rewind(self.length - 1)
        return rows[: len(token_ids)]

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V], valid until the next
        call."""
        embeds = self._backend.embed_tokens(np.array([token_ids], np.int64))
        return self._run(embeds.reshape(self.drafts, 1, -1), 1)[:, 0]

    def rewind(self, length: int) -> None:
        """Discard everything after the first ``length`` embeddings and tokens."""
        self.length = min(self.length, length)
        self._prompt = self._prompt[: self.length]

    def fork(self, rows: Sequence[int]) -> OnnxDecoder:
        """A decoder of several drafts; draft i is a copy of draft ``rows[i]``."""
        other = type(self)(self._backend, self.capacity, len(rows))
        other._copy_rows(self, list(rows))
        return other

    def enlarged(self, capacity: int) -> OnnxDecoder:
        """A new decoder of ``capacity`` that has read this decoder's prompt, and nothing else."""
        self.rewind(len(self._prompt))
        other = self._backend.new_decoder(capacity)
        assert isinstance(other, OnnxDecoder)
        other._copy_rows(self, [0])
        other._prompt = self._prompt
        return other

    def _read(self, token_ids: np.ndarray) -> np.ndarray:
        """Token ids of a single draft, int64 [1, tokens] → logits after each, float32 [tokens, V]."""
        return self._run(self._backend.embed_tokens(token_ids), token_ids.shape[1])[0]

    def _copy_rows(self, source: OnnxDecoder, rows: list[int]) -> None:
        """Copy the caches of another decoder's drafts."""
        self.length = source.length
        for name, array in self._arrays.items():
            array[:, :, : self.length] = source._arrays[name][rows, :, : self.length]

    def _advance(self, count: int) -> None:
        """Advance the position by ``count``, checking the capacity."""
        if self.length + count > self.capacity:
            raise ValueError(f"{self.length + count} tokens exceed the decoder's capacity of {self.capacity}")
        self.length += count

    def _run(self, embeds: np.ndarray, wanted: int) -> np.ndarray:
        start = self.length
        self._advance(embeds.shape[1])
        binding = self._binding
        mask = np.ones((self.drafts, self.length), np.int64)
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds, np.float32))
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input(*self._backend.logits_request(wanted))
        if self._backend.has_position_ids:
            positions = np.tile(np.arange(start, self.length, dtype=np.int64), (self.drafts, 1))
            binding.bind_cpu_input("position_ids", positions)
        shape = (self.drafts, wanted, self._backend.vocabulary)
        if self._logits.size < math.prod(shape):
            self._logits = np.empty(math.prod(shape), np.float32)
        logits = self._logits[: math.prod(shape)].reshape(shape)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding, self._options)
        return logits
