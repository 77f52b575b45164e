"""Graphs in 16-bit floats, for GPUs."""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from cbedge.backends.ort import LOGITS_START
from export.tracing import DECODER, HEAD, ExportError, save_graph

_ROWS = 64  # CUDA's kernels need a multiple of this number of rows in a head
# Inputs and outputs that stay fp32 in the 16-bit variants; keys and values are 16 bit.
_FP32_NAMES = [
    "pixel_values",
    "image_features",
    "image_embeds",
    "attention",
    "finding_logits",
    "inputs_embeds",
    "logits",
]


def to_half(source: Path, target: Path) -> Path:
    """Write a graph with 16-bit weights, activations, scales, keys and values; returns ``target``."""
    graph = convert_float_to_float16(onnx.load(str(source)), keep_io_types=_FP32_NAMES, disable_shape_infer=True)
    align_head(graph)
    save_graph(graph, target, within=not target.name.startswith(DECODER))
    return target


def half_on_the_same_weights(decoder: Path) -> ModelProto:
    """A quantized decoder in 16-bit arithmetic for GPUs, which reads the same weight file.

    CUDA has no such attention in fp32. Products with 4- and 8-bit weights use the 16-bit scales of the file; fp32
    weights are cast when a session loads.

    Raises:
        ExportError: the graph contains weights, which would be stored twice.
    """
    model = onnx.load(str(decoder), load_external_data=False)
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    if any(len(t.raw_data) > 65_536 for t in graph.initializer):
        raise ExportError(f"{decoder.name} contains its weights: export the variants q4f16 and int4 separately")
    nodes, renamed = [], {}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:  # scales, widened for the CPU
            renamed[node.output[0]] = node.input[0]
        elif node.op_type == "Neg" and node.input[0] == "num_logits":  # of earlier exports: see choose_logits
            renamed[node.output[0]] = LOGITS_START
        else:
            nodes.append(node)
    wide = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT} | {"inputs_embeds"}
    casts = {name: f"{name}/half" for name in wide if any(name in node.input for node in nodes)}
    for node in nodes:
        node.input[:] = [casts.get(renamed.get(name, name), renamed.get(name, name)) for name in node.input]
        node.output[:] = ["logits/half" if name == "logits" else name for name in node.output]
    before = [
        helper.make_node("Cast", [name], [half], name=half, to=TensorProto.FLOAT16) for name, half in casts.items()
    ]
    after = helper.make_node("Cast", ["logits/half"], ["logits"], name="logits/half", to=TensorProto.FLOAT)
    graph.ClearField("node")
    graph.node.extend([*before, *nodes, after])
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        value.name = LOGITS_START if value.name == "num_logits" else value.name
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def align_head(graph: ModelProto) -> None:
    """Pad the rows of a quantized head, in place, to a number for which CUDA has a kernel for single tokens.

    Without it, Vicuna's 32,001 rows are widened to 16 bits for every token. The results of the added rows are removed.
    """
    node = next((n for n in graph.graph.node if n.op_type == "MatMulNBits" and HEAD in n.name), None)
    if node is None:
        return
    words = next(a for a in node.attribute if a.name == "N")
    count, more = words.i, -words.i % _ROWS
    if not more:
        return
    tensors = {t.name: t for t in graph.graph.initializer}
    for name in filter(None, node.input[1:]):
        values = numpy_helper.to_array(tensors[name])
        rows = values.reshape(count, -1)
        filled = np.concatenate([rows, np.zeros((more, rows.shape[1]), rows.dtype)])
        shape = (count + more, *values.shape[1:]) if values.shape[0] == count else (filled.size,)
        tensors[name].CopyFrom(numpy_helper.from_array(filled.reshape(shape), name))
    words.i = count + more
    whole, (start, end, axis) = f"{node.name}/filled", (f"{node.name}/{part}" for part in ("start", "end", "axis"))
    cut = helper.make_node("Slice", [whole, start, end, axis], [node.output[0]], name=f"{node.name}/cut")
    node.output[0] = whole
    graph.graph.node.insert(list(graph.graph.node).index(node) + 1, cut)
    for name, value in ((start, 0), (end, count), (axis, 2)):
        graph.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
