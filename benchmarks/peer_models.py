"""Write a model in the formats of the peers of :mod:`benchmarks.peers`."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import start_module
from cbedge import open_bundle
from cbedge.backends.provider import is_installed
from export.merge import merge
from export.restore import restore
from training.fetch import DEFAULT_CACHE
from training.trained import load_adapted


def prepare(
    checkpoint: str | None,
    adapters: Path | None,
    bundle: Path,
    folder: Path,
    names: list[str],
    tell: Callable[[str], None],
) -> Path:
    """Write the model for the peers among ``names`` into ``folder``; returns the folder of the merged model.

    Without a checkpoint, the model is restored from the bundle's fp32 graphs. A checkpoint to which nothing has to be
    merged is used where it is.
    """
    alone = any("alone" in name for name in names)
    if checkpoint and adapters is None and not alone and Path(checkpoint).is_dir():
        return Path(checkpoint)
    tell("merging" if checkpoint else "restoring")
    if checkpoint:
        parts = load_adapted(checkpoint, [adapters] if adapters else [], DEFAULT_CACHE)
        merge(parts)
    else:
        parts = restore(open_bundle(bundle), "fp32")
    language = parts.model.language_model
    if getattr(language.config, "quantization_config", None) is not None:
        del language.config.quantization_config  # of the base weights; these are in fp32
    parts.save(folder)
    if not alone:
        return folder
    language.save_pretrained(folder / "language")
    parts.tokenizer.save_pretrained(folder / "language")
    if is_installed("llama-cpp-python"):
        from benchmarks.gguf import quantize, write_gguf

        tell("writing GGUF for llama.cpp")
        write_gguf(folder / "language", folder / "language.gguf")
        for kind in ("Q4_0", "Q8_0"):
            quantize(folder / "language.gguf", folder / f"language-{kind}.gguf", kind)
    _copy_for_optimum(folder / "language", folder / "optimum")
    tell("building onnxruntime-genai's int4")
    options = ["-i", folder / "language", "-o", folder / "genai", "-c", folder / "cache", "-p", "int4", "-e", "cpu"]
    options += ["--extra_options", "int4_accuracy_level=4"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start_module("onnxruntime_genai.models.builder", *options, **quiet).wait()
    return folder


def _copy_for_optimum(language: Path, folder: Path) -> None:
    """Copy the language model for transformers below 5, which read the base of the positions from another key."""
    shutil.copytree(language, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
