"""Sample the films of each step, with fixed shares of collections and views."""

from __future__ import annotations

import numpy as np

from training.encoder.config import EncoderConfig
from training.encoder.films import COLLECTIONS, SPLITS, VIEWS, Films


class Sampler:
    """Samples balanced batches, which depend only on the seed and the step.

    Args:
        films: all films.
        config: shares, batch size, seed.

    Raises:
        ValueError: a share has no training film.
    """

    def __init__(self, films: Films, config: EncoderConfig):
        self.seed = config.seed
        self.groups: list[np.ndarray] = []
        self.counts: list[int] = []
        shares = {name: share for name, share in config.shares.items() if share > 0}
        for name in shares:
            collection, _, view = name.partition("/")
            if collection not in COLLECTIONS or view not in VIEWS:
                raise ValueError(f"unknown share {name!r}: give collection/view, such as iu_xray/frontal")
            rows = films.rows(collection, "train", view)
            if not len(rows):
                raise ValueError(f"no training film for the share {name}: give its folder, or remove the share")
            positives = films.labels[rows] == 1
            rare = positives[:, positives.sum(0) <= config.rare].any(1)
            self.groups.append(np.concatenate([rows, rows[rare]]))
        exact = np.array(list(shares.values())) / sum(shares.values()) * config.batch_size
        ends = np.rint(np.cumsum(exact)).astype(int)
        self.counts = np.diff(np.concatenate([[0], ends])).tolist()
        self.films = int((films.split == SPLITS.index("train")).sum())
        self.steps_per_epoch = max(1, self.films // config.batch_size)

    def batch(self, step: int) -> np.ndarray:
        """The films of a step, int64 [batch]."""
        drawn = []
        for number, (rows, count) in enumerate(zip(self.groups, self.counts, strict=True)):
            places = np.arange(step * count, (step + 1) * count)
            rounds = {
                r: np.random.default_rng([self.seed, number, int(r)]).permutation(len(rows))
                for r in np.unique(places // len(rows))
            }
            drawn.append([rows[rounds[place // len(rows)][place % len(rows)]] for place in places])
        return np.concatenate(drawn).astype(np.int64)
