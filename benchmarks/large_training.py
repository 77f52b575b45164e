"""Take a large model from its first training step to a draft, and measure the memory of each step.

An InstructBLIP of Vicuna-7B's shape with random weights (``--layers`` limits the layers of the language model) is
trained for two steps of each stage with the settings of ``training/configs/instructblip_vicuna_7b.yaml``. A second run
is killed after its first step and resumed; its losses must equal those of the first run. Then the adapters are merged
into a bundle, and the bundle writes a draft. The studies are the example radiograph with usual sentences, because time
and memory depend only on shapes.
"""

from __future__ import annotations

import csv
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.common import EXAMPLE, ROOT, refuse_existing, start_module, write_record
from benchmarks.drawn_studies import write_collection
from benchmarks.export_memory import watch
from cbedge.provenance import provenance
from training.command_line import run

CONFIG = ROOT / "training" / "configs" / "instructblip_vicuna_7b.yaml"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def write_config(path: Path, checkpoint: Path, data: Path, output: Path) -> list[str]:
    """Write the configuration for Vicuna-7B with one study a step and a checkpoint after each; returns its stages."""
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    values |= {"base": str(checkpoint), "data": str(data), "output": str(output), "validation_studies": 2}
    for stage in values["stages"]:
        stage |= {"batch_size": 1, "accumulate": 1, "save_every": 1, "select_by": "language"}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return [stage["name"] for stage in values["stages"]]


def kill_when(there: Path, module: str, *words: object) -> None:
    """Start ``python -m MODULE WORDS``, and kill it as soon as a file exists.

    Raises:
        RuntimeError: it ended earlier.
    """
    process = start_module(module, *words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not there.is_file():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before it wrote {there.name}")
        time.sleep(0.05)
    process.kill()
    process.wait()


def losses(run: Path, stage: str) -> list[list[str]]:
    """The rows of a stage's ``loss.csv``."""
    with open(run / stage / "loss.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@app.command(help=__doc__)
def main(
    output: Annotated[Path, typer.Option(help="JSON to write.")],
    shape: Annotated[str, typer.Option(help="vicuna-7b or tiny.")] = "vicuna-7b",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the language model.", show_default="all")] = None,
    base_precision: Annotated[str, typer.Option(help="Precision of frozen weights: nf4 or bf16.")] = "nf4",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing record.")] = False,
) -> None:
    """Measure, print and record."""
    refuse_existing(output, force)
    settings = {"shape": shape, "layers": layers, "base_precision": base_precision}
    record = provenance("drawn studies", bundle=False) | settings
    with tempfile.TemporaryDirectory() as scratch:
        kept = ["--layers", layers] if layers else []
        measured = measure(Path(scratch), ["--shape", shape, *kept], base_precision)
    write_record(record | measured, output)
    if not all(measured["losses equal after being killed"].values()):
        typer.echo("error: the resumed run has other losses than the run that was not killed", err=True)
        raise typer.Exit(1)


def measure(folder: Path, shape: list[object], base_precision: str) -> dict[str, Any]:
    """Train, kill and resume, export, and draft in an empty folder."""
    record: dict[str, Any] = {}

    def step(name: str, module: str, *words: object) -> None:
        typer.echo(name, err=True)
        record[name] = watch(module, *words)
        typer.echo(json.dumps(record[name]), err=True)

    checkpoint, data, bundle = folder / "checkpoint", folder / "data", folder / "bundle"
    write_collection(data, [EXAMPLE], ["val"] * 2 + ["train"] * 6)
    step("written", "benchmarks.shape", checkpoint, *shape)
    whole, killed = folder / "whole", folder / "killed"
    commands = {}
    for out in (whole, killed):
        config = folder / f"{out.name}.yaml"
        stages = write_config(config, checkpoint, data, out)
        commands[out] = ["run", "--config", config, "--base-precision", base_precision, "--max-steps", 2]
    step("two steps a stage", "training", *commands[whole])
    kill_when(killed / stages[0] / "checkpoint.pt", "training", *commands[killed])
    step("resumed", "training", *commands[killed])
    record["losses equal after being killed"] = {name: losses(whole, name) == losses(killed, name) for name in stages}
    for name in stages:
        record[f"losses, {name}"] = losses(whole, name)
    options = ["--checkpoint", checkpoint, "--adapters", killed, "--out", bundle, "--variant", "int4"]
    step("merged and exported in int4", "export.layers", *options, "--name", "random")
    record["bundle_gb"] = round(sum(f.stat().st_size for f in bundle.iterdir()) / 1e9, 2)
    options = ["--model", bundle, "--max-new-tokens", 16, "--accept-any-image"]
    step("drafted", "cbedge.cli", "generate", EXAMPLE, *options)
    return record


if __name__ == "__main__":
    run(app)
