"""The quantized token embedding, which shares the decoder's weights where the language model ties them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.blockwise import Int4Settings, quantize_products
from export.tracing import EMBED, save_graph


def write_embedding(embed: Path, decoder: ModelProto, path: Path, settings: Int4Settings, suffix: str) -> Path:
    """Write the quantized token embedding beside the decoder; tied to the head, it reads the decoder's weights.

    Args:
        embed: the fp32 graph.
        decoder: the quantized decoder, stored at ``path``.
    """
    written = path.parent / f"{EMBED}{suffix}.onnx"
    shared = _share_head(embed, decoder, path, settings)
    if shared is None:
        save_graph(quantize_products(embed, settings.block_size, settings), written, within=True)
    else:  # it refers to the decoder's file of weights
        onnx.save(shared, str(written))
    return written


def _share_head(embed: Path, decoder: ModelProto, decoder_path: Path, settings: Int4Settings) -> ModelProto | None:
    """An embedding graph on the head's quantized weights if the two are tied, else ``None``."""
    table = next(numpy_helper.to_array(t) for t in onnx.load(str(embed)).graph.initializer if len(t.dims) == 2)
    node = next((n for n in reversed(decoder.graph.node) if n.op_type == "MatMulNBits"), None)
    if node is None:
        return None
    sizes = {a.name: a.i for a in node.attribute if a.name in ("N", "K", "block_size", "bits")}
    bits = sizes.get("bits", 4)
    words, width = table.shape
    if (sizes["N"], sizes["K"]) != (words, width) or width % sizes["block_size"] or not settings.symmetric:
        return None
    stored = {t.name: t for t in onnx.load(str(decoder_path), load_external_data=False).graph.initializer}
    loaded = {t.name: t for t in decoder.graph.initializer}
    if node.input[2] not in loaded:  # narrowed scales: not a head that could be tied
        return None
    base = str(decoder_path.parent)
    scales = numpy_helper.to_array(loaded[node.input[2]], base).reshape(words, -1)
    # If tied, the rows of the table are the columns of the head: the largest weight of each block gives its scale.
    expected = np.abs(table.reshape(words, -1, sizes["block_size"])).max(2) / 2 ** (bits - 1)
    if not np.allclose(np.abs(scales), expected, rtol=1e-3, atol=1e-6):
        return None
    blocks = width // sizes["block_size"]
    if not all(stored[name].external_data for name in node.input[1:3]):
        return None
    weights = _external_alias(stored[node.input[1]], "embed_tokens", [words, width * bits // 8])
    scale = _external_alias(stored[node.input[2]], "embed_tokens_scales", [words, blocks])
    gather = helper.make_node(
        "GatherBlockQuantized",
        ["embed_tokens", "input_ids", "embed_tokens_scales"],
        ["inputs_embeds"],
        domain="com.microsoft",
        bits=bits,
        block_size=sizes["block_size"],
        gather_axis=0,
        quantize_axis=1,
    )
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])
    embeds = helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, [1, "tokens", width])
    graph = helper.make_graph([gather], "embed_tokens", [ids], [embeds], [weights, scale])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=decoder.ir_version)


def _external_alias(source: TensorProto, name: str, shape: list[int]) -> TensorProto:
    """The same bytes of the external data file under another name and shape."""
    alias = TensorProto(name=name, data_type=source.data_type, dims=shape, data_location=TensorProto.EXTERNAL)
    alias.external_data.extend(source.external_data)
    return alias
