"""Train the classifiers of lateral and mirrored radiographs (:mod:`cbedge.images.film_view`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cbedge.backends import Backend
from cbedge.errors import RadiographError
from cbedge.images.film_view import FilmView, halves
from cbedge.images.preprocess import Preprocessing, preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from training.datasets.iu_xray import read_studies

MAX_TRAIN = 1000  # films of each kind and collection
FEWEST = 40
# Inverse of the L2 penalty, and the logit from which a frontal film counts as mirrored. With them, none of 294
# validation films of IU X-RAY counts as mirrored, and 96% of the same films do when flipped.
STRENGTH = 0.01
MIRRORED_LIMIT = 1.0


@dataclass(frozen=True)
class Films:
    """Paths of frontal and lateral films."""

    frontal: tuple[Path, ...]
    lateral: tuple[Path, ...] = ()


def collect_films(data: Path, more: Sequence[Path] = ()) -> list[Films]:
    """The training films of IU X-RAY, and of further folders with a ``films.jsonl`` of frontal films.

    Of a ``films.jsonl`` with splits, only ``train`` is used.

    Raises:
        ValueError: a folder has no readable ``films.jsonl``.
    """
    studies = read_studies(data, ("train",))
    found = [Films(tuple(s.image for s in studies), tuple(s.lateral for s in studies if s.lateral is not None))]
    for folder in more:
        try:
            rows = [json.loads(line) for line in (folder / "films.jsonl").read_text(encoding="utf-8").splitlines()]
            names = [row["file"] for row in rows if row.get("split", "train") == "train"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} has no readable films.jsonl ({type(error).__name__})") from None
        paths = (folder / name for name in names)
        found.append(Films(tuple(path if path.exists() else folder / "images" / path.name for path in paths)))
    return found


def fit_film_view(backend: Backend, settings: Preprocessing, collections: Sequence[Films]) -> FilmView | None:
    """Train both classifiers; ``None`` if there are too few films.

    Args:
        backend: its vision encoder computes the features.
        collections: from :func:`collect_films`. Films of small collections count up to three times.
    """
    upright, flipped, lateral = [], [], []
    for films in collections:
        chosen = _some(films.frontal)
        times = int(np.clip(MAX_TRAIN // (2 * max(1, len(chosen))), 1, 3))
        upright += [_features(backend, settings, chosen)] * times
        flipped += [_features(backend, settings, chosen, mirror=True)] * times
        lateral += [_features(backend, settings, _some(films.lateral), mirror=m) for m in (False, True)]
    groups = [
        np.concatenate([rows for rows in group if len(rows)] or [np.empty((0, 0), np.float32)])
        for group in (upright, flipped, lateral)
    ]
    if min(map(len, groups)) < FEWEST:
        return None
    frontal = np.concatenate(groups[:2])
    rows = [_fit(groups[2], frontal), _fit(groups[1], groups[0])]
    weights, bias = (np.stack([row[i] for row in rows]).astype(np.float32) for i in (0, 1))
    return FilmView(weights, bias, np.array([0.0, MIRRORED_LIMIT], np.float32))


def _some(paths: Sequence[Path]) -> list[Path]:
    order = np.random.default_rng(0).permutation(len(paths))[:MAX_TRAIN]
    return [paths[i] for i in order]


def _features(backend: Backend, settings: Preprocessing, paths: Sequence[Path], mirror: bool = False) -> np.ndarray:
    rows = []
    for path in paths:
        try:
            film = load_radiograph(path)
        except RadiographError:  # large collections have damaged files
            continue
        if mirror:
            stored = None if film.stored is None else np.ascontiguousarray(film.stored[:, ::-1])
            film = replace(film, pixels=np.ascontiguousarray(film.pixels[:, ::-1]), stored=stored)
        rows.append(halves(backend.encode_image(preprocess_radiograph(film, settings))))
    return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)


def _fit(yes: np.ndarray, no: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [D] and bias of a logistic regression on standardized features, for features without scaling."""
    rows, labels = np.concatenate([yes, no]), np.r_[np.ones(len(yes)), np.zeros(len(no))]
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(C=STRENGTH, max_iter=2000).fit(scaler.transform(rows), labels)
    weights = model.coef_[0] / scaler.scale_
    return weights, float(model.intercept_[0] - weights @ scaler.mean_)
