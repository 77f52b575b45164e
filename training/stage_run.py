"""The training loop of one stage: steps, logs, validation, checkpoints."""

import math
import random
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from cbedge.files import open_atomically
from cbedge.prompt import split_sections
from training.base import FindingHead, ModelAndTokenizers, save_finding_head
from training.config import RunConfig, Stage
from training.controls import own
from training.datasets import open_studies
from training.datasets.iu_xray import clean_reference
from training.drafting import TorchDrafter
from training.logs import append_row, cut_rows, plot_losses
from training.losses import AlignmentHeads, StageLosses, word_vocabulary
from training.ontology import TAGS
from training.parallel import Processes
from training.processor import save_preprocessing
from training.run_bundle import ReportResources
from training.scoring import cider
from training.stage_batches import StageBatches
from training.stages import load_trained, save_trained, start_cross_attention, trainable_groups
from training.validation import Validation, choose_thresholds

_SELECTED = {"cider": "cider", "tags": "auc_mean"}  # columns of validation.csv of which the largest is the best
VOCABULARY_STUDIES = 20_000  # enough to separate common words from rare ones


class StageRun:
    """The training loop of one stage, and its state on disk."""

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
        self.batches = StageBatches(config, stage, parts, processes, self.seed)
        self.val = open_studies(config.data, ("val",), config.validation_studies)
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        self.heads = self._build_heads(previous).to(self.device)
        self.groups = trainable_groups(parts.model, self.heads, stage)
        self.optimizer = torch.optim.AdamW(self.groups, weight_decay=stage.weight_decay, fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.steps_per_epoch = max(1, len(self.batches.epoch(0)) // stage.accumulate)
        self.total_steps = max(1, round(stage.epochs * self.steps_per_epoch))
        self.step = 0
        self.best: float | None = None
        self.best_step, self.worse = 0, 0
        if stage.gradient_checkpointing:
            parts.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            parts.model.gradient_checkpointing_disable()
        self.losses = StageLosses(parts, self.heads, stage)
        self.validation = Validation(parts, stage, self.val, self.device, autocast, consensus=self.batches.consensus)
        self.wrapped: nn.Module = self.losses
        if processes.rank:
            torch.manual_seed(self.seed + 7919 * processes.rank)  # dropout differs between processes

    def run(self, max_steps: int | None = None) -> None:
        """Train to the end of the stage; resume from its checkpoint if there is one."""
        self._resume()
        total = min(self.total_steps, max_steps or self.total_steps)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
        with Progress("{task.description}", *columns, console=self.console) as progress:
            if self.stage.cached_views:
                encoding = progress.add_task(f"stage {self.stage.name}: encoding images", total=None)
                advance = partial(_advance, progress, encoding)
                self.batches.cache(self.config.output / "cache", self.autocast, advance)
                progress.remove_task(encoding)
            features = self.batches.features
            if self.stage.start_cross_attention and features is not None and self.step == 0:
                sample = torch.from_numpy(features[0, : 16 * self.stage.batch_size].astype(np.float32))
                start_cross_attention(self.parts.model, sample, self.seed)
            self.wrapped = self.processes.wrap(self.losses)
            task = progress.add_task(f"stage {self.stage.name}", total=total, completed=self.step)
            seconds = []
            while self.step < total:
                start = perf_counter()
                losses = self._train_step()
                seconds.append(perf_counter() - start)
                if self.processes.is_main:
                    append_row(self.folder / "loss.csv", losses)
                loss_text = " ".join(f"{k} {v:.3f}" for k, v in losses.items() if k != "step")
                progress.update(task, completed=self.step, description=f"stage {self.stage.name} {loss_text}")
                if not progress.console.is_terminal and self.step % 10 == 0:
                    self.console.print(f"{self.stage.name} {self.step}/{total} {loss_text}", highlight=False)
                if self.step % (self.stage.validate_every or self.steps_per_epoch) == 0 or self.step == total:
                    self.processes.validating(self._validate)
                    self.worse = self.processes.agree(self.worse)
                if self.step % self.stage.save_every == 0:
                    self.processes.only_main(self._save_checkpoint)
                if 0 < self.stage.patience <= self.worse:
                    self.console.print(f"stage {self.stage.name}: stopped early, best at step {self.best_step}")
                    break
        self.batches.close()
        self._print_cost(seconds)
        self.processes.only_main(self._finish)
        if self.processes.rank:
            load_trained(self.parts.model, self.folder)

    def _print_cost(self, seconds: list[float]) -> None:
        """Print the median time of a step, and the peak memory of the GPU."""
        if seconds and self.processes.is_main:
            line = f"stage {self.stage.name}: {np.median(seconds):.2f} s per step"
            if self.device.type == "cuda":
                line += f", peak GPU memory {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB"
            self.console.print(line, highlight=False)

    def _select(self, row: dict[str, float]) -> None:
        """Save the weights if this validation is the best so far."""
        value = -row["language"] if self.stage.select_by == "language" else row[_SELECTED[self.stage.select_by]]
        if self.best is not None and value <= self.best:
            self.worse += 1
            return
        self.best, self.best_step, self.worse = value, self.step, 0
        state = {"trained": self._trained(), "heads": self.heads.state_dict()}
        with open_atomically(self.folder / "best.pt") as file:
            torch.save(state, file)

    def _trained(self) -> dict[str, Tensor]:
        return {n: p.detach().cpu() for n, p in self.parts.model.named_parameters() if p.requires_grad}

    def _cider(self) -> float:
        """CIDEr of drafts of the validation studies with findings, written without templates."""
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
        # The number of guesses depends on timing, and sharded processes must run the same number of passes.
        return replace(found, phrasebook=None) if self.processes.sharded else found

    def _finding_head(self) -> FindingHead:
        """The current finding head, with thresholds chosen on validation studies."""
        views, tags = self.validation.tag_logits(self.heads)
        return self.heads.finding_head(choose_thresholds(views, tags, self.stage.tell_findings, self.stage.openings))

    def _build_heads(self, previous: Path | None) -> AlignmentHeads:
        encode = self.parts.tokenizer
        train = open_studies(self.config.data, ("train",), VOCABULARY_STUDIES)
        ids, share = word_vocabulary([encode(s.target, add_special_tokens=False).input_ids for s in train])
        heads = AlignmentHeads(self.parts.model.config.qformer_config.hidden_size, len(TAGS), ids, share)
        if previous and (previous / "heads.pt").is_file():
            heads.load_state_dict(torch.load(previous / "heads.pt", weights_only=True))
        elif self.parts.finding_head is not None:  # the base is a trained checkpoint
            heads.start_from(self.parts.finding_head)
        return heads

    def _train_step(self) -> dict[str, float]:
        self.parts.model.train()
        encoded = self.batches.features is not None
        if encoded:
            self.parts.model.vision_model.eval()
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self._schedule()
        totals: dict[str, float] = {}
        accumulate = self.stage.accumulate
        epoch, first = divmod(self.step, self.steps_per_epoch)
        for i in range(accumulate):
            batch = self.batches.take(epoch, first * accumulate + i)
            with self.processes.without_sync(self.wrapped, i < accumulate - 1):
                with self.autocast:
                    found = self.wrapped(batch, encoded)
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
        self.batches.wait()
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
        with open_atomically(self.folder / "checkpoint.pt") as file:
            torch.save(state, file)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        for left in self.folder.glob(".*.partial"):  # by a run that was killed while it saved
            left.unlink(missing_ok=True)
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
        kept = f", best of step {self.best_step} kept" if self.best is not None else ""
        (self.folder / "finished").write_text(f"{self.step} steps{kept}\n")
        for name in ("checkpoint.pt", "best.pt"):
            (self.folder / name).unlink(missing_ok=True)


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, total=total, advance=done)
