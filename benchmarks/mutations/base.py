"""One input of the campaign, the film that all are made of, and damage to bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import yaml
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "chest_pa.dcm"
FILMS = 4
_SIDE = 512


class _Loader(yaml.SafeLoader):
    """YAML with ``!repeat [TEXT, TIMES]``, and optionally what stands before."""


def _repeat(loader: _Loader, node: yaml.SequenceNode) -> str:
    text, times, *before = loader.construct_sequence(node)
    return "".join(before) + text * times


_Loader.add_constructor("!repeat", _repeat)
TABLES: dict[str, Any] = yaml.load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"), _Loader)
MARKER: str = TABLES["marker"]


@dataclass
class Input:
    """One input of the campaign.

    Attributes:
        kind: one of :data:`benchmarks.mutations.KINDS`.
        route: ``api``, ``generate``, ``batch``, ``serve`` or ``listen``.
        array: pixels for the Python API, instead of a file.
        film: number of the film that an equivalent shows; ``None`` for other kinds.
        may_refuse: whether an equivalent may be refused with an error message.
        options: indication, comparison, view, template, format and others.
    """

    index: int
    kind: str
    route: str
    data: bytes = b""
    name: str = "film.png"
    array: np.ndarray | None = None
    film: int | None = None
    may_refuse: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@cache
def film(number: int) -> np.ndarray:
    """The example radiograph, float64 [rows, columns] from 0 to 1, cropped and exposed a little differently."""
    ds = pydicom.dcmread(EXAMPLE)
    grey = ds.pixel_array.astype(np.float64)
    low, high = np.percentile(grey, (0.2, 99.8))
    grey = np.clip((grey - low) / (high - low), 0, 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    rows, columns = grey.shape
    cut = 0.01 * number
    grey = grey[int(cut * rows) : rows - int(cut * rows), int(cut * columns) : columns - int(cut * columns)]
    width = round(_SIDE * grey.shape[1] / grey.shape[0])
    small = Image.fromarray(grey.astype(np.float32)).resize((width, _SIDE), Image.Resampling.BOX)
    values = np.clip(np.asarray(small, np.float64), 0, 1) ** (1 + 0.1 * number)
    # 255 steps, so that 8-bit containers hold the same values.
    return np.round((values - values.min()) / (values.max() - values.min()) * 255) / 255


@cache
def plain_png() -> bytes:
    """The first film as an 8-bit PNG."""
    return saved(Image.fromarray(np.round(film(0) * 255).astype(np.uint8)), "PNG")


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def flip(rng: np.random.Generator, data: bytes, first: int = 0) -> bytes:
    """Flip up to 29 bits, half of the time only in the 2,000 bytes after ``first``."""
    changed = bytearray(data)
    end = len(changed) if rng.random() < 0.5 else min(len(changed), first + 2000)
    for place in rng.integers(min(first, end - 1), end, int(rng.integers(1, 30))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(0, len(data)) if rng.random() < 0.5 else rng.integers(0, 300))]


def _splice(rng: np.random.Generator, data: bytes) -> bytes:
    a, b = sorted(map(int, rng.integers(0, len(data), 2)))
    part = data[a : min(b, a + 5000)]
    return [
        data[:a] + data[b:],
        data[:b] + part + data[b:],
        data[:a] + rng.bytes(len(part)) + data[a + len(part) :],
        data[:a] + bytes(len(part)) + data[a + len(part) :],
        data + rng.bytes(500),
    ][rng.integers(5)]


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip bits, cut off the end, or repeat, remove, overwrite or append a part."""
    return [flip, _cut, _splice][rng.integers(3)](rng, data)


def number(rng: np.random.Generator, limit: int = 2**32) -> int:
    """A number below ``limit`` at which decoders tend to fail."""
    fitting = [value for value in TABLES["numbers"] if value < limit]
    return fitting[rng.integers(len(fitting))]
