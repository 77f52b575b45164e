"""The settings of a training run, read from YAML: one dataclass for the run and one for each stage."""

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from training.ontology import OPENINGS, TAGS
from training.settings import STRICT, Count, Positive, Share, Size, read_settings, require

if TYPE_CHECKING:
    Finding = str
else:
    Finding = Literal[*TAGS[1:]]


@dataclass(frozen=True, config=STRICT)
class LoraSettings:
    """LoRA (Hu et al. 2021) on one part of the model: ``part`` is ``vision`` or ``language``."""

    part: Literal["vision", "language"]
    targets: tuple[str, ...]
    r: Count = 16
    alpha: Count = 32
    dropout: Share = 0.05


@dataclass(frozen=True, config=STRICT)
class Stage:
    """One stage: which parts are trained, with which losses, and how.

    Attributes:
        name: name of the stage, and of its folder in the run.
        train: parts that are trained in full.
        lora: adapters that this stage adds and trains. Later stages keep them frozen, or train them further with the
            same settings.
        losses: weight of each loss; only ``language`` runs the language model.
        image_blind: the language model reads only prompt and report; no image is loaded. As the only stage, it makes an
            image-blind model; as an earlier stage, it teaches the language model the wording of reports.
        learning_rate: peak, for parts trained in full; ``lora_learning_rate`` for adapters.
        schedule: after ``warmup_steps``: ``cosine`` or ``linear`` to a tenth of the peak, or ``constant``.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        batch_size: studies per forward pass; ``accumulate`` passes make one optimizer step.
        cached_views: 0 encodes newly augmented images at every step; K > 0 encodes K views of each image once (the
            first without augmentation), for stages with a frozen vision encoder.
        start_cross_attention: initialize the Q-Former's new cross-attention from the statistics of the cached features
            (see :func:`training.stages.start_cross_attention`).
        prior_dropout: probability of withholding the indication, and independently the comparison.
        tell_findings: findings that the prompt may list (``Seen: cardiomegaly, effusion.``). In training they come from
            index terms with some noise, at inference from the Q-Former's tag head, whose thresholds are chosen on
            validation studies when the stage ends.
        tell_share: share of training studies whose prompt has this line.
        tell_from: source of these findings in training: ``tags`` (index terms), or ``report`` (found in the report by
            :mod:`training.findings`, so that the language model learns to write all listed findings and no others).
        openings: finding → the sentence that opens a draft with this finding. It must not say more than the finding's
            name does, because side and size are not known.
        open_share: share of the training studies with such a finding whose report begins with that sentence instead of
            its own words on the finding (:mod:`training.openings`).
        learn: the training target: ``own``, the study's own report; or ``consensus``, the opening sentences and the
            report that agrees most with those of studies with a similar indication (:mod:`training.consensus`).
        lateral: read the lateral radiograph of a study too. The language model gets the image embeddings of both, and
            the tag head's logits are averaged.
        lateral_dropout: probability of withholding it, so that the model also learns from a frontal radiograph alone.
        splits: splits for training; ``extra`` has impressions only.
        validate_every: steps between validations; 0 for one per epoch. The last step is always validated.
        select_by: keep the best weights by ``language`` (lowest validation loss), ``cider`` (highest CIDEr of drafts of
            validation studies) or ``tags`` (highest mean AUC of the tag head); empty keeps the last weights.
        patience: number of validations without improvement that ends the stage; 0 for no limit.
        abnormal_weight: how often an abnormal study is sampled, relative to a normal one.
    """

    name: str
    losses: dict[Literal["contrastive", "tags", "words", "language"], float]
    train: tuple[Literal["qformer", "query_tokens", "projection"], ...] = ()
    lora: LoraSettings | None = None
    epochs: Positive = 1.0
    batch_size: Count = 8
    accumulate: Count = 1
    learning_rate: float = 1e-4
    lora_learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_steps: Size = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gradient_checkpointing: bool = False
    validate_every: Size = 0
    select_by: Literal["", "language", "cider", "tags"] = ""
    patience: Size = 0
    image_blind: bool = False
    cached_views: Size = 0
    start_cross_attention: bool = False
    prior_dropout: Share = 0.3
    tell_findings: tuple[Finding, ...] = ()
    tell_share: Share = 0.9
    tell_from: Literal["tags", "report"] = "tags"
    openings: dict[Finding, str] = field(default_factory=lambda: dict(OPENINGS))
    open_share: Share = 0.0
    learn: Literal["own", "consensus"] = "own"
    lateral: bool = False
    lateral_dropout: Share = 0.3
    splits: tuple[str, ...] = ("train",)
    abnormal_weight: Positive = 1.0
    save_every: Count = 50

    @model_validator(mode="after")
    def _check(self) -> "Stage":
        listed, opened, alone = self.tell_findings, self.open_share, set(self.losses) == {"language"}
        needed = "tags" if self.select_by == "tags" else "language"
        require(listed or not opened, "open_share needs tell_findings: only prompted findings open a report")
        require("language" in self.losses or not listed, "tell_findings needs the language loss: its prompt has them")
        fits = bool(listed and alone and not opened)
        require(fits or self.learn == "own", "learn consensus needs tell_findings, language loss alone, no open_share")
        require(not self.select_by or needed in self.losses, f"select_by {self.select_by} needs the {needed} loss")
        require(self.select_by or not self.patience, "patience needs select_by, which says what is better")
        fits = "qformer" in self.train and self.cached_views > 0
        require(fits or not self.start_cross_attention, "start_cross_attention needs qformer in train and cached_views")
        fits = alone and not (self.train or self.cached_views or self.lateral)
        allowed = "the language loss alone, and trains, caches and reads no image part"
        require(fits or not self.image_blind, f"an image-blind stage has {allowed}")
        return self


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """A whole run: base model, data, output folder and stages.

    Attributes:
        base: one of :data:`training.base.BASES`, with its ``base_options``; or a checkpoint folder or a hub name.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: of computations: ``auto`` (fp32 on a CPU, bf16 on a GPU), ``fp32`` or ``bf16``.
        base_precision: of frozen weights in memory: ``fp32``, ``bf16`` or ``nf4`` (QLoRA). Trained weights are fp32.
        validation_studies: maximum number of validation studies, the first ones of the split.
        shard: with several processes, each keeps only a part of the language model's frozen weights (FSDP), for a model
            that does not fit on one GPU.
    """

    base: str
    data: Path
    output: Path
    stages: tuple[Stage, ...]
    base_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    base_precision: Literal["fp32", "bf16", "nf4"] = "fp32"
    validation_studies: Count = 300
    shard: bool = False

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        base, adapted = self.base_precision, dict[str, LoraSettings]()
        require(base != "nf4" or not self.shard, "shard cannot split nf4 weights; give base_precision bf16")
        require(base == "fp32" or self.precision != "fp32", f"base_precision {base} needs precision bf16 or auto")
        for name, lora in [(stage.name, stage.lora) for stage in self.stages if stage.lora]:
            same = f"stage {name}: an earlier stage has LoRA on {lora.part} with other settings; give the same"
            require(adapted.setdefault(lora.part, lora) == lora, f"{same} to train its adapters further")
        return self


def load_config(path: Path, **overrides: Any) -> RunConfig:
    """Read a run's YAML; ``overrides`` that are not ``None`` replace its top-level values.

    Raises:
        ConfigError: the file is not a YAML mapping, or a key or value is invalid.
        FileNotFoundError: there is no such file.
    """
    return read_settings(RunConfig, path, overrides)
