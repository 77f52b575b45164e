"""Write the variants of the fp32 graphs: 4- and 8-bit weights, 16-bit floats, 8-bit integer products.

Where the language model ties its embedding to its head (as SmolLM2 does), both graphs read the same quantized weights.
"""

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from cbedge.bundles.bundle import Bundle
from cbedge.bundles.manifest import IN_INT8
from export.blockwise import Int4Settings, linear_nodes, narrow_scales, quantize_language_model, quantize_products
from export.embedding import write_embedding
from export.gptq import Rounded, calibration_inputs, round_language_model
from export.half import to_half
from export.int8 import multiply_in_int8
from export.tracing import DECODER, EMBED, ENCODER, QFORMER, VISION, save_graph
from export.tune import tune_scales
from training.base import ModelAndTokenizers

# Suffixes of a variant's files, as in Transformers.js and Optimum, and descriptions.
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


def write_variant(
    name: str,
    paths: dict[str, Path],
    folder: Path,
    settings: Int4Settings,
    rounded: dict[str, Rounded] | None,
    language: Bundle | None,
    film: np.ndarray | None = None,
) -> dict[str, Path]:
    """Write one variant of the fp32 graphs into ``folder``; returns the path of each graph.

    Args:
        name: one of :data:`VARIANTS`, except ``fp32`` and ``nf4``.
        settings: quantization of ``int4`` and of variants with its weights.
        rounded: with ``gptq``, the weights from :func:`export.gptq.round_language_model`.
        language: a bundle with this variant, ``int8`` or ``int4``, whose language model is copied.
        film: preprocessed radiograph, float32 [1, 3, S, S], on which ``q4a8`` measures ranges.
    """
    settings = settings_of(name, settings)
    if language is not None:
        written = quantize_image_side(paths, folder, settings, SUFFIX[name])
        return written | _language_of(language, name, folder)
    if name == "fp16":
        return {kind: to_half(path, folder / f"{kind}{SUFFIX[name]}.onnx") for kind, path in paths.items()}
    if name == "q4f16":
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            quantized = quantize_graphs(paths, Path(scratch), settings, SUFFIX["int4"], rounded, narrow=False)
            return {kind: to_half(path, folder / f"{kind}{SUFFIX[name]}.onnx") for kind, path in quantized.items()}
    if name == IN_INT8:
        return in_int8(quantize_graphs(paths, folder, settings, SUFFIX["int4"], rounded), folder, film)
    return quantize_graphs(paths, folder, settings, SUFFIX[name], rounded if name != "int8" else None)


def in_int8(int4: dict[str, Path], folder: Path, film: np.ndarray | None = None) -> dict[str, Path]:
    """Write the graphs that read int4's weights and multiply 8-bit integers; returns the path of each graph.

    Args:
        int4: the graphs of int4, in ``folder``; the embedding has no products and is used unchanged.
        film: preprocessed radiograph, on which the vision encoder's ranges are measured.
    """
    targets = {kind: folder / f"{kind}{SUFFIX[IN_INT8]}.onnx" for kind in int4.keys() - {EMBED}}
    written = {k: multiply_in_int8(int4[k], path, film if k == VISION else None) for k, path in targets.items()}
    return {**int4, **written}


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
    """Round the 4-bit weights of a merged model's language model by GPTQ, on training studies at ``data``.

    ``tell`` gets each step that tunes the scales, the number of steps, and the divergence from fp32.
    """
    inputs = calibration_inputs(parts, data)

    def chosen(name: str) -> bool:
        return not re.search(settings.eight_bits, name)

    model = parts.model.language_model
    rounded = round_language_model(model, inputs, settings.block_size, chosen)
    return tune_scales(model, rounded, inputs, settings.tune, tell=tell) if settings.tune else rounded


def settings_of(name: str, settings: Int4Settings) -> Int4Settings:
    """The settings for a variant, derived from those of int4."""
    if name == "q4f16":
        return replace(settings, eight_bits_block_size=32, qformer_block_size=32, vision_block_size=32)
    if name == "int8":
        return replace(settings, algorithm="rtn", eight_bits=".", eight_bits_block_size=64, qformer_four_bits="$^")
    return settings


def quantize_graphs(
    paths: dict[str, Path],
    folder: Path,
    settings: Int4Settings | None = None,
    suffix: str = SUFFIX["int4"],
    rounded: dict[str, Rounded] | None = None,
    narrow: bool = True,
) -> dict[str, Path]:
    """Write the quantized graphs into ``folder``; returns the path of each.

    ``narrow`` stores scales in 16 bits; the other arguments are as in :func:`write_variant`.
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
    """Write only vision encoder and Q-Former of :func:`quantize_graphs`; returns the path of each."""
    written = {kind: folder / f"{kind}{suffix}.onnx" for kind in (VISION, QFORMER)}
    exact = replace(settings, accuracy_level=0)  # as fast for so many positions, and activations are not rounded
    vision = quantize_products(paths[VISION], settings.vision_block_size, exact, bits=8)
    source = onnx.load(str(paths[QFORMER]))
    few = linear_nodes(source, settings.qformer_four_bits)
    qformer = quantize_products(source, settings.qformer_block_size, settings, bits=8, apart=few)
    qformer = quantize_products(qformer, 32, settings) if few else qformer
    for graph in (vision, qformer) if narrow else ():
        narrow_scales(graph)
    save_graph(vision, written[VISION], within=True)
    save_graph(qformer, written[QFORMER], within=True)
    return written
