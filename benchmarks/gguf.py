"""Write a Llama language model of transformers as GGUF, for llama.cpp in :mod:`benchmarks.peers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

# Names of a layer's weights in transformers and in llama.cpp.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint in fp32; llama.cpp quantizes it later.

    Args:
        checkpoint: folder of a ``LlamaForCausalLM`` with a byte-pair tokenizer (``tokenizer.json``), as SmolLM2 is.

    Raises:
        ValueError: the model is not a Llama.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"a {config.model_type} model cannot be written as GGUF here, only a llama one")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8")), config)
    weights = model.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", weights["lm_head.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _LAYER.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"].numpy()
            if ours in ("attn_q", "attn_k"):
                weight = _interleave(weight, heads if ours == "attn_q" else kv_heads)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize a GGUF file with llama.cpp.

    Args:
        kind: a format of llama.cpp, such as ``Q4_0`` or ``Q8_0``.

    Raises:
        RuntimeError: llama.cpp reports an error.
    """
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from two halves to pairs: transformers rotates halves, llama.cpp neighbours."""
    return np.ascontiguousarray(weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))


def _add_tokenizer(writer: gguf.GGUFWriter, rules: dict[str, Any], config: Any) -> None:
    names = [f"<unused{i}>" for i in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, i in rules["model"]["vocab"].items():
        names[i], kinds[i] = token, gguf.TokenType.NORMAL
    for entry in rules["added_tokens"]:
        names[entry["id"]], kinds[entry["id"]] = entry["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    merges = rules["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, i in ((writer.add_bos_token_id, config.bos_token_id), (writer.add_eos_token_id, config.eos_token_id)):
        if isinstance(i, int):
            add(i)
