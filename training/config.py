"""The settings of a training run, read from YAML: one frozen dataclass for the run and one for each stage."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from training.ontology import OPENINGS, TAGS

COMPONENTS = ("qformer", "query_tokens", "projection")
LOSSES = ("contrastive", "tags", "words", "language")
SCHEDULES = ("cosine", "linear", "constant")
BASE_PRECISIONS = ("fp32", "bf16", "nf4")
SOURCES = ("tags", "report")
REPORTS = ("own", "consensus")
SELECTIONS = ("", "language", "cider", "tags")


class ConfigError(ValueError):
    """A training configuration has an unknown key or value; the message names it."""


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al. 2021) on one part of the model: ``part`` is ``vision`` or ``language``."""

    part: str
    targets: tuple[str, ...]
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05


@dataclass(frozen=True)
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
    losses: dict[str, float]
    train: tuple[str, ...] = ()
    lora: LoraSettings | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    lora_learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_steps: int = 20
    schedule: str = "cosine"
    gradient_checkpointing: bool = False
    validate_every: int = 0
    select_by: str = ""
    patience: int = 0
    image_blind: bool = False
    cached_views: int = 0
    start_cross_attention: bool = False
    prior_dropout: float = 0.3
    tell_findings: tuple[str, ...] = ()
    tell_share: float = 0.9
    tell_from: str = "tags"
    openings: dict[str, str] = field(default_factory=lambda: dict(OPENINGS))
    open_share: float = 0.0
    learn: str = "own"
    lateral: bool = False
    lateral_dropout: float = 0.3
    splits: tuple[str, ...] = ("train",)
    abnormal_weight: float = 1.0
    save_every: int = 50


@dataclass(frozen=True)
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
    precision: str = "auto"
    base_precision: str = "fp32"
    validation_studies: int = 300
    shard: bool = False


def load_config(path: Path, **overrides: Any) -> RunConfig:
    """Read a run's YAML; ``overrides`` that are not ``None`` replace its top-level values.

    Raises:
        ConfigError: the file is no YAML mapping, or a key, part, loss or value is unknown.
        FileNotFoundError: there is no such file.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
        raise ConfigError(f"{path} has no list of stages")
    values.update({key: value for key, value in overrides.items() if value is not None})
    values["stages"] = tuple(_stage(stage, path) for stage in values["stages"])
    adapted: dict[str, LoraSettings] = {}
    for stage in values["stages"]:
        if stage.lora and adapted.setdefault(stage.lora.part, stage.lora) != stage.lora:
            raise ConfigError(
                f"{path}, stage {stage.name}: an earlier stage has LoRA on {stage.lora.part} with other settings; give "
                "the same, and its adapters are trained on"
            )
    if values.get("base_precision", "fp32") not in BASE_PRECISIONS:
        raise ConfigError(
            f"{path}: unknown base_precision {values['base_precision']!r}; give one of: {', '.join(BASE_PRECISIONS)}"
        )
    if values.get("shard") and values.get("base_precision") == "nf4":
        raise ConfigError(f"{path}: shard cannot part weights in nf4; give base_precision bf16, or no shard")
    if values.get("base_precision", "fp32") != "fp32" and values.get("precision") == "fp32":
        raise ConfigError(f"{path}: base_precision {values['base_precision']} needs precision bf16 or auto")
    count = values.get("validation_studies", 300)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"{path}: validation_studies is {count!r}; give a whole number from 1 up")
    for key in ("data", "output"):
        if not values.get(key):
            raise ConfigError(f"{path} does not say {key}; set it there or give --{key}")
        values[key] = Path(values[key])
    return _build(RunConfig, values, str(path))


def _stage(values: dict, path: Path) -> Stage:
    values = dict(values)
    where = f"{path}, stage {values.get('name', '?')}"
    if values.get("lora"):
        lora = {**values["lora"], "targets": tuple(values["lora"].get("targets", ()))}
        values["lora"] = _build(LoraSettings, lora, where)
        if values["lora"].part not in ("vision", "language"):
            raise ConfigError(f"{where}: lora.part is {lora['part']!r}; give vision or language")
    for key in ("train", "splits", "tell_findings"):
        if key in values:
            values[key] = tuple(values[key])
    stage = _build(Stage, values, where)
    for name in (*(set(stage.train) - set(COMPONENTS)), *(set(stage.losses) - set(LOSSES))):
        raise ConfigError(f"{where}: unknown part or loss {name!r}; parts: {COMPONENTS}, losses: {LOSSES}")
    for key, known in (("schedule", SCHEDULES), ("select_by", SELECTIONS), ("tell_from", SOURCES), ("learn", REPORTS)):
        if getattr(stage, key) not in known:
            names = ", ".join(filter(None, known))
            raise ConfigError(f"{where}: unknown {key} {getattr(stage, key)!r}; give one of: {names}")
    for key in ("tell_findings", "openings"):
        unknown = [name for name in getattr(stage, key) if name not in TAGS[1:]]
        if unknown:
            raise ConfigError(f"{where}: {key} has {unknown[0]!r}; known: {', '.join(TAGS[1:])}")
    if stage.open_share and not stage.tell_findings:
        raise ConfigError(f"{where}: open_share needs tell_findings: only what is told opens a report")
    if stage.tell_findings and "language" not in stage.losses:
        raise ConfigError(f"{where}: tell_findings needs the language loss: only the language model is told")
    if stage.learn == "consensus" and (
        not stage.tell_findings or stage.open_share or set(stage.losses) != {"language"}
    ):
        raise ConfigError(
            f"{where}: learn consensus needs tell_findings and the language loss alone; its reports are opened without "
            "open_share"
        )
    needed = "tags" if stage.select_by == "tags" else "language"
    if stage.select_by and needed not in stage.losses:
        raise ConfigError(f"{where}: select_by {stage.select_by} needs the {needed} loss")
    if stage.patience and not stage.select_by:
        raise ConfigError(f"{where}: patience needs select_by, which says what is better")
    if stage.start_cross_attention and ("qformer" not in stage.train or not stage.cached_views):
        raise ConfigError(f"{where}: start_cross_attention needs qformer in train, and cached_views")
    if stage.image_blind and (set(stage.losses) != {"language"} or stage.train or stage.cached_views or stage.lateral):
        raise ConfigError(
            f"{where}: an image-blind stage has the language loss alone, and trains, caches and reads no image part"
        )
    return stage


def _build(kind: type, values: dict, where: str) -> Any:
    known = {f.name for f in fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
