"""Smaller variants of the fp32 graphs: 4- and 8-bit weights block by block, and 16-bit floats.

Linear weights become ``MatMulNBits`` and embedding tables ``GatherBlockQuantized``. Scales are kept in 16 bits and
widened when a session loads: the CPU's kernels want them as wide as activations. Where the language model ties its
embedding to its head (SmolLM2 does), both graphs read one and the same block of quantized weights on disk.
"""

import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    WeightOnlyQuantConfig,
)

from cbedge.backends.ort import LOGITS_START
from cbedge.bundles.bundle import Bundle
from cbedge.bundles.manifest import IN_INT8
from export.gptq import Rounded, calibration_inputs, put_into_graph, round_language_model
from export.int8 import multiply_in_int8
from export.tracing import DECODER, EMBED, ENCODER, HEAD, QFORMER, VISION, ExportError, save_graph
from export.tune import tune_scales
from training.base import ModelAndTokenizers

# The quantizer tells each node that it skips, and of opsets.
logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
# What a variant's files are called, as Transformers.js and Optimum name them, and what it is.
SUFFIX = {"fp32": "", "fp16": "_fp16", "int8": "_int8", "int4": "_q4", "q4a8": "_q4a8", "q4f16": "_q4f16"}
DESCRIPTIONS = {
    "fp32": "32 bit weights",
    "fp16": "16 bit weights and activations, for GPUs",
    "int8": "8 bit weights, fp32 activations, for CPUs",
    "int4": "4 and 8 bit weights, fp32 activations, for CPUs",
    "q4a8": "int4's weights, multiplied in 8-bit integers, for x86 processors",
    "q4f16": "4 and 8 bit weights, 16 bit activations, for GPUs",
    "nf4": "4 bit NormalFloat in torch (bitsandbytes), 16 bit activations",
}
NF4 = "nf4"
HALF = ("fp16", "q4f16")
VARIANTS = (*SUFFIX, NF4)
ALIASES = {"q4": "int4"}
_ROWS = 64  # of a head, for CUDA
ALGORITHMS = ("rtn", "k_quant", "hqq", "gptq")
# What comes in and goes out stays fp32 in the 16-bit variants; keys and values are 16 bit.
_FP32_NAMES = [
    "pixel_values",
    "image_features",
    "image_embeds",
    "attention",
    "finding_logits",
    "inputs_embeds",
    "logits",
]


@dataclass(frozen=True)
class Int4Settings:
    """How weights are quantized.

    Attributes:
        block_size: weights that share one scale, in the language model; CUDA's fastest kernels know 32 alone.
        qformer_block_size, qformer_bits: the same in the Q-Former, which is smaller and more sensitive. 4 bits (block
            32) move the findings' logits by 11% (and all up, abnormal by .3), 8 bits by 0.3%, for 9 MB; 4 bits in all
            its feed-forward layers by 5% (mini, 24 studies).
        qformer_four_bits: regular expression of the names of the Q-Former's linear layers that have 4 bits, in blocks
            of 32. Those that work on the words of the instruction alone move the logits by 1%, and save 3.3 MB.
        vision_block_size, vision_bits: in the vision encoder. 4 bits move its features by 16% (ViT-S/14, 8 layers,
            relative Euclidean error on radiographs); 8 bits by 2.4% where activations are rounded to 8 bits too (the
            model 0.3.0), by 1.3% where they are not (the two-view run), at the same speed, for 6 MB.
        eight_bits: regular expression of the language model's nodes that keep 8 bits. With everything in 4 bits the
            merged mini model, short and freshly adapted, chose another token than fp32 at 21% of positions (KL 0.38);
            with attention, down projection and the first two layers in 8 bits at 7% (KL 0.13), and the gate projection
            was added to those.
        eight_bits_block_size: weights that share a scale there.
        algorithm: of the language model's 4-bit weights: ``rtn`` (round to nearest), ``k_quant`` (llama.cpp's search
            for scale and offset), ``hqq`` (half-quadratic, Badri and Shaji 2023) or ``gptq`` (:mod:`export.gptq`,
            which rounds on reports and is given as ``rounded`` below).
        tune: with ``gptq``, steps in which the scales are then tuned (:mod:`export.tune`).
        symmetric: no zero points, with ``rtn``.
        accuracy_level: 4 lets the CPU multiply in int8, which is fastest.
    """

    block_size: int = 32
    qformer_block_size: int = 64
    qformer_bits: int = 8
    qformer_four_bits: str = r"\.layer\.\d+\.(intermediate|output)\.dense$"
    vision_block_size: int = 128
    vision_bits: int = 8
    eight_bits: str = r"attn|down_proj|gate_proj|layers\.[01]/"
    eight_bits_block_size: int = 128
    algorithm: str = "rtn"
    tune: int = 0
    symmetric: bool = True
    accuracy_level: int = 4


def write_variant(
    name: str,
    paths: dict[str, Path],
    folder: Path,
    settings: Int4Settings | None = None,
    rounded: dict[str, Rounded] | None = None,
    language: Bundle | None = None,
) -> dict[str, Path]:
    """Write one variant of the fp32 graphs into ``folder``; returns the path of each graph.

    Args:
        name: of :data:`VARIANTS`, but ``fp32`` and ``nf4``.
        paths: the fp32 graphs.
        folder: where to write.
        settings: of ``int4`` and ``q4f16``.
        rounded: with ``gptq``, what :func:`export.gptq.round_language_model` made of the language model.
        language: a bundle that has this variant, whose language model is taken as it is.

    Raises:
        ExportError: 16-bit floats are asked for, and do not hold what the language model computes.
    """
    settings = settings_of(name, settings)
    if name in HALF and ENCODER in paths:
        raise ExportError(f"{name}: what Flan-T5 computes does not fit 16-bit floats; give fp32, int8, int4 or nf4")
    if language is not None:
        if name not in ("int8", "int4"):
            raise ExportError(f"{name}: a language model is taken from a bundle in int8 or int4 alone")
        written = quantize_image_side(paths, folder, settings, SUFFIX[name])
        return written | _language_of(language, name, folder)
    if name == "fp16":
        return {kind: to_half(path, folder / f"{kind}{SUFFIX[name]}.onnx") for kind, path in paths.items()}
    if name == "q4f16":
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            quantized = quantize_graphs(paths, Path(scratch), settings, SUFFIX["int4"], rounded, narrow=False)
            return {kind: to_half(path, folder / f"{kind}{SUFFIX[name]}.onnx") for kind, path in quantized.items()}
    if name == IN_INT8:
        return in_int8(quantize_graphs(paths, folder, settings, SUFFIX["int4"], rounded), folder)
    return quantize_graphs(paths, folder, settings, SUFFIX[name], rounded if name != "int8" else None)


def in_int8(int4: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Write the graphs that read int4's weights and multiply in 8-bit integers; returns the path of each graph.

    Args:
        int4: its graphs, in ``folder``; that of the embedding multiplies nothing and serves as it is.
        folder: where to write.
    """
    target = f"{{}}{SUFFIX[IN_INT8]}.onnx"
    return {k: path if k == EMBED else multiply_in_int8(path, folder / target.format(k)) for k, path in int4.items()}


def _language_of(bundle: Bundle, name: str, folder: Path) -> dict[str, Path]:
    """Copy the language model's graphs of a bundle's variant, with their weights, into ``folder``."""
    variant = bundle.manifest.variants[name]
    kinds = [kind for kind in variant.graphs if kind not in (VISION, QFORMER)]
    data = [file for file in variant.data if not file.startswith((VISION, QFORMER))]
    for file in (*(variant.graphs[kind] for kind in kinds), *data):
        shutil.copyfile(bundle.folder / file, folder / file)
    return {kind: folder / variant.graphs[kind] for kind in kinds}


def round_for(
    parts: ModelAndTokenizers,
    data: Path,
    settings: Int4Settings,
    tell: Callable[[int, int, float], None] = lambda done, total, divergence: None,
) -> dict[str, Rounded]:
    """Round a merged model's language model by GPTQ, on training studies at ``data``, where the settings ask 4 bits.

    ``tell`` is told each step in which scales are tuned, how many there are, and the divergence from fp32.
    """
    inputs = calibration_inputs(parts, data)

    def chosen(name: str) -> bool:
        return not re.search(settings.eight_bits, name)

    model = parts.model.language_model
    rounded = round_language_model(model, inputs, settings.block_size, chosen)
    return tune_scales(model, rounded, inputs, settings.tune, tell=tell) if settings.tune else rounded


def settings_of(name: str, settings: Int4Settings | None = None) -> Int4Settings:
    """How a variant's weights are quantized."""
    settings = settings or Int4Settings()
    if name == "q4f16":
        return replace(settings, eight_bits_block_size=32, qformer_block_size=32, vision_block_size=32)
    if name == "int8":
        return replace(
            settings, algorithm="rtn", eight_bits=".", eight_bits_block_size=64, vision_bits=8, qformer_four_bits="$^"
        )
    return settings


def to_half(source: Path, target: Path) -> Path:
    """Write the same graph with 16-bit weights, activations, scales, keys and values; returns ``target``."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = convert_float_to_float16(onnx.load(str(source)), keep_io_types=_FP32_NAMES, disable_shape_infer=True)
    align_head(graph)
    save_graph(graph, target, within=not target.name.startswith(DECODER))
    return target


def half_on_the_same_weights(decoder: Path) -> ModelProto:
    """A quantized decoder's graph in 16-bit arithmetic for GPUs, which reads the same file of weights.

    CUDA has no attention of this kind in fp32. Products with 4- and 8-bit weights take their scales in 16 bits as they
    lie there; what lies there in fp32 is cast, once, when a session loads.

    Raises:
        ExportError: the graph holds weights itself, which would be stored twice.
    """
    model = onnx.load(str(decoder), load_external_data=False)
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    if any(len(t.raw_data) > 65_536 for t in graph.initializer):
        raise ExportError(f"{decoder.name} holds its weights itself: write the variants q4f16 and int4 apart")
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
    """Fill the rows of a quantized head, in place, to a number that suits CUDA's kernels for one token: Vicuna's 32,001
    words would be widened to 16 bits at every token. What comes of the added rows is cut off again."""
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


def quantize_graphs(
    paths: dict[str, Path],
    folder: Path,
    settings: Int4Settings | None = None,
    suffix: str = SUFFIX["int4"],
    rounded: dict[str, Rounded] | None = None,
    narrow: bool = True,
) -> dict[str, Path]:
    """Write the quantized graphs of four fp32 graphs into ``folder``; returns the path of each.

    ``narrow`` keeps scales in 16 bits on disk; the rest is as of :func:`write_variant`.
    """
    settings = settings or Int4Settings()
    written = quantize_image_side(paths, folder, settings, suffix, narrow)
    for kind in [kind for kind in (ENCODER, DECODER) if kind in paths]:
        written[kind] = folder / f"{kind}{suffix}.onnx"
        graph = quantize_language_model(paths[kind], settings, rounded)
        if narrow:
            narrow_scales(graph)
        save_graph(graph, written[kind])
    written[EMBED] = write_embedding(paths[EMBED], graph, written[DECODER], settings, suffix)
    return written


def quantize_image_side(
    paths: dict[str, Path], folder: Path, settings: Int4Settings, suffix: str, narrow: bool = True
) -> dict[str, Path]:
    """Write vision encoder and Q-Former of :func:`quantize_graphs` alone; returns the path of each."""
    written = {kind: folder / f"{kind}{suffix}.onnx" for kind in (VISION, QFORMER)}
    exact = replace(settings, accuracy_level=0)  # as fast over so many positions, and rounds no activation
    vision = _quantize(paths[VISION], settings.vision_block_size, exact, bits=settings.vision_bits)
    source = onnx.load(str(paths[QFORMER]))
    few = linear_nodes(source, settings.qformer_four_bits)
    qformer = _quantize(source, settings.qformer_block_size, settings, bits=settings.qformer_bits, apart=few)
    qformer = _quantize(qformer, 32, settings) if few else qformer
    for graph in (vision, qformer) if narrow else ():
        narrow_scales(graph)
    save_graph(vision, written[VISION], within=True)
    save_graph(qformer, written[QFORMER], within=True)
    return written


def linear_nodes(graph: ModelProto, pattern: str) -> list[str]:
    """The products of the linear layers whose names a regular expression is found in, by the bias added to each."""
    producers = {output: node for node in graph.graph.node for output in node.output}
    found = []
    for node in graph.graph.node:
        names = [name.removesuffix(".bias") for name in node.input if name.endswith(".bias")]
        product = next((producers[name] for name in node.input if name in producers), None)
        if node.op_type == "Add" and product is not None and product.op_type == "MatMul":
            found += [product.name for name in names if re.search(pattern, name)]
    return found


def write_embedding(embed: Path, decoder: ModelProto, path: Path, settings: Int4Settings, suffix: str) -> Path:
    """Write the quantized token embedding beside the decoder; where the two are tied, it reads the decoder's weights.

    Args:
        embed: the fp32 graph.
        decoder: the quantized one, which lies at ``path``.
        path: of the decoder.
        settings: of the language model.
        suffix: of the variant's files.
    """
    written = path.parent / f"{EMBED}{suffix}.onnx"
    shared = _share_head(embed, decoder, path, settings)
    if shared is None:
        save_graph(_quantize(embed, settings.block_size, settings), written, within=True)
    else:  # its weights are the decoder's, where they lie
        onnx.save(shared, str(written))
    return written


def narrow_scales(graph: ModelProto) -> None:
    """Keep the scales of 4- and 8-bit products in 16 bits, in place; a cast, done once at loading, widens them.

    The head's stay as they are, for the embedding's graph reads them too; so do scales that 16 bits do not hold.
    """
    tensors = {t.name: t for t in graph.graph.initializer}
    for at, node in reversed([*enumerate(graph.graph.node)]):
        if node.op_type != "MatMulNBits" or HEAD in node.name:
            continue
        scales = tensors[node.input[2]]
        wide = numpy_helper.to_array(scales)
        with np.errstate(over="ignore"):
            short = wide.astype(np.float16)
        if not np.allclose(short, wide, rtol=1e-3, atol=0):
            continue
        name = f"{scales.name}_f16"
        graph.graph.node.insert(
            at, helper.make_node("Cast", [name], [scales.name], name=f"{name}/Cast", to=TensorProto.FLOAT)
        )
        scales.CopyFrom(numpy_helper.from_array(short, name))


def quantize_language_model(
    source: Path | ModelProto, settings: Int4Settings, rounded: dict[str, Rounded] | None = None
) -> ModelProto:
    """An fp32 decoder with 4-bit weights, and 8-bit ones where the settings say so.

    Raises:
        ValueError: the algorithm is unknown; or it is ``gptq``, and ``rounded`` is missing or does not fit.
    """
    graph = onnx.load(str(source)) if isinstance(source, Path) else source
    few = [n.name for n in graph.graph.node if n.op_type == "MatMul" and not re.search(settings.eight_bits, n.name)]
    tables = [n.name for n in graph.graph.node if n.op_type == "Gather"]  # T5's position biases: small, and not words
    mixed = _quantize(graph, settings.eight_bits_block_size, settings, bits=8, apart=few + tables)
    if settings.algorithm == "gptq":
        if rounded is None:
            raise ValueError("gptq rounds on reports: it needs what export.gptq.round_language_model gives")
        graph = _quantize(mixed, settings.block_size, settings, apart=tables)
        put_into_graph(graph, rounded)
        return graph
    if settings.algorithm == "rtn":
        return _quantize(mixed, settings.block_size, settings, apart=tables)
    return _quantize_otherwise(mixed, settings)


def _quantize_otherwise(graph: ModelProto, settings: Int4Settings) -> ModelProto:
    """4-bit weights by another algorithm than rounding to nearest; they have zero points."""
    configs: dict[str, WeightOnlyQuantConfig] = {
        "k_quant": KQuantWeightOnlyQuantConfig(op_types_to_quantize=("MatMul",)),
        "hqq": HQQWeightOnlyQuantConfig(settings.block_size, 4, 1, op_types_to_quantize=("MatMul",)),
    }
    if settings.algorithm not in configs:
        raise ValueError(f"unknown algorithm {settings.algorithm!r}; give one of: {', '.join(ALGORITHMS)}")
    quantizer = MatMulNBitsQuantizer(
        graph,
        block_size=settings.block_size,
        is_symmetric=False,
        accuracy_level=settings.accuracy_level,
        algo_config=configs[settings.algorithm],
    )
    quantizer.process()
    model = quantizer.model.model
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and not any(a.name == "accuracy_level" for a in node.attribute):
            node.attribute.append(helper.make_attribute("accuracy_level", settings.accuracy_level))
    return model


def _quantize(
    source: Path | ModelProto, block_size: int, settings: Int4Settings, bits: int = 4, apart: list[str] | None = None
) -> ModelProto:
    model = onnx.load(str(source)) if isinstance(source, Path) else source
    for kind, wide in (("MatMul", bits), ("Gather", 4)):  # tables of words are known to the quantizer in 4 bits alone
        config = DefaultWeightOnlyQuantConfig(
            bits=wide,
            block_size=block_size,
            is_symmetric=settings.symmetric,
            accuracy_level=settings.accuracy_level,
            op_types_to_quantize=(kind,),
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
        quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=apart)
        quantizer.process()
        model = quantizer.model.model
    opsets = {entry.domain for entry in model.opset_import}
    if "com.microsoft" not in opsets:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _share_head(embed: Path, decoder: ModelProto, decoder_path: Path, settings: Int4Settings) -> ModelProto | None:
    """An embedding graph on the head's quantized weights where the two are tied, else ``None``."""
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
    if node.input[2] not in loaded:  # its scales were narrowed: no head that is known to be tied
        return None
    base = str(decoder_path.parent)
    scales = numpy_helper.to_array(loaded[node.input[2]], base).reshape(words, -1)
    # Tied means that the rows of the table are the columns of the head: each block's largest weight gives its scale.
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
