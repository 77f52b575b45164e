"""Run the stages of a configuration in order, and resume where a run stopped."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from training.base import BASES, ModelAndTokenizers, load_model
from training.config import RunConfig
from training.datasets.provenance import merged, save_training_data
from training.fetch import DEFAULT_CACHE
from training.parallel import Processes, choose_device
from training.preflight import check_run, earlier_records
from training.stage_run import StageRun
from training.stages import load_trained, prepare_stage


def run(config: RunConfig, cache: Path = DEFAULT_CACHE, max_steps: int | None = None) -> Path:
    """Run every stage that is not finished; returns the folder of the run.

    Args:
        config: the run. Its folder contains ``base/`` (for an assembled base model) and one folder per stage:
            ``adapters/`` in peft's format, ``trained.safetensors``, ``loss.csv``, ``loss.png``, and during training a
            checkpoint.

    Raises:
        FileNotFoundError: data or base weights are missing.
        ValueError: the folder has a run of another configuration; the data cannot be used, or nothing can be learned
            from them; or a loss is not finite.
    """
    processes = Processes(choose_device(config.device))
    device = processes.device
    console = Console(stderr=True, quiet=not processes.is_main)
    if processes.count > 1:
        console.print(f"{processes.count} processes")
    fast = device.type == "cuda" or config.base_precision != "fp32"
    bf16 = config.precision == "bf16" or (config.precision == "auto" and fast)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    checked = processes.main_first(lambda: check_run(config, processes.count))  # before any file is written
    for note in checked.notes:
        console.print(f"note: {note}", highlight=False)
    config.output.mkdir(parents=True, exist_ok=True)
    processes.only_main(lambda: _check_same_run(config))
    processes.only_main(lambda: save_training_data(merged([*earlier_records(config), checked.record]), config.output))
    parts = processes.main_first(lambda: _base(config, cache))
    if config.shard:
        whole, kept = processes.shard(parts.model.language_model)
        console.print(f"language model: {kept / 1e6:.2f} of {whole / 1e6:.2f} MB in each process")
    parts.model.to(device)
    previous: Path | None = None
    for number, stage in enumerate(checked.stages):
        folder = config.output / stage.name
        torch.manual_seed(config.seed * 1000 + number)  # adapters are initialized randomly
        prepare_stage(parts.model, stage)
        if (folder / "finished").is_file():
            load_trained(parts.model, folder)
            console.print(f"stage {stage.name}: already finished, loaded")
        else:
            StageRun(config, stage, number, parts, processes, autocast, folder, previous, console).run(max_steps)
        previous = folder
    return config.output


def _check_same_run(config: RunConfig) -> None:
    current = json.loads(
        json.dumps({k: v for k, v in asdict(config).items() if k not in ("data", "device", "shard")}, default=str)
    )
    path = config.output / "config.json"
    if path.is_file():
        old = json.loads(path.read_text())
        finished = {s["name"] for s in old["stages"] if (config.output / s["name"]).exists()}
        same_stages = all(
            a[key] == b[key]  # a setting that is newer than the run has its default
            for a, b in zip(old["stages"], current["stages"], strict=False)
            for key in a.keys() & b.keys()
            if a["name"] in finished
        )
        if not same_stages or old["base"] != current["base"] or old["base_options"] != current["base_options"]:
            raise ValueError(
                f"{config.output} has a run of another configuration: give another --output, or restore the settings"
            )
    path.write_text(json.dumps(current, indent=1))


def _base(config: RunConfig, cache: Path) -> ModelAndTokenizers:
    if config.base not in BASES:  # a checkpoint is not copied: it may have billions of weights
        return load_model(config.base, cache, config.base_precision)
    saved = config.output / "base"
    if not saved.is_dir():
        parts = load_model(config.base, cache, seed=config.seed, **config.base_options)
        scratch = config.output / "base.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        parts.save(scratch)
        scratch.rename(saved)
    return load_model(str(saved), cache, config.base_precision)
