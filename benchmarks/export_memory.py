"""Measure the memory that exporting a large decoder takes when it is exported some layers at a time.

A Llama with random weights, as wide as Vicuna-7B, is written in 16 bits and exported by ``python -m export.layers``.
The result is the largest sum of resident memory of that command and its child processes. It scales with the width and
with the number of layers in memory, not with the depth: two depths show it.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.common import start_module, write_record
from benchmarks.shape import byte_tokenizer
from cbedge.provenance import provenance

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Write a random language model in 16 bits, one file for each layer, so that it is never whole in memory."""
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    width, wide = config.hidden_size, config.intermediate_size

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.02).to(torch.bfloat16)

    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"
        layer = {f"{name}.self_attn.{kind}_proj.weight": draw(width, width) for kind in "qkvo"}
        layer |= {f"{name}.mlp.{kind}_proj.weight": draw(wide, width) for kind in ("gate", "up")}
        layer |= {f"{name}.mlp.down_proj.weight": draw(width, wide)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[f"{name}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save_file(layer, folder / f"layer-{i:02}.safetensors")
    rest = {name: draw(config.vocab_size, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(rest | {"model.norm.weight": torch.ones(width, dtype=torch.bfloat16)}, folder / "rest.safetensors")


def watch(module: str, *words: object) -> dict[str, float]:
    """Run ``python -m MODULE WORDS``: its seconds, and the largest sum of resident memory of its processes in GB.

    Raises:
        RuntimeError: it fails; the message is its last line of output.
    """
    start, most = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = start_module(module, *words, stdout=said, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for one in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += one.memory_info().rss
            most = max(most, total)
            time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().strip().splitlines()[-1])
    return {"seconds": round(time.monotonic() - start, 1), "peak_gb": round(most / 1e9, 2)}


def measure(config: LlamaConfig, variant: str, at_once: int) -> dict[str, Any]:
    """Write a checkpoint, export it, and return sizes, seconds and memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
        write_checkpoint(folder, config)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2
        options = ["--checkpoint", folder, "--out", out, "--variant", variant, "--at-once", at_once]
        measured = watch("export.layers", *options)
        size = sum(file.stat().st_size for file in out.iterdir())
    return {
        "layers": config.num_hidden_layers,
        "weights": int(weights),
        "fp32_gb": 4 * weights / 1e9,
        **measured,
        "written_gb": round(size / 1e9, 3),
    }


@app.command(help=__doc__)
def main(
    output: Annotated[Path, typer.Option(help="JSON to write.")],
    depths: Annotated[list[int], typer.Option(help="Layers of the checkpoint; repeatable.")] = [2, 4],  # noqa: B006
    at_once: Annotated[int, typer.Option(min=1, help="Number of layers in memory at a time.")] = 1,
    width: Annotated[int, typer.Option(help="Width of the hidden state; 4096 for Vicuna-7B.")] = 4096,
    vocabulary: Annotated[int, typer.Option(help="Vocabulary size; 32,000 for Vicuna-7B.")] = 32_000,
    variant: Annotated[str, typer.Option(help="fp32, int8 or int4.")] = "int4",
) -> None:
    """Measure, print and record."""
    rows = []
    for depth in depths:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 11008 // 4096,
            num_hidden_layers=depth,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=2048,
        )
        rows.append(measure(config, variant, at_once))
    settings = {"width": width, "vocabulary": vocabulary, "variant": variant, "at_once": at_once}
    write_record(provenance("random weights", bundle=False) | settings | {"depths": rows}, output)


if __name__ == "__main__":
    app()
