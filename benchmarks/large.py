"""``python -m benchmarks.large``: InstructBLIP-Vicuna-7B's shape with random weights, at any depth: what a training
step, the merge and the export take, and how fast a report is drafted. For latency and memory random weights serve.

On a workstation without a GPU take ``--layers 2``: the width is the real one, so what a layer takes is measured, and
two depths give the slope. Where a GPU is at hand, ``--layers 32 --vision-layers 39 --device cuda --variant q4f16
--variant nf4`` is the whole run.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
import yaml

from cbedge.bench import machine
from cbedge.errors import CbedgeError

STUDIES = 8
_RUN = {
    "base_precision": "nf4", "seed": 0,
    "stages": [{
        "name": "language", "train": ["projection"], "losses": {"language": 1.0}, "batch_size": 2, "accumulate": 1,
        "lora": {"part": "language", "r": 16, "alpha": 32, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "gradient_checkpointing": True, "epochs": 1, "save_every": 1,
    }],
}  # fmt: skip


def random_checkpoint(folder: Path, language_layers: int, vision_layers: int, cache: Path, seed: int = 0) -> None:
    """Write a random InstructBLIP of Vicuna-7B's width in transformers' layout, fp16.

    Tokenizers and vocabulary are those of the mini model (49,152 tokens in place of Vicuna's 32,001).
    """
    import torch
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        LlamaConfig,
    )

    from training.base import ModelAndTokenizers, assemble_mini

    mini = assemble_mini(cache, vision_layers=1, language_layers=3)
    text = LlamaConfig(
        vocab_size=len(mini.tokenizer), hidden_size=4096, intermediate_size=11008, num_hidden_layers=language_layers,
        num_attention_heads=32, max_position_embeddings=2048, bos_token_id=mini.tokenizer.bos_token_id,
        eos_token_id=mini.tokenizer.eos_token_id, pad_token_id=mini.tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(num_hidden_layers=vision_layers),
        qformer_config=InstructBlipQFormerConfig(vocab_size=mini.model.config.qformer_config.vocab_size),
        text_config=text, num_query_tokens=32, image_token_index=mini.image_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        model = InstructBlipForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    ModelAndTokenizers(model, mini.tokenizer, mini.qformer_tokenizer, mini.image_token_id).save(folder)


def drawn_studies(folder: Path) -> None:
    """A few studies in IU X-RAY's layout with noise for radiographs: enough to take a step on."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(2 * STUDIES):
        Image.fromarray(rng.integers(0, 255, (224, 224), np.uint8)).save(folder / "images" / f"{i}.jpg")
        lines.append({
            "study_id": f"S{i}", "split": "train" if i < STUDIES else "val", "r2gen_id": f"S{i}",
            "images": [{"file": f"{i}.jpg", "view": "frontal", "columns": 224, "rows": 224}],
            "indication": "cough", "comparison": None, "exam": "chest", "impression": "No acute disease.",
            "findings": "The heart is normal in size. The lungs are clear. " * 3, "mesh_major": ["normal"],
            "mesh_automatic": [], "problems": [],
        })  # fmt: skip
    (folder / "studies.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def run(title: str, *arguments: str) -> dict[str, Any]:
    """``python -m ARGUMENTS``: seconds, and the peak memory of it in GB.

    Raises:
        RuntimeError: it fails; the message holds its last words.
    """
    typer.echo(title, err=True)
    code = (
        "import json, resource, runpy, sys, time; sys.argv = sys.argv[1:]; module = sys.argv[0]; start = time.time()\n"
        "try:\n    runpy.run_module(module, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    status = end.code or 0\nelse:\n    status = 0\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(json.dumps({'seconds': time.time() - start, 'peak_gb': peak / 1e9}))\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{title} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"output": done.stdout}


def measure(layers: int, vision_layers: int, variants: list[str], device: str, train: bool) -> dict[str, Any]:
    """One depth: checkpoint, a step and its resumption, export, drafts."""
    from training.fetch import DEFAULT_CACHE

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        typer.echo(f"{layers} layers: random weights", err=True)
        random_checkpoint(folder / "base", layers, vision_layers, DEFAULT_CACHE)
        record: dict[str, Any] = {"layers": layers, "vision_layers": vision_layers}
        adapters: list[str] = []
        if train:
            drawn_studies(folder / "data")
            (folder / "run.yaml").write_text(yaml.safe_dump({"base": str(folder / "base"), **_RUN}), encoding="utf-8")
            options = ("training", "run", "--config", folder / "run.yaml", "--data", folder / "data", "--output",
                       folder / "run", "--device", device, "--precision", "bf16")  # fmt: skip
            record["train_1_step"] = run("one step", *map(str, options), "--max-steps", "1")
            (folder / "run" / "language" / "finished").unlink()
            record["train_again"] = run("a step more", *map(str, options), "--max-steps", "2")
            adapters = ["--adapters", str(folder / "run")]
        chosen = [part for variant in variants for part in ("--variant", variant)]
        record["export"] = run("export", "export", "--checkpoint", str(folder / "base"), *adapters, *chosen, "--out",
                               str(folder / "bundle"), "--name", f"random-7b-{layers}")  # fmt: skip
        record["bundle_gb"] = sum(f.stat().st_size for f in (folder / "bundle").iterdir()) / 1e9
        names = [part for variant in variants for part in ("--variants", variant)]
        start = perf_counter()
        bench = run("drafts", "cbedge.cli", "bench", "--model", str(folder / "bundle"), "--device", device, *names,
                    "--tokens", "100", "--repeat", "3", "--format", "json")  # fmt: skip
        record["bench_s"] = perf_counter() - start
        text = bench.pop("output")
        record["bench"] = json.loads(text[: text.rindex("}\n{") + 1] if "}\n{" in text else text)
        for part in ("train_1_step", "train_again", "export"):
            record.get(part, {}).pop("output", None)
        return record


def large_command(
    output: Annotated[Path, typer.Option(help="Record as OUTPUT.json.")],
    layers: Annotated[list[int], typer.Option(help="Layers of the language model, of 32; may be repeated.")],
    vision_layers: Annotated[int, typer.Option(help="Layers of the vision encoder, of 39.")] = 2,
    variant: Annotated[list[str] | None, typer.Option(help="As for python -m export.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    train: Annotated[bool, typer.Option(help="Also take two training steps (QLoRA).")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a record that is already there.")] = False,
) -> None:
    """Measure and record."""
    target = output.with_suffix(".json")
    if target.exists() and not force:
        raise ValueError(f"{target} exists already: give --force to replace it")
    rows = [measure(count, vision_layers, variant or ["int4"], device, train) for count in layers]
    record = {
        "machine": machine(), "rows": rows, "own_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9,
        "command": "python -m benchmarks.large " + " ".join(f"--layers {n}" for n in layers)
        + f" --vision-layers {vision_layers} --device {device}",
    }  # fmt: skip
    if len(rows) > 1:
        (first, last), part = (rows[0], rows[-1]), "export"
        slope = (last[part]["peak_gb"] - first[part]["peak_gb"]) / (last["layers"] - first["layers"])
        record["export_peak_gb_per_layer"] = slope
        record["export_peak_gb_of_32_layers_by_the_slope"] = first[part]["peak_gb"] + (32 - first["layers"]) * slope
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(record, indent=1))


def main() -> None:
    """Run the command line; an expected failure is one line and exit code 1."""
    try:
        typer.run(large_command)
    except (CbedgeError, ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
