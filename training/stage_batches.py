"""The batches of a stage: a function of seed, epoch and position, so that a resumed run continues with the same."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from training.base import ModelAndTokenizers
from training.batches import (
    Batch,
    StudyTags,
    cache_features,
    collate,
    drop_priors,
    epoch_order,
    lengths_and_flags,
    load_pixels,
    prompted_findings,
    retarget,
)
from training.config import RunConfig, Stage
from training.consensus import ConsensusReports
from training.datasets import open_studies
from training.openings import Opener
from training.parallel import Processes


class StageBatches:
    """The batches of a stage. The next one is read while the model trains on the current one.

    Attributes:
        studies: the training studies.
        consensus: the reports to learn instead of the studies' own, or ``None``.
        features: cached vision features, float16 [views, images, P, H]; ``None`` if images are read.
    """

    def __init__(self, config: RunConfig, stage: Stage, parts: ModelAndTokenizers, processes: Processes, seed: int):
        self.stage, self.parts, self.processes, self.seed = stage, parts, processes, seed
        self.studies = processes.main_first(lambda: open_studies(config.data, stage.splits))
        self.consensus = None
        if stage.learn == "consensus":
            self.consensus = ConsensusReports(self.studies, stage.tell_findings, stage.openings, seed)
        self.features: np.ndarray | None = None
        self._lengths, self._abnormal = lengths_and_flags(self.studies)
        self._order: tuple[int, list[list[int]]] = (-1, [])
        self._study_tags = StudyTags(stage.tell_from)
        self._opener = Opener(stage.openings, stage.open_share)
        self._lateral_rows: dict[int, int] = {}  # study → row of the cache
        self._readers = ThreadPoolExecutor()  # reads the images of a batch in parallel
        self._ahead = ThreadPoolExecutor(1)  # prepares the next batch
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def epoch(self, epoch: int) -> list[list[int]]:
        """The study indices of each batch."""
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            stage = self.stage
            order = epoch_order(self._lengths, self._abnormal, stage.batch_size, stage.abnormal_weight, rng)
            self._order = (epoch, order)
        return self._order[1]

    def cache(self, folder: Path, autocast: torch.autocast, advance: Callable[[int, int], None]) -> None:
        """Encode all radiographs once, into a file in ``folder``."""
        images = [(s.study_id, s.image) for s in self.studies]
        if self.stage.lateral:
            paired = [(i, s.study_id, s.lateral) for i, s in enumerate(self.studies) if s.lateral is not None]
            self._lateral_rows = {i: len(images) + row for row, (i, _, _) in enumerate(paired)}
            images += [(f"{study_id} lateral", file) for _, study_id, file in paired]
        vision, settings, views = self.parts.model.vision_model, self.parts.preprocessing, self.stage.cached_views
        arguments = (folder, self.seed, self.processes.device, autocast, advance)
        self.features = self.processes.main_first(lambda: cache_features(vision, images, settings, views, *arguments))

    def take(self, epoch: int, index: int) -> Batch:
        """A batch on the model's device; the next one of the epoch is prepared in a thread."""
        batches = self.epoch(epoch)
        ready, self._next = self._next, None
        if ready is not None and ready[0] == (epoch, index):
            batch = ready[1].result()
        else:
            batch = self._batch(epoch, index, batches[index % len(batches)])
        if index + 1 < len(batches):
            later = self._ahead.submit(self._batch, epoch, index + 1, batches[index + 1])
            self._next = ((epoch, index + 1), later)
        return batch.to(self.processes.device)

    def wait(self) -> None:
        """Wait for the batch in preparation, because a tokenizer serves one thread at a time."""
        if self._next is not None:
            self._next[1].exception()

    def close(self) -> None:
        """End the threads."""
        for pool in (self._ahead, self._readers):
            pool.shutdown(cancel_futures=True)

    def _batch(self, epoch: int, index: int, rows: list[int]) -> Batch:
        """This process's share of a batch."""
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
            # The two views of a study share a random generator, so the frontal ones are read first.
            frontals = [(s.image, rng) for s, rng in zip(studies, draws, strict=True)]
            views = self._read(frontals) + self._read([(studies[i].lateral, draws[i]) for i in laterals])
            images = torch.from_numpy(np.stack(views))
        seen: list[tuple[str, ...] | None] = [None] * len(studies)
        if self.stage.tell_findings:
            names, share, noise = self.stage.tell_findings, self.stage.tell_share, self._study_tags.noise
            tagged = zip(self._study_tags(studies), draws, strict=True)
            seen = [prompted_findings(tags, names, share, rng, noise) for tags, rng in tagged]
        openings: list[str] = []
        if self.stage.open_share:
            opened = zip(studies, seen, self._study_tags(studies), draws, strict=True)
            openings, studies = retarget(studies, [self._opener(*row) for row in opened])
        elif self.consensus is not None:
            rows_of = zip(studies, contexts, seen, strict=True)
            openings, studies = retarget(studies, [self.consensus(*row) for row in rows_of])
        return collate(self.parts, studies, contexts, images, seen, laterals, openings)

    def _read(self, files: Sequence[tuple[Path | None, np.random.Generator]]) -> list[np.ndarray]:
        there = [(file, rng) for file, rng in files if file is not None]
        settings = self.parts.preprocessing
        return [*self._readers.map(lambda one: load_pixels(one[0], settings, one[1]), there)]
