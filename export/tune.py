"""Tune the scales of 4-bit weights so that the language model predicts as it did in fp32.

The second phase of Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models" (ACL
2025): the rounded values stay, and only the scales are trained, in all layers at once. The loss here is the divergence
of the rounded model's next token from the fp32 model's (distillation) on reports of training studies. The fp32 model is
not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from export.gptq import Reading, Rounded, products

BATCH_SIZE = 8
LEARNING_RATE = 2e-3  # of a scale, relative to its first value
_WARMUP = 5


class _Product(torch.autograd.Function):
    """``x`` [..., K] times a rounded weight, with gradients only for ``x`` and for the scales [N, K / B]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, scales)
        return x @ _weight(values, scales).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (gradient,) = gradients
        x, values, scales = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        of_scales = (of_weight * values).reshape(*scales.shape, -1).sum(-1)
        return gradient @ _weight(values, scales), None, of_scales


def tune_scales(
    model: Any,
    rounded: dict[str, Rounded],
    readings: Sequence[Reading],
    steps: int,
    tell: Callable[[int, int, float], None] = lambda step, steps, divergence: None,
) -> dict[str, Rounded]:
    """Tune the scales of rounded weights.

    Args:
        model: the language model in fp32, of the LLaMA family; it is not changed.
        rounded: from :func:`export.gptq.round_language_model`.
        readings: from :func:`export.gptq.calibration_inputs`.
        steps: number of steps of Adam, with :data:`BATCH_SIZE` readings each.
        tell: gets the step, the number of steps, and the divergence of the batch in nats per token.
    """
    model.requires_grad_(False)
    values = {name: torch.from_numpy(r.values.astype(np.float32)) - 8 for name, r in rounded.items()}
    start = {name: torch.from_numpy(r.scales) for name, r in rounded.items()}
    shares = {name: torch.ones_like(s, requires_grad=True) for name, s in start.items()}
    optimizer = torch.optim.Adam(shares.values(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(steps, 2), pct_start=min(0.5, _WARMUP / max(steps, 2))
    )
    order = _order(len(readings), np.random.default_rng(0))
    for step in range(steps):
        batch = [readings[next(order)] for _ in range(min(BATCH_SIZE, len(readings)))]
        with torch.no_grad():
            wanted = _log_probabilities(model, batch)
        with _rounded_products(model, values, {name: start[name] * share for name, share in shares.items()}):
            found = _log_probabilities(model, batch)
        loss = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tell(step + 1, steps, loss.item())
    tuned = {name: (start[name] * share).detach().numpy() for name, share in shares.items()}
    return {name: Rounded(r.values, tuned[name].astype(np.float16).astype(np.float32)) for name, r in rounded.items()}


@torch.no_grad()
def divergence(model: Any, rounded: dict[str, Rounded], readings: Sequence[Reading]) -> float:
    """Mean KL divergence of the rounded model's next token from the fp32 model's, in nats per token."""
    values = {name: torch.from_numpy(r.values.astype(np.float32)) - 8 for name, r in rounded.items()}
    scales = {name: torch.from_numpy(r.scales) for name, r in rounded.items()}
    wanted = _log_probabilities(model, readings)
    with _rounded_products(model, values, scales):
        found = _log_probabilities(model, readings)
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True).item()


def _weight(values: Tensor, scales: Tensor) -> Tensor:
    return (values.reshape(*scales.shape, -1) * scales.unsqueeze(-1)).reshape(values.shape)


def _order(count: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from map(int, rng.permutation(count))


def _log_probabilities(model: Any, readings: Sequence[Reading]) -> Tensor:
    """Log probabilities at the positions before each token of the report and its end, float32 [tokens, V]."""
    length = max(r.embeds.shape[1] for r in readings)
    embeds = torch.cat([functional.pad(r.embeds, (0, 0, 0, length - r.embeds.shape[1])) for r in readings])
    mask = torch.zeros(embeds.shape[:2], dtype=torch.long)
    before = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    for row, reading in enumerate(readings):
        mask[row, : reading.embeds.shape[1]] = 1
        before[row, reading.report - 1 : reading.embeds.shape[1] - 1] = True
    hidden = model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    return functional.log_softmax(model.lm_head(hidden[before]).float(), -1)


@contextmanager
def _rounded_products(model: Any, values: dict[str, Tensor], scales: dict[str, Tensor]) -> Iterator[None]:
    """Let the linear layers use rounded weights."""
    changed: list[nn.Linear] = []
    try:
        for number, layer in enumerate(model.model.layers):
            for name, linears in products(layer).items():
                key = f"/model/layers.{number}/{name}/MatMul"
                if key not in values:
                    continue
                sizes = [linear.out_features for linear in linears]
                parts = zip(linears, values[key].split(sizes), scales[key].split(sizes), strict=True)
                for linear, numbers, scale in parts:
                    linear.forward = partial(_multiply, numbers, scale)  # type: ignore[method-assign]
                    changed.append(linear)
        yield
    finally:
        for linear in changed:
            del linear.forward


def _multiply(values: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    return _Product.apply(x, values, scales)
