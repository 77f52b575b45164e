"""Run an InstructBLIP of transformers in torch: an NF4 variant of a bundle, or a model in training.

torch is imported in the methods, because the runtime does not need it for other variants.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.findings.reading import QFormerOutput

if TYPE_CHECKING:
    import torch


class TorchBackend:
    """The model in torch, with the interface of :class:`cbedge.backends.Backend`.

    Args:
        model: transformers' InstructBLIP, in evaluation mode. Attention weights are zero unless its Q-Former computes
            attention eagerly.
        finding_head: ``queries`` int64 [T], ``weight`` float32 [T, H] and ``bias`` float32 [T] of the finding scores;
            ``None`` for a model without.

    Attributes:
        device, threads, decoder_only, vocabulary: see :class:`cbedge.backends.Backend`.
    """

    def __init__(self, model: Any, finding_head: Mapping[str, torch.Tensor] | None = None):
        import torch

        self._model, self._device = model, next(model.parameters()).device
        self._head = {name: tensor.to(self._device) for name, tensor in finding_head.items()} if finding_head else None
        self.device, self.threads = self._device.type, torch.get_num_threads()
        self.decoder_only = bool(model.config.use_decoder_only_language_model)
        self.vocabulary = int(model.config.text_config.vocab_size)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → the vision encoder's features, float32 [1, P, H]."""
        import torch

        with torch.inference_mode():
            given = torch.from_numpy(pixels).to(self._device, self._model.vision_model.dtype)
            return self._model.vision_model(pixel_values=given).last_hidden_state.float().cpu().numpy()

    def query_image(self, features: np.ndarray, instruction_ids: np.ndarray) -> QFormerOutput:
        """Run the Q-Former; see :meth:`cbedge.backends.Backend.query_image`."""
        import torch

        model = self._model
        with torch.inference_mode():
            ids = torch.from_numpy(instruction_ids).to(self._device)
            count = model.query_tokens.shape[1]
            found = model.qformer(
                input_ids=ids,
                attention_mask=torch.ones(1, count + ids.shape[1], dtype=torch.long, device=self._device),
                query_embeds=model.query_tokens,
                encoder_hidden_states=torch.from_numpy(features).to(self._device, model.query_tokens.dtype),
                output_attentions=model.qformer.config._attn_implementation == "eager",  # others have no weights
            )
            output, weights = found.last_hidden_state[:, :count], found.cross_attentions
            embeds = model.language_projection(output).float().cpu().numpy()
            none = torch.zeros(1, 1, 1, count, features.shape[1], device=self._device)
            attention = (torch.stack(weights) if weights else none).float().mean((0, 2))[0]
            if self._head is None:
                return QFormerOutput(embeds, attention.mean(0, keepdim=True).cpu().numpy(), None)
            rows = self._head["queries"]
            logits = (output[0, rows].float() * self._head["weight"]).sum(-1) + self._head["bias"]
        return QFormerOutput(embeds, attention[rows].cpu().numpy(), logits.cpu().numpy())

    def embed_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Token ids, int64 [1, L] → embeddings, float32 [1, L, D]."""
        import torch

        with torch.inference_mode():
            embed = self._model.get_input_embeddings()
            return embed(torch.from_numpy(ids).to(self._device)).float().cpu().numpy()

    def new_decoder(self, capacity: int) -> TorchDecoder:
        """A decoder with an empty KV cache for up to ``capacity`` embeddings and tokens."""
        return TorchDecoder(self._model.language_model, self.decoder_only, self._device, capacity)


class TorchDecoder:
    """Decoding state of the language model, for one or several drafts.

    See :class:`cbedge.decoding.Decoder`.

    The encoder of an encoder-decoder (Flan-T5) reads the prompt; the cache then has the generated tokens only.
    """

    def __init__(self, model: Any, decoder_only: bool, device: torch.device, capacity: int):
        self.capacity, self.length, self.reused, self.keeps_prompt = capacity, 0, 0, False
        self._model, self._decoder_only, self._device = model, decoder_only, device
        self._cache: Any = None
        self._encoded: Any = None

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """Read input embeddings, float32 [1, L, D]; return the logits after the last, float32 [V]."""
        import torch

        with torch.inference_mode():
            given = torch.from_numpy(np.ascontiguousarray(embeds)).to(self._device, self._model.dtype)
            self.length = embeds.shape[1]
            if self._decoder_only:
                out = self._model(inputs_embeds=given, use_cache=True, logits_to_keep=1)
                self._cache = out.past_key_values
                return out.logits[0, -1].float().cpu().numpy()
            self._encoded = self._model.get_encoder()(inputs_embeds=given)
            start = torch.tensor([[self._model.config.decoder_start_token_id]], device=self._device)
            return self._run_one(start)[-1]

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read more tokens; return the logits after each, float32 [tokens, V]."""
        import torch

        self.length += len(token_ids)
        with torch.inference_mode():
            return self._run_one(torch.tensor([list(token_ids)], device=self._device))

    def rewind(self, length: int) -> None:
        """Discard everything after the first ``length`` embeddings and tokens."""
        if length < self.length:
            self._cache.crop(length - self.length)  # a negative number removes tokens from the end
            self.length = length

    def fork(self, rows: Sequence[int]) -> TorchDecoder:
        """A decoder of several drafts; draft i is a copy of draft ``rows[i]``."""
        import torch

        other = copy.copy(self)
        with torch.inference_mode():
            chosen = torch.tensor(list(rows), device=self._device)
            other._cache = copy.deepcopy(self._cache)
            other._cache.batch_select_indices(chosen)
            if self._encoded is not None:
                other._encoded = copy.copy(self._encoded)
                other._encoded.last_hidden_state = self._encoded.last_hidden_state[chosen]
        return other

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        """Read one more token in each draft; return the logits after it, float32 [drafts, V]."""
        import torch

        self.length += 1
        with torch.inference_mode():
            return self._run(torch.tensor(list(token_ids), device=self._device)[:, None])[:, -1]

    def enlarged(self, capacity: int) -> TorchDecoder:
        """This decoder: its cache grows as needed."""
        self.capacity = capacity
        return self

    def _run_one(self, ids: torch.Tensor) -> np.ndarray:
        return self._run(ids)[0]

    def _run(self, ids: torch.Tensor) -> np.ndarray:
        if self._decoder_only:
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        else:
            out = self._model(
                encoder_outputs=self._encoded, decoder_input_ids=ids, past_key_values=self._cache, use_cache=True
            )
        self._cache = out.past_key_values
        return out.logits.float().cpu().numpy()
