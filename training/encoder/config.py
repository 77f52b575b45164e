"""Settings of a run."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from training.settings import STRICT, Count, Positive, Share, Size, read_settings


@dataclass(frozen=True, config=STRICT)
class EncoderConfig:
    """Settings of a run, read from YAML.

    Attributes:
        start: see :func:`training.encoder.model.load_start`.
        layers: number of the encoder's layers if ``start`` is ``mini``.
        image_size: rows and columns of the encoder's input.
        side: rows and columns of the decoded films; equal to ``image_size``, validation is like the runtime.
        batch_size: films per step.
        shares: share of each batch, ``collection/view`` → share.
        epochs: length of the schedule; an epoch samples as many films as there are training films.
        learning_rate: peak for the encoder's last layer; ``head_learning_rate`` for the head.
        layer_decay: factor of the learning rate from each layer to the one below.
        weight_decay: weight decay of matrices.
        warmup_steps: steps until the peak; a cosine to 1% follows.
        average: decay of the moving average of the weights, which is validated and saved.
        smoothing: collection → label smoothing, for labels from text mining.
        rare: films with a finding that has at most this many positives in its group are sampled twice as often.
        augment: strength of the augmentation.
        patches: share of the patches that a training step reads, drawn anew for each step (PatchDropout, Liu et al.,
            WACV 2023): half of them take half the time. Validation reads all.
        seed: random seed.
        validate_every: steps between validations; 0 for one per epoch.
        save_minutes: minutes between saved states.
    """

    start: str = "mini"
    layers: Count | None = None
    image_size: Count = 224
    side: Count = 224
    batch_size: Count = 24
    shares: dict[str, Share] = field(
        default_factory=lambda: {"iu_xray/frontal": 0.42, "iu_xray/lateral": 0.16, "nih/frontal": 0.42}
    )
    epochs: Positive = 10.0
    learning_rate: float = 2e-5
    head_learning_rate: float = 2e-4
    layer_decay: float = 0.8
    weight_decay: float = 0.05
    warmup_steps: Size = 100
    average: Share = 0.998
    smoothing: dict[str, Share] = field(default_factory=lambda: {"iu_xray": 0.02, "nih": 0.1})
    rare: Size = 60
    augment: float = 1.0
    patches: Positive = 1.0
    seed: int = 0
    validate_every: Size = 0
    save_minutes: float = 4.0


def read_config(path: Path, **overrides: Any) -> EncoderConfig:
    """Read settings from YAML; see :func:`training.config.load_config`."""
    return read_settings(EncoderConfig, path, overrides)
