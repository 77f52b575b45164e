"""A decoder-only language model on ONNX Runtime, with a KV cache in place."""

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
    """The language model in the middle of one report, or of several drafts of one.

    Keys and values live where the session runs, in buffers of the full capacity that the graph reads and writes in
    place (past and present are the same memory): a token costs no copy of the cache, and forgetting costs nothing.

    Args:
        backend: whose sessions are used.
        capacity: embeddings and tokens to hold at most.
        drafts: how many.

    Attributes:
        reused: embeddings of the last prompt that it did not read again.
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
        """Bind an empty cache; returns for how many embeddings and tokens it has room."""
        # The session reads and writes these arrays themselves.
        self._arrays = empty_cache(self._backend, self.capacity, self.drafts)
        self._cache = {name: to_ortvalue(array, self._backend.memory) for name, array in self._arrays.items()}
        bind_cache(self._binding, self._cache)
        return self.capacity

    @property
    def keeps_prompt(self) -> bool:
        """Whether another prompt need not be read where it begins as the last one did: on a CPU, whose kernels give an
        embedding the same keys and values whatever else is read in its pass, bit for bit. For those of a GPU nobody has
        seen to that."""
        return self._backend.provider.is_repeatable

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V].

        A decoder that has read a prompt before forgets it, but for what the new one begins with where it
        :attr:`keeps_prompt`.
        """
        known = self._prompt[: max(0, embeds.shape[1] - 2)]  # for one alone other kernels are taken: see append
        differing = np.flatnonzero((known != embeds[0, : len(known)]).any(-1))
        self.reused = int(differing[0]) if len(differing) else len(known)
        self.rewind(self.reused)
        logits = self._run(embeds[:, self.reused :], 1)[0, 0].copy()
        if self.keeps_prompt:
            self._prompt = embeds[0]
        return logits

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V], to be used before the next call.

        One alone is read twice, and the second time forgotten: other kernels compute one row than several, their sums
        differ in the last digits, and a guess that is checked among others would seldom get another answer than the
        token that is read alone. A GPU reads two no slower: 3.3 ms instead of 3.7 with 7B in 4 bits on an H100, whose
        kernels for one row are other ones, too (``benchmarks/results/gpu_h100.md``).
        """
        alone = len(token_ids) == 1 and self.length + 2 <= self.capacity
        rows = self._read(np.array([[*token_ids, *token_ids] if alone else token_ids], np.int64))
        if alone:
            self.rewind(self.length - 1)
        return rows[: len(token_ids)]

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V], to be used before the
        next call."""
        embeds = self._backend.embed_tokens(np.array([token_ids], np.int64))
        return self._run(embeds.reshape(self.drafts, 1, -1), 1)[:, 0]

    def rewind(self, length: int) -> None:
        """Forget all that was read after the first ``length``."""
        self.length = min(self.length, length)
        self._prompt = self._prompt[: self.length]

    def fork(self, rows: Sequence[int]) -> OnnxDecoder:
        """A decoder of many drafts, each of which has read what the draft in ``rows`` has."""
        other = type(self)(self._backend, self.capacity, len(rows))
        other._copy_rows(self, list(rows))
        return other

    def enlarged(self, capacity: int) -> OnnxDecoder:
        """A new decoder for ``capacity`` that has read the prompt that this one keeps, and nothing else."""
        self.rewind(len(self._prompt))
        other = self._backend.new_decoder(capacity)
        assert isinstance(other, OnnxDecoder)
        other._copy_rows(self, [0])
        other._prompt = self._prompt
        return other

    def _read(self, token_ids: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, tokens], of the one draft → logits after each, float32 [tokens, V]."""
        return self._run(self._backend.embed_tokens(token_ids), token_ids.shape[1])[0]

    def _copy_rows(self, source: OnnxDecoder, rows: list[int]) -> None:
        """Copy drafts of another decoder."""
        self.length = source.length
        for name, array in self._arrays.items():
            array[:, :, : self.length] = source._arrays[name][rows, :, : self.length]

    def _advance(self, count: int) -> None:
        """Count what is read now."""
        if self.length + count > self.capacity:
            raise ValueError(f"{self.length + count} tokens do not fit a decoder made for {self.capacity}")
        self.length += count

    def _run(self, embeds: np.ndarray, wanted: int) -> np.ndarray:
        start = self.length
        self._advance(embeds.shape[1])
        binding = self._binding
        mask = np.ones((self.drafts, self.length), np.int64)
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds, np.float32))
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input(*self._backend.wanted(wanted))
        if self._backend.told_positions:
            positions = np.tile(np.arange(start, self.length, dtype=np.int64), (self.drafts, 1))
            binding.bind_cpu_input("position_ids", positions)
        shape = (self.drafts, wanted, self._backend.vocabulary)
        if self._logits.size < math.prod(shape):
            self._logits = np.empty(math.prod(shape), np.float32)
        logits = self._logits[: math.prod(shape)].reshape(shape)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding, self._options)
        return logits
