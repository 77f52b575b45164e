"""List the films of several collections without their test splits, decode them once, pack them for another machine."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cbedge.files import write_atomically
from cbedge.images.radiograph import load_radiograph
from training.encoder.labels import FINDINGS, iu_labels, nih_labels

COLLECTIONS = ("iu_xray", "nih")
VIEWS = ("frontal", "lateral")
SPLITS = ("train", "val")
VALIDATION_SHARE = 0.15  # of the NIH's training patients
_IU_SPLITS = {"train": "train", "extra": "train", "val": "val"}


@dataclass(frozen=True)
class Film:
    """One film on disk.

    Attributes:
        collection: one of :data:`COLLECTIONS`.
        split: one of :data:`SPLITS`.
        view: one of :data:`VIEWS`.
        file: the image file.
        labels: int8 [findings], 1, 0 or -1 (unknown).
    """

    collection: str
    split: str
    view: str
    file: Path
    labels: np.ndarray


@dataclass(frozen=True)
class Films:
    """Decoded films; row i of each array is film i.

    Attributes:
        pixels: uint8 [films, side, side], stretched to a square as the model's preprocessing does.
        labels: int8 [films, findings].
        collection, split, view: int8 [films], indices into :data:`COLLECTIONS`, :data:`SPLITS`, :data:`VIEWS`.
    """

    pixels: np.ndarray
    labels: np.ndarray
    collection: np.ndarray
    split: np.ndarray
    view: np.ndarray

    def rows(self, collection: str, split: str, view: str) -> np.ndarray:
        """Indices of the films of one collection, split and view, ascending."""
        return np.flatnonzero(
            (self.collection == COLLECTIONS.index(collection))
            & (self.split == SPLITS.index(split))
            & (self.view == VIEWS.index(view))
        )


def list_films(folders: dict[str, Path], validation_share: float = VALIDATION_SHARE) -> list[Film]:
    """List the films for training and validation. No file of a test split is opened.

    Args:
        folders: collection → folder.
        validation_share: share of the NIH's training patients for validation.

    Raises:
        FileNotFoundError: a folder lacks its list of films.
        ValueError: an unknown collection.
    """
    unknown = sorted(set(folders) - set(COLLECTIONS))
    if unknown:
        raise ValueError(f"unknown collection {unknown[0]!r}; known: {', '.join(COLLECTIONS)}")
    films: list[Film] = []
    if "iu_xray" in folders:
        films += _iu_films(folders["iu_xray"])
    if "nih" in folders:
        films += _nih_films(folders["nih"], validation_share)
    return films


def _iu_films(folder: Path) -> list[Film]:
    films = []
    for study in _read_lines(folder / "studies.jsonl"):
        if study["split"] not in _IU_SPLITS:
            continue
        labels = iu_labels(study["problems"] + study["mesh_major"] + study["mesh_automatic"])
        for image in study["images"]:
            path = folder / "images" / image["file"]
            if image["view"] in VIEWS and path.is_file():
                films.append(Film("iu_xray", _IU_SPLITS[study["split"]], image["view"], path, labels))
    return films


def _nih_films(folder: Path, validation_share: float) -> list[Film]:
    films = []
    for row in _read_lines(folder / "films.jsonl"):
        if row["split"] != "train":
            continue
        split = "val" if patient_share(row["patient"]) < validation_share else "train"
        films.append(Film("nih", split, "frontal", folder / "images" / row["file"], nih_labels(row["labels"])))
    return films


def patient_share(patient: str) -> float:
    """A hash of the patient's identifier, 0 to 1, so that all films of a patient are in one split.

    114 was chosen among 400 numbers by counts of labels only, so that as many findings as possible have validation
    films.
    """
    return int.from_bytes(hashlib.sha256(f"nih 114 {patient}".encode()).digest()[:4], "big") / 2**32


def _read_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def decode_films(
    films: Sequence[Film], cache: Path, side: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Films:
    """Decode films to ``side`` x ``side`` pixels; an existing cache of the same films is opened.

    Args:
        films: from :func:`list_films`.
        cache: folder of the decoded films, outside the repository.
        side: rows and columns.
        progress: called with the number of decoded films and the total.
    """
    names = [f"{film.collection} {film.split} {film.view} {film.file.name}" for film in films]
    key = hashlib.sha256("\n".join([str(side), *names]).encode()).hexdigest()[:16]
    path = cache / f"films-{side}-{key}.npy"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(films), side, side))
        for row, film in enumerate(films):
            pixels[row] = _resized(film.file, side)
            progress(row + 1, len(films))
        pixels.flush()
        partial.rename(path)
    return Films(np.load(path, mmap_mode="r"), *_columns(films))


def _resized(path: Path, side: int) -> np.ndarray:
    pixels = np.ascontiguousarray(load_radiograph(path).pixels, np.float32)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.rint(np.clip(np.asarray(image), 0, 1) * 255).astype(np.uint8)


def _columns(films: Sequence[Film]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    labels = np.stack([film.labels for film in films])
    collection = np.array([COLLECTIONS.index(film.collection) for film in films], np.int8)
    split = np.array([SPLITS.index(film.split) for film in films], np.int8)
    return labels, collection, split, np.array([VIEWS.index(film.view) for film in films], np.int8)


def write_pack(films: Films, start: dict[str, Tensor], path: Path, quality: int = 80) -> None:
    """Pack films and initial weights into one file for another machine.

    Films become WebP images. Weight matrices are rounded to 8 bits with one scale per row.

    Args:
        films: decoded films.
        start: initial weights, name → tensor.
        path: file to write.
        quality: WebP quality, 1 to 100.
    """
    arrays: dict[str, np.ndarray] = {
        "labels": films.labels,
        "collection": films.collection,
        "split": films.split,
        "view": films.view,
        "findings": np.array(FINDINGS),
    }
    images = []
    for pixels in films.pixels:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(buffer, "WEBP", quality=quality, method=6)
        images.append(buffer.getvalue())
    arrays["ends"] = np.cumsum([len(image) for image in images], dtype=np.int64)
    arrays["images"] = np.frombuffer(b"".join(images), np.uint8)
    for name, tensor in start.items():
        values = tensor.detach().float().cpu().numpy()
        if values.ndim >= 2 and values.size > 10_000:
            scale = np.abs(values).reshape(len(values), -1).max(1) / 127 + 1e-12
            rounded = np.rint(values.reshape(len(values), -1) / scale[:, None]).astype(np.int8)
            arrays |= {f"rounded/{name}": rounded.reshape(values.shape), f"scale/{name}": scale.astype(np.float32)}
        else:
            arrays[f"weight/{name}"] = values
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def read_pack(path: Path) -> tuple[Films, dict[str, Tensor]]:
    """Read what :func:`write_pack` wrote: the films and the initial weights.

    Raises:
        FileNotFoundError: there is no such pack.
        ValueError: the pack has other findings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such pack: {path}; write it with --pack first")
    with np.load(path, allow_pickle=False) as pack:
        if tuple(pack["findings"]) != FINDINGS:
            raise ValueError(f"{path.name} has other findings than this version: write it again with --pack")
        content, ends = pack["images"].tobytes(), pack["ends"]
        begins = [0, *ends[:-1].tolist()]
        images = [
            np.asarray(Image.open(io.BytesIO(content[begin:end])).convert("L"))
            for begin, end in zip(begins, ends.tolist(), strict=True)
        ]
        columns = (pack[name] for name in ("labels", "collection", "split", "view"))
        films = Films(np.stack(images), *columns)
        start = {}
        for name in pack.files:
            kind, _, weight = name.partition("/")
            if kind == "weight":
                start[weight] = torch.from_numpy(pack[name])
            elif kind == "rounded":
                values = pack[name].astype(np.float32)
                scale = pack[f"scale/{weight}"].reshape(-1, *[1] * (values.ndim - 1))
                start[weight] = torch.from_numpy(values * scale)
    return films, start
