"""GPTQ: 4-bit weights whose rounding errors compensate each other on real prompts and reports.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023. Each
linear weight is rounded column by column. The error of a column is compensated in the columns that are not yet rounded,
by the second moments H of the layer's inputs. Columns are rounded in the order of their inputs' power ("activation
order") with scales that are chosen before ("static groups"), so the result fits any block-wise kernel. Layers are
rounded one after another; each gets the output of the rounded layers before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from training.base import ModelAndTokenizers
from training.batches import collate, load_pixels
from training.controls import own
from training.datasets.iu_xray import read_studies
from training.drafting import TorchDrafter
from training.stages import embed_inputs, encode_images, query_image

CALIBRATION_STUDIES = 256
_DAMPING = 0.01  # of the mean of H's diagonal, as in the paper
_CLIPS = np.linspace(1.0, 0.7, 13)  # candidates for a scale, as shares of the block's largest weight
_TOGETHER = 128  # columns whose errors are propagated together


@dataclass(frozen=True)
class Rounded:
    """A linear weight in 4 bits: ``values`` uint8 [N, K] from 0 to 15, 8 being zero; ``scales`` float32 [N, K / B]."""

    values: np.ndarray
    scales: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """The dequantized weight, float32 [N, K]."""
        block = self.values.shape[1] // self.scales.shape[1]
        return (self.values.astype(np.float32) - 8) * np.repeat(self.scales, block, 1)


@dataclass(frozen=True)
class Reading:
    """Input of the language model for one study: ``embeds`` of images, prompt and report, float32 [1, L, D]; ``report``
    is the position where the report begins."""

    embeds: Tensor
    report: int


def calibration_inputs(parts: ModelAndTokenizers, data: Path, count: int = CALIBRATION_STUDIES) -> list[Reading]:
    """Inputs of the language model for training studies, with the model's own drafts as reports, as in use.

    Args:
        parts: a merged model with a decoder-only language model.
    """
    studies = [s for s in read_studies(data, ("train",)) if s.findings]
    chosen = np.random.default_rng(0).permutation(len(studies))[:count]
    drawn = [studies[i] for i in chosen]
    drafts = TorchDrafter(parts).draft(own(drawn), lambda done: None)
    inputs = []
    with torch.inference_mode():
        for study in (replace(s, target=draft or s.target) for s, draft in zip(drawn, drafts, strict=True)):
            both = parts.reads_lateral and study.lateral is not None
            files = [study.image, *([study.lateral] if both else [])]
            pixels = np.stack([load_pixels(file, parts.preprocessing) for file in files if file is not None])
            features = encode_images(parts.model, torch.from_numpy(pixels))
            laterals = [0] * both
            batch = collate(parts, [study], [study.context], features, None, laterals)
            queries, projected = query_image(parts.model, features, batch.qformer_ids, batch.qformer_mask)
            if parts.finding_head is not None:
                found = parts.finding_head.read(queries, 1, batch.laterals)
                batch = collate(parts, [study], [study.context], features, found, laterals)
            embeds = embed_inputs(parts.model, batch.input_ids, projected, batch.laterals)
            inputs.append(Reading(embeds, int((batch.labels[0] != -100).nonzero()[0])))
    return inputs


def can_be_rounded(model: Any) -> bool:
    """Whether a language model has the layers of LLaMA, as GPTQ needs here."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers:
        return False
    return hasattr(layers[0], "self_attn") and hasattr(getattr(layers[0], "mlp", None), "gate_proj")


@torch.inference_mode()
def round_language_model(
    model: Any, inputs: Sequence[Reading], block: int, chosen: Callable[[str], bool]
) -> dict[str, Rounded]:
    """Round the linear weights of a language model of the LLaMA family to 4 bits; the model is not changed.

    Args:
        model: the language model in fp32.
        inputs: from :func:`calibration_inputs`.
        block: number of columns that share a scale.
        chosen: whether a product is rounded, by its name in the decoder's graph.

    Returns:
        Name in the decoder's graph → rounded weight; queries, keys and values are one product there.

    Raises:
        ValueError: the language model is of another family, or the width of a weight is no multiple of ``block``.
    """
    if not can_be_rounded(model):
        raise ValueError(
            f"GPTQ is for language models of the LLaMA family, not {type(model).__name__}: give --algorithm rtn"
        )
    hidden, arguments = _first_layer_inputs(model, inputs)
    rounded: dict[str, Rounded] = {}
    for number, layer in enumerate(model.model.layers):
        wanted = {n: p for n, p in products(layer).items() if chosen(f"/model/layers.{number}/{n}/MatMul")}
        moments = _second_moments(layer, {n: p[0] for n, p in wanted.items()}, hidden, arguments)
        before = {linear: linear.weight.data for linears in wanted.values() for linear in linears}
        for name, linears in wanted.items():
            weight = torch.cat([linear.weight for linear in linears])
            found = round_weight(weight.float().numpy(), moments[name], block)
            rounded[f"/model/layers.{number}/{name}/MatMul"] = found
            sizes = [linear.out_features for linear in linears]
            for linear, part in zip(linears, torch.from_numpy(found.weight).split(sizes), strict=True):
                linear.weight.data = part
        hidden = [_run(layer, x, a) for x, a in zip(hidden, arguments, strict=True)]
        for linear, weight in before.items():
            linear.weight.data = weight
    return rounded


def round_weight(weight: np.ndarray, moments: np.ndarray, block: int) -> Rounded:
    """Round one weight.

    Args:
        weight: float32 [N, K], K a multiple of ``block``.
        moments: float64 [K, K], the sum of the outer products of its inputs.

    Raises:
        ValueError: K is no multiple of ``block``.
    """
    rows, columns = weight.shape
    if columns % block:
        raise ValueError(f"the width of a weight, {columns}, is not a multiple of the block size {block}")
    power = np.diag(moments).copy()
    scales = _scales(weight, power, block)
    order = np.argsort(-power, kind="stable")
    inverse = _inverse_factor(moments[np.ix_(order, order)])
    left = torch.from_numpy(weight[:, order].astype(np.float64))
    by_column = torch.from_numpy(np.repeat(scales, block, 1)[:, order].astype(np.float64))
    values = torch.zeros(rows, columns, dtype=torch.float64)
    for start in range(0, columns, _TOGETHER):
        end = min(start + _TOGETHER, columns)
        errors = torch.zeros(rows, end - start, dtype=torch.float64)
        for i in range(start, end):
            values[:, i] = torch.round(left[:, i] / by_column[:, i]).clamp(-8, 7)
            errors[:, i - start] = (left[:, i] - values[:, i] * by_column[:, i]) / inverse[i, i]
            left[:, i:end] -= errors[:, i - start, None] * inverse[i, i:end]
        left[:, end:] -= errors @ inverse[start:end, end:]
    back = np.argsort(order)
    return Rounded((values.numpy()[:, back] + 8).astype(np.uint8), scales)


def put_into_graph(graph: ModelProto, rounded: dict[str, Rounded]) -> None:
    """Replace the weights of ``MatMulNBits`` nodes with 4 bits and without zero points, in place.

    Raises:
        ValueError: the graph has no such node of a given name, or it has another block size.
    """
    nodes = {re.sub(r"_Q4$", "", n.name): n for n in graph.graph.node if n.op_type == "MatMulNBits"}
    tensors = {t.name: t for t in graph.graph.initializer}
    for name, found in rounded.items():
        node = nodes.get(name)
        if node is None or len(node.input) > 3:
            raise ValueError(f"the decoder has no product {name} in 4 bits without zero points")
        packed, scales = (tensors[i] for i in node.input[1:3])
        values = found.values.reshape(*packed.dims[:2], -1)
        if values.shape[2] != 2 * packed.dims[2]:
            raise ValueError(f"{name} has another block size than its rounded weight")
        new = values[..., ::2] | values[..., 1::2] << 4
        packed.CopyFrom(numpy_helper.from_array(new.astype(np.uint8), packed.name))
        scales.CopyFrom(numpy_helper.from_array(found.scales.reshape(tuple(scales.dims)), scales.name))


def products(layer: Any) -> dict[str, list[nn.Linear]]:
    """The products of a layer as in the decoder's graph, which joins queries, keys and values."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "attn/qkv_proj": [attention.q_proj, attention.k_proj, attention.v_proj],
        "attn/o_proj": [attention.o_proj],
        "mlp/gate_proj": [mlp.gate_proj],
        "mlp/up_proj": [mlp.up_proj],
        "mlp/down_proj": [mlp.down_proj],
    }


class _Stop(Exception):
    """The first layer was reached."""


def _first_layer_inputs(model: Any, inputs: Sequence[Reading]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The hidden states that the first layer gets for each input, and the arguments that all layers share."""
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def take(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append(positional[0] if positional else named.pop("hidden_states"))
        arguments.append(named)
        raise _Stop

    hook = model.model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        for reading in inputs:
            try:
                model.model(inputs_embeds=reading.embeds, use_cache=False)
            except _Stop:
                continue
    finally:
        hook.remove()
    return hidden, arguments


def _run(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def _second_moments(
    layer: nn.Module, linears: dict[str, nn.Linear], hidden: list[Tensor], arguments: list[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """The sum of the outer products of the inputs of each linear layer, float64 [K, K]."""
    moments = {name: torch.zeros(m.in_features, m.in_features) for name, m in linears.items()}

    def add(name: str, module: nn.Module, positional: tuple[Tensor, ...]) -> None:
        rows = positional[0].flatten(0, -2).float()
        moments[name].addmm_(rows.T, rows)

    hooks = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()]
    try:
        for x, named in zip(hidden, arguments, strict=True):
            _run(layer, x, named)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value.double().numpy() for name, value in moments.items()}


def _scales(weight: np.ndarray, power: np.ndarray, block: int) -> np.ndarray:
    """The scale of each block, [N, K / block], with the least rounding error weighted by the inputs' power."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // block, block)
    strength = power.reshape(1, columns // block, block) + 1e-12
    at = np.abs(blocks).argmax(2)[..., None]
    largest = np.take_along_axis(blocks, at, 2)  # with its sign: it becomes -8, the value without an opposite
    best, least = np.zeros((rows, columns // block, 1)), np.full((rows, columns // block, 1), np.inf)
    for clip in _CLIPS:
        scale = np.where(largest == 0, 1.0, largest * clip / -8)
        error = (strength * (np.clip(np.round(blocks / scale), -8, 7) * scale - blocks) ** 2).sum(2, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    wide = best[..., 0].astype(np.float32)
    short = wide.astype(np.float16).astype(np.float32)  # as they are stored
    return np.where(short == 0, wide, short)


def _inverse_factor(moments: np.ndarray) -> Tensor:
    """The upper Cholesky factor of the damped moments' inverse, float64 [K, K]."""
    damped = torch.from_numpy(moments.copy())
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always 0
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
