"""Restore an InstructBLIP checkpoint from a bundle, to train it further or to use it in other engines.

A bundle has graphs and no checkpoint. Its graphs still tell where each weight belongs: nodes traced by torch name their
module, and nodes of the decoder, which ONNX Runtime GenAI's builder writes, name their layer. Weights in 4 or 8 bits
are restored as they were rounded, so the checkpoint computes what the bundle computes. Only language models of the
LLaMA family can be restored.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from cbedge.bundles.bundle import QFORMER_TOKENIZER, TOKENIZER, Bundle, open_bundle
from export.console import Verbose
from export.graph_weights import (
    Graph,
    RestoreError,
    attributes,
    decoder_weights,
    image_positions,
    query_tokens,
    traced_weights,
)
from export.tracing import DECODER, EMBED, QFORMER, VISION
from training.base import FindingHead, ModelAndTokenizers
from training.command_line import run
from training.datasets.provenance import save_training_data

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
_IMAGE_TOKENS = ("<image>", "<file_sep>")  # InstructBLIP's own; the mini model's


@app.command(help=__doc__)
def main_command(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint to write.")],
    variant: Annotated[
        str | None, typer.Option(help="Variant with the weights.", show_default="the bundle's default")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing folder.")] = False,
    verbose: Verbose = False,
) -> None:
    """Restore one checkpoint."""
    _check_target(out, force)
    source = open_bundle(bundle)
    source.verify()
    parts = restore(source, variant)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "checkpoint"
        parts.save(folder)
        save_training_data(list(source.manifest.training_data), folder)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    size = sum(parameter.numel() for parameter in parts.model.parameters())
    typer.echo(f"checkpoint: {out}: {source.manifest.name} {source.manifest.version}, {size / 1e6:.0f} million weights")


def _check_target(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise RestoreError(f"{out} exists already: give --force to replace it")
    if not (out / "config.json").is_file():
        raise RestoreError(f"{out} exists and is not a checkpoint: give another folder; nothing was written")


def restore(bundle: Bundle, variant: str | None = None) -> ModelAndTokenizers:
    """The model of a bundle in torch, in fp32, with its tokenizers and finding head.

    Args:
        variant: the variant with the weights; default is the bundle's default.

    Raises:
        BundleError: there is no such variant.
        RestoreError: the variant has no ONNX graphs, or they were not written by this export.
    """
    name, chosen = bundle.variant(variant)
    if not chosen.graphs:
        raise RestoreError(f"variant {name} has no ONNX graphs: give another with --variant")
    graphs = {kind: Graph.load(bundle.folder / file) for kind, file in chosen.graphs.items()}
    tokenizer = _language_tokenizer(bundle)
    state = traced_weights(graphs[VISION]) | image_positions(graphs[VISION]) | traced_weights(graphs[QFORMER])
    state["query_tokens"] = query_tokens(graphs[QFORMER], bundle.manifest.shapes.num_query_tokens)
    state = {re.sub(r"^projection\.", "language_projection.", name): value for name, value in state.items()}
    config = _config(bundle, graphs, state, tokenizer)
    model = InstructBlipForConditionalGeneration(config)
    state |= {f"language_model.{k}": v for k, v in decoder_weights(graphs[DECODER], config.text_config).items()}
    table = graphs[EMBED].table()
    state["language_model.model.embed_tokens.weight"] = table
    if config.text_config.tie_word_embeddings:
        del state["language_model.lm_head.weight"]
    _fill(model, state)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(bundle.folder / QFORMER_TOKENIZER)),
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    head = _finding_head(graphs[QFORMER], bundle)
    settings = bundle.manifest.preprocessing
    return ModelAndTokenizers(model.eval(), tokenizer, words, config.image_token_id, head, settings)


def _config(
    bundle: Bundle, graphs: dict[str, Graph], state: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerFast
) -> InstructBlipConfig:
    """The configuration, from the shapes of weights and the attributes of nodes."""
    shapes, patch = bundle.manifest.shapes, state["vision_model.embeddings.patch_embedding.weight"]
    image_token = next((t for t in _IMAGE_TOKENS if t in tokenizer.get_vocab()), None)
    if image_token is None:
        raise RestoreError(f"the tokenizer has none of the image tokens {', '.join(_IMAGE_TOKENS)}")
    words = state["qformer.embeddings.word_embeddings.weight"]
    layers = _indices(state, r"qformer\.encoder\.layer\.(\d+)\.")
    crossed = _indices(state, r"qformer\.encoder\.layer\.(\d+)\.crossattention")
    return InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=patch.shape[0],
            patch_size=patch.shape[2],
            image_size=shapes.image_size,
            intermediate_size=len(state["vision_model.encoder.layers.0.mlp.fc1.bias"]),
            num_hidden_layers=len(_indices(state, r"vision_model\.encoder\.layers\.(\d+)\.")),
            num_attention_heads=_heads(graphs[VISION]),
            hidden_act=_activation(graphs[VISION]),
            layer_norm_eps=_epsilon(graphs[VISION], "LayerNormalization"),
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            max_position_embeddings=len(state["qformer.embeddings.position_embeddings.weight"]),
            num_hidden_layers=len(layers),
            num_attention_heads=_heads(graphs[QFORMER]),
            hidden_act=_activation(graphs[QFORMER]),
            intermediate_size=len(state["qformer.encoder.layer.0.intermediate_query.dense.bias"]),
            cross_attention_frequency=crossed[1] - crossed[0] if len(crossed) > 1 else len(layers),
            encoder_hidden_size=patch.shape[0],
            layer_norm_eps=_epsilon(graphs[QFORMER], "LayerNormalization"),
        ),
        text_config=_text_config(bundle, graphs, tokenizer),
        num_query_tokens=shapes.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        reads_lateral=bundle.manifest.reads_lateral,
    )


def _text_config(bundle: Bundle, graphs: dict[str, Graph], tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    shapes, decoder = bundle.manifest.shapes, graphs[DECODER]
    attention = next((n for n in decoder.nodes if n.op_type == "GroupQueryAttention"), None)
    gate = next((n for n in decoder.nodes if n.name.startswith("/model/layers.0/mlp/gate_proj/")), None)
    if attention is None or gate is None:
        raise RestoreError("the decoder is no LLaMA, and only that family can be restored")
    weight = decoder.linear(gate)
    head = next(n for n in decoder.nodes if n.name.startswith("/lm_head/MatMul"))
    table, words = graphs[EMBED].table(), decoder.linear(head)
    if weight is None or words is None:
        raise RestoreError("the decoder's weights are not in its graph")
    # Position 1 rotates the last pair of a head by theta^(2/d - 1); the fp32 table gives seven digits.
    angle = np.arcsin(np.float64(decoder.array("sin_cache")[1, -1]))
    theta = float(f"{angle ** (-1 / (1 - 2 / shapes.head_size)):.5g}")
    return LlamaConfig(
        vocab_size=len(table),
        hidden_size=shapes.hidden_size,
        intermediate_size=len(weight),
        num_hidden_layers=shapes.num_layers,
        num_attention_heads=attributes(attention)["num_heads"],
        num_key_value_heads=shapes.num_key_value_heads,
        head_dim=shapes.head_size,
        max_position_embeddings=len(decoder.array("cos_cache")),
        rms_norm_eps=_epsilon(decoder, "SimplifiedLayerNormalization"),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=table.shape == words.shape and np.array_equal(table, words),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _indices(state: dict[str, np.ndarray], pattern: str) -> list[int]:
    return sorted({int(m[1]) for name in state if (m := re.match(pattern, name))})


def _epsilon(graph: Graph, kind: str) -> float:
    """Epsilon of the graph's normalizations, rounded because fp32 stores 1e-5 as 0.0000099999997."""
    node = next((n for n in graph.nodes if n.op_type == kind), None)
    if node is None:
        raise RestoreError(f"a graph has no {kind}: it was not written by this export")
    return float(f"{attributes(node)['epsilon']:.6g}")


def _activation(graph: Graph) -> str:
    return "gelu" if any(n.op_type == "Gelu" for n in graph.nodes) else "quick_gelu"


def _heads(graph: Graph) -> int:
    """The number of attention heads: the last but one dimension of a reshape that splits the width."""
    for node in graph.nodes:
        if node.op_type == "Reshape" and node.input[1] in graph.tensors:
            shape = graph.array(node.input[1])
            if len(shape) >= 4:
                return int(shape[-2])
    raise RestoreError("no attention in the graph: it was not written by this export")


def _language_tokenizer(bundle: Bundle) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(bundle.folder / TOKENIZER)))
    end = tokenizer.convert_ids_to_tokens(bundle.manifest.stop_ids[0])
    tokenizer.eos_token = tokenizer.pad_token = end
    if bundle.manifest.prefix_ids:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(bundle.manifest.prefix_ids[0])
    return tokenizer


def _finding_head(graph: Graph, bundle: Bundle) -> FindingHead | None:
    """The finding head: the last product of the graph, and the lookup of its queries."""
    if bundle.manifest.image_findings is None:
        return None
    findings = bundle.manifest.image_findings.head
    made = {output: node for node in graph.nodes for output in node.output}
    add = made["finding_logits"]
    bias = next(i for i in add.input if i in graph.tensors)
    total = made[next(i for i in add.input if i in made)]
    product = made[total.input[0]]
    weight = next(i for i in product.input if i in graph.tensors)
    node = made[next(i for i in product.input if i in made)]
    while not node.op_type.startswith("Gather"):
        node = made[node.input[0]]
    queries = tuple(int(i) for i in graph.array(node.input[1]).ravel())
    return FindingHead(queries, torch.tensor(graph.array(weight)), torch.tensor(graph.array(bias)), findings)


def _fill(model: InstructBlipForConditionalGeneration, state: dict[str, np.ndarray]) -> None:
    tensors: dict[str, Tensor] = {name: torch.tensor(value) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"language_model.lm_head.weight"} if model.config.text_config.tie_word_embeddings else set()
    last = model.config.qformer_config.num_hidden_layers - 1
    unread = re.compile(rf"qformer\.encoder\.layer\.{last}\.(intermediate|output)\.")  # of the instruction
    for name in missing:
        if unread.match(name):
            model.get_parameter(name).data.zero_()
    absent = [n for n in missing if n not in tied and not n.endswith("position_ids") and not unread.match(n)]
    if absent or unexpected:
        raise RestoreError(f"the graphs do not fit InstructBLIP: missing {absent[:3]}, unexpected {unexpected[:3]}")
    model.tie_weights()


if __name__ == "__main__":
    run(app)
