"""What transformers, the training code and the runtime compute for the same file and prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

from cbedge import ReportGenerator
from cbedge.decoding import decode
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from training.base import ModelAndTokenizers
from training.special_tokens import prefix_ids, start_ids, suffix_ids
from training.stages import embed_inputs, encode_images, query_image

GREEDY_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """What a model computes for one file and prompt.

    Attributes:
        pixel_values: float32 [1, 3, S, S].
        input_ids: token ids of the prompt and of the special tokens around it, without image placeholders.
        qformer_ids: token ids of the instruction.
        features: output of the vision encoder, float32 [1, P, H].
        queried: the Q-Former's output for the queries, float32 [1, Q, H]; ``None`` if a graph does not return it.
        image_embeds: the same after the projection, float32 [1, Q, D].
        logits: logits of the first token, float32 [V].
        tokens: up to 32 greedy tokens, including the stop token.
    """

    pixel_values: np.ndarray
    input_ids: list[int]
    qformer_ids: list[int]
    features: np.ndarray
    queried: np.ndarray | None
    image_embeds: np.ndarray
    logits: np.ndarray
    tokens: list[int]


class Reference:
    """A checkpoint in transformers: its processor and its model."""

    def __init__(self, folder: Path):
        self.processor = InstructBlipProcessor.from_pretrained(folder)
        self.model = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._vocabulary = self.model.config.text_config.vocab_size
        if self.processor.num_query_tokens is None:  # early release: what transformers' message asks for
            self.processor.num_query_tokens = self.model.config.num_query_tokens
            self.model.resize_token_embeddings(len(self.processor.tokenizer))
            self.model.config.image_token_index = len(self.processor.tokenizer) - 1

    @torch.inference_mode()
    def answer(self, image: Path, prompt: str) -> Answer:
        """What transformers computes for a file and a prompt."""
        inputs = self.processor(images=Image.open(image), text=prompt, return_tensors="pt")
        decoder_only = self.model.config.use_decoder_only_language_model
        first = {} if decoder_only else {"decoder_input_ids": torch.tensor([[self._start]])}
        out = self.model(**inputs, **first)
        count = self.model.config.num_query_tokens
        queried = out.qformer_outputs.last_hidden_state[:, :count]
        written = self.model.generate(**inputs, max_new_tokens=GREEDY_TOKENS, do_sample=False)[0].tolist()
        ids = inputs["input_ids"][0].tolist()
        read = ids if decoder_only else [self._start]
        if written[: len(read)] == read:
            written = written[len(read) :]
        return Answer(
            inputs["pixel_values"].numpy(),
            ids[count:],
            inputs["qformer_input_ids"][0].tolist(),
            out.vision_outputs.last_hidden_state.numpy(),
            queried.numpy(),
            self.model.language_projection(queried).numpy(),
            out.logits[0, -1, : self._vocabulary].numpy(),
            written,
        )

    @property
    def _start(self) -> int:
        return self.model.language_model.generation_config.decoder_start_token_id


@torch.inference_mode()
def in_torch(parts: ModelAndTokenizers, image: Path, prompt: str) -> Answer:
    """What the training code computes; transformers generates the tokens from its input embeddings."""
    model = parts.model.eval()
    pixels = preprocess_radiograph(load_radiograph(image), parts.preprocessing)
    features = encode_images(model, torch.from_numpy(pixels))
    words = parts.qformer_tokenizer(prompt, return_tensors="pt")
    queried, projected = query_image(model, features, words["input_ids"], words["attention_mask"])
    text = parts.tokenizer(prompt, add_special_tokens=False).input_ids
    ids = [*prefix_ids(parts), *text, *suffix_ids(parts)]
    placeholders = [parts.image_token_id] * model.config.num_query_tokens
    embeds = embed_inputs(model, torch.tensor([placeholders + ids]), projected)
    language, start = model.language_model, start_ids(parts)
    first = {"decoder_input_ids": torch.tensor([start])} if start else {}
    logits = language(inputs_embeds=embeds, **first).logits[0, -1]
    written = language.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
    )[0, len(start) :].tolist()
    return Answer(
        pixels,
        ids,
        words["input_ids"][0].tolist(),
        features.numpy(),
        queried.numpy(),
        projected.numpy(),
        logits.numpy(),
        written,
    )


def in_bundle(generator: ReportGenerator, image: Path, prompt: str) -> Answer:
    """What the runtime computes for a file and a prompt."""
    backend, manifest = generator.backend, generator.bundle.manifest
    pixels = preprocess_radiograph(load_radiograph(image), manifest.preprocessing)
    features = backend.encode_image(pixels)
    codec = generator.resources.codec
    words, ids = codec.encode_instruction(prompt), codec.encode_prompt(prompt)
    embeds = backend.query_image(features, np.array([words], np.int64)).embeds
    read = np.concatenate([embeds, backend.embed_tokens(np.array([ids], np.int64))], axis=1)
    decoder = backend.new_decoder(read.shape[1] + GREEDY_TOKENS + 1)
    logits = decoder.prefill(read).copy()
    written = [token.id for token in decode(decoder, logits, manifest.stop_ids, GREEDY_TOKENS)]
    return Answer(pixels, ids, words, features, None, embeds, logits, written)
