"""The paper's ablation: LoRA on {none, vision, language, both} parts, with and without priors in the prompt.

Ji et al. (JMIR Form Res 2024;8:e32690) compare stages and priors separately. Here each cell is a run of one
configuration without some of its stages. Without priors, indication and comparison are withheld in training and
evaluation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cbedge.files import write_atomically
from cbedge.prompt import split_sections
from training.clinical import label_known, with_intervals
from training.config import RunConfig
from training.controls import own, swapped, withheld
from training.datasets.iu_xray import clean_reference, read_studies
from training.drafting import TorchDrafter
from training.records import origin, table
from training.run_bundle import ReportResources
from training.scoring import METRICS, score
from training.train import run
from training.trained import load_merged

PARTS = {"none": (), "vision": ("vision",), "language": ("language",), "both": ("vision", "language")}


@dataclass(frozen=True)
class Cell:
    """One run of the ablation: the parts with LoRA, and whether the prompt has priors."""

    parts: str
    priors: bool

    @property
    def name(self) -> str:
        """Name of the cell and of its folder."""
        return f"{self.parts}-{'priors' if self.priors else 'no-priors'}"


LEAST_CIDER = 0.01
CELLS = tuple(Cell(parts, priors) for parts in PARTS for priors in (False, True))


def cell_config(config: RunConfig, cell: Cell, output: Path) -> RunConfig:
    """The configuration of one cell, without the stages with LoRA on other parts."""
    kept = [stage for stage in config.stages if stage.lora is None or stage.lora.part in PARTS[cell.parts]]
    stages = tuple(kept if cell.priors else [replace(stage, prior_dropout=1.0) for stage in kept])
    return replace(config, stages=stages, output=output / cell.name)


def ablate(
    config: RunConfig,
    output: Path,
    cache: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    cells: tuple[Cell, ...] = CELLS,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """Train and score every cell that was not scored before.

    Args:
        config: the whole run, such as ``training/configs/iu_xray_mini.yaml``.
        output: folder of the ablation, with a run folder and ``CELL.json`` for each cell.
        split, limit: the studies to draft.

    Returns:
        A JSON-ready record, ``cells`` → ``scores`` and ``clinical``.
    """
    console = Console(stderr=True)
    output.mkdir(parents=True, exist_ok=True)
    rows = {}
    for cell in cells:
        scored = output / f"{cell.name}.json"
        if not scored.is_file():
            console.print(f"cell {cell.name}")
            here = cell_config(config, cell, output)
            _share(here, output)
            folder = run(here, cache, max_steps)
            row = _score(folder, cell, config, cache, split, limit, console)
            write_atomically(scored, json.dumps(row).encode())
        rows[cell.name] = json.loads(scored.read_text(encoding="utf-8"))
    return {
        "split": split,
        "studies": next(iter(rows.values()))["studies"],
        "limited": limit is not None,
        "stages": [stage.name for stage in config.stages],
        "shortened": max_steps,
        "cells": rows,
    }


def to_markdown(record: dict[str, Any]) -> str:
    """The ablation as one table, in the paper's order."""
    limited = " (limited: a trial, not the whole split)" if record["limited"] or record["shortened"] else ""
    names = [*METRICS[3:], "CIDEr lost on swap", "balanced accuracy", "F1 of findings"]
    lines = [
        f"# Ablation, {record['split']} split: {record['studies']} studies{limited}",
        "",
        f"{origin(record)}. fp32, torch, greedy.",
        "",
    ]
    rows = []
    for cell in (c for c in CELLS if c.name in record["cells"]):
        row = record["cells"][cell.name]
        values = [f"{row['scores'][m]:.3f}" for m in METRICS[3:]]
        # The share of a score near zero is meaningless.
        values.append(f"{row['cider_lost_on_swap']:.1%}" if row["scores"]["CIDEr"] >= LEAST_CIDER else "-")
        values += [f"{row['clinical'][name][0]:.3f}" for name in ("balanced_accuracy", "finding_f1")]
        rows.append((cell.parts, "on" if cell.priors else "off", *values))
    return "\n".join([*lines, *table(("LoRA on", "priors", *names), rows)]) + "\n"


def _score(
    folder: Path, cell: Cell, config: RunConfig, cache: Path, split: str, limit: int | None, console: Console
) -> dict[str, Any]:
    parts = load_merged(folder, cache, config.device)
    drafter = TorchDrafter(parts, resources=ReportResources.learn(parts, config.data))
    studies = [s for s in read_studies(config.data, (split,)) if s.findings][:limit]
    if not cell.priors:
        bare = [r.context for r in withheld(studies)]
        studies = [replace(s, context=context) for s, context in zip(studies, bare, strict=True)]
    texts = {}
    with Progress(console=console) as progress:
        for name, requests in (("own", own(studies)), ("swapped", swapped(studies))):
            task = progress.add_task(f"{cell.name}, {name} images", total=len(requests))
            texts[name] = drafter.draft(requests, lambda count, task=task: progress.advance(task, count))  # type: ignore[misc]
    references = [clean_reference(s.findings) for s in studies]
    drafts = {name: [split_sections(t)[0] for t in given] for name, given in texts.items()}
    scores = {name: score([clean_reference(d) for d in given], references).corpus for name, given in drafts.items()}
    whole = scores["own"]["CIDEr"]
    return {
        "studies": len(studies),
        "scores": scores["own"],
        "cider_lost_on_swap": (whole - scores["swapped"]["CIDEr"]) / whole if whole else 0.0,
        "clinical": with_intervals(*label_known(studies, drafts["own"])),
    }


def _share(config: RunConfig, output: Path) -> None:
    """Reuse what another cell trained: the base, cached features, and leading stages with the same settings."""
    cache = output / "cache"
    cache.mkdir(exist_ok=True)
    config.output.mkdir(parents=True, exist_ok=True)
    if not (config.output / "cache").exists():
        (config.output / "cache").symlink_to(cache.resolve(), target_is_directory=True)
    if (config.output / "config.json").is_file():
        return
    best: tuple[int, Path] | None = None
    for folder, stages in _finished(output):
        same = 0
        for ours, theirs in zip(config.stages, stages, strict=False):
            if json.loads(json.dumps(asdict(ours))) != theirs or not (folder / ours.name / "finished").is_file():
                break
            same += 1
        if best is None or same > best[0]:
            best = same, folder
    if best:
        names = ["base"] if (best[1] / "base").is_dir() else []
        for name in (*names, *(stage.name for stage in config.stages[: best[0]])):
            shutil.copytree(best[1] / name, config.output / name, dirs_exist_ok=True)


def _finished(output: Path) -> Iterator[tuple[Path, list[dict]]]:
    for path in sorted(output.glob("*/config.json")):
        yield path.parent, json.loads(path.read_text(encoding="utf-8"))["stages"]
