"""Run a bundle's NF4 variant: transformers with the language model's linear layers in 4-bit NormalFloat (bitsandbytes).

It saves memory, not time: the ONNX variants are faster. torch is imported here and nowhere else in
the runtime.
"""

from __future__ import annotations

import copy
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.bundles.bundle import Bundle
from cbedge.bundles.manifest import Variant
from cbedge.errors import BundleError, DeviceError
from cbedge.findings.reading import QFormerOutput

if TYPE_CHECKING:
    import torch

# File name in a bundle → file name in transformers.
FILES = {"nf4_config.json": "config.json", "nf4_model.safetensors": "model.safetensors"}
DEVICES = ("auto", "cpu", "cuda")  # torch's
HEAD = "nf4_finding_head.safetensors"
INSTALL = 'pip install torch "transformers>=5.20" bitsandbytes accelerate safetensors'


class TorchNf4Backend:
    """The model in torch, with the interface of :class:`cbedge.backends.ort.OnnxBackend`.

    Args:
        bundle: an opened bundle.
        variant: its NF4 variant.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; default is torch's own.

    Attributes:
        device, threads: actual values.
        decoder_only: see :class:`cbedge.backends.Backend`.
        vocabulary: size of the language model's vocabulary.

    Raises:
        DeviceError: torch, transformers or bitsandbytes is missing, or CUDA is requested and not available.
        BundleError: the files cannot be loaded.
    """

    def __init__(self, bundle: Bundle, variant: Variant, device: str, threads: int | None = None):
        try:
            import bitsandbytes  # noqa: F401
            import torch
            from safetensors.torch import load_file
            from transformers import InstructBlipForConditionalGeneration
        except ImportError as error:
            raise DeviceError(f"the nf4 variant needs the package {error.name}; type: {INSTALL}") from None
        self.device = _choose(device, torch.cuda.is_available())
        if threads:
            torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for ours, theirs in FILES.items():
                Path(scratch, theirs).symlink_to((bundle.folder / ours).absolute())
            try:
                self._model = InstructBlipForConditionalGeneration.from_pretrained(
                    scratch, device_map=self.device, attn_implementation={"qformer_config": "eager"}
                ).eval()
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise BundleError(f"the nf4 variant cannot be loaded ({reason}): export it again") from error
        self.decoder_only = bool(self._model.config.use_decoder_only_language_model)
        self.vocabulary = int(self._model.config.text_config.vocab_size)
        self._attention: list[Any] = []
        self._collecting = threading.Lock()  # while attention weights are collected
        for layer in self._model.qformer.encoder.layer:
            if layer.has_cross_attention:
                layer.crossattention.attention.register_forward_hook(self._take_weights)
        head = bundle.folder / HEAD
        self._head = {n: t.to(self.device) for n, t in load_file(head).items()} if HEAD in variant.data else None

    def _take_weights(self, module: Any, inputs: Any, output: tuple[Any, Any]) -> None:
        self._attention.append(output[1])

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, 3, S, S] → the vision encoder's features, float32 [1, P, H]."""
        import torch

        with torch.inference_mode():
            given = torch.from_numpy(pixels).to(self.device, self._model.vision_model.dtype)
            return self._model.vision_model(pixel_values=given).last_hidden_state.float().cpu().numpy()

    def query_image(self, features: np.ndarray, instruction_ids: np.ndarray) -> QFormerOutput:
        """Run the Q-Former; see :meth:`cbedge.backends.ort.OnnxBackend.query_image`."""
        import torch

        model = self._model
        with self._collecting, torch.inference_mode():
            self._attention.clear()
            ids = torch.from_numpy(instruction_ids).to(self.device)
            count = model.query_tokens.shape[1]
            output = model.qformer(
                input_ids=ids,
                attention_mask=torch.ones(1, count + ids.shape[1], dtype=torch.long, device=self.device),
                query_embeds=model.query_tokens,
                encoder_hidden_states=torch.from_numpy(features).to(self.device, model.query_tokens.dtype),
            ).last_hidden_state[:, :count]
            embeds = model.language_projection(output).float().cpu().numpy()
            attention = torch.stack(self._attention).float().mean((0, 2))[0]
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
            return embed(torch.from_numpy(ids).to(self.device)).float().cpu().numpy()

    def new_decoder(self, capacity: int) -> TorchDecoder:
        """A decoder with an empty KV cache for up to ``capacity`` embeddings and tokens."""
        return TorchDecoder(self._model.language_model, self.decoder_only, self.device, capacity)


class TorchDecoder:
    """Decoding state of the language model, for one or several drafts.

    See :class:`cbedge.decoding.Decoder`.

    The encoder of an encoder-decoder (Flan-T5) reads the prompt; the cache then has the generated tokens only.
    """

    def __init__(self, model: Any, decoder_only: bool, device: str, capacity: int):
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


def _choose(device: str, cuda: bool) -> str:
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device[:20]!r}; give one of: {', '.join(DEVICES)}")
    if device == "cuda" and not cuda:
        raise DeviceError("CUDA was requested, but torch finds no CUDA device: check nvidia-smi, or give --device cpu")
    return "cuda" if cuda and device != "cpu" else "cpu"
