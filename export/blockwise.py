"""4- and 8-bit weights in blocks with a common scale, by ONNX Runtime's quantizers.

Linear weights become ``MatMulNBits`` and embedding tables ``GatherBlockQuantized``. Scales are stored in 16 bits and
widened when a session loads, because the CPU's kernels need them in the type of the activations.
"""

import re
from dataclasses import dataclass
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

from export.gptq import Rounded, put_into_graph
from export.tracing import HEAD

ALGORITHMS = ("rtn", "k_quant", "hqq", "gptq")


@dataclass(frozen=True)
class Int4Settings:
    """How weights are quantized.

    Attributes:
        block_size: number of weights that share a scale in the language model; CUDA's fastest kernels need 32.
        qformer_block_size: the same in 8 bits in the Q-Former, which is smaller and more sensitive. Measured on the
            mini model and 24 studies: 4 bits (block 32) change the finding logits by 11% (all upwards, abnormal by .3),
            8 bits by 0.3% for 9 MB more; 4 bits in all feed-forward layers by 5%.
        qformer_four_bits: regular expression of the Q-Former's linear layers with 4 bits, in blocks of 32. The layers
            that only process the instruction change the logits by 1% and save 3.3 MB.
        vision_block_size: the same in 8 bits in the vision encoder. Relative error of its features on radiographs
            (ViT-S/14, 8 layers): 4 bits 16%; 8 bits 2.4% with activations in 8 bits, 1.3% without, at the same speed,
            for 6 MB more.
        eight_bits: regular expression of the language model's nodes with 8 bits. With all nodes in 4 bits, the merged
            mini model chose another token than fp32 at 21% of the positions (KL divergence 0.38); with attention, down
            projection and the first two layers in 8 bits at 7% (0.13). The gate projection was added later.
        eight_bits_block_size: number of weights that share a scale in these nodes.
        algorithm: quantization of the language model's 4-bit weights: ``rtn`` (round to nearest), ``k_quant``
            (llama.cpp's search for scale and offset), ``hqq`` (half-quadratic, Badri and Shaji 2023) or ``gptq``
            (:mod:`export.gptq`).
        tune: with ``gptq``, number of steps that tune the scales afterwards (:mod:`export.tune`).
        symmetric: with ``rtn``, no zero points.
        accuracy_level: 4 lets the CPU multiply in 8-bit integers, which is fastest.
    """

    block_size: int = 32
    qformer_block_size: int = 64
    qformer_four_bits: str = r"\.layer\.\d+\.(intermediate|output)\.dense$"
    vision_block_size: int = 128
    eight_bits: str = r"attn|down_proj|gate_proj|layers\.[01]/"
    eight_bits_block_size: int = 128
    algorithm: str = "rtn"
    tune: int = 0
    symmetric: bool = True
    accuracy_level: int = 4


def narrow_scales(graph: ModelProto) -> None:
    """Store the scales of 4- and 8-bit products in 16 bits, in place; a cast widens them when a session loads.

    The scales of the head stay in 32 bits, because the embedding's graph reads them too, and so do scales that 16 bits
    cannot represent.
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
    """Quantize an fp32 decoder to 4 bits, and to 8 bits where the settings say so.

    Raises:
        ValueError: the algorithm is unknown; or it is ``gptq``, and ``rounded`` is missing or does not fit.
    """
    graph = onnx.load(str(source)) if isinstance(source, Path) else source
    few = [n.name for n in graph.graph.node if n.op_type == "MatMul" and not re.search(settings.eight_bits, n.name)]
    tables = [n.name for n in graph.graph.node if n.op_type == "Gather"]  # T5's position biases, which are small
    mixed = quantize_products(graph, settings.eight_bits_block_size, settings, bits=8, apart=few + tables)
    if settings.algorithm == "gptq":
        if rounded is None:
            raise ValueError("gptq needs the weights of export.gptq.round_language_model")
        graph = quantize_products(mixed, settings.block_size, settings, apart=tables)
        put_into_graph(graph, rounded)
        return graph
    if settings.algorithm == "rtn":
        return quantize_products(mixed, settings.block_size, settings, apart=tables)
    return _quantize_otherwise(mixed, settings)


def _quantize_otherwise(graph: ModelProto, settings: Int4Settings) -> ModelProto:
    """4-bit weights by ``k_quant`` or ``hqq``, with zero points."""
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


def quantize_products(
    source: Path | ModelProto, block_size: int, settings: Int4Settings, bits: int = 4, apart: list[str] | None = None
) -> ModelProto:
    """Quantize products to ``bits`` bits and lookups to 4, without the nodes named in ``apart``."""
    model = onnx.load(str(source)) if isinstance(source, Path) else source
    for kind, wide in (("MatMul", bits), ("Gather", 4)):  # the quantizer knows tables in 4 bits only
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


def linear_nodes(graph: ModelProto, pattern: str) -> list[str]:
    """Names of the products of the linear layers that match a regular expression; their biases have the names."""
    producers = {output: node for node in graph.graph.node for output in node.output}
    found = []
    for node in graph.graph.node:
        names = [name.removesuffix(".bias") for name in node.input if name.endswith(".bias")]
        product = next((producers[name] for name in node.input if name in producers), None)
        if node.op_type == "Add" and product is not None and product.op_type == "MatMul":
            found += [product.name for name in names if re.search(pattern, name)]
    return found
