"""Join the graphs of a decoder's layers into one graph, one part at a time."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.tracing import ExportError

_LAYER = re.compile(r"(?<![\w.])((?:/?model[./])?layers|past_key_values|present)\.(\d+)(?=[./])")
_OTHER_GRAPH = "the decoder's builder wrote another graph than expected: use the pinned onnxruntime-genai"
_SMALL = 1024  # bytes of a weight that stays in the graph itself


class Stitcher:
    """A decoder's graph that grows with each part; weights are written to its external file at once.

    Args:
        path: path of the graph; the weights are written to ``<name>.onnx_data``.
    """

    def __init__(self, path: Path):
        self._path = path
        self._data = open(path.with_suffix(".onnx_data"), "wb")  # noqa: SIM115 (closed in close)
        self._whole: ModelProto | None = None
        self._known: set[str] = set()
        self._input = "inputs_embeds"
        self._open: list[str] = []  # the two summands that the last part passes on

    def add(self, part: ModelProto, last: bool) -> None:
        """Join the next part; its layers must have their final numbers."""
        if self._whole is None:
            self._whole = ModelProto()
            self._whole.CopyFrom(part)
            for field in ("node", "initializer", "input", "output", "value_info"):
                self._whole.graph.ClearField(field)
        graph, whole = part.graph, self._whole.graph
        handed_on = f"/model/parts/{len(self._known)}/hidden"
        nodes = self._close_end([*graph.node])
        if not last:
            nodes = self._open_end(nodes)
        used = {name for node in nodes for name in node.input}
        for node in nodes:
            if node.name not in self._known:
                node.input[:] = [self._input if name == "inputs_embeds" else name for name in node.input]
                whole.node.append(node)
                self._known.add(node.name)
        for tensor in graph.initializer:
            if tensor.name in used and tensor.name not in self._known:
                self._store(tensor)
                whole.initializer.append(tensor)
                self._known.add(tensor.name)
        for here, there in ((graph.input, whole.input), (graph.output, whole.output)):
            for value in here:
                wanted = value.name in used or value.name.startswith("present.") or (last and value.name == "logits")
                if wanted and value.name not in self._known:
                    there.append(value)
                    self._known.add(value.name)
        self._input = handed_on

    def close(self) -> None:
        """Write the graph."""
        self._data.close()
        if self._whole is not None:
            onnx.save(self._whole, str(self._path))

    def _open_end(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """Remove last norm and head; the summands of the norm are passed to the next part."""
        end = next((i for i, node in enumerate(nodes) if "final_norm_layernorm" in node.name), None)
        if end is None:
            raise ExportError(_OTHER_GRAPH)
        self._open = list(nodes[end].input[:2])
        return nodes[:end]

    def _close_end(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """Let the first norm of a part, which reads the embeddings, add the summands of the previous part."""
        if not self._open:
            return nodes
        first = next((i for i, node in enumerate(nodes) if node.op_type == "SimplifiedLayerNormalization"), None)
        if first is None or nodes[first].input[0] != "inputs_embeds":
            raise ExportError(_OTHER_GRAPH)
        norm = nodes[first]
        epsilon = next(a.f for a in norm.attribute if a.name == "epsilon")
        nodes[first] = helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [*self._open, norm.input[1]],
            [norm.output[0], "", "", self._input],
            name=norm.name,
            domain="com.microsoft",
            epsilon=epsilon,
        )
        return nodes

    def _store(self, tensor: TensorProto) -> None:
        raw = tensor.raw_data
        if len(raw) < _SMALL:
            return
        self._data.write(b"\0" * (-self._data.tell() % 64))
        offset = self._data.tell()
        self._data.write(raw)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        name = self._path.with_suffix(".onnx_data").name
        for key, value in (("location", name), ("offset", str(offset)), ("length", str(len(raw)))):
            tensor.external_data.add(key=key, value=value)


def number_layers(graph: ModelProto, by: int) -> None:
    """Add ``by`` to the layer numbers in all names of a part, in place."""

    def renamed(name: str) -> str:
        return _LAYER.sub(lambda match: f"{match[1]}.{int(match[2]) + by}", name)

    for node in graph.graph.node:
        node.name = renamed(node.name)
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
    for values in (graph.graph.initializer, graph.graph.input, graph.graph.output):
        for value in values:
            value.name = renamed(value.name)
