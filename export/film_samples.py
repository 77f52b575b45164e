"""The labelled images that a gate is fitted on: films, altered films, and other images (:mod:`export.gate`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cbedge.errors import RadiographError
from cbedge.images.intensity import to_uint8
from cbedge.images.radiograph import load_radiograph
from export.drawn_images import drawn_images
from training.datasets.iu_xray import read_studies
from training.encoder.augment import Augmenter
from training.encoder.films import VALIDATION_SHARE, patient_share

MAX_FILMS = 1000  # for fitting, of each collection and view
MAX_MIRRORED = 1000  # of them
MAX_ALTERED = 96  # copies of them that are augmented, mirrored, turned or cropped
FEWEST = 40  # films of each view
_SMALL = 200  # films; a smaller collection gives more augmented copies of each film
_DRAWN = 60
_PART = (0.18, 0.38)  # rows and columns of a part that is too small, of the film's
Alteration = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def part(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random part that is too small to be read as a chest radiograph."""
    return _window(pixels, rng, *_PART)


ALTERATIONS: dict[str, Alteration] = {
    "mirrored": lambda pixels, _: pixels[:, ::-1],
    "rotated by 180": lambda pixels, _: pixels[::-1, ::-1],
    "flipped top to bottom": lambda pixels, _: pixels[::-1],
    "rotated by 90": lambda pixels, _: np.rot90(pixels),
    "rotated by 270": lambda pixels, _: np.rot90(pixels, 3),
    "part": part,
}
LABELS = {
    "mirrored": "mirrored",
    "rotated by 180": "upside down",
    "flipped top to bottom": "upside down",
    "rotated by 90": "on its side",
    "rotated by 270": "on its side",
    "part": "part",
}
_TURNS = ("rotated by 180", "rotated by 90", "flipped top to bottom", "rotated by 270")


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        label: one of :data:`cbedge.images.gate.CLASSES`.
        collection: where it is from.
        pixels: uint8 [S, S].
        is_film: whether it is a film as it is, not altered or augmented.
    """

    label: str
    collection: str
    pixels: np.ndarray
    is_film: bool = False


@dataclass(frozen=True)
class Films:
    """Files of one collection's frontal and lateral films, for fitting and for validation."""

    name: str
    fit: dict[str, Sequence[Path]]
    validation: dict[str, Sequence[Path]]


def collect_films(data: Path, more: Sequence[Path] = (), held_out: str = "val") -> list[Films]:
    """The films of IU X-RAY's ``train`` and ``val``, and of further folders with a ``films.jsonl`` of frontal films.

    A ``films.jsonl`` has ``file`` and ``patient``. If it also has ``split``, ``test`` is left out, and
    :data:`training.encoder.films.VALIDATION_SHARE` of the patients are for validation; otherwise half of them.

    Args:
        data: folder of IU X-RAY.
        more: further folders.
        held_out: ``test`` gives the films of ``test`` instead of those for validation, for measuring; a collection
            without splits has none.

    Raises:
        ValueError: a folder has no readable ``films.jsonl``.
    """
    iu_xray = _iu_films(data, "train")
    found = [Films(data.name, {view: _some(files) for view, files in iu_xray.items()}, _iu_films(data, held_out))]
    for folder in more:
        try:
            rows = [json.loads(line) for line in (folder / "films.jsonl").read_text(encoding="utf-8").splitlines()]
            share = VALIDATION_SHARE if any("split" in row for row in rows) else 0.5
            known = [(row["file"], _is_held_out(row, held_out, share)) for row in rows]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder} has no readable films.jsonl ({type(error).__name__}): give a line with file and patient "
                "for each film"
            ) from None
        paths: tuple[list[Path], list[Path]] = [], []
        for name, is_held_out in known:
            path = folder / "images" / name
            if is_held_out is not None:
                paths[is_held_out].append(path if path.exists() else folder / name)
        found.append(Films(folder.name, {"frontal": _some(paths[0])}, {"frontal": paths[1]}))
    return found


def film_samples(collections: Sequence[Films], size: int) -> Iterator[Sample]:
    """Films for fitting, each as it is, and some of them augmented, mirrored, turned or cropped."""
    for films in collections:
        for view, paths in films.fit.items():
            copies = 3 if len(paths) < _SMALL else 1
            for place, path in enumerate(paths):
                pixels = read_pixels(path)
                if pixels is None:
                    continue
                yield Sample(view, films.name, square(pixels, size), is_film=True)
                if view == "frontal" and place < MAX_MIRRORED:
                    yield Sample("mirrored", films.name, square(pixels[:, ::-1], size))
                if place < MAX_ALTERED // copies:
                    yield from _altered(films.name, view, place, path.name, pixels, copies, size)


def _altered(
    collection: str, view: str, place: int, name: str, pixels: np.ndarray, copies: int, size: int
) -> Iterator[Sample]:
    for copy in range(copies):
        rng = _random(f"{name} {copy}")
        flipped = pixels[:, ::-1] if view == "lateral" and rng.random() < 0.5 else pixels  # it faces either way
        yield Sample(view, collection, augmented(square(flipped, size), rng))
        # Half of the altered films are not augmented, like half of the others.
        chosen = ["mirrored"] if view == "frontal" else []
        chosen += [_TURNS[(place // 2 + copy) % 4]] if (place + copy) % 2 == 0 else []
        chosen += ["part"] if (place + copy) % 4 == 1 else []
        for alteration in chosen:
            altered = square(ALTERATIONS[alteration](pixels, rng), size)
            altered = augmented(altered, rng) if rng.random() < 0.5 else altered
            yield Sample(LABELS[alteration], collection, altered)


def validation_samples(collections: Sequence[Films], size: int) -> Iterator[Sample]:
    """Films for validation as they are."""
    for films in collections:
        for view, paths in films.validation.items():
            for path in paths:
                pixels = read_pixels(path)
                if pixels is not None:
                    yield Sample(view, films.name, square(pixels, size), is_film=True)


def other_samples(folder: Path | None, size: int) -> Iterator[Sample]:
    """Images that are not chest radiographs: drawn ones, and the files of a folder and its subfolders, as they are and
    altered."""
    for name, pixels in drawn_images(np.random.default_rng(0), _DRAWN):
        yield Sample("other", f"drawn {name}", square(pixels, size))
    for path in sorted(folder.rglob("*")) if folder is not None else ():
        image = read_pixels(path) if path.is_file() else None
        if image is None or folder is None:
            continue
        rng = _random(path.relative_to(folder).as_posix())
        yield Sample("other", path.parent.name, square(image, size))
        turned = np.rot90(image, int(rng.integers(4)))[:, :: rng.choice((-1, 1))]
        window = _window(turned, rng, 0.5, 1)
        window = 1 - window if rng.random() < 0.3 else window
        yield Sample("other", path.parent.name, augmented(square(window, size), rng))


def read_pixels(path: Path) -> np.ndarray | None:
    """Pixels of an image file in grey, float32 [rows, columns] in 0..1; ``None`` if it cannot be read."""
    try:
        return load_radiograph(path).pixels
    except RadiographError:  # large collections have damaged files
        return None


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pixels in 0..1, stretched to uint8 [size, size]."""
    image = Image.fromarray(np.ascontiguousarray(pixels, np.float32))
    return to_uint8(np.clip(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)), 0, 1))


def augmented(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An augmented copy of uint8 [S, S] (:mod:`training.encoder.augment`)."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    image = torch.from_numpy(pixels.astype(np.float32) / 255)[None, None]
    return to_uint8(Augmenter(len(pixels))(image, generator)[0, 0].numpy())


def _window(pixels: np.ndarray, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A random window with ``low`` to ``high`` of the rows and of the columns."""
    rows, columns = (max(8, int(size * rng.uniform(low, high))) for size in pixels.shape)
    top, left = rng.integers(0, pixels.shape[0] - rows + 1), rng.integers(0, pixels.shape[1] - columns + 1)
    return pixels[top : top + rows, left : left + columns]


def _is_held_out(row: dict[str, str], held_out: str, share: float) -> bool | None:
    """Whether a film is held out, or ``None`` if it has no use."""
    of_test = row.get("split", "train") != "train"
    if held_out == "test":
        return of_test or None
    return None if of_test else patient_share(row["patient"]) < share


def _iu_films(data: Path, split: str) -> dict[str, Sequence[Path]]:
    studies = read_studies(data, (split,))
    lateral = [study.lateral for study in studies if study.lateral is not None]
    return {"frontal": [study.image for study in studies], "lateral": lateral}


def _some(paths: Sequence[Path]) -> list[Path]:
    order = np.random.default_rng(0).permutation(len(paths))[:MAX_FILMS]
    return [paths[i] for i in order]


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
