"""Fit the gate (:mod:`cbedge.images.gate`) and the measure of familiarity (:mod:`cbedge.images.familiarity`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cbedge.backends import Backend
from cbedge.images.familiarity import VIEWS, Familiarity
from cbedge.images.gate import CLASSES, FRONTAL, MIRRORED, Gate, halves, pooled, readable_odds
from cbedge.images.preprocess import Preprocessing, preprocess
from export.film_samples import FEWEST, Films, Sample, film_samples, other_samples, validation_samples

DIRECTIONS = 48
HIDDEN = 64
STEPS, LEARNING_RATE, WEIGHT_DECAY, DROPOUT, SMOOTHING = 300, 2e-3, 1e-2, 0.3, 0.02
REFUSED = 0.01  # share of validation films of a collection and view that the gate may refuse
FALSE_MIRRORED = 0.05  # share of validation films of a collection that may count as mirrored


@dataclass(frozen=True)
class Fitted:
    """What is fitted on images."""

    gate: Gate
    familiarity: Familiarity


@dataclass(frozen=True)
class _Rows:
    """Features of images: ``halves`` float32 [N, 3H], ``pooled`` float32 [N, 2H], and what they are of."""

    halves: np.ndarray
    pooled: np.ndarray
    labels: np.ndarray
    collections: np.ndarray
    is_film: np.ndarray

    def films(self, view: str) -> np.ndarray:
        """Which rows are unaltered films of a view."""
        return self.is_film & (self.labels == CLASSES.index(view))


def fit_gate(
    backend: Backend,
    settings: Preprocessing,
    collections: Sequence[Films],
    others: Path | None = None,
    cache: Path | None = None,
) -> Fitted | None:
    """Fit both on a variant's features; ``None`` if there are too few frontal films.

    Args:
        backend: its vision encoder computes the features.
        settings: the model's preprocessing.
        collections: films, from :func:`export.film_samples.collect_films`.
        others: folder of images that are not chest radiographs; ``None`` for drawn ones only.
        cache: folder for the features of each image, so that a second fit need not compute them.
    """
    frontal = sum(len(films.fit["frontal"]) for films in collections)
    if frontal < FEWEST or not any(films.validation["frontal"] for films in collections):
        return None
    encoder, size = _Encoder(backend, settings, cache), settings.image_size
    fit = encoder.rows(chain(film_samples(collections, size), other_samples(others, size)))
    validation = encoder.rows(validation_samples(collections, size))
    gate = Gate(_fit_network(fit), 0.0, 0.0)
    _set_limits(gate, validation)
    return Fitted(gate, _fit_familiarity(fit, validation))


class _Encoder:
    """Computes the features of images, or reads them from a cache."""

    def __init__(self, backend: Backend, settings: Preprocessing, cache: Path | None):
        self.backend, self.settings, self.cache = backend, settings, cache
        probe = np.linspace(0, 255, settings.image_size**2).astype(np.uint8).reshape(settings.image_size, -1)
        self.identity = hashlib.sha256(self._encode(probe).tobytes()).digest()
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)

    def rows(self, samples: Iterable[Sample]) -> _Rows:
        found = [(self._cached(s.pixels), CLASSES.index(s.label), s.collection, s.is_film) for s in samples]
        features, labels, collections, is_film = (np.array(column) for column in zip(*found, strict=True))
        width = features.shape[1] // 5
        return _Rows(features[:, : 3 * width], features[:, 3 * width :], labels, collections, is_film)

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [S, S] → halves and pooled features, float32 [5H]."""
        features = self.backend.encode_image(preprocess(pixels, self.settings))
        return np.concatenate([halves(features)[0], pooled(features)[0]])

    def _cached(self, pixels: np.ndarray) -> np.ndarray:
        if self.cache is None:
            return self._encode(pixels)
        path = self.cache / f"{hashlib.sha256(self.identity + pixels.tobytes()).hexdigest()[:32]}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except FileNotFoundError:
            row = self._encode(pixels)
            np.save(path, row, allow_pickle=False)
            return row


def _fit_network(rows: _Rows) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train a network with one hidden layer; its layers, for features without scaling.

    Every class has the same weight, "frontal" and "other" twice as much, and each collection within a class the square
    root of its share. Classes without images get no probability.
    """
    mean, deviation = rows.halves.mean(0), rows.halves.std(0) + 1e-6
    inputs, labels = torch.from_numpy((rows.halves - mean) / deviation), torch.from_numpy(rows.labels)
    weights = torch.from_numpy(_weights(rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(inputs.shape[1], HIDDEN), nn.Linear(HIDDEN, len(CLASSES))
        network = nn.Sequential(nn.Dropout(0.7 * DROPOUT), first, nn.ReLU(), nn.Dropout(DROPOUT), last)
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        entropy = nn.CrossEntropyLoss(reduction="none", label_smoothing=SMOOTHING)
        for _ in range(STEPS):
            loss = (entropy(network(inputs), labels) * weights).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    inner = _array(first.weight).T / deviation[:, None]
    return [(inner, _array(first.bias) - mean @ inner), (_array(last.weight).T, _array(last.bias))]


def _weights(rows: _Rows) -> np.ndarray:
    """Weight of each image, float32 [N]; they add up to 1."""
    weights = np.zeros(len(rows.labels), np.float32)
    for label in np.unique(rows.labels):
        of_class = rows.labels == label
        _, place, counts = np.unique(rows.collections[of_class], return_inverse=True, return_counts=True)
        shares = counts[place] ** -0.5
        weights[of_class] = shares / shares.sum() * (2 if CLASSES[label] in ("frontal", "other") else 1)
    return weights / weights.sum()


def _array(values: Tensor) -> np.ndarray:
    return values.detach().numpy()


def _set_limits(gate: Gate, rows: _Rows) -> None:
    """Choose the limits on validation films: the gate may refuse :data:`REFUSED` of the films of each collection and
    view, and is not lenient beyond even odds without need; :data:`FALSE_MIRRORED` may count as mirrored."""
    logits = gate.logits_of(rows.halves)
    odds, mirrored = readable_odds(logits), logits[:, MIRRORED] - logits[:, FRONTAL]
    for view in VIEWS:
        for collection in np.unique(rows.collections):
            chosen = rows.films(view) & (rows.collections == collection)
            if not chosen.any():
                continue
            gate.limit = min(gate.limit, float(np.quantile(odds[chosen], REFUSED)))
            if view == "frontal":
                least = float(np.quantile(mirrored[chosen], 1 - FALSE_MIRRORED))
                gate.mirrored_limit = max(gate.mirrored_limit, least)


def _fit_familiarity(fit: _Rows, validation: _Rows) -> Familiarity:
    both = [(fit.pooled[fit.films(view)], validation.pooled[validation.films(view)]) for view in VIEWS]
    both = [(rows, held_out) for rows, held_out in both if len(rows) >= FEWEST and len(held_out)]
    count = min(DIRECTIONS, *(len(rows) // 4 for rows, _ in both))
    return Familiarity(np.stack([distribution(rows, held_out, count) for rows, held_out in both]))


def distribution(rows: np.ndarray, held_out: np.ndarray, count: int) -> np.ndarray:
    """One view's values of a :class:`~cbedge.images.familiarity.Familiarity`, float32 [2 + count, 2H], from pooled
    features of films for fitting and for validation, float32 [N, 2H]."""
    mean = rows.mean(0)
    _, singular, directions = np.linalg.svd(rows - mean, full_matrices=False)
    variances = singular**2 / (len(rows) - 1)
    head = np.zeros((2, rows.shape[1]))
    head[0], head[1, 0] = mean, variances[count:].sum()  # mean squared length outside the directions
    values = np.vstack([head, directions[:count] / np.sqrt(variances[:count, None])]).astype(np.float32)
    typical, far = np.quantile(Familiarity(values[None]).distances(held_out, 0), (0.5, 0.99))
    values[1, 1:3] = typical, max(far, 1.01 * typical)
    return values
