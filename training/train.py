"""Run the stages of a configuration in order: train, log, checkpoint, and resume exactly where a run stopped."""

import json
import math
import random
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from cbedge.prompt import split_sections
from training.base import BASES, FindingHead, ModelAndTokenizers, load_model, save_finding_head
from training.batches import (
    Batch,
    ToldTags,
    cache_features,
    collate,
    drop_priors,
    epoch_order,
    lengths_and_flags,
    load_pixels,
    retarget,
    told_findings,
)
from training.config import RunConfig, Stage
from training.consensus import ConsensusReports
from training.controls import own
from training.datasets import open_studies
from training.datasets.iu_xray import clean_reference
from training.datasets.provenance import merged, save_training_data
from training.drafting import TorchDrafter
from training.fetch import DEFAULT_CACHE
from training.logs import append_row, cut_rows, plot_losses, write_atomically
from training.losses import AlignmentHeads, StageLosses, word_vocabulary
from training.ontology import TAGS
from training.openings import Opener
from training.parallel import Processes
from training.preflight import check_run, earlier_records
from training.processor import save_preprocessing
from training.run_bundle import ReportResources
from training.scoring import cider
from training.stages import (
    load_trained,
    prepare_stage,
    save_trained,
    start_cross_attention,
    trainable_groups,
)
from training.validation import Validation, choose_findings

_SELECTED = {"cider": "cider", "tags": "auc_mean"}  # the column of validation.csv in which more is better
VOCABULARY_STUDIES = 20_000  # enough to tell common words from rare ones


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        RuntimeError: CUDA is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("CUDA was asked for, but torch finds no CUDA device: give --device cpu")
    return torch.device(name)


def choose_autocast(precision: str, device: torch.device) -> torch.autocast:
    """fp32 on a CPU and bf16 on a GPU, unless the precision is named (bf16 pays on CPUs with AVX512-BF16 or AMX)."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"unknown precision {precision!r}; give auto, fp32 or bf16")
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def run(config: RunConfig, cache: Path = DEFAULT_CACHE, max_steps: int | None = None) -> Path:
    """Run every stage that is not finished; returns the folder of the run.

    Args:
        config: the run. Its folder holds ``base/`` (the starting point, where it was assembled), one folder a stage
            (``adapters/`` in peft's format, ``trained.safetensors``, ``loss.csv``, ``loss.png``) and a resumable
            checkpoint while one runs.
        cache: where base weights are kept.
        max_steps: end each stage after so many optimizer steps (for trials).

    Raises:
        FileNotFoundError: data or base weights are missing.
        ValueError: the folder holds a run of another configuration; the data cannot be used or nothing can be learned
            from them; or a loss is no number.
    """
    processes = Processes(choose_device(config.device))
    device = processes.device
    console = Console(stderr=True, quiet=not processes.is_main)
    if processes.count > 1:
        console.print(f"{processes.count} processes")
    bf16 = config.base_precision != "fp32" and config.precision == "auto"
    autocast = choose_autocast("bf16" if bf16 else config.precision, device)
    checked = processes.main_first(lambda: check_run(config, processes.count))  # before anything is written
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
        torch.manual_seed(config.seed * 1000 + number)  # adapters begin at random
        prepare_stage(parts.model, stage)
        if (folder / "finished").is_file():
            load_trained(parts.model, folder)
            console.print(f"stage {stage.name}: finished before, loaded")
        else:
            StageRun(config, stage, number, parts, processes, autocast, folder, previous, console).run(max_steps)
        previous = folder
    return config.output


def _check_same_run(config: RunConfig) -> None:
    told = json.loads(
        json.dumps({k: v for k, v in asdict(config).items() if k not in ("data", "device", "shard")}, default=str)
    )
    path = config.output / "config.json"
    if path.is_file():
        begun = json.loads(path.read_text())
        finished = {s["name"] for s in begun["stages"] if (config.output / s["name"]).exists()}
        same_stages = all(
            a[key] == b[key]  # of a setting that is newer than the run, it has the default
            for a, b in zip(begun["stages"], told["stages"], strict=False)
            for key in a.keys() & b.keys()
            if a["name"] in finished
        )
        if not same_stages or begun["base"] != told["base"] or begun["base_options"] != told["base_options"]:
            raise ValueError(
                f"{config.output} holds a run of another configuration: give another --output, or restore the values"
            )
    path.write_text(json.dumps(told, indent=1))


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


class StageRun:
    """One stage's training loop and its state on disk."""

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        number: int,
        parts: ModelAndTokenizers,
        processes: Processes,
        autocast: torch.autocast,
        folder: Path,
        previous: Path | None,
        console: Console,
    ):
        self.config, self.stage, self.number, self.parts = config, stage, number, parts
        self.processes, self.device, self.autocast = processes, processes.device, autocast
        self.folder, self.console = folder, console
        self.seed = config.seed * 1000 + number
        folder.mkdir(parents=True, exist_ok=True)
        self.studies = processes.main_first(lambda: open_studies(config.data, stage.splits))
        self.val = open_studies(config.data, ("val",), config.validation_studies)
        self.lengths, self.abnormal = lengths_and_flags(self.studies)
        self._order: tuple[int, list[list[int]]] = (-1, [])
        self.told_tags = ToldTags(stage.tell_from)
        self.opener = Opener(stage.openings, stage.open_share)
        self.consensus = None
        if stage.learn == "consensus":
            self.consensus = ConsensusReports(self.studies, stage.tell_findings, stage.openings, self.seed)
        self._seed_everything()
        self.heads = self._build_heads(previous).to(self.device)
        self.groups = trainable_groups(parts.model, self.heads, stage)
        self.optimizer = torch.optim.AdamW(self.groups, weight_decay=stage.weight_decay, fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.steps_per_epoch = max(1, len(self._epoch(0)) // stage.accumulate)
        self.total_steps = max(1, round(stage.epochs * self.steps_per_epoch))
        self.step = 0
        self.best: float | None = None
        self.best_step, self.worse = 0, 0
        if stage.gradient_checkpointing:
            parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            parts.model.gradient_checkpointing_disable()
        self.features: np.ndarray | None = None
        self._lateral_rows: dict[int, int] = {}  # study → row of the cache
        self.losses = StageLosses(parts, self.heads, stage)
        self.validation = Validation(parts, stage, self.val, self.device, autocast, consensus=self.consensus)
        self.wrapped: nn.Module = self.losses
        self._readers = ThreadPoolExecutor()  # images of a batch are read together,
        self._ahead = ThreadPoolExecutor(1)  # and the next batch while this one is learnt from
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None
        if processes.rank:
            torch.manual_seed(self.seed + 7919 * processes.rank)  # dropout differs between processes

    def run(self, max_steps: int | None = None) -> None:
        """Train to the end of the stage, resuming from its checkpoint where there is one."""
        self._resume()
        total = min(self.total_steps, max_steps or self.total_steps)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            if self.stage.cached_views:
                self._cache(progress)
            if self.stage.start_cross_attention and self.features is not None and self.step == 0:
                sample = torch.from_numpy(self.features[0, : 16 * self.stage.batch_size].astype(np.float32))
                start_cross_attention(self.parts.model, sample, self.seed)
            self.wrapped = self.processes.wrap(self.losses)
            task = progress.add_task(f"stage {self.stage.name}", total=total, completed=self.step)
            seconds = []
            while self.step < total:
                start = perf_counter()
                losses = self._train_step()
                seconds.append(perf_counter() - start)
                if self.processes.is_main:
                    self._log(losses)
                loss_text = " ".join(f"{k} {v:.3f}" for k, v in losses.items() if k != "step")
                progress.update(task, completed=self.step, description=f"stage {self.stage.name} {loss_text}")
                if not progress.console.is_terminal and self.step % 10 == 0:
                    self.console.print(f"{self.stage.name} {self.step}/{total} {loss_text}", highlight=False)
                if self.step % (self.stage.validate_every or self.steps_per_epoch) == 0 or self.step == total:
                    self.processes.validating(self._validate)
                    self.worse = self.processes.agree(self.worse)
                if self.step % self.stage.save_every == 0:
                    self.processes.only_main(self._save_checkpoint)
                if self._is_stale():
                    self.console.print(f"stage {self.stage.name}: stopped early, best at step {self.best_step}")
                    break
        for pool in (self._ahead, self._readers):
            pool.shutdown(cancel_futures=True)
        self._tell_cost(seconds)
        self.processes.only_main(self._finish)
        if self.processes.rank:
            load_trained(self.parts.model, self.folder)

    def _tell_cost(self, seconds: list[float]) -> None:
        """Say what a step took, and the most memory of the GPU."""
        if seconds and self.processes.is_main:
            told = f"stage {self.stage.name}: {np.median(seconds):.2f} s a step"
            if self.device.type == "cuda":
                told += f", at most {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB of the GPU's memory"
            self.console.print(told, highlight=False)

    def _is_stale(self) -> bool:
        return bool(self.stage.patience) and self.worse >= self.stage.patience

    def _select(self, row: dict[str, float]) -> None:
        """Keep the weights where this validation is the best so far."""
        value = -row["language"] if self.stage.select_by == "language" else row[_SELECTED[self.stage.select_by]]
        if self.best is not None and value <= self.best:
            self.worse += 1
            return
        self.best, self.best_step, self.worse = value, self.step, 0
        state = {"trained": self._trained(), "heads": self.heads.state_dict()}
        write_atomically(self.folder / "best.pt", lambda path: torch.save(state, path))

    def _trained(self) -> dict[str, Tensor]:
        return {n: p.detach().cpu() for n, p in self.parts.model.named_parameters() if p.requires_grad}

    def _cider(self) -> float:
        """CIDEr of greedy drafts of the validation studies that have findings."""
        studies = [s for s in self.val if s.findings]
        parts = replace(self.parts, finding_head=self._finding_head() if self.stage.tell_findings else None)
        drafter = TorchDrafter(parts, image_blind=self.stage.image_blind, resources=self._resources)
        with self.autocast:
            texts = drafter.draft(own(studies), lambda count: None)
        drafts = [clean_reference(split_sections(text)[0]) for text in texts]
        return cider(drafts, [clean_reference(s.findings) for s in studies])

    @cached_property
    def _resources(self) -> ReportResources:
        found = ReportResources.learn(self.parts, self.config.data, VOCABULARY_STUDIES)
        # The number of guesses depends on time; the passes of sharded processes must be the same.
        return replace(found, phrasebook=None) if self.processes.sharded else found

    def _finding_head(self) -> FindingHead:
        """The head as it now is, with thresholds chosen on validation studies."""
        return self.heads.finding_head(
            choose_findings(self.validation, self.heads, self.stage.tell_findings, self.stage.openings)
        )

    def _seed_everything(self) -> None:
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def _build_heads(self, previous: Path | None) -> AlignmentHeads:
        encode = self.parts.tokenizer
        train = open_studies(self.config.data, ("train",), VOCABULARY_STUDIES)
        ids, share = word_vocabulary([encode(s.target, add_special_tokens=False).input_ids for s in train])
        heads = AlignmentHeads(self.parts.model.config.qformer_config.hidden_size, len(TAGS), ids, share)
        if previous and (previous / "heads.pt").is_file():
            heads.load_state_dict(torch.load(previous / "heads.pt", weights_only=True))
        elif self.parts.finding_head is not None:  # of a checkpoint that was trained before
            heads.start_from(self.parts.finding_head)
        return heads

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = epoch_order(self.lengths, self.abnormal, self.stage.batch_size, self.stage.abnormal_weight, rng)
            self._order = (epoch, order)
        return self._order[1]

    def _cache(self, progress: Progress) -> None:
        task = progress.add_task(f"stage {self.stage.name}: encoding images", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, total=total, advance=done)

        settings = self.parts.preprocessing
        arguments = (self.config.output / "cache", self.seed, self.device, self.autocast, advance)
        vision = self.parts.model.vision_model
        images = [(s.study_id, s.image) for s in self.studies]
        if self.stage.lateral:
            paired = [(i, s.study_id, s.lateral) for i, s in enumerate(self.studies) if s.lateral is not None]
            self._lateral_rows = {i: len(images) + row for row, (i, _, _) in enumerate(paired)}
            images += [(f"{study_id} lateral", file) for _, study_id, file in paired]
        self.features = self.processes.main_first(
            lambda: cache_features(vision, images, settings, self.stage.cached_views, *arguments)
        )
        progress.remove_task(task)

    def _batch(self, epoch: int, index: int, rows: list[int]) -> Batch:
        """This process's share of a batch: a function of seed, epoch and index, so a resumed run sees the same."""
        draws = self.processes.share([np.random.default_rng([self.seed, epoch, index, i]) for i in range(len(rows))])
        rows = self.processes.share(rows)
        studies = [self.studies[i] for i in rows]
        contexts = [
            drop_priors(s.context, self.stage.prior_dropout, rng) for s, rng in zip(studies, draws, strict=True)
        ]
        laterals = []
        if self.stage.lateral:
            kept = [rng.random() >= self.stage.lateral_dropout for rng in draws]
            laterals = [i for i, s in enumerate(studies) if s.lateral is not None and kept[i]]
        if self.features is not None:
            wanted = [*zip(rows, draws, strict=True), *((self._lateral_rows[rows[i]], draws[i]) for i in laterals)]
            picked = [self.features[rng.integers(len(self.features)), row] for row, rng in wanted]
            images = torch.from_numpy(np.stack(picked)).float()
        elif self.stage.image_blind:
            images = torch.zeros(len(rows), 0)
        else:
            # A study's draws are shared by its two views: the frontal one comes first, whoever reads it.
            frontals = [(s.image, rng) for s, rng in zip(studies, draws, strict=True)]
            views = self._read(frontals) + self._read([(studies[i].lateral, draws[i]) for i in laterals])
            images = torch.from_numpy(np.stack(views))
        seen: list[tuple[str, ...] | None] = [None] * len(studies)
        if self.stage.tell_findings:
            names, share, noise = self.stage.tell_findings, self.stage.tell_share, self.told_tags.noise
            told = zip(self.told_tags(studies), draws, strict=True)
            seen = [told_findings(tags, names, share, rng, noise) for tags, rng in told]
        begun: list[str] = []
        if self.stage.open_share:
            told_rows = zip(studies, seen, self.told_tags(studies), draws, strict=True)
            begun, studies = retarget(studies, [self.opener(*row) for row in told_rows])
        elif self.consensus is not None:
            rows_of = zip(studies, contexts, seen, strict=True)
            begun, studies = retarget(studies, [self.consensus(*row) for row in rows_of])
        return collate(self.parts, studies, contexts, images, seen, laterals, begun)

    def _read(self, files: Sequence[tuple[Path | None, np.random.Generator]]) -> list[np.ndarray]:
        there = [(file, rng) for file, rng in files if file is not None]
        settings = self.parts.preprocessing
        return [*self._readers.map(lambda one: load_pixels(one[0], settings, one[1]), there)]

    def _take_batch(self, epoch: int, index: int, batches: list[list[int]]) -> Batch:
        """A batch, and the start of the next of its epoch."""
        ready, self._next = self._next, None
        if ready is not None and ready[0] == (epoch, index):
            batch = ready[1].result()
        else:
            batch = self._batch(epoch, index, batches[index % len(batches)])
        if index + 1 < len(batches):
            later = self._ahead.submit(self._batch, epoch, index + 1, batches[index + 1])
            self._next = ((epoch, index + 1), later)
        return batch.to(self.device)

    def _train_step(self) -> dict[str, float]:
        self.parts.model.train()
        if self.features is not None:
            self.parts.model.vision_model.eval()
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self._schedule()
        totals: dict[str, float] = {}
        accumulate = self.stage.accumulate
        epoch, first = divmod(self.step, self.steps_per_epoch)
        batches = self._epoch(epoch)
        for i in range(accumulate):
            index = first * accumulate + i
            batch = self._take_batch(epoch, index, batches)
            with self.processes.without_sync(self.wrapped, i < accumulate - 1):
                with self.autocast:
                    found = self.wrapped(batch, self.features is not None)
                losses = {name: self.processes.weigh(mean, count) for name, (mean, count) in found.items()}
                loss = sum((self.stage.losses[name] * value for name, value in losses.items()), torch.tensor(0.0))
                (loss / accumulate).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + self.processes.average(value) / accumulate
        for name, mean in totals.items():
            if not math.isfinite(mean):
                where = f"stage {self.stage.name}, step {self.step + 1}"
                raise ValueError(f"{where}: the {name} loss is {mean}: lower the learning rate")
        trained = [p for g in self.groups for p in g["params"]]
        self.processes.average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, **totals}

    def _schedule(self) -> float:
        if self.step < self.stage.warmup_steps:
            return (self.step + 1) / self.stage.warmup_steps
        if self.stage.schedule == "constant":
            return 1.0
        progress = min(1.0, (self.step - self.stage.warmup_steps) / max(1, self.total_steps - self.stage.warmup_steps))
        left = 1 - progress if self.stage.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return 0.1 + 0.9 * left

    def _validate(self) -> None:
        if self._next is not None:
            self._next[1].exception()  # waits: tokenizers serve one thread at a time
        row = self.validation.measure(self.losses)
        if self.stage.select_by == "cider":
            row["cider"] = self._cider()
        if not self.processes.is_main:
            return
        if self.stage.select_by:
            self._select(row)
        append_row(self.folder / "validation.csv", {"step": self.step, **row})
        self.console.print(
            f"{self.stage.name} step {self.step} validation " + " ".join(f"{k} {v:.3f}" for k, v in row.items()),
            highlight=False,
        )
        plot_losses(self.folder)

    def _log(self, losses: dict[str, float]) -> None:
        append_row(self.folder / "loss.csv", losses)

    def _save_checkpoint(self) -> None:
        state: dict[str, Any] = {
            "step": self.step,
            "trained": self._trained(),
            "heads": self.heads.state_dict(),
            "best": (self.best, self.best_step, self.worse),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        write_atomically(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            for log in ("loss.csv", "validation.csv"):
                (self.folder / log).unlink(missing_ok=True)
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.parts.model.load_state_dict(state["trained"], strict=False)
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.step = state["step"]
        self.best, self.best_step, self.worse = state.get("best", (None, 0, 0))
        for log in ("loss.csv", "validation.csv"):
            cut_rows(self.folder / log, self.step)
        self.console.print(f"stage {self.stage.name}: resumed at step {self.step}")

    def _finish(self) -> None:
        best = self.folder / "best.pt"
        if self.best is not None and best.is_file():
            state = torch.load(best, weights_only=True, map_location="cpu")
            self.parts.model.load_state_dict(state["trained"], strict=False)
            self.heads.load_state_dict(state["heads"])
        save_trained(self.parts.model, self.stage, self.folder)
        if self.stage.tell_findings:
            save_finding_head(self._finding_head(), self.folder)
        save_preprocessing(self.parts.preprocessing, self.parts.model.config.num_query_tokens, self.folder)
        torch.save(self.heads.state_dict(), self.folder / "heads.pt")
        plot_losses(self.folder)
        kept = f", the best of step {self.best_step} kept" if self.best is not None else ""
        (self.folder / "finished").write_text(f"{self.step} steps{kept}\n")
        for name in ("checkpoint.pt", "best.pt"):
            (self.folder / name).unlink(missing_ok=True)
