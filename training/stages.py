"""Prepare a model for a stage, save and load what a stage trains, and run the forward passes of its losses."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import InstructBlipForConditionalGeneration

from training.base import ModelAndTokenizers
from training.batches import Batch
from training.config import Stage
from training.views import by_study

_ADAPTED = {"vision": "vision_model", "language": "language_model"}
_LATERAL = "lateral"
_PARTS = {"qformer": "qformer.", "query_tokens": "query_tokens", "projection": "language_projection."}


def prepare_stage(model: InstructBlipForConditionalGeneration, stage: Stage) -> None:
    """Freeze the model, add the stage's LoRA adapters, and unfreeze the parts that the stage trains, in fp32."""
    model.requires_grad_(False)
    if stage.lateral:
        model.config.reads_lateral = True
    if stage.lora:
        settings = LoraConfig(
            r=stage.lora.r,
            lora_alpha=stage.lora.alpha,
            lora_dropout=stage.lora.dropout,
            target_modules=list(stage.lora.targets),
        )
        attribute = _ADAPTED[stage.lora.part]
        part = getattr(model, attribute)
        if isinstance(part, PeftModel):  # the adapters of an earlier stage are trained further
            part.set_requires_grad(part.active_adapter, True)
        else:
            setattr(model, attribute, get_peft_model(part, settings))
    for name, parameter in model.named_parameters():
        if any(name.startswith(_PARTS[part]) for part in stage.train):
            parameter.requires_grad_(True)
        if parameter.requires_grad:  # bf16 is too coarse for the optimizer's steps
            parameter.data = parameter.data.float()


@torch.no_grad()
def start_cross_attention(model: InstructBlipForConditionalGeneration, features: Tensor, seed: int) -> None:
    """Initialize new cross-attention so that it uses the image from the first step.

    A few directions of a vision encoder's features are much larger than all others and almost the same for all images.
    With the usual initialization, keys and values would contain little else. So they are initialized for standardized
    features, and the output for the scale of the residual that it is added to.

    Args:
        model: its Q-Former's cross-attention is initialized in place.
        features: vision features of some radiographs, float [N, P, H].
    """
    mean, deviation = features.mean((0, 1)), features.flatten(0, 1).std(0) + 1e-6
    generator = torch.Generator().manual_seed(seed)
    for layer in model.qformer.encoder.layer:
        if not layer.has_cross_attention:
            continue
        attention = layer.crossattention
        for linear in (attention.attention.key, attention.attention.value):
            weight = torch.randn(linear.weight.shape, generator=generator) / features.shape[2] ** 0.5 / deviation
            linear.weight.copy_(weight)
            linear.bias.copy_(-weight @ mean)
        dense = attention.output.dense
        dense.weight.copy_(torch.randn(dense.weight.shape, generator=generator) / dense.in_features**0.5)


def trainable_groups(
    model: InstructBlipForConditionalGeneration, heads: nn.Module, stage: Stage
) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer: parts trained in full, adapters, and the heads for training only."""
    full = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    lora = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    groups = [{"params": full, "lr": stage.learning_rate}, {"params": lora, "lr": stage.lora_learning_rate}]
    if set(stage.losses) - {"language"}:
        groups.append({"params": list(heads.parameters()), "lr": 5 * stage.learning_rate})
    return [group for group in groups if group["params"]]


def save_trained(model: InstructBlipForConditionalGeneration, stage: Stage, folder: Path) -> None:
    """Save what a stage trained: full parts as ``trained.safetensors``, adapters in peft's format."""
    full = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if any(name.startswith(_PARTS[part]) for part in stage.train)
    }
    if full:
        save_file(full, folder / "trained.safetensors")
    if stage.lora:
        getattr(model, _ADAPTED[stage.lora.part]).save_pretrained(folder / "adapters" / stage.lora.part)
    if stage.lateral:
        (folder / _LATERAL).write_text("lateral radiographs are read too\n", encoding="utf-8")


def load_trained(
    model: InstructBlipForConditionalGeneration, folder: Path, adapted: tuple[str, ...] = tuple(_ADAPTED)
) -> None:
    """Load a finished stage's parts and adapters into the model.

    Args:
        adapted: parts whose adapters are loaded, of ``vision`` and ``language``.
    """
    if (folder / "trained.safetensors").is_file():
        unexpected = model.load_state_dict(load_file(folder / "trained.safetensors"), strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{folder} does not fit this model: unexpected {unexpected[:3]}")
    if (folder / _LATERAL).is_file():
        model.config.reads_lateral = True
    for part_name in adapted:
        attribute = _ADAPTED[part_name]
        adapter = folder / "adapters" / part_name
        if adapter.is_dir():
            part = getattr(model, attribute)
            base = part.unload() if isinstance(part, PeftModel) else part
            setattr(model, attribute, PeftModel.from_pretrained(base, str(adapter)))


def encode_images(model: InstructBlipForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[B, 3, S, S] → the vision encoder's features [B, P, H]."""
    return model.vision_model(pixel_values=pixels).last_hidden_state


def query_image(
    model: InstructBlipForConditionalGeneration, features: Tensor, instruction_ids: Tensor, instruction_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Features and instruction → the Q-Former's output [B, Q, H] and its projection [B, Q, D]."""
    queries = model.query_tokens.expand(len(features), -1, -1)
    mask = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long, device=features.device), instruction_mask], 1)
    output = model.qformer(
        input_ids=instruction_ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=features
    ).last_hidden_state[:, : queries.shape[1]]
    return output, model.language_projection(output)


def embed_inputs(
    model: InstructBlipForConditionalGeneration,
    input_ids: Tensor,
    projected: Tensor | None,
    laterals: Tensor | None = None,
) -> Tensor:
    """Token embeddings [B, L, D], with the projected queries in place of the image placeholders.

    Args:
        input_ids: int64 [B, L].
        projected: [N, Q, D] of the frontal radiographs, followed by the lateral ones; ``None`` if ``input_ids`` has no
            placeholders.
        laterals: int64 [N - B], the study index of each lateral radiograph. Such a study has twice as many
            placeholders.
    """
    if projected is None:
        return model.get_input_embeddings()(input_ids)
    if laterals is None:
        laterals = torch.zeros(0, dtype=torch.long, device=projected.device)
    stacked, there = by_study(projected, len(input_ids), laterals)
    places = input_ids == model.config.image_token_id
    text = model.get_input_embeddings()(input_ids.masked_fill(places, 0))
    return text.masked_scatter(places.unsqueeze(-1), stacked[there].to(text.dtype))


def language_loss(parts: ModelAndTokenizers, batch: Batch, projected: Tensor | None) -> Tensor:
    """Mean cross-entropy of the report's tokens, given the prompt and, unless ``projected`` is ``None``, the image."""
    model = parts.model
    if not model.config.use_decoder_only_language_model:
        return _sequence_to_sequence_loss(parts, batch, projected)
    embeds = embed_inputs(model, batch.input_ids, projected, batch.laterals)
    language = model.language_model
    base = language.get_base_model() if isinstance(language, PeftModel) else language
    hidden = base.get_decoder()(
        inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    # Logits over the whole vocabulary are expensive, so they are computed for the report's tokens only.
    labels = batch.labels[:, 1:]
    wanted = labels != -100
    logits = base.get_output_embeddings()(hidden[:, :-1][wanted])
    return functional.cross_entropy(logits.float(), labels[wanted])


def _sequence_to_sequence_loss(parts: ModelAndTokenizers, batch: Batch, projected: Tensor | None) -> Tensor:
    """The same for an encoder-decoder (Flan-T5): the encoder reads image and prompt, the decoder the report."""
    reports = batch.labels != -100
    prompt_length = int((batch.attention_mask.bool() & ~reports).sum(1).max())
    prompt_mask = (batch.attention_mask.bool() & ~reports)[:, :prompt_length].long()
    embeds = embed_inputs(parts.model, batch.input_ids[:, :prompt_length], projected, batch.laterals)
    width = int(reports.sum(1).max())
    labels = torch.full((len(reports), width), -100, device=embeds.device)
    for row, keep in enumerate(reports):
        labels[row, : int(keep.sum())] = batch.labels[row][keep]
    return parts.model.language_model(inputs_embeds=embeds, attention_mask=prompt_mask, labels=labels).loss
