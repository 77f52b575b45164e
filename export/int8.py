"""Write graphs whose linear layers multiply 8-bit integers, on the stored weights of a quantized variant.

Activations are rounded to 8 bits for each token by its own largest value. So the result of a token depends on no other
token of the same pass, and sums are exact: speculative decoding stays lossless. If the input of a product comes from a
LayerNorm, scales are moved from activations to weights for each channel (SmoothQuant, Xiao et al., ICML 2023,
arXiv:2211.10438); powers of two keep the result exact. The range of a channel is measured on an example, or estimated
from the scale and bias of the LayerNorm. GELU's results are at least -0.17: with 0.17 added they fill all 256
steps, and each step is half as large; the product of 0.17 and the weights is subtracted again.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper, parser

from cbedge.backends.int8 import QuantizedLinear, Table, read_files
from export.tracing import HEAD, ExportError

_DOMAIN = "cbedge"
_EXTERNAL = 1024  # tensors of this size and larger stay in their file
_MIGRATION = 0.75  # share of the range that moves from activations to weights, SmoothQuant's alpha
_DEVIATIONS = 3  # standard deviations that a channel is assumed to reach if it was not measured
_MOST = 7  # largest exponent
_GELU = 0.17  # added to GELU's results, the least of which is -0.16997
_FUNCTIONS = (
    # float32 [..., K] → uint8 [..., K] around 128, and the largest absolute value of each row, float32 [..., 1]. A row
    # of zeros becomes NaN and arbitrary integers; multiplied by its largest value, 0, they are zeros again.
    """Round (x) => (rounded, largest) {
        last = Constant <value = int64[1] {-1}> ()
        step = Constant <value = float {0.007874016}> ()
        middle = Constant <value = uint8 {128}> ()
        sizes = Abs (x)
        largest = ReduceMax <keepdims = 1> (sizes, last)
        share = Div (x, largest)
        rounded = QuantizeLinear (share, step, middle)
    }""",
    # uint8 [..., K], float32 [..., 1], int8 [K, N], float32 [N] → float32 [..., N].
    """Multiply (x, largest, weights, scales) => (y) {
        step = Constant <value = float {0.007874016}> ()
        middle = Constant <value = uint8 {128}> ()
        sum = com.microsoft.MatMulIntegerToFloat (x, weights, step, scales, middle)
        y = Mul (sum, largest)
    }""",
    # The same for GELU's results: 0.17 is added, and nothing is negative.
    f"""RoundGelu (x) => (rounded, largest) {{
        last = Constant <value = int64[1] {{-1}}> ()
        step = Constant <value = float {{0.003921569}}> ()
        zero = Constant <value = uint8 {{0}}> ()
        added = Constant <value = float {{{_GELU}}}> ()
        shifted = Add (x, added)
        largest = ReduceMax <keepdims = 1> (shifted, last)
        share = Div (shifted, largest)
        rounded = QuantizeLinear (share, step, zero)
    }}""",
    """MultiplyGelu (x, largest, weights, scales) => (y) {
        step = Constant <value = float {0.003921569}> ()
        zero = Constant <value = uint8 {0}> ()
        sum = com.microsoft.MatMulIntegerToFloat (x, weights, step, scales, zero)
        y = Mul (sum, largest)
    }""",
    # float32 [K] divided by two to the power of int8 [K]; computed when a session loads.
    """Divide (x, exponents) => (y) {
        two = Constant <value = float {2}> ()
        wide = Cast <to = 1> (exponents)
        powers = Pow (two, wide)
        y = Div (x, powers)
    }""",
)  # 0.007874016 is 1/127, 0.003921569 is 1/255


def multiply_in_int8(source: Path, target: Path, example: np.ndarray | None = None) -> Path:
    """Write the 8-bit integer version of a quantized graph, and its table; returns ``target``.

    Args:
        source: a graph with ``MatMulNBits``, in the folder of ``target``.
        target: the graph to write; its :class:`~cbedge.backends.int8.Table` is written beside it as ``.json``.
        example: the graph's only input, float32, on which the ranges of activations are measured.

    Raises:
        ExportError: the graph has no suitable product.
    """
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    stored = _Stored(source, graph)
    chosen = [node for node in graph.node if node.op_type == "MatMulNBits" and stored.holds(node)]
    names = {node.output[0]: f"p{number}" for number, node in enumerate(chosen)}
    if not chosen:
        raise ExportError(f"{source.name} has no product with 4- or 8-bit weights without zero points")
    smoothed = _smooth(graph, names, stored, {} if example is None else _measure_ranges(source, target, example))
    gelus = {node.output[0] for node in graph.node if node.op_type == "Gelu"}
    nodes: list[NodeProto] = []
    products, rounded, corrections = [], set(), []
    for node in graph.node:
        if node.output[0] not in names:
            nodes.append(node)
            continue
        (read, *_), (written,), name = node.input, node.output, names[node.output[0]]
        product = stored.product(node, name, smoothed.get(read, ()))
        products.append(product)
        kind = "Gelu" if read in gelus else ""
        if read not in rounded:
            rounded.add(read)
            outputs = [f"{read}/int8", f"{read}/largest"]
            nodes.append(helper.make_node(f"Round{kind}", [read], outputs, domain=_DOMAIN))
        added = [*node.input[5:6]] if len(node.input) > 5 and node.input[5] else []
        if kind:
            added.append(f"{name}/correction")
            corrections.append(numpy_helper.from_array(-_GELU * stored.sums(product), added[-1]))
        results = [f"{written}/{number}" for number in range(len(added))] + [written]
        inputs = [f"{read}/int8", f"{read}/largest", f"{name}/weights", f"{name}/scales"]
        nodes.append(helper.make_node(f"Multiply{kind}", inputs, results[:1], domain=_DOMAIN))
        for number, summand in enumerate(added):
            nodes.append(helper.make_node("Add", [results[number], summand], [results[number + 1]]))
    _replace_nodes(graph, nodes)
    stored.leave_outside(graph)
    graph.initializer.extend(corrections)
    for product in products:
        shape = (product.columns, product.rows)
        graph.initializer.append(_made_at_loading(f"{product.name}/weights", TensorProto.INT8, shape))
        graph.initializer.append(_made_at_loading(f"{product.name}/scales", TensorProto.FLOAT, (product.rows,)))
    head = f'<domain: "{_DOMAIN}", opset_import: ["": 18, "com.microsoft": 1]>'
    model.functions.extend(parser.parse_function(f"{head} {function}") for function in _FUNCTIONS)
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    target.write_bytes(model.SerializeToString())
    Table(tuple(sorted(stored.sources)), tuple(products)).save(Table.path(target))
    return target


class _Stored:
    """The tensors of a graph, and their places in files."""

    def __init__(self, path: Path, graph: onnx.GraphProto):
        self._name, self._bytes = path.name, path.read_bytes()
        self._folder = path.parent
        self.tensors = {t.name: t for t in graph.initializer}
        self._widened = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Cast"}
        self.sources: set[str] = set()

    def holds(self, node: NodeProto) -> bool:
        """Whether a product has stored weights in 4 or 8 bits without zero points, and is not the head, which shares
        its weights with the embedding."""
        return (
            HEAD not in node.name
            and helper.get_node_attr_value(node, "bits") in (4, 8)
            and node.input[1] in self.tensors
            and self._scales(node) in self.tensors
            and not any(node.input[3:5])
        )

    def product(self, node: NodeProto, name: str, exponents: tuple[int, ...]) -> QuantizedLinear:
        """The entry of a node in the table."""
        size = {key: int(helper.get_node_attr_value(node, key)) for key in ("N", "K", "bits", "block_size")}
        file, weights = self._place(self.tensors[node.input[1]])
        scales = self.tensors[self._scales(node)]
        scale_file, at = self._place(scales)
        self.sources |= {file, scale_file}
        bits = 16 if scales.data_type == TensorProto.FLOAT16 else 32
        sizes = (size["N"], size["K"], size["bits"], size["block_size"])
        return QuantizedLinear(
            name, file, weights, at, bits, *sizes, exponents, "" if scale_file == file else scale_file
        )

    def wide(self, node: NodeProto) -> np.ndarray:
        """A product's weights, float32 [columns, rows]."""
        product = self.product(node, "", ())
        return product.widen(self._files(product))

    def sums(self, product: QuantizedLinear) -> np.ndarray:
        """For each output of a product, the sum of the weights that the runtime multiplies, float32 [rows]."""
        weights, scales = product.load(self._files(product))
        return (weights.sum(0, dtype=np.int32) * scales).astype(np.float32)

    def leave_outside(self, graph: onnx.GraphProto) -> None:
        """Remove tensors that no node reads; refer to large ones in their files."""
        read = {name for node in graph.node for name in node.input}
        kept = [t for t in graph.initializer if t.name in read]
        graph.ClearField("initializer")
        for tensor in kept:
            if tensor.data_location == TensorProto.EXTERNAL:
                self.sources.add(self._place(tensor)[0])
            elif len(tensor.raw_data) >= _EXTERNAL:
                file, at = self._place(tensor)
                self.sources.add(file)
                tensor = _external(tensor.name, tensor.data_type, tensor.dims, file, at, len(tensor.raw_data))
            graph.initializer.append(tensor)

    def _files(self, product: QuantizedLinear) -> dict[str, np.ndarray]:
        return read_files(self._folder, {product.file, product.scale_file} - {""})

    def _scales(self, node: NodeProto) -> str:
        return self._widened.get(node.input[2], node.input[2])

    def _place(self, tensor: TensorProto) -> tuple[str, int]:
        if tensor.data_location == TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            return where["location"], int(where.get("offset", 0))
        at = self._bytes.find(tensor.raw_data) if tensor.raw_data else -1
        if at < 0:
            raise ExportError(f"{self._name}: the bytes of {tensor.name} are not in the file")
        return self._name, at


def _measure_ranges(source: Path, target: Path, example: np.ndarray) -> dict[str, np.ndarray]:
    """The largest absolute value of each channel of each LayerNorm's output, for one input of a graph. The graph that
    has these outputs stands for a moment beside the weights that it refers to, under the name of ``target``."""
    model = onnx.load(str(source), load_external_data=False)
    outputs = [node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization"]
    model.graph.ClearField("output")
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    target.write_bytes(model.SerializeToString())
    session = ort.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    found = session.run(outputs, {given.name: example})
    return {name: np.abs(np.reshape(v, (-1, v.shape[-1]))).max(0) for name, v in zip(outputs, found, strict=True)}


def _smooth(
    graph: onnx.GraphProto, chosen: Collection[str], stored: _Stored, ranges: dict[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Let each LayerNorm that feeds only ``chosen`` products, given by their outputs, divide its channels by powers of
    two; returns the exponents. ``ranges`` are those that were measured."""
    found: dict[str, tuple[int, ...]] = {}
    for norm in [node for node in graph.node if node.op_type == "LayerNormalization" and len(node.input) == 3]:
        output = norm.output[0]
        readers = [node for node in graph.node if output in node.input]
        if not readers or not all(node.output[0] in chosen for node in readers):
            continue
        if not all(name in stored.tensors for name in norm.input[1:]):
            continue
        scale, bias = (np.abs(numpy_helper.to_array(stored.tensors[name])) for name in norm.input[1:])
        reach = ranges.get(output, _DEVIATIONS * scale + bias)
        weights = np.max([np.abs(stored.wide(node)).max(1) for node in readers], axis=0)
        factors = np.log2(np.maximum(reach, 1e-9) ** _MIGRATION / np.maximum(weights, 1e-9) ** (1 - _MIGRATION))
        exponents = np.clip(np.rint(factors - factors.mean()), -_MOST, _MOST).astype(np.int8)
        found[output] = tuple(exponents.tolist())
        shared = f"{output}/exponents"
        graph.initializer.append(numpy_helper.from_array(exponents, shared))
        for place in (1, 2):
            divided = f"{output}/{norm.input[place]}"
            at = next(i for i, node in enumerate(graph.node) if node.output[0] == output)
            graph.node.insert(at, helper.make_node("Divide", [norm.input[place], shared], [divided], domain=_DOMAIN))
            graph.node[at + 1].input[place] = divided
    return found


def _replace_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    """Replace the nodes of a graph, without nodes whose results are not used."""
    read = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in nodes if any(name in read for name in node.output)]
    for node in kept:
        node.ClearField("metadata_props")  # its module in torch, longer than all the rest
    graph.ClearField("node")
    graph.node.extend(kept)
    graph.ClearField("value_info")


def _made_at_loading(name: str, kind: int, shape: tuple[int, ...]) -> TensorProto:
    """A tensor that the runtime computes when it loads the graph."""
    return _external(name, kind, shape, "made-at-loading", 0, 0)


def _external(name: str, kind: int, shape: Iterable[int], file: str, offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
