"""Image features and Q-Former scores of labelled films, from which the readers of findings are fitted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cbedge.api import ReportGenerator
from cbedge.drafting.query import query_films
from cbedge.errors import RadiographError
from cbedge.files import write_atomically
from cbedge.images.gate import pooled
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from cbedge.prompt import ClinicalContext
from training.encoder.films import VALIDATION_SHARE, Film, patient_share
from training.encoder.labels import FINDINGS, iu_labels, nih_labels

IU_XRAY, NIH = "iu_xray", "nih"
_SPLITS = {"train": "train", "extra": "train", "val": "val"}
_KEYS = ("pooled", "logits", "collection", "split", "group", "view", "position", "name", "labels")
_COARSE_KEYS = ("coarse", "differences")
COARSE_EVERY = 20  # films, of which one is also read by a variant with coarser arithmetic


@dataclass(frozen=True)
class LabelledFilm(Film):
    """A :class:`~training.encoder.films.Film` with its study (IU X-RAY) or patient (NIH).

    Attributes:
        group: films of one group are never in two folds.
        position: ``AP`` or ``PA``; empty if the collection does not say.
    """

    group: str
    position: str = ""


@dataclass(frozen=True)
class FilmFeatures:
    """Features of films; row i of each array is film i.

    Attributes:
        pooled: class token and mean patch, float16 [N, 2H].
        logits: the Q-Former's finding logits, float32 [N, Q].
        collection, split, group, view, position, name: text [N].
        labels: int8 [N, FINDINGS], 1, 0 or -1 (unknown).
        coarse: indices of the films that a variant with coarser arithmetic has read as well, int [M].
        differences: its pooled features and logits less those above, float32 [M, 2H + Q].
    """

    pooled: np.ndarray
    logits: np.ndarray
    collection: np.ndarray
    split: np.ndarray
    group: np.ndarray
    view: np.ndarray
    position: np.ndarray
    name: np.ndarray
    labels: np.ndarray
    coarse: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    differences: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def __len__(self) -> int:
        return len(self.name)

    def where(self, collection: str, view: str, split: str | None = None) -> np.ndarray:
        """Indices of the films of a collection and view, of one split or of all."""
        chosen = (self.collection == collection) & (self.view == view)
        return np.flatnonzero(chosen if split is None else chosen & (self.split == split))

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            findings=np.array(FINDINGS),
            **{key: getattr(self, key) for key in _KEYS + _COARSE_KEYS},
        )
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> FilmFeatures:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is of another ontology.
        """
        with np.load(path, allow_pickle=False) as values:
            if tuple(values["findings"]) != FINDINGS or not {*_KEYS, *_COARSE_KEYS} <= {*values}:
                raise ValueError(f"{path.name} was written for another training/ontology.yaml or version: delete it")
            return cls(*(values[key] for key in _KEYS + _COARSE_KEYS))


def list_films(iu_xray: Path, nih: Path | None) -> list[LabelledFilm]:
    """The training and validation films of IU X-RAY, and those of the NIH's ``train``; never those of ``test``."""
    films = []
    for study in _lines(iu_xray / "studies.jsonl"):
        if split := _SPLITS.get(study["split"]):
            labels = iu_labels(study["problems"] + study["mesh_major"] + study["mesh_automatic"])
            for image in study["images"]:
                path = iu_xray / "images" / image["file"]
                films.append(LabelledFilm(IU_XRAY, split, image["view"], path, labels, study["study_id"]))
    for row in _lines(nih / "films.jsonl") if nih else ():
        if row["split"] == "train":
            split = "val" if patient_share(row["patient"]) < VALIDATION_SHARE else "train"
            path = nih / "images" / row["file"] if nih else Path()
            films.append(
                LabelledFilm(NIH, split, "frontal", path, nih_labels(row["labels"]), row["patient"], row["view"])
            )
    return films


def compute_features(
    generator: ReportGenerator,
    films: Sequence[LabelledFilm],
    progress: Callable[[int, int], None],
    coarse: ReportGenerator | None = None,
) -> FilmFeatures:
    """Run vision encoder and Q-Former on films; damaged ones are left out.

    Args:
        generator: the bundle.
        films: from :func:`list_films`.
        progress: called with the number of films done and the total.
        coarse: the bundle's variant with coarser arithmetic, for :attr:`FilmFeatures.differences`.
    """
    kept: list[LabelledFilm] = []
    features, chosen, differences = [], [], []
    for done, film in enumerate(films, 1):
        progress(done, len(films))
        try:
            planes = preprocess_radiograph(load_radiograph(film.file), generator.bundle.manifest.preprocessing)
        except RadiographError:
            continue
        features.append(_features(generator, planes, film.view))
        if coarse is not None and done % COARSE_EVERY == 0:
            chosen.append(len(kept))
            differences.append(_features(coarse, planes, film.view) - features[-1])
        kept.append(film)
    findings = generator.bundle.manifest.image_findings
    scores = len(findings.head.names) if findings else 0
    rows = np.array(features)
    width = rows.shape[1] - scores
    return FilmFeatures(
        pooled=rows[:, :width].astype(np.float16),
        logits=rows[:, width:],
        collection=np.array([film.collection for film in kept]),
        split=np.array([film.split for film in kept]),
        group=np.array([film.group for film in kept]),
        view=np.array([film.view for film in kept]),
        position=np.array([film.position for film in kept]),
        name=np.array([film.file.name for film in kept]),
        labels=np.stack([film.labels for film in kept]),
        coarse=np.array(chosen, np.int64),
        differences=np.array(differences, np.float32).reshape(len(chosen), rows.shape[1]),
    )


def _features(generator: ReportGenerator, planes: np.ndarray, view: str) -> np.ndarray:
    """Pooled features of a film, then the Q-Former's finding logits, float32 [2H + Q]."""
    encoded = generator.backend.encode_image(planes)
    context = ClinicalContext(view="lateral" if view == "lateral" else "frontal")
    (output,) = query_films(generator.backend, generator.resources.codec, [encoded], context)
    logits = output.finding_logits
    return np.concatenate([pooled(encoded)[0], logits if logits is not None else []], dtype=np.float32)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
