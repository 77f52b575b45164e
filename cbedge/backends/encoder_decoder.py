"""An encoder-decoder language model (Flan-T5) on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbedge.backends.kv_cache import to_ortvalue

if TYPE_CHECKING:
    import onnxruntime

    from cbedge.backends.ort import OnnxBackend


class OnnxEncoderDecoder:
    """Decoding state of an encoder-decoder (Flan-T5), for one or several drafts.

    The encoder reads image embeddings and prompt once; the KV cache contains only the generated tokens. Keys and values
    stay on the device of the sessions. A pass copies the cache, which is small compared with the weights.

    Args:
        backend: whose sessions are used.
        capacity: maximum number of embeddings and tokens.
    """

    def __init__(self, backend: OnnxBackend, capacity: int):
        self.capacity, self.length, self.reused, self.keeps_prompt = capacity, 0, 0, False
        self._backend = backend
        names = [f"{i}.{kind}" for i in range(backend.shapes.num_layers) for kind in ("key", "value")]
        self._past, self._crossed = ([f"{part}.{name}" for name in names] for part in ("past_key_values", "cross"))
        self._cache: dict[str, onnxruntime.OrtValue] = {}
        self._cross: dict[str, onnxruntime.OrtValue] = {}

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits of the draft's first token, float32 [V]."""
        backend = self._backend
        assert backend._encoder is not None
        self.length = embeds.shape[1] - len(backend._start_ids)  # start tokens of the decoder are not counted
        given = {"inputs_embeds": self._to_ortvalue(np.ascontiguousarray(embeds, np.float32))}
        self._cross = self._bound(backend._encoder, given, self._crossed)
        shapes = backend.shapes
        empty = np.zeros((1, shapes.num_key_value_heads, 0, shapes.head_size), np.float32)
        self._cache = {name: self._to_ortvalue(empty) for name in self._past}
        return self._run(backend.embed_tokens(np.array([backend._start_ids], np.int64)))[0, -1].copy()

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V]."""
        return self._run(self._backend.embed_tokens(np.array([token_ids], np.int64)))[0]

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V]."""
        embeds = self._backend.embed_tokens(np.array([token_ids], np.int64))
        return self._run(embeds.reshape(len(token_ids), 1, -1))[:, 0]

    def rewind(self, length: int) -> None:
        """Discard everything after the first ``length`` embeddings and tokens."""
        gone = self.length - length
        if gone > 0:
            self._cache = {
                name: self._to_ortvalue(np.ascontiguousarray(v.numpy()[:, :, :-gone]))
                for name, v in self._cache.items()
            }
            self.length = length

    def fork(self, rows: Sequence[int]) -> OnnxEncoderDecoder:
        """A decoder of several drafts; draft i is a copy of draft ``rows[i]``."""
        other = OnnxEncoderDecoder(self._backend, self.capacity)
        other.length, chosen = self.length, list(rows)
        for ours, theirs in ((other._cache, self._cache), (other._cross, self._cross)):
            ours |= {name: self._to_ortvalue(value.numpy()[chosen]) for name, value in theirs.items()}
        return other

    def enlarged(self, capacity: int) -> OnnxEncoderDecoder:
        """This decoder: its cache grows as needed."""
        self.capacity = capacity
        return self

    def _run(self, embeds: np.ndarray) -> np.ndarray:
        self.length += embeds.shape[1]
        if self.length > self.capacity:
            raise ValueError(f"{self.length} tokens do not fit a decoder made for {self.capacity}")
        session = self._backend._decoder
        given = {
            "inputs_embeds": self._to_ortvalue(np.ascontiguousarray(embeds, np.float32)),
            **self._cache,
            **self._cross,
        }
        present = [name.replace("past_key_values", "present") for name in self._past]
        found = self._bound(session, given, ["logits", *present])
        self._cache = {name: found[new] for name, new in zip(self._past, present, strict=True)}
        return found["logits"].numpy()

    def _to_ortvalue(self, array: np.ndarray) -> onnxruntime.OrtValue:
        return to_ortvalue(array, self._backend.memory)

    def _bound(
        self, session: onnxruntime.InferenceSession, given: dict[str, onnxruntime.OrtValue], wanted: Sequence[str]
    ) -> dict[str, onnxruntime.OrtValue]:
        """Run a session with inputs and outputs on its own device."""
        binding = session.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name in wanted:
            binding.bind_output(name, "cpu" if name == "logits" else self._backend.memory)
        session.run_with_iobinding(binding)
        return dict(zip(wanted, binding.get_outputs(), strict=True))
