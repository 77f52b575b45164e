"""Write an encoder-decoder language model (Flan-T5) as two graphs: its encoder, and its decoder with KV cache.

The encoder graph also computes the keys and values of the decoder's cross-attention, so they are computed once for a
report and not once for each token.

    encoder_model           inputs_embeds [B, L, D] → cross.{i}.key, cross.{i}.value [B, A, L, K]
    decoder_model_merged    inputs_embeds [B, T, D], past_key_values.{i}.key, .value [B, A, P, K], cross.… →
                            logits [B, T, V], present.{i}.key, .value [B, A, P + T, K]
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional
from transformers import T5ForConditionalGeneration

from export.tracing import DECODER, ENCODER, ExportError, trace

KINDS = ("key", "value")


class EncoderGraph(nn.Module):
    """Embeddings [B, L, D] → keys and values of the cross-attention of each decoder layer, [B, A, L, K]."""

    def __init__(self, model: T5ForConditionalGeneration):
        super().__init__()
        self.encoder: Any = model.encoder
        self.decoder: Any = model.decoder

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, ...]:
        """Run the encoder, and project its output for each layer."""
        encoded = self.encoder(inputs_embeds=inputs_embeds).last_hidden_state
        found: list[Tensor] = []
        for block in self.decoder.block:
            attention = block.layer[1].EncDecAttention
            found += [_heads(project(encoded), attention) for project in (attention.k, attention.v)]
        return tuple(found)


class DecoderGraph(nn.Module):
    """Embeddings of tokens, past keys and values, and the encoder's keys and values → logits, and present ones."""

    def __init__(self, model: T5ForConditionalGeneration):
        super().__init__()
        self.decoder: Any = model.decoder
        self.head = model.lm_head
        self.scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(self, inputs_embeds: Tensor, past: list[Tensor], cross: list[Tensor]) -> tuple[Tensor, ...]:
        """Process more tokens; each attends to the tokens before it and to the encoder's output."""
        hidden, present = inputs_embeds, []
        read, new = past[0].shape[2], inputs_embeds.shape[1]
        at = torch.arange(new, device=hidden.device)[:, None] + read
        others = torch.arange(read + new, device=hidden.device)[None]
        first = self.decoder.block[0].layer[0].SelfAttention
        bucket = first._relative_position_bucket(
            others - at,
            bidirectional=False,
            num_buckets=first.relative_attention_num_buckets,
            max_distance=first.relative_attention_max_distance,
        )
        bias = first.relative_attention_bias(bucket).permute(2, 0, 1)[None]
        bias = bias.masked_fill(others > at, torch.finfo(torch.float32).min)
        for i, block in enumerate(self.decoder.block):
            own, crossed, forward = block.layer
            attention, normed = own.SelfAttention, own.layer_norm(hidden)
            pairs = zip(past[2 * i : 2 * i + 2], (attention.k, attention.v), strict=True)
            key, value = (torch.cat([old, _heads(project(normed), attention)], 2) for old, project in pairs)
            present += [key, value]
            hidden = hidden + _attend(attention, normed, key, value, bias)
            key, value = cross[2 * i : 2 * i + 2]
            hidden = hidden + _attend(crossed.EncDecAttention, crossed.layer_norm(hidden), key, value)
            hidden = forward(hidden)
        return self.head(self.decoder.final_layer_norm(hidden) * self.scale), *present


def _heads(projected: Tensor, attention: Any) -> Tensor:
    """[B, T, A K] → [B, A, T, K]."""
    return projected.unflatten(-1, (attention.n_heads, attention.key_value_proj_dim)).transpose(1, 2)


def _attend(attention: Any, normed: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """T5's attention: without scaling, and with a bias for positions."""
    scores = _heads(attention.q(normed), attention) @ key.transpose(2, 3)
    weights = functional.softmax(scores if bias is None else scores + bias, dim=-1)
    return attention.o((weights @ value).transpose(1, 2).flatten(2))


@torch.inference_mode()
def export_encoder_decoder(model: T5ForConditionalGeneration, folder: Path) -> dict[str, Path]:
    """Write both graphs of a merged fp32 model into ``folder``; returns the path of each.

    Raises:
        ExportError: the language model is an encoder-decoder of another family.
    """
    if not isinstance(model, T5ForConditionalGeneration):
        raise ExportError(f"only encoder-decoders of the T5 family can be exported, not {type(model).__name__}")
    model.eval()
    config = model.config
    paths = {kind: folder / f"{kind}.onnx" for kind in (ENCODER, DECODER)}
    names = [f"{i}.{kind}" for i in range(config.num_decoder_layers) for kind in KINDS]
    crossed, batch = [f"cross.{name}" for name in names], Dim("batch", min=1, max=64)
    length, read, new = Dim("length", min=2, max=4096), Dim("read", min=0, max=4096), Dim("tokens", min=1, max=4096)
    embeds = torch.zeros(2, 5, config.d_model)
    trace(
        EncoderGraph(model),
        (embeds,),
        paths[ENCODER],
        ["inputs_embeds"],
        crossed,
        {"inputs_embeds": {0: batch, 1: length}},
        within=False,
    )
    past = [torch.zeros(2, config.num_heads, 3, config.d_kv) for _ in names]
    cross = [torch.zeros(2, config.num_heads, 5, config.d_kv) for _ in names]
    trace(
        DecoderGraph(model),
        (torch.zeros(2, 4, config.d_model), past, cross),
        paths[DECODER],
        ["inputs_embeds", *(f"past_key_values.{name}" for name in names), *crossed],
        ["logits", *(f"present.{name}" for name in names)],
        {
            "inputs_embeds": {0: batch, 1: new},
            "past": [{0: batch, 2: read} for _ in names],
            "cross": [{0: batch, 2: length} for _ in names],
        },
        within=False,
    )
    return paths
