"""``python -m benchmarks.large_training``: a large model's path, from one step of training to a draft, and its memory.

An InstructBLIP of Vicuna-7B's shape with random weights (``--layers`` keeps so many of the language model's) is trained
for two steps a stage with the settings of ``training/configs/instructblip_vicuna_7b.yaml``, killed after the first step
and resumed; the losses must be those of a run that was not killed. Then its adapters are merged on the way into a
bundle, and that writes a draft. Studies are the example radiograph with usual sentences: cost hangs on shapes alone.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.export_memory import watch
from cbedge.bench import machine

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "training" / "configs" / "instructblip_vicuna_7b.yaml"
EXAMPLE = ROOT / "examples" / "chest_pa.png"
FINDINGS = ("The heart is normal in size. The lungs are clear.", "There is a small left pleural effusion.")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def write_studies(folder: Path, count: int = 8) -> None:
    """A collection in the layout of ``studies.jsonl``, two of its studies for validation."""
    (folder / "images").mkdir(parents=True)
    shutil.copyfile(EXAMPLE, folder / "images" / "chest.png")
    lines = []
    for number in range(count):
        lines.append(
            {
                "study_id": f"S{number}",
                "split": "val" if number < 2 else "train",
                "r2gen_id": f"S{number}",
                "images": [{"file": "chest.png", "view": "frontal"}],
                "indication": "cough",
                "comparison": None,
                "exam": "Chest",
                "findings": FINDINGS[number % 2],
                "impression": None,
                "mesh_major": [["normal"], ["Pleural Effusion"]][number % 2],
                "mesh_automatic": [],
                "problems": [],
            }
        )
    (folder / "studies.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def write_config(path: Path, checkpoint: Path, data: Path, output: Path) -> list[str]:
    """The configuration for Vicuna-7B on this checkpoint, a study a step, each step kept; returns its stages' names."""
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    values |= {"base": str(checkpoint), "data": str(data), "output": str(output), "validation_studies": 2}
    for stage in values["stages"]:
        stage |= {"batch_size": 1, "accumulate": 1, "save_every": 1, "select_by": "language"}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return [stage["name"] for stage in values["stages"]]


def kill_when(command: list[str], there: Path) -> None:
    """Start a command and kill it as soon as a file is there.

    Raises:
        RuntimeError: it ended before that.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not there.is_file():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before {there.name} was there")
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
    if output.exists() and not force:
        typer.echo(f"error: {output} exists already: give --force to replace it", err=True)
        raise typer.Exit(1)
    record: dict[str, Any] = {"shape": shape, "layers": layers, "base_precision": base_precision, "machine": machine()}

    def step(name: str, *command: object) -> None:
        typer.echo(name, err=True)
        seconds, peak = watch([sys.executable, "-m", *map(str, command)])
        record[name] = {"seconds": round(seconds, 1), "peak_gb": round(peak, 2)}
        typer.echo(json.dumps(record[name]), err=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint, data, bundle = folder / "checkpoint", folder / "data", folder / "bundle"
        write_studies(data)
        step("written", "benchmarks.shape", checkpoint, "--shape", shape, *(["--layers", layers] if layers else []))
        runs = [folder / "whole", folder / "killed"]
        for run in runs:
            stages = write_config(folder / f"{run.name}.yaml", checkpoint, data, run)
        commands = [
            [
                "training",
                "run",
                "--config",
                folder / f"{run.name}.yaml",
                "--base-precision",
                base_precision,
                "--max-steps",
                2,
            ]
            for run in runs
        ]
        step("two steps a stage", *commands[0])
        kill_when([sys.executable, "-m", *map(str, commands[1])], runs[1] / stages[0] / "checkpoint.pt")
        step("resumed", *commands[1])
        equal = {name: losses(runs[0], name) == losses(runs[1], name) for name in stages}
        record["losses equal after being killed"] = equal
        for name in stages:
            record[f"losses, {name}"] = losses(runs[0], name)
        step(
            "merged and exported in int4",
            "export.layers",
            "--checkpoint",
            checkpoint,
            "--adapters",
            runs[1],
            "--out",
            bundle,
            "--variant",
            "int4",
            "--name",
            "random",
        )
        record["bundle_gb"] = round(sum(f.stat().st_size for f in bundle.iterdir()) / 1e9, 2)
        step(
            "drafted",
            "cbedge.cli",
            "generate",
            EXAMPLE,
            "--model",
            bundle,
            "--max-new-tokens",
            16,
            "--accept-any-image",
        )
    kept = f" --layers {layers}" if layers else ""
    record["command"] = f"python -m benchmarks.large_training --shape {shape}{kept} --output …"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(record, indent=1))
    if not all(equal.values()):
        typer.echo("error: the resumed run's losses are others than those of the run that was not killed", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
