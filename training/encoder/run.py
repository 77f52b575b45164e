"""Train the encoder: balanced batches, regular validation, and a saved state to resume from."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cbedge.files import lock_file, sync_folder
from training.encoder.areas import areas
from training.encoder.augment import Augmenter
from training.encoder.config import EncoderConfig
from training.encoder.films import COLLECTIONS, SPLITS, VIEWS, Films
from training.encoder.model import EncoderWithHead, build_model, parameter_groups, save_weights
from training.encoder.sampling import Sampler

# Validation groups, and those whose mean AUC selects the best weights.
VALIDATED = {"iu_val": ("iu_xray", "frontal"), "iu_val_lateral": ("iu_xray", "lateral"), "nih_val": ("nih", "frontal")}
CHOSEN_BY = ("iu_val", "nih_val")
_FIT_AT = 120  # steps after which the length of the schedule is fitted
_FREE = ("epochs", "validate_every", "save_minutes")  # a resumed run may change them


class EncoderRun:
    """One run in a folder: ``state.pt`` (to resume), ``best.safetensors``, ``log.jsonl``, ``config.json``.

    Args:
        config: settings.
        films: decoded films.
        start: initial weights; if they have no head, it is fitted to the encoder's features first.
        folder: folder of the run.
        device: device for training.
        bf16: whether matrices are multiplied in bfloat16.
        report: called with one line of text.

    Raises:
        ValueError: the folder has a run of other settings.
        cbedge.errors.OutputError: another process trains in the folder.
    """

    def __init__(
        self,
        config: EncoderConfig,
        films: Films,
        start: dict[str, Tensor],
        folder: Path,
        device: torch.device | None = None,
        bf16: bool = False,
        report: Callable[[str], None] = print,
    ):
        self.config, self.films, self.folder, self.report = config, films, folder, report
        self.device = device or torch.device("cpu")
        self.bf16 = bf16
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(folder / ".lock", f"another process trains in {folder.name}: wait for it, or stop it")
        self._check_config()
        torch.manual_seed(config.seed)
        self.model = build_model(start, config.image_size).to(self.device)
        self.model.patches = config.patches
        self._has_head = start.get("head.weight", torch.empty(0)).shape == self.model.head.weight.shape
        groups = parameter_groups(
            self.model, config.learning_rate, config.head_learning_rate, config.layer_decay, config.weight_decay
        )
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.sampler = Sampler(films, config)
        on_gpu = self.device.type == "cuda"  # all films fit into a GPU's memory
        self.pixels = torch.from_numpy(np.array(films.pixels)).to(self.device) if on_gpu else None
        self.augmenter = Augmenter(config.image_size, config.augment)
        self.total = max(1, round(config.epochs * self.sampler.steps_per_epoch))
        self.step, self.best = 0, -1.0
        self.losses: list[Any] = [0.0, 0]  # sum and count of the steps since the last validation
        self.averaged = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._stopped: list[int] = []
        self._resumed = self._load()

    @property
    def finished(self) -> bool:
        """Whether the schedule has ended."""
        return self.step >= self.total

    def train(
        self,
        deadline: float = math.inf,
        max_steps: int | None = None,
        fit: bool = False,
    ) -> None:
        """Train until the end of the schedule, the deadline, ``SIGTERM`` or ``max_steps`` more steps; save the state.

        Args:
            deadline: as :func:`time.time` counts.
            max_steps: maximum number of steps of this call.
            fit: set the length of the schedule once, from the speed of the first steps, to end at the deadline.
        """
        if not self._resumed:
            self._validate(0.0, None if self._has_head else self._fit_head())
            self._save()
        old = signal.signal(signal.SIGTERM, lambda number, frame: self._stopped.append(number))
        try:
            saved, seconds = time.time(), []
            last = self.total if max_steps is None else self.step + max_steps
            interval = self.config.validate_every or self.sampler.steps_per_epoch
            while not self.finished and self.step < last and not self._stopped:
                start = time.time()
                if start >= deadline:
                    self.report("time limit reached")
                    break
                self._train_step()
                seconds.append(time.time() - start)
                if fit and self.step == _FIT_AT and len(seconds) >= _FIT_AT:
                    left = max(0.0, deadline - time.time())
                    self.total = self.step + max(1, int(0.85 * left / float(np.mean(seconds[_FIT_AT // 4 :]))))
                    self.report(f"{self.total} steps fit into the time limit")
                if self.step % interval == 0 or self.finished:
                    self._validate(float(np.mean(seconds[-interval:])))
                if time.time() - saved > 60 * self.config.save_minutes:
                    self._save()
                    saved = time.time()
            self._save()
        finally:
            signal.signal(signal.SIGTERM, old)

    def _train_step(self) -> None:
        scale = self._schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        rows = self.sampler.batch(self.step)
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + self.step)
        images = self.augmenter(self._images(rows), generator)
        labels = torch.from_numpy(self.films.labels[rows].astype(np.float32)).to(self.device)
        smoothing = [self.config.smoothing.get(COLLECTIONS[c], 0.0) for c in self.films.collection[rows]]
        amount = torch.tensor(smoothing, device=self.device).unsqueeze(1)
        self.model.train()
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # which patches are read
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(images, self._view(rows))
        known = labels >= 0
        target = labels.clamp_min(0) * (1 - amount) + amount / 2
        loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = (loss * known).sum() / known.sum().clamp_min(1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            state = self.model.state_dict()
            old, new = zip(*((self.averaged[name], value) for name, value in state.items()), strict=True)
            torch._foreach_lerp_(list(old), list(new), 1 - decay)
        self.losses = [self.losses[0] + loss.detach(), self.losses[1] + 1]

    def _schedule(self, step: int) -> float:
        if step < self.config.warmup_steps:
            return (step + 1) / self.config.warmup_steps
        done = (step - self.config.warmup_steps) / max(1, self.total - self.config.warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _images(self, rows: np.ndarray) -> Tensor:
        if self.pixels is not None:
            pixels = self.pixels[torch.from_numpy(rows).to(self.device)]
        else:
            pixels = torch.from_numpy(np.ascontiguousarray(self.films.pixels[rows]))
        return pixels.unsqueeze(1).float() / 255

    def _view(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.films.view[rows].astype(np.int64)).to(self.device)

    @torch.inference_mode()
    def _features(self, model: EncoderWithHead, rows: np.ndarray) -> Tensor:
        """Features of films without augmentation, float32 [rows, 2H]."""
        model.eval()
        found, size, count = [], self.config.image_size, 32 if self.device.type == "cpu" else 256
        for begin in range(0, len(rows), count):
            images = self._images(rows[begin : begin + count])
            if images.shape[-1] != size:
                images = functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                found.append(model.features(images))
        return torch.cat(found)

    def _fit_head(self) -> dict[str, Any]:
        """Fit the head to the initial encoder's features, so that the first steps do not damage the encoder.

        Returns:
            The result of :meth:`_areas` for the weight decay with the highest mean AUC.
        """
        start = time.time()
        rows = np.flatnonzero(self.films.split == SPLITS.index("train"))
        features, view = self._features(self.model, rows).clone(), self._view(rows)
        self.report(f"features of {len(rows)} films in {time.time() - start:.0f} s")
        labels = torch.from_numpy(self.films.labels[rows].astype(np.float32)).to(self.device)
        weight = torch.zeros(len(rows), device=self.device)
        shares = {name: share for name, share in self.config.shares.items() if share > 0}
        for name, share in shares.items():
            collection, _, kind = name.partition("/")
            chosen = torch.from_numpy(np.isin(rows, self.films.rows(collection, "train", kind))).to(self.device)
            weight[chosen] = share / chosen.sum()
        mean, std = features.mean(0), features.std(0) + 1e-3
        features = (features - mean) / std
        found = []
        groups = [self.films.rows(collection, "val", kind) for collection, kind in VALIDATED.values()]
        seen = [self._features(self.model, group).clone() if len(group) else None for group in groups]
        for decay in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
            head = torch.nn.Linear(features.shape[1], self.model.head.out_features).to(self.device)
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.zeros_(head.bias)
            optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")
            place = torch.arange(len(rows), device=self.device)

            def closure(head=head, optimizer=optimizer, decay=decay, place=place) -> Tensor:
                optimizer.zero_grad()
                logits = head(features).view(len(rows), len(VIEWS), -1)[place, view]
                loss = functional.binary_cross_entropy_with_logits(logits, labels.clamp_min(0), reduction="none")
                total = (loss * (labels >= 0) * weight.unsqueeze(1)).sum() + decay * head.weight.square().sum()
                total.backward()
                return total

            optimizer.step(closure)
            with torch.no_grad():
                self.model.head.weight.copy_(head.weight / std)
                self.model.head.bias.copy_(head.bias - (head.weight / std) @ mean)
            result = self._areas(self.model, seen)
            found.append((result, decay, self.model.head.weight.clone(), self.model.head.bias.clone()))
            self.report(f"head only, weight decay {decay}: mean AUC {result['mean']:.4f}")
        result, decay, best_weight, best_bias = max(found, key=lambda row: row[0]["mean"])
        with torch.no_grad():
            self.model.head.weight.copy_(best_weight)
            self.model.head.bias.copy_(best_bias)
        for name, value in self.model.state_dict().items():
            self.averaged[name].copy_(value)
        self.report(f"head fitted to {len(rows)} films in {time.time() - start:.0f} s, weight decay {decay}")
        return result

    def _areas(
        self, model: EncoderWithHead, seen: Sequence[Tensor | None] = (None,) * len(VALIDATED)
    ) -> dict[str, Any]:
        """AUC of each finding on each validation group, and their means; ``seen`` are the groups' features."""
        result: dict[str, Any] = {}
        for (name, (collection, view)), known in zip(VALIDATED.items(), seen, strict=True):
            rows = self.films.rows(collection, "val", view)
            if len(rows):
                with torch.no_grad():
                    features = self._features(model, rows) if known is None else known
                    logits = model.logits(features, self._view(rows)).float().cpu().numpy()
                result[name] = areas(logits, self.films.labels[rows])
        chosen = [result[name]["mean"] for name in CHOSEN_BY if name in result and "mean" in result[name]]
        result["mean"] = float(np.mean(chosen)) if chosen else 0.0
        return result

    def _validate(self, seconds_per_step: float, result: dict[str, Any] | None = None) -> None:
        if result is None:
            model = build_model({name: value.cpu() for name, value in self.averaged.items()}, self.config.image_size)
            result = self._areas(model.to(self.device))
        loss = float(self.losses[0]) / self.losses[1] if self.losses[1] else None
        epoch = self.step / self.sampler.steps_per_epoch
        better = result["mean"] > self.best
        row = {
            "epoch": round(epoch, 3),
            "step": self.step,
            "total_steps": self.total,
            "loss": loss,
            "seconds_per_step": round(seconds_per_step, 3),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "best": better,
            **result,
        }
        if better:
            self.best = result["mean"]
            notes = {"epoch": row["epoch"], "step": self.step, "validation": result, "config": asdict(self.config)}
            save_weights(self.averaged, self.folder / "best.safetensors", notes)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        self.losses = [0.0, 0]
        parts = [
            f"{n} {result[n].get('mean', 0):.4f} (8: {result[n].get('compared', 0):.4f})"
            for n in VALIDATED
            if n in result
        ]
        parts = [*([] if loss is None else [f"loss {loss:.4f}"]), *parts]
        self.report(f"epoch {epoch:.2f}, step {self.step}/{self.total}: {', '.join(parts)}{' *' if better else ''}")

    def _check_config(self) -> None:
        path = self.folder / "config.json"
        values = json.loads(json.dumps(asdict(self.config)))
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(key for key in values if key not in _FREE and old.get(key) != values[key])
            if changed:
                raise ValueError(
                    f"{self.folder.name} has a run with another {changed[0]}: give another folder, or its settings"
                )
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def _save(self) -> None:
        state = {
            "step": self.step,
            "total": self.total,
            "epochs": self.config.epochs,
            "best": self.best,
            "losses": [float(value) for value in self.losses],
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.folder / "state.pt.partial"
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / "state.pt")
        sync_folder(self.folder)

    def _load(self) -> bool:
        path = self.folder / "state.pt"
        if not path.is_file():
            (self.folder / "log.jsonl").unlink(missing_ok=True)
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averaged = state["averaged"]
        self.step, self.best, self.losses = state["step"], state["best"], state["losses"]
        if state["epochs"] == self.config.epochs:  # otherwise the schedule gets another length
            self.total = state["total"]
        self._cut_log()
        self.report(f"resumed at step {self.step} of {self.total}")
        return True

    def _cut_log(self) -> None:
        """Remove log lines after the saved step; they are written again."""
        path = self.folder / "log.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.strip() and json.loads(line)["step"] <= self.step]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
