"""Names of the graphs, and tracing a module as a graph."""

import tempfile
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

LARGEST_GRAPH = 1_500_000_000  # bytes of weights in one file; InstructBLIP's vision encoder has 4 GB in fp32
VISION, QFORMER, EMBED, DECODER = "vision_encoder", "qformer", "embed_tokens", "decoder_model_merged"
HEAD = "lm_head"  # keeps 8 bits where GPTQ rounds all other weights: it is also the embedding, and chooses the tokens
SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the module that it was traced from
ENCODER = "encoder_model"  # only of an encoder-decoder


class ExportError(ValueError):
    """The model cannot be exported."""


def trace(
    module: nn.Module,
    inputs: tuple[Tensor | list[Tensor], ...],
    path: Path,
    names: list[str],
    outputs: list[str],
    dynamic: dict | None,
    within: bool = True,
) -> None:
    """Trace a module, and write its graph.

    Args:
        names, outputs: names of the graph's inputs and outputs.
        dynamic: dynamic dimensions of each argument of ``forward``.
        within: as in :func:`save_graph`.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        traced = Path(scratch) / path.name
        torch.onnx.export(
            module.eval(),
            inputs,
            str(traced),
            input_names=names,
            output_names=outputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=size > LARGEST_GRAPH,
            verbose=False,
        )
        graph = onnx.load(str(traced))
        for node in graph.graph.node:  # keep the module that each came from, not the file paths of this machine
            kept = [entry for entry in node.metadata_props if entry.key == SCOPES]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
        skip_unread(graph)
        save_graph(graph, path, within)


def skip_unread(graph: onnx.ModelProto) -> None:
    """Remove the nodes of a graph, in place, whose results are sliced away later.

    The Q-Former's last layer also computes the tokens of the instruction and joins them to the queries, but only the
    queries are used: ``Slice(Concat(queries, tokens), 0, Q)`` is ``queries``.
    """
    nodes = graph.graph.node
    constants = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer if t.data_type == TensorProto.INT64}
    producers = {output: node for node in nodes for output in node.output}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.value_info}
    renamed = {}
    for node in nodes:
        joined = producers.get(node.input[0]) if node.op_type == "Slice" else None
        if joined is None or joined.op_type != "Concat" or len(node.input) < 4:
            continue
        if any(name not in constants for name in node.input[1:4]):
            continue
        start, end, axis = (constants[name].tolist() for name in node.input[1:4])
        rows = shapes.get(joined.input[0], [])
        if start == [0] and axis == [joined.attribute[0].i] and rows[axis[0] : axis[0] + 1] == end:
            renamed[node.output[0]] = joined.input[0]
    if not renamed:
        return
    for node in nodes:
        for at, name in enumerate(node.input):
            node.input[at] = renamed.get(name, name)
    wanted = {output.name for output in graph.graph.output}
    read = []
    for node in reversed(nodes):
        if wanted & {*node.output}:
            read.append(node)
            wanted |= {*node.input}
    kept = [t for t in graph.graph.initializer if t.name in wanted]
    for field, left in ((nodes, read[::-1]), (graph.graph.initializer, kept)):
        del field[:]
        field.extend(left)


def save_graph(graph: onnx.ModelProto, path: Path, within: bool = False) -> None:
    """Write a graph with its weights in ``<name>.onnx_data`` beside it; existing files are replaced.

    Args:
        within: keep the weights in the graph's file if they fit: protobuf allows 2 GB.
    """
    data = path.with_suffix(".onnx_data")
    data.unlink(missing_ok=True)
    if within and sum(len(tensor.raw_data) for tensor in graph.graph.initializer) <= LARGEST_GRAPH:
        onnx.save(graph, str(path))
        return
    onnx.save(graph, str(path), save_as_external_data=True, location=data.name, size_threshold=1024)
