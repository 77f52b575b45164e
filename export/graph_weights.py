"""Read a model's weights from the graphs of a bundle, by the names that they have in transformers.

Graphs traced by torch name, for each node, the module that it came from; the decoder, which ONNX Runtime GenAI's
builder writes, names the layer. Weights in 4 or 8 bits are returned as fp32.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from transformers import LlamaConfig

from export.tracing import SCOPES

_LAYER_PARTS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "attn.o_proj.MatMul": "self_attn.o_proj",
    "mlp.gate_proj.MatMul": "mlp.gate_proj",
    "mlp.up_proj.MatMul": "mlp.up_proj",
    "mlp.down_proj.MatMul": "mlp.down_proj",
}


class RestoreError(ValueError):
    """The graphs of a bundle were not written by ``python -m export``."""


@dataclass
class Graph:
    """One graph with its weights."""

    nodes: list[NodeProto]
    tensors: dict[str, TensorProto]
    folder: Path

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Read a graph and its external weights."""
        graph: GraphProto = onnx.load(str(path)).graph
        tensors = {t.name: t for t in graph.initializer}
        widened = [n for n in graph.node if n.op_type == "Cast" and n.input[0] in tensors]
        return cls(list(graph.node), tensors | {n.output[0]: tensors[n.input[0]] for n in widened}, path.parent)

    def array(self, name: str) -> np.ndarray:
        """A stored weight; 16-bit floats as fp32."""
        value = numpy_helper.to_array(self.tensors[name], str(self.folder))
        return value.astype(np.float32) if value.dtype == np.float16 else value

    def linear(self, node: NodeProto) -> np.ndarray | None:
        """The weight of a product, float32 [out, in]; ``None`` if both factors are computed."""
        if node.op_type == "MatMulNBits":
            return self._blocks(node)
        if node.op_type == "MatMul" and node.input[1] in self.tensors:
            return self.array(node.input[1]).T
        return None

    def _blocks(self, node: NodeProto) -> np.ndarray:
        size = attributes(node)
        bits, rows, columns = size.get("bits", 4), size["N"], size["K"]
        scales = self.array(node.input[2]).reshape(rows, -1, 1)
        values = _unpacked(self.array(node.input[1]).reshape(rows, scales.shape[1], -1), bits)
        zeros: np.ndarray | int = 2 ** (bits - 1)
        if len(node.input) > 3 and node.input[3]:
            zeros = _unpacked(self.array(node.input[3]).reshape(rows, -1), bits)[:, : scales.shape[1], None]
        return ((values - zeros) * scales).reshape(rows, -1)[:, :columns].astype(np.float32)

    def table(self, name: str | None = None) -> np.ndarray:
        """The table of a lookup, float32 [N, D]: of the weight ``name``, or of the only lookup in the graph."""
        for node in self.nodes:
            if node.op_type not in ("Gather", "GatherBlockQuantized"):
                continue
            source = node.input[0]
            if source not in self.tensors or (name and re.sub(r"_Q\d$", "", source) != name):
                continue
            if node.op_type == "Gather":
                return self.array(source)
            return self._table_blocks(node)
        raise RestoreError(f"no table {name or 'of tokens'} in the graph: it was not written by this export")

    def _table_blocks(self, node: NodeProto) -> np.ndarray:
        tensor, bits = self.tensors[node.input[0]], attributes(node).get("bits", 4)
        values = self.array(node.input[0])
        scales = self.array(node.input[2])
        if tensor.data_type == TensorProto.UINT8:  # packed, with an offset
            values = _unpacked(values, bits) - 2 ** (bits - 1)
        elif len(node.input) > 3:
            values = values.astype(np.int32) - np.repeat(
                self.array(node.input[3]).astype(np.int32), values.shape[1] // scales.shape[1], 1
            )
        rows = values.astype(np.float32).reshape(len(values), scales.shape[1], -1)
        return (rows * scales[:, :, None]).reshape(values.shape)


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _unpacked(values: np.ndarray, bits: int) -> np.ndarray:
    """Unpack bytes with two 4-bit numbers, the low one first, to int16 along the last axis; 8-bit numbers unchanged."""
    values = values.astype(np.uint8)
    if bits == 8:
        return values.astype(np.int16)
    return np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1).astype(np.int16)


def _scope(node: NodeProto) -> str:
    """The module of a traced node, or an empty text if it is not recorded."""
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "[]")
    names = ast.literal_eval(scopes)
    return names[-2] if len(names) > 1 else ""


def traced_weights(graph: Graph) -> dict[str, np.ndarray]:
    """The weights of a graph that torch traced, by their names in the model.

    The tracer stores equal weights once, under one of their names, so a weight is identified by the node that reads it.
    """
    found: dict[str, np.ndarray] = {}
    products = {o: weight for n in graph.nodes for o in n.output if (weight := graph.linear(n)) is not None}
    for node in graph.nodes:
        module, stored = _scope(node), [i for i in node.input if i in graph.tensors]
        if node.op_type == "Add" and stored and (product := next((i for i in node.input if i in products), None)):
            found[f"{module}.weight"], found[f"{module}.bias"] = products[product], graph.array(stored[0])
        elif node.op_type in ("LayerNormalization", "Conv"):
            weight = graph.array(stored[0])
            bias = graph.array(stored[1]) if len(stored) > 1 else np.zeros(len(weight), np.float32)
            found[f"{module}.weight"], found[f"{module}.bias"] = weight, bias
        elif node.op_type in ("Gather", "GatherBlockQuantized") and stored and "embeddings" in stored[0]:
            name = re.sub(r"_Q\d$", "", stored[0])
            found[name] = graph.table(name)
    return found


def image_positions(graph: Graph) -> dict[str, np.ndarray]:
    """Class token and positions of the vision encoder: the first is joined to the patches, then the second is added."""
    join = next((n for n in graph.nodes if n.op_type == "Concat" and any(i in graph.tensors for i in n.input)), None)
    add = next((n for n in graph.nodes if join and n.op_type == "Add" and join.output[0] in n.input), None)
    if join is None or add is None:
        raise RestoreError("the vision encoder has no class token: it was not written by this export")
    names = ("class_embedding", "position_embedding")
    constants = [next(i for i in n.input if i in graph.tensors) for n in (join, add)]
    return {f"vision_model.embeddings.{n}": graph.array(c) for n, c in zip(names, constants, strict=True)}


def query_tokens(graph: Graph, count: int) -> np.ndarray:
    """The query tokens, float32 [1, Q, H]: the only weight of the Q-Former with three dimensions."""
    found = [n for n, t in graph.tensors.items() if [*t.dims[:2]] == [1, count] and len(t.dims) == 3]
    if len(found) != 1:
        raise RestoreError("the Q-Former has no query tokens: it was not written by this export")
    return graph.array(found[0])


def decoder_weights(graph: Graph, config: LlamaConfig) -> dict[str, np.ndarray]:
    """The weights of a decoder, by their names in transformers' LLaMA."""
    width = config.head_dim
    sizes = [config.num_attention_heads * width, *[config.num_key_value_heads * width] * 2]
    state: dict[str, np.ndarray] = {}
    products = [n for n in graph.nodes if n.op_type in ("MatMul", "MatMulNBits")]
    found = {re.sub(r"^/|_Q\d$", "", n.name).replace("/", "."): n for n in products}
    norms = [n for n in graph.tensors if n.endswith("layernorm.weight")]
    for name, node in found.items():
        weight = graph.linear(node)
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if weight is None:
            continue
        if name == "lm_head.MatMul":
            state["lm_head.weight"] = weight
        elif layer and layer[2] == "attn.qkv_proj.MatMul":
            for part, rows in zip("qkv", np.split(weight, np.cumsum(sizes)[:-1]), strict=True):
                state[f"model.layers.{layer[1]}.self_attn.{part}_proj.weight"] = rows
        elif layer and (one := re.fullmatch(r"attn\.([qkv]_proj)\.MatMul", layer[2])):
            state[f"model.layers.{layer[1]}.self_attn.{one[1]}.weight"] = weight
        elif layer and layer[2] in _LAYER_PARTS:
            state[f"model.layers.{layer[1]}.{_LAYER_PARTS[layer[2]]}.weight"] = weight
        else:
            raise RestoreError(f"the decoder has the product {name}, which no LLaMA has")
    for name in norms:
        final = name.endswith("final_norm_layernorm.weight")
        state["model.norm.weight" if final else name] = graph.array(name)
    return state
