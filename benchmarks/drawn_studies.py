"""Drawn films, and small collections in the layout of ``studies.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

REPORTS = (
    ("The heart is normal in size. The lungs are clear.", "No acute disease.", ["normal"]),
    (
        "The heart is enlarged. There is a small left pleural effusion.",
        "Cardiomegaly and effusion.",
        ["Cardiomegaly/mild", "Pleural Effusion/left"],
    ),
)


def draw_films(folder: Path) -> list[Path]:
    """Draw films of the full range 0..255: grey and colour, PNG and JPEG, in several shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (name, rows, columns) in enumerate(
        (("grey.png", 300, 250), ("wide.jpg", 200, 400), ("colour.png", 224, 224), ("colour.jpg", 350, 210))
    ):
        y, x = np.mgrid[0:rows, 0:columns] / np.array([rows, columns])[:, None, None]
        rng = np.random.default_rng(number)
        plane = 0.8 + 0.05 * rng.standard_normal((rows, columns))
        for centre in (0.3, 0.7):
            plane -= 0.6 * np.exp(-((((x - centre) / 0.13) ** 2 + ((y - 0.5) / (0.2 + 0.05 * number)) ** 2) ** 2))
        grey = (255 * (plane - plane.min()) / (plane.max() - plane.min())).astype(np.uint8)
        image = Image.fromarray(grey)
        if name.startswith("colour"):
            image = Image.fromarray(np.stack([grey, 255 - grey, grey // 2 + 64], axis=2))
        image.save(folder / name)
        paths.append(folder / name)
    return paths


def write_collection(folder: Path, films: Sequence[Path], splits: Sequence[str]) -> Path:
    """Write a study for each of ``splits`` into a new folder, with films and :data:`REPORTS` in turn."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, split in enumerate(splits):
        film, (findings, impression, tags) = films[number % len(films)], REPORTS[number % 2]
        file = f"{number}{film.suffix}"
        (folder / "images" / file).write_bytes(film.read_bytes())
        study = {
            "study_id": f"S{number}",
            "split": split,
            "images": [{"file": file, "view": "frontal"}],
            "indication": "cough",
            "findings": findings,
            "impression": impression,
            "mesh_major": tags,
        }
        lines.append(json.dumps(study))
    (folder / "studies.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
