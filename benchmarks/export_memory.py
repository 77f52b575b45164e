"""``python -m benchmarks.export_memory``: the memory that exporting a large decoder takes, some layers at a time.

A Llama with random weights, as wide as Vicuna-7B and as deep as is asked for, is written in 16 bits and exported by
``python -m export.layers``. Given is the largest sum of resident memory of that command and what it starts. It hangs on
the width and on the layers at once, not on the depth: two depths show it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from cbedge.bench import machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """A random language model in 16 bits, a file a layer, never whole in memory."""
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    table = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rules = Tokenizer(models.BPE(vocab=table, merges=[]))
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=rules).save_pretrained(folder)
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


def watch(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and the largest sum of resident memory of its processes in GB.

    Raises:
        RuntimeError: it fails; the message holds what it said last.
    """
    start, most = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for one in (root, *root.children(recursive=True)):
                try:
                    total += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            most = max(most, total)
            time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().strip().splitlines()[-1])
    return time.monotonic() - start, most / 1e9


@app.command(help=__doc__)
def main(
    output: Annotated[Path, typer.Option(help="JSON to write.")],
    depths: Annotated[list[int], typer.Option(help="Layers of the checkpoint; repeated.")] = [2, 4],  # noqa: B006
    at_once: Annotated[int, typer.Option(min=1, help="Number of layers in memory at a time.")] = 1,
    width: Annotated[int, typer.Option(help="Width of the hidden state; 4096 for Vicuna-7B.")] = 4096,
    vocabulary: Annotated[int, typer.Option(help="Vocabulary size; 32,000 for Vicuna-7B.")] = 32_000,
    variant: Annotated[str, typer.Option(help="fp32, int8 or int4.")] = "int4",
) -> None:
    """Measure, print and record."""
    rows: list[dict[str, Any]] = []
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
        with tempfile.TemporaryDirectory() as scratch:
            folder, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
            write_checkpoint(folder, config)
            weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2
            seconds, peak = watch(
                [
                    sys.executable,
                    "-m",
                    "export.layers",
                    "--checkpoint",
                    str(folder),
                    "--out",
                    str(out),
                    "--variant",
                    variant,
                    "--at-once",
                    str(at_once),
                ]
            )
            size = sum(file.stat().st_size for file in out.iterdir())
        rows.append(
            {
                "layers": depth,
                "weights": int(weights),
                "fp32_gb": 4 * weights / 1e9,
                "peak_gb": round(peak, 2),
                "seconds": round(seconds, 1),
                "written_gb": round(size / 1e9, 3),
            }
        )
        typer.echo(json.dumps(rows[-1]))
    record = {
        "width": width,
        "vocabulary": vocabulary,
        "variant": variant,
        "at_once": at_once,
        "depths": rows,
        "machine": machine(),
        "command": f"python -m benchmarks.export_memory --at-once {at_once} --variant {variant} --output …",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
