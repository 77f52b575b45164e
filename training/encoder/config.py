"""The settings of a run, read from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import yaml


@dataclass(frozen=True)
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
    layers: int | None = None
    image_size: int = 224
    side: int = 224
    batch_size: int = 24
    shares: dict[str, float] = field(
        default_factory=lambda: {"iu_xray/frontal": 0.42, "iu_xray/lateral": 0.16, "nih/frontal": 0.42}
    )
    epochs: float = 10.0
    learning_rate: float = 2e-5
    head_learning_rate: float = 2e-4
    layer_decay: float = 0.8
    weight_decay: float = 0.05
    warmup_steps: int = 100
    average: float = 0.998
    smoothing: dict[str, float] = field(default_factory=lambda: {"iu_xray": 0.02, "nih": 0.1})
    rare: int = 60
    augment: float = 1.0
    seed: int = 0
    validate_every: int = 0
    save_minutes: float = 4.0


def read_config(path: Path) -> EncoderConfig:
    """Read settings from YAML.

    Raises:
        ValueError: an unknown key, or a file that is no mapping.
    """
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no mapping of settings to values")
    known = {f.name for f in fields(EncoderConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return EncoderConfig(**values)


def with_epochs(config: EncoderConfig, epochs: float | None) -> EncoderConfig:
    """The same settings with another length of the schedule, where one is given."""
    return config if epochs is None else replace(config, epochs=epochs)
