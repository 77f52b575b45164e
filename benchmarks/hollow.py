"""Remove the weights of a bundle, and fill it with random ones.

The speed of a model depends only on its shapes, so the weights of a large one need not be copied to the machine where
it is measured: ``empty`` keeps graphs, tokenizers and manifest, a few megabytes; ``fill`` draws weights of the same
size there.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper

from cbedge.bundles.bundle import open_bundle
from cbedge.bundles.manifest import MANIFEST
from cbedge.files import file_sha256

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_SMALL = 1024  # bytes of a weight that stays in the graph
_PACKED = (TensorProto.INT4, TensorProto.UINT4)  # two to a byte
_WEIGHTS = (TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT16, TensorProto.FLOAT, *_PACKED)
_DEVIATION = 0.02  # standard deviation of weights


@app.command("empty")
def empty_command(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
) -> None:
    """Write the bundle without its weights."""
    if out.exists():
        typer.echo(f"error: {out} exists already: give another folder", err=True)
        raise typer.Exit(1)
    manifest = open_bundle(bundle).manifest
    out.mkdir(parents=True)
    data = {name for variant in manifest.variants.values() for name in variant.data}
    for name in (*manifest.files, MANIFEST):
        if name.endswith(".onnx"):
            onnx.save(emptied(onnx.load(str(bundle / name), load_external_data=False), name), str(out / name))
        elif name not in data:
            shutil.copyfile(bundle / name, out / name)


def emptied(graph: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Move the weights that a graph contains to an external file that is not written, in place; returns the graph."""
    data = name.replace(".onnx", ".onnx_data")
    end = 0
    for tensor in graph.graph.initializer:
        if tensor.external_data or len(tensor.raw_data) < _SMALL or tensor.data_type not in _WEIGHTS:
            continue
        end += -end % 64
        for key, value in (("location", data), ("offset", str(end)), ("length", str(len(tensor.raw_data)))):
            tensor.external_data.add(key=key, value=value)
        end += len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    return graph


@app.command("fill")
def fill_command(
    folder: Annotated[Path, typer.Argument(help="Folder written by `empty`; it becomes a bundle again.")],
) -> None:
    """Draw weights."""
    rng = np.random.default_rng(0)
    path = folder / MANIFEST
    values = json.loads(path.read_text(encoding="utf-8"))
    for variant in values["variants"].values():
        written: set[str] = set()
        for name in variant["graphs"].values():
            written |= draw(onnx.load(str(folder / name), load_external_data=False), folder, rng)
        variant["data"] = sorted(written)
    files = [file for file in folder.iterdir() if file != path]
    values["files"] = {f.name: {"size": f.stat().st_size, "sha256": file_sha256(f)} for f in files}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def draw(graph: onnx.ModelProto, folder: Path, rng: np.random.Generator) -> set[str]:
    """Write the files of a graph's external weights; returns their names. Existing files are kept."""
    places: dict[str, list[tuple[int, TensorProto]]] = {}
    for tensor in graph.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            places.setdefault(place["location"], []).append((int(place.get("offset", 0)), tensor))
    for name, tensors in places.items():
        if (folder / name).exists():
            continue
        with open(folder / name, "wb") as file:
            for offset, tensor in sorted(tensors, key=lambda place: place[0]):
                file.seek(offset)
                file.write(weights(tensor, rng))
    return {*places}


def weights(tensor: TensorProto, rng: np.random.Generator) -> bytes:
    """Random weights of a tensor's type and size. Norms are 1. Scales give 4- and 8-bit weights the same standard
    deviation as the others."""
    count = math.prod(tensor.dims)
    if tensor.data_type in _PACKED:
        return rng.bytes(-(-count // 2))
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if kind in (np.uint8, np.int8):
        return rng.bytes(count)
    if np.issubdtype(kind, np.integer):
        raise ValueError(f"{tensor.name}: integers are not weights")
    if "scales" in tensor.name:
        # Uniform 4-bit numbers from -8 to 7 have a standard deviation of 4.6, 8-bit ones 16 times as much.
        return np.full(count, _DEVIATION / (74 if "Q8" in tensor.name else 4.6), kind).tobytes()
    if "norm" in tensor.name:
        return np.ones(count, kind).tobytes()
    return (rng.standard_normal(count, np.float32) * np.float32(_DEVIATION)).astype(kind).tobytes()


if __name__ == "__main__":
    app()
