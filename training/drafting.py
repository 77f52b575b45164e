"""Write drafts for many studies: with an exported bundle through the runtime, or with a run in torch."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cbedge.drafting.query import read_images
from cbedge.errors import DraftError
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.prompt import ClinicalContext, build_opening
from training.base import ModelAndTokenizers
from training.batches import encode_instructions, encode_prompt, of_lateral
from training.special_tokens import stop_ids
from training.stages import embed_inputs, encode_images, query_image

MAX_NEW_TOKENS = 160
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """One draft to write: of which frontal radiograph, with which context; a model that reads a lateral one gets it."""

    image: Path | Radiograph
    context: ClinicalContext
    lateral: Path | Radiograph | None = None


class Drafter(Protocol):
    """Something that writes drafts."""

    name: str

    def draft(self, requests: list[Request], progress: Progress) -> list[str]:
        """The text of each draft."""
        ...


class RuntimeDrafter:
    """Drafts as users get them: a bundle, run by cbedge.

    Args:
        model: folder of a bundle; ``None`` is the embedded one.
        variant: of the bundle; ``None`` is its default.
    """

    def __init__(self, model: Path | None, variant: str | None, device: str = "cpu"):
        from cbedge.api import ReportGenerator

        self.generator = ReportGenerator.from_pretrained(model, variant, device)
        backend: Any = self.generator.backend
        backend.encode_image = remember(backend.encode_image)
        self.decoding = self.generator.decoding
        self.name = f"{self.generator.variant} (cbedge)"

    def freely(self) -> "RuntimeDrafter":
        """The same bundle, its drafts kept to no template."""
        other = copy.copy(self)
        other.decoding = replace(self.decoding, keep_to_template=False)
        return other

    def templates(self, requests: list[Request]) -> list[str] | None:
        """What the drafts keep to, before any image is seen; ``None`` where they keep to nothing."""
        templates = self.generator.resources.templates
        if templates is None:
            return None
        return [templates.choose(request.context) for request in requests]

    def draft(self, requests: list[Request], progress: Progress) -> list[str]:
        """The text of each draft."""
        texts = []
        for request in requests:
            c = request.context
            try:
                report = self.generator.generate(
                    request.image,
                    indication=c.indication,
                    comparison=c.comparison,
                    view=c.view,
                    lateral=request.lateral if self.generator.reads_lateral else None,
                    max_new_tokens=MAX_NEW_TOKENS,
                    accept_any_image=True,
                    decoding=self.decoding,
                )
                texts.append(report.text)
            except DraftError:  # users get none: it scores as an empty one
                texts.append("")
            progress(1)
        return texts


def remember(encode: Callable[[np.ndarray], np.ndarray], most: int = 2000) -> Callable[[np.ndarray], np.ndarray]:
    """The same encoder of one radiograph's pixels, which encodes none twice: the controls show the same ones again.

    Args:
        encode: pixels float32 [1, 3, R, R] → features float32 [1, P, H].
        most: radiographs whose features are kept, the first ones (0.4 MB each, mini).
    """
    known: dict[bytes, np.ndarray] = {}

    def encoded(pixels: np.ndarray) -> np.ndarray:
        key = hashlib.sha256(pixels.tobytes()).digest()
        if key in known:
            return known[key]
        features = encode(pixels)
        if len(known) < most:
            known[key] = features
        return features

    return encoded


class RuntimeEncoder:
    """The image side of a bundle, for the retrieval controls and the linear probes.

    Args:
        drafter: holds the bundle.
    """

    def __init__(self, drafter: RuntimeDrafter, batch_size: int = 16):
        self.generator, self.batch_size = drafter.generator, batch_size

    def encode(self, images: Sequence[Path | Radiograph]) -> torch.Tensor:
        """The vision encoder's features [B, P, H]."""
        settings = self.generator.bundle.manifest.preprocessing
        pixels = (preprocess_radiograph(load_radiograph(image), settings) for image in images)
        return torch.from_numpy(np.concatenate([self.generator.backend.encode_image(p) for p in pixels]))

    def query(self, features: torch.Tensor, contexts: list[ClinicalContext]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded radiographs [B, P, H] → image embeddings [B, Q, D], twice.

        A bundle's Q-Former hands out its output after the projection alone, which is linear and at least as wide: what
        a linear probe reads off the one, it reads off the other.
        """
        rows = zip(features.numpy(), contexts, strict=True)
        backend, codec = self.generator.backend, self.generator.resources.codec
        readings = [read_images(backend, codec, None, [f[None]], c) for f, c in rows]
        embeds = torch.from_numpy(np.concatenate([reading.image_embeds for reading in readings]))
        return embeds, embeds


class Encoder(Protocol):
    """The image side of a model, a run's in torch or a bundle's."""

    batch_size: int

    def encode(self, images: Sequence[Path | Radiograph]) -> torch.Tensor:
        """The vision encoder's features [B, P, H]."""
        ...

    def query(self, features: torch.Tensor, contexts: list[ClinicalContext]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded radiographs [B, P, H] → the Q-Former's output [B, Q, H] and image embeddings [B, Q, D]."""
        ...


class TorchDrafter:
    """Drafts of a run, in torch, in batches: greedy; for trials, without the runtime's
    control of repetition, template and whole sentences.

    Args:
        parts: the trained model, on its device.
        batch_size: studies at once.
        name: of the row in the table.
        image_blind: the model was trained without images, and is shown none.
    """

    def __init__(
        self,
        parts: ModelAndTokenizers,
        batch_size: int = 16,
        name: str = "fp32 (torch)",
        image_blind: bool = False,
    ):
        self.parts, self.batch_size, self.name, self.image_blind = parts, batch_size, name, image_blind
        self.device = next(parts.model.parameters()).device

    @torch.inference_mode()
    def draft(self, requests: list[Request], progress: Progress) -> list[str]:
        """The text of each draft."""
        texts: dict[int, str] = {}
        # Prompts of like length go together, which saves padding.
        order = sorted(range(len(requests)), key=lambda i: len(encode_prompt(self.parts, requests[i].context)))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, text in zip(rows, self._batch([requests[i] for i in rows]), strict=True):
                texts[row] = text
            progress(len(rows))
        return [texts[i] for i in range(len(requests))]

    def _batch(self, requests: list[Request]) -> list[str]:
        parts = self.parts
        count = parts.model.config.num_query_tokens
        reads = parts.reads_lateral and not self.image_blind
        laterals = [i for i, r in enumerate(requests) if reads and r.lateral is not None]
        projected = None
        seen: list[tuple[str, ...] | None] = [None] * len(requests)
        if not self.image_blind:
            images = [r.image for r in requests] + [r.lateral for r in requests if r.lateral is not None and reads]
            contexts = [r.context for r in requests] + [of_lateral(requests[i].context) for i in laterals]
            output, projected = self.query(self.encode(images), contexts)
            if parts.finding_head is not None:
                seen = [*parts.finding_head.read(output, len(requests), torch.tensor(laterals, dtype=torch.long))]
        begun = [self._opening(told) for told in seen]
        read = begun if parts.model.config.use_decoder_only_language_model else [[] for _ in begun]
        told_rows = [*zip(requests, seen, read, [i in laterals for i in range(len(requests))], strict=True)]
        prompts = [encode_prompt(parts, r.context, told, two) + ids for r, told, ids, two in told_rows]
        if self.image_blind:
            prompts = [prompt[count:] for prompt in prompts]
        length = max(map(len, prompts))
        width = parts.model.config.text_config.hidden_size
        embeds = torch.zeros(len(prompts), length, width, device=self.device)
        mask = torch.zeros(len(prompts), length, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):  # left-padded, so that every report begins at the same place
            ids = torch.tensor([prompt], device=self.device)
            queries, own = None, torch.zeros(0, dtype=torch.long, device=self.device)
            if projected is not None:
                rows = [row, *(len(requests) + n for n, i in enumerate(laterals) if i == row)]
                queries, own = projected[rows], own.new_zeros(len(rows) - 1)
            embeds[row, length - len(prompt) :] = embed_inputs(parts.model, ids, queries, own)[0]
            mask[row, length - len(prompt) :] = 1
        if parts.model.config.use_decoder_only_language_model:
            written = self._generate(embeds, mask).tolist()
            drafts = [[*ids, *row] for ids, row in zip(begun, written, strict=False)]
        else:  # what a draft begins with is its decoder's, of another length in each: one study at a time
            drafts = []
            for at, opening in enumerate(begun):
                start = [parts.model.language_model.config.decoder_start_token_id, *opening]
                first, one = torch.tensor([start], device=self.device), slice(at, at + 1)
                whole = self._generate(embeds[one], mask[one], decoder_input_ids=first)[0, 1:]
                drafts.append(whole.tolist())
        texts = parts.tokenizer.batch_decode(drafts, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generate(self, embeds: torch.Tensor, mask: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        """int64 [rows, tokens], greedy; an encoder-decoder's hold what its decoder began with."""
        return self.parts.model.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=[*stop_ids(self.parts)],
            pad_token_id=self.parts.tokenizer.pad_token_id,
            **more,
        )

    def _opening(self, told: tuple[str, ...] | None) -> list[int]:
        if not told or self.parts.finding_head is None:
            return []
        sentences = self.parts.finding_head.findings.open(told).values()
        return self.parts.tokenizer("".join(build_opening([*sentences])), add_special_tokens=False).input_ids

    @torch.inference_mode()
    def query(self, features: torch.Tensor, contexts: list[ClinicalContext]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoded radiographs [B, P, H] → Q-Former output [B, Q, H] and image embeddings [B, Q, D]."""
        text = encode_instructions(self.parts, contexts)
        ids, mask = text["input_ids"].to(self.device), text["attention_mask"].to(self.device)
        return query_image(self.parts.model, features, ids, mask)

    @torch.inference_mode()
    def encode(self, images: Sequence[Path | Radiograph]) -> torch.Tensor:
        """The vision encoder's features [B, P, H]."""
        settings = self.parts.preprocessing
        pixels = np.concatenate([preprocess_radiograph(load_radiograph(image), settings) for image in images])
        return encode_images(self.parts.model, torch.from_numpy(pixels).to(self.device))
