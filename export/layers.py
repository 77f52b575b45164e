"""Export a checkpoint that is too large for memory in fp32, some layers at a time.

Seven billion weights in fp32 do not fit a workstation's memory. This command reads a few layers of the checkpoint,
merges their adapters, writes them as a graph, quantizes it, and frees the memory before it reads the next layers. The
parts are joined where one layer passes the sum of its residual to the next, so the result is the graph that
``python -m export`` writes. Vision encoder and Q-Former are held whole. A folder with only a language model gives only
its decoder. Nothing is compared with torch.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import onnx
import torch
import typer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from cbedge.errors import OutputError
from export.blockwise import Int4Settings, narrow_scales, quantize_language_model
from export.bundle import ModelInfo, Origin, VariantFiles, describe, write_packed
from export.console import Steps, Verbose
from export.embedding import write_embedding
from export.graphs import build_decoder, export_image_graphs
from export.half import to_half
from export.layer_weights import LanguageWeights, language_adapters, load_part
from export.quantize import SUFFIX, quantize_image_side, settings_of
from export.stitch import Stitcher, number_layers
from export.tracing import DECODER, EMBED, HEAD, ExportError
from training.base import ModelAndTokenizers
from training.command_line import run
from training.fetch import DEFAULT_CACHE
from training.trained import load_adapted, merge_adapters

# Wide models lose little with all but the head in 4 bits; what the mini model needs was measured on that alone.
WIDE = Int4Settings(eight_bits=HEAD)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class LayerSettings:
    """What is exported layer by layer, and how.

    Attributes:
        checkpoint: folder of an InstructBLIP checkpoint, or of a language model alone, in safetensors.
        adapters: folders of runs, or of finished stages, in order.
        variant: ``fp32``, ``int8``, ``int4`` or ``q4f16``.
        at_once: layers of the language model that are in memory together.
        int4: quantization of ``int4`` and ``q4f16``.
    """

    checkpoint: Path
    adapters: list[Path]
    variant: str = "int4"
    at_once: int = 2
    int4: Int4Settings = WIDE

    @property
    def half(self) -> bool:
        """Whether the quantized graphs are converted to 16-bit floats in the end."""
        return self.variant == "q4f16"

    @property
    def quantized(self) -> str:
        """The variant whose weights the layers get."""
        return "int4" if self.half else self.variant


def export_by_layers(settings: LayerSettings, tokenizer: PreTrainedTokenizerBase, path: Path, steps: Steps) -> Path:
    """Write the decoder's graph of a checkpoint to ``path``, some layers at a time; returns ``path``.

    Args:
        settings: ``q4f16`` writes int4 with scales in 32 bits.
        tokenizer: any tokenizer of the language model; the builder needs one.

    Raises:
        ExportError: the checkpoint cannot be exported.
    """
    config = AutoConfig.from_pretrained(settings.checkpoint)
    config = getattr(config, "text_config", config)
    weights, adapters = LanguageWeights(settings.checkpoint), language_adapters(settings.adapters)
    stitcher = Stitcher(path)
    try:
        for first, count, last in _parts(config.num_hidden_layers, settings.at_once):
            model = load_part(config, weights, adapters, first, count, last)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                graph = build_decoder(model, tokenizer, Path(scratch))
            del model
            number_layers(graph, first)
            if settings.quantized != "fp32":
                graph = quantize_language_model(graph, settings_of(settings.quantized, settings.int4))
                if not settings.half:
                    narrow_scales(graph)
            stitcher.add(graph, last)
            steps.done("exported", f"layers {first} to {first + count - 1} of {config.num_hidden_layers}")
    finally:
        stitcher.close()
    return path


def _parts(layers: int, at_once: int) -> Iterator[tuple[int, int, bool]]:
    for first in range(0, layers, at_once):
        yield first, min(at_once, layers - first), first + at_once >= layers


def bundle_by_layers(settings: LayerSettings, out: Path, info: ModelInfo, steps: Steps) -> None:
    """Write a bundle of one variant into the new folder ``out``.

    Raises:
        ExportError: the checkpoint cannot be exported.
    """
    parts = load_adapted(str(settings.checkpoint), settings.adapters, DEFAULT_CACHE, image_side=True)
    if not parts.model.config.use_decoder_only_language_model:
        raise ExportError("an encoder-decoder (Flan-T5) is not exported layer by layer: use python -m export")
    merge_adapters(parts)
    layers = AutoConfig.from_pretrained(settings.checkpoint).text_config.num_hidden_layers
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.graphs.") as scratch:
        graphs = _write_graphs(settings, parts, Path(scratch), steps)
        variants = {settings.variant: VariantFiles(graphs)}
        manifest = describe(parts, variants, info, layers)
        write_packed(parts, manifest, variants, out, None, info.data, force=False)
    steps.done("packed", str(out), out.iterdir())


def _write_graphs(settings: LayerSettings, parts: ModelAndTokenizers, scratch: Path, steps: Steps) -> dict[str, Path]:
    """Write all graphs of the variant into ``scratch``; returns the path of each."""
    kind, suffix = settings.quantized, SUFFIX[settings.quantized]
    exact = scratch / "fp32"
    exact.mkdir()
    graphs = export_image_graphs(parts, exact)
    parts.model.vision_model, parts.model.qformer = torch.nn.Identity(), torch.nn.Identity()  # frees their memory
    steps.done("traced", "vision encoder, Q-Former and embedding", graphs.values())
    path = (exact if kind == "fp32" else scratch) / f"{DECODER}{suffix}.onnx"
    export_by_layers(settings, parts.tokenizer, path, steps)
    if kind != "fp32":
        int4 = settings_of(kind, settings.int4)
        quantized = quantize_image_side(graphs, scratch, int4, suffix, narrow=not settings.half)
        decoder = onnx.load(str(path), load_external_data=False)
        quantized[EMBED] = write_embedding(graphs[EMBED], decoder, path, int4, suffix)
        graphs = quantized
        steps.done("quantized", "vision encoder, Q-Former and embedding", graphs.values())
    graphs[DECODER] = path
    if settings.half:
        halves = scratch / "half"
        halves.mkdir()
        graphs = {k: to_half(p, halves / f"{k}{SUFFIX[settings.variant]}.onnx") for k, p in graphs.items()}
        steps.done("converted", "all graphs to 16-bit floats", halves.iterdir())
    return graphs


@app.command(help=__doc__)
def main_command(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a checkpoint in safetensors.")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    adapters: Annotated[list[Path] | None, typer.Option(help="Folder of a run; repeatable.")] = None,
    variant: Annotated[str, typer.Option(help="fp32, int8, int4 or q4f16.")] = "int4",
    at_once: Annotated[int, typer.Option(min=1, help="Number of layers in memory at a time.")] = 2,
    block_size: Annotated[int, typer.Option(help="Block size of the quantization: 32, 64 or 128.")] = 32,
    eight_bits: Annotated[
        str, typer.Option(help="Regular expression of the language model's linear layers that keep 8 bits.")
    ] = HEAD,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "cbedge-model",
    version: Annotated[str, typer.Option(help="Version of the model.")] = "0.1.0",
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "see the checkpoint's own card",
    data: Annotated[Path | None, typer.Option(help="IU X-RAY folder, for phrasebook and gate.")] = None,
    verbose: Verbose = False,
) -> None:
    """Write the bundle, or the decoder."""
    if variant not in ("fp32", "int8", "int4", "q4f16"):
        raise ExportError(f"unknown variant {variant[:20]!r}; give fp32, int8, int4 or q4f16")
    if not (checkpoint / "config.json").is_file():
        raise ExportError(f"{checkpoint} is not a checkpoint: it has no config.json")
    if out.exists():
        raise OutputError(f"{out} exists already: give another folder")
    if block_size not in (32, 64, 128):
        raise ExportError(f"unknown block size {block_size}; give 32, 64 or 128")
    runs, steps = adapters or [], Steps()
    int4 = replace(WIDE, block_size=block_size, eight_bits=eight_bits or "$^")
    settings = LayerSettings(checkpoint, runs, variant, at_once, int4)
    whole = hasattr(AutoConfig.from_pretrained(checkpoint), "qformer_config")
    if whole:
        info = ModelInfo(name, version, licence, Origin.of(str(checkpoint), runs), data=data)
        bundle_by_layers(settings, out, info, steps)
    elif settings.half:
        raise ExportError("q4f16 needs a whole model, and this is only a language model: give fp32, int8 or int4")
    else:
        out.mkdir(parents=True)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        export_by_layers(settings, tokenizer, out / f"{DECODER}{SUFFIX[variant]}.onnx", steps)
    size = sum(file.stat().st_size for file in out.iterdir())
    typer.echo(json.dumps({"bundle" if whole else "decoder": str(out), "megabytes": round(size / 1e6, 1)}))


if __name__ == "__main__":
    run(app)
