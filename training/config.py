"""The settings of a training run, read from YAML: one frozen dataclass for the run and one for each stage."""

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
    """One stage: what is trained, by which losses, and how.

    Attributes:
        name: also the name of the stage's folder in the run.
        train: parts trained in full: of ``qformer``, ``query_tokens``, ``projection``.
        lora: adapters added and trained in this stage; they stay, frozen, in the later ones. A later stage with the
            same settings goes on training them.
        losses: weight of each loss: ``contrastive``, ``tags``, ``words`` (no language model), ``language``.
        image_blind: the language model reads prompt and report alone; no image is loaded. Alone it makes an image-blind
            model; before the others, a language model that already knows how reports are worded.
        learning_rate: peak, for full parts; ``lora_learning_rate`` for adapters.
        schedule: after ``warmup_steps``: ``cosine`` or ``linear`` to a tenth of the peak, or ``constant``.
        gradient_checkpointing: compute activations again in the backward pass: less memory, about a third more time.
        batch_size: studies a forward pass; ``accumulate`` passes make one optimizer step.
        cached_views: 0 encodes augmented images anew at every step; K > 0 caches K views of each image once (the first
            as it is, the others augmented), for stages in which the vision encoder is frozen.
        start_cross_attention: before the first step, start the Q-Former's new cross-attention from the spread of the
            cached features (see :func:`training.stages.start_cross_attention`).
        prior_dropout: probability of withholding indication and comparison, each on its own.
        tell_findings: tags that the prompt may tell (``Seen: cardiomegaly, effusion.``); none where empty. In training
            they come from the curated tags with some noise, at inference from the Q-Former's tag head, whose thresholds
            are chosen on validation studies when the stage ends.
        tell_share: share of training studies that are told anything.
        tell_from: ``tags`` (what people tagged) or ``report`` (what the report's findings name, read by
            :mod:`training.findings`: then the language model learns to write all that it is told, and nothing else).
        openings: finding → the sentence that opens a draft where the finding is told; none where empty. It should say
            no more than the finding's name does: nothing is known of side or size.
        open_share: share of the studies told such a finding whose report begins with that sentence in training too, its
            own words on the finding left out (:mod:`training.openings`).
        learn: ``own``, the study's own report, or ``consensus``, the one that agrees most with the reports of studies
            whose indication reads alike, behind the sentences of what is told (:mod:`training.consensus`).
        lateral: the lateral radiograph is read beside the frontal one, where a study has it; the image embeddings of
            both go to the language model, and the tag head's logits are averaged.
        lateral_dropout: probability of withholding it, so that a frontal radiograph alone stays familiar.
        splits: studies to learn from; ``extra`` has impressions only.
        validate_every: steps between validations; 0 validates at each epoch's end. The last step is always validated.
        select_by: ``language`` (lowest validation loss), ``cider`` (highest CIDEr of greedy drafts of validation
            studies) or ``tags`` (highest mean AUC of the tag head) keeps the best weights seen and ends the stage with
            them; empty ends it with the last.
        patience: validations without a better one after which the stage stops early; 0 never stops it.
        abnormal_weight: how often an abnormal study is drawn, against a normal one.
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
        told, opened, alone = self.tell_findings, self.open_share, set(self.losses) == {"language"}
        needed = "tags" if self.select_by == "tags" else "language"
        require(told or not opened, "open_share needs tell_findings: only prompted findings open a report")
        require("language" in self.losses or not told, "tell_findings needs the language loss: they are in its prompt")
        fits = bool(told and alone and not opened)
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
    """A whole run: where the model begins, the data, where the result goes, and the stages in order.

    Attributes:
        base: one of :data:`training.base.BASES`, with its ``base_options``; or a checkpoint folder or a hub name.
        data: folder of IU X-RAY or MIMIC-CXR-JPG.
        output: the run's folder.
        stages: in order; none leaves the base as it is.
        seed: of every random choice.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: of the arithmetic: ``auto`` (fp32 on a CPU, bf16 on a GPU), ``fp32`` or ``bf16``.
        base_precision: of frozen weights in memory: ``fp32``, ``bf16`` or ``nf4`` (QLoRA). What is trained is fp32.
        validation_studies: so many, at most, of the validation split are looked at in each validation, the first ones.
        shard: with several processes, each keeps but a part of the language model's frozen weights (FSDP), for a model
            that no single GPU holds.
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
