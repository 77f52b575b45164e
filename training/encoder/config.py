"""The settings of a run, read from YAML."""

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
        layers: of the encoder, where ``start`` is ``mini``.
        image_size: rows and columns that the encoder reads.
        side: rows and columns of the decoded films. Equal to ``image_size``, validation sees what the runtime sees.
        batch_size: films of a step.
        shares: share of each batch, ``collection/view`` → share.
        epochs: length of the schedule; an epoch has as many draws as there are training films.
        learning_rate: peak of the encoder's last layer; ``head_learning_rate`` of the head.
        layer_decay: factor of the rate from each layer to the one below.
        weight_decay: of matrices.
        warmup_steps: steps until the peak; a cosine to 1% follows.
        average: decay of the moving average of the weights, which is what is validated and kept.
        smoothing: collection → label smoothing, for labels that rules mined.
        rare: training films of a finding with at most so many positives in their group are drawn twice as often.
        augment: strength of the augmentation.
        seed: of all chance.
        validate_every: steps between two validations; 0 validates after each epoch.
        save_minutes: minutes between two saved states.
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
    seed: int = 0
    validate_every: Size = 0
    save_minutes: float = 4.0


def read_config(path: Path, **overrides: Any) -> EncoderConfig:
    """Read settings from YAML; see :func:`training.config.load_config`."""
    return read_settings(EncoderConfig, path, overrides)
