"""``python -m export.layers``: a bundle of a checkpoint that is too large to be held in fp32, some layers at a time.

Seven billion weights in fp32 do not fit a workstation's memory. Here a few layers are read from the checkpoint, get
their adapters, become a graph, are quantized and written, and are forgotten before the next ones are read. The parts
are joined where one layer hands the sum of its residual on to the next, so the whole is the graph that an export at
once writes. Vision encoder and Q-Former are held whole. A folder that
holds a language model alone gives its decoder alone. Nothing is compared with torch.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import onnx
import torch
import typer
from onnx import ModelProto, NodeProto, TensorProto, helper
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cbedge.errors import OutputError
from export.command import run
from export.graphs import build_decoder, export_image_graphs
from export.quantize import (
    SUFFIX,
    Int4Settings,
    narrow_scales,
    quantize_image_side,
    quantize_language_model,
    settings_of,
    to_half,
    write_embedding,
)
from export.tracing import DECODER, EMBED, HEAD, ExportError
from training.fetch import DEFAULT_CACHE
from training.trained import load_adapted, merge_adapters, stage_folders

_LAYER = re.compile(r"(?<![\w.])((?:/?model[./])?layers|past_key_values|present)\.(\d+)(?=[./])")
_OTHER_GRAPH = "the decoder's builder wrote another graph than expected: use the pinned onnxruntime-genai"
_SMALL = 1024  # bytes of a weight that stays in the graph itself
# Wide models lose little with all but the head in 4 bits; what the mini model needs was measured on that alone.
WIDE = Int4Settings(eight_bits=HEAD)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class LanguageWeights:
    """The language model's weights in a folder of safetensors, read tensor by tensor.

    Args:
        folder: an InstructBLIP checkpoint, or that of a language model alone.

    Raises:
        ExportError: the folder holds no safetensors.
    """

    def __init__(self, folder: Path):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ExportError(f"{folder} holds no .safetensors: save the checkpoint in that format")
        self._names: dict[Path, list[str]] = {}
        for path in files:
            with safe_open(str(path), "pt") as file:
                self._names[path] = list(file.keys())
        # InstructBLIP's names have "language_model." somewhere before those of the language model alone.
        names = [name for held in self._names.values() for name in held]
        self._prefix = next((n[: n.index("language_model.") + 15] for n in names if "language_model." in n), "")

    def part(self, first: int, count: int, ends: bool) -> dict[str, Tensor]:
        """Weights of ``count`` layers in fp32, numbered from 0; embedding, last norm and head where ``ends``."""
        found = {}
        for path, names in self._names.items():
            with safe_open(str(path), "pt") as file:  # opened anew each time: what was read is held no longer
                for name in names:
                    if not name.startswith(self._prefix):
                        continue
                    own = name[len(self._prefix) :]
                    layer = re.search(r"layers\.(\d+)\.", own)
                    if layer is None:
                        if ends or own.endswith("norm.weight"):
                            found[own] = file.get_tensor(name).float()
                    elif first <= int(layer[1]) < first + count:
                        found[_renumber(own, layer, -first)] = file.get_tensor(name).float()
        return found


def load_part(
    config: Any, weights: LanguageWeights, adapters: list[Path], first: int, count: int, ends: bool
) -> PreTrainedModel:
    """A language model of some layers, its adapters merged, in fp32.

    Args:
        config: of the whole language model.
        weights: where they are read.
        adapters: folders of peft adapters for the whole, in order.
        first, count: which layers.
        ends: with its own embedding and head; else a stand-in of eight words, for a part that nothing is read from.

    Raises:
        ExportError: the checkpoint lacks a weight, or an adapter does not fit.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if not ends:
        config.vocab_size, config.pad_token_id = 8, None
        config.bos_token_id, config.eos_token_id = 1, 2  # the builder asks for them
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing = model.load_state_dict(weights.part(first, count, ends), strict=False).missing_keys
    lost = [name for name in missing if "layers." in name or (ends and "lm_head" not in name)]
    if lost or (ends and "lm_head.weight" in missing and not config.tie_word_embeddings):
        raise ExportError(f"the checkpoint lacks {(lost or missing)[0]} of layers {first} to {first + count - 1}")
    for folder in adapters:
        model = _merge(model, folder, first, count)
    return model


def _merge(model: PreTrainedModel, folder: Path, first: int, count: int) -> PreTrainedModel:
    values = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and first <= int(layer[1]) < first + count:
            values[_renumber(name, layer, -first)] = value
    adapted = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))
    unexpected = set_peft_model_state_dict(adapted, values).unexpected_keys
    if unexpected:
        raise ExportError(f"{folder} does not fit this checkpoint: it holds {unexpected[0]}")
    return adapted.merge_and_unload()


def _renumber(name: str, layer: re.Match[str], by: int) -> str:
    return f"{name[: layer.start(1)]}{int(layer[1]) + by}{name[layer.end(1) :]}"


class Stitcher:
    """A decoder's graph that grows part by part; weights go to the file beside it as they come.

    Args:
        path: of the graph; its data are ``<name>.onnx_data``.
    """

    def __init__(self, path: Path):
        self._path = path
        self._data = open(path.with_suffix(".onnx_data"), "wb")  # noqa: SIM115 (closed in close)
        self._whole: ModelProto | None = None
        self._known: set[str] = set()
        self._input = "inputs_embeds"
        self._open: list[str] = []  # what the last part hands on, not yet added up

    def add(self, part: ModelProto, last: bool) -> None:
        """Join the next part, whose layers have their own numbers already."""
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
        """Take off last norm and head; what the norm adds up is handed on."""
        end = next((i for i, node in enumerate(nodes) if "final_norm_layernorm" in node.name), None)
        if end is None:
            raise ExportError(_OTHER_GRAPH)
        self._open = list(nodes[end].input[:2])
        return nodes[:end]

    def _close_end(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """Let a part's first norm, which read the embeddings, add up what the part before hands on."""
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
    """Give a part's layers their numbers in the whole, in every name, in place."""

    def renamed(name: str) -> str:
        return _LAYER.sub(lambda match: f"{match[1]}.{int(match[2]) + by}", name)

    for node in graph.graph.node:
        node.name = renamed(node.name)
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)
    for values in (graph.graph.initializer, graph.graph.input, graph.graph.output):
        for value in values:
            value.name = renamed(value.name)


def export_by_layers(
    checkpoint: Path,
    adapters: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    variant: str,
    at_once: int,
    progress: Callable[[str], None] = lambda text: None,
    narrow: bool = True,
    settings: Int4Settings = WIDE,
) -> Path:
    """Write one variant of a checkpoint's decoder, ``at_once`` layers at a time.

    Args:
        checkpoint: folder of an InstructBLIP checkpoint, or of a language model alone, in safetensors.
        adapters: folders of peft adapters of the language model, in order.
        tokenizer: any of the language model's; the builder asks for one.
        path: of the graph to write.
        variant: ``fp32``, ``int8`` or ``int4``.
        at_once: layers that are in memory together.
        progress: is told what is done.
        narrow: keep scales in 16 bits on disk.
        settings: of ``int4``.

    Raises:
        ExportError: the checkpoint cannot be exported.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    config = getattr(config, "text_config", config)
    weights = LanguageWeights(checkpoint)
    stitcher = Stitcher(path)
    try:
        for first, count, last in _parts(config.num_hidden_layers, at_once):
            progress(f"layers {first} to {first + count - 1} of {config.num_hidden_layers}")
            model = load_part(config, weights, adapters, first, count, last)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                graph = build_decoder(model, tokenizer, Path(scratch))
            del model
            number_layers(graph, first)
            if variant != "fp32":
                graph = quantize_language_model(graph, settings_of(variant, settings))
                if narrow:
                    narrow_scales(graph)
            stitcher.add(graph, last)
    finally:
        stitcher.close()
    return path


def _parts(layers: int, at_once: int) -> Iterator[tuple[int, int, bool]]:
    for first in range(0, layers, at_once):
        yield first, min(at_once, layers - first), first + at_once >= layers


def language_adapters(folders: list[Path]) -> list[Path]:
    """The language model's adapters in the stages of runs, the newest of each run, which holds all that it learnt."""
    found = []
    for folder in folders:
        stages = [stage / "adapters" / "language" for stage in stage_folders(folder)]
        found += [stage for stage in stages if stage.is_dir()][-1:]
    return found


def bundle_by_layers(
    checkpoint: Path,
    adapters: list[Path],
    out: Path,
    variant: str,
    at_once: int,
    *,
    name: str,
    version: str,
    licence: str,
    data: Path | None,
    decoding: dict[str, float],
    progress: Callable[[str], None] = lambda text: None,
    settings: Int4Settings = WIDE,
) -> None:
    """Write a bundle of one variant.

    Args:
        checkpoint: folder of an InstructBLIP checkpoint in safetensors, its language model decoder-only.
        adapters: folders of runs, or of finished stages, in order.
        out: the bundle's folder, which must be new.
        variant: ``fp32``, ``int8``, ``int4`` or ``q4f16``.
        at_once: layers of the language model that are in memory together.
        name, version, licence: of the model.
        data: IU X-RAY's folder, for phrasebook and gate, or ``None``.
        decoding: the manifest's, but for ``max_new_tokens``.
        progress: is told what is done.
        settings: of ``int4`` and ``q4f16``.

    Raises:
        ExportError: the checkpoint cannot be exported.
    """
    from export.bundle import Origin, describe, write_packed

    progress("vision encoder and Q-Former")
    parts = load_adapted(str(checkpoint), adapters, DEFAULT_CACHE, image_side=True)
    if not parts.model.config.use_decoder_only_language_model:
        raise ExportError("an encoder-decoder (Flan-T5) is not exported layer by layer: use python -m export")
    merge_adapters(parts)
    layers = AutoConfig.from_pretrained(checkpoint).text_config.num_hidden_layers
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.graphs.") as scratch:
        folder, exact = Path(scratch), Path(scratch) / "fp32"
        exact.mkdir()
        graphs = export_image_graphs(parts, exact)
        parts.model.vision_model, parts.model.qformer = torch.nn.Identity(), torch.nn.Identity()  # done with
        half = variant == "q4f16"
        kind = "int4" if half else variant
        path = (exact if kind == "fp32" else folder) / f"{DECODER}{SUFFIX[kind]}.onnx"
        adapted = language_adapters(adapters)
        export_by_layers(checkpoint, adapted, parts.tokenizer, path, kind, at_once, progress, not half, settings)
        if kind != "fp32":
            settings = settings_of(kind, settings)
            quantized = quantize_image_side(graphs, folder, settings, SUFFIX[kind], narrow=not half)
            decoder = onnx.load(str(path), load_external_data=False)
            quantized[EMBED] = write_embedding(graphs[EMBED], decoder, path, settings, SUFFIX[kind])
            graphs = quantized
        graphs[DECODER] = path
        if half:
            progress("16 bits")
            halves = folder / "half"
            halves.mkdir()
            graphs = {k: to_half(p, halves / f"{k}{SUFFIX[variant]}.onnx") for k, p in graphs.items()}
        progress("packing")
        manifest = describe(
            parts,
            {variant: graphs},
            {},
            (variant,),
            name=name,
            version=version,
            licence=licence,
            origin=Origin.of(str(checkpoint), adapters),
            quality={},
            decoding=decoding,
            data=data,
            layers=layers,
        )
        files = [file for graph in graphs.values() for file in (graph, graph.with_suffix(".onnx_data"))]
        write_packed(parts, manifest, {variant: [f for f in files if f.is_file()]}, out, None, data, force=False)


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
) -> None:
    """Write the bundle, or the decoder."""
    if variant not in ("fp32", "int8", "int4", "q4f16"):
        raise ExportError(f"unknown variant {variant[:20]!r}; give fp32, int8, int4 or q4f16")
    if not (checkpoint / "config.json").is_file():
        raise ExportError(f"{checkpoint} is no folder of a checkpoint: it has no config.json")
    if out.exists():
        raise OutputError(f"{out} is there already: give another folder")
    if block_size not in (32, 64, 128):
        raise ExportError(f"unknown block size {block_size}; give 32, 64 or 128")
    settings = replace(WIDE, block_size=block_size, eight_bits=eight_bits or "$^")

    def tell(text: str) -> None:
        typer.echo(text, err=True)

    whole = hasattr(AutoConfig.from_pretrained(checkpoint), "qformer_config")
    if whole:
        bundle_by_layers(
            checkpoint,
            adapters or [],
            out,
            variant,
            at_once,
            name=name,
            version=version,
            licence=licence,
            data=data,
            decoding={},
            progress=tell,
            settings=settings,
        )
    elif variant == "q4f16":
        raise ExportError("q4f16 is for a whole model, and this is a language model alone: give fp32, int8 or int4")
    else:
        out.mkdir(parents=True)
        path = out / f"{DECODER}{SUFFIX[variant]}.onnx"
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        adapted = language_adapters(adapters or [])
        export_by_layers(checkpoint, adapted, tokenizer, path, variant, at_once, tell, settings=settings)
    size = sum(file.stat().st_size for file in out.iterdir())
    typer.echo(json.dumps({"bundle" if whole else "decoder": str(out), "megabytes": round(size / 1e6, 1)}))


def main() -> None:
    """Run the command line."""
    run(app)


if __name__ == "__main__":
    main()
