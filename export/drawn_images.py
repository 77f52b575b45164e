"""Drawn images that are not chest radiographs, of which any number can be made: noise, blanks, pages, windows, charts,
and rough stand-ins for radiographs of limbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_SIDE = 320


def drawn_images(rng: np.random.Generator, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names of kinds, and pixels float32 [320, 320] in 0..1; the kinds take turns."""
    for place in range(count):
        name = tuple(_KINDS)[place % len(_KINDS)]
        pixels = np.clip(np.asarray(_KINDS[name](rng), np.float32), 0, 1)
        yield name, 1 - pixels if rng.random() < 0.4 else pixels


def _noise(rng: np.random.Generator) -> np.ndarray:
    """White or smooth noise."""
    side = int(rng.choice((4, 10, 40, 160, _SIDE)))
    values = rng.random((side, side)) if rng.random() < 0.5 else rng.normal(0.5, 0.2, (side, side))
    image = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8)).resize((_SIDE, _SIDE))
    return np.asarray(image) / 255


def _blank(rng: np.random.Generator) -> np.ndarray:
    """An almost uniform plane, a gradient, or a soft disc, with little noise."""
    y, x = np.mgrid[-1:1:320j, -1:1:320j]
    kind = rng.integers(3)
    if kind == 0:
        plane = np.full_like(x, rng.random())
    elif kind == 1:
        plane = 0.5 + 0.5 * (x * np.cos(angle := rng.uniform(0, 6.3)) + y * np.sin(angle)) / 1.5
    else:
        plane = np.exp(-((x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-1, 1)) ** 2) / rng.uniform(0.05, 1))
    return plane + rng.normal(0, rng.uniform(0.001, 0.05), plane.shape)


def _page(rng: np.random.Generator) -> np.ndarray:
    """A page with lines of words."""
    image, draw = _canvas(rng.uniform(0.85, 1))
    height = int(rng.integers(5, 14))
    margin = int(rng.integers(8, 50))
    for top in range(margin, _SIDE - margin, int(height * rng.uniform(1.5, 2.5))):
        left = margin
        while left < _SIDE - margin and rng.random() > 0.03:
            length = int(rng.integers(height, 7 * height))
            for letter in range(left, min(left + length, _SIDE - margin), max(3, height // 2)):
                bottom = top + height * int(rng.integers(6, 11)) // 10
                draw.line((letter, top + int(rng.integers(height // 2)), letter + int(rng.integers(3)), bottom), 30, 2)
            left += length + height
    return np.asarray(image) / 255


def _window(rng: np.random.Generator) -> np.ndarray:
    """Rectangles with borders and words, like a program's window."""
    image, draw = _canvas(rng.random())
    for _ in range(int(rng.integers(5, 25))):
        left, top = rng.integers(0, _SIDE - 20, 2)
        right, bottom = left + rng.integers(10, 200), top + rng.integers(8, 120)
        draw.rectangle((left, top, right, bottom), int(rng.integers(256)), int(rng.integers(256)))
        draw.text((left + 3, top + 2), "".join(map(chr, rng.integers(65, 122, 12))), int(rng.integers(256)))
    return np.asarray(image) / 255


def _chart(rng: np.random.Generator) -> np.ndarray:
    """Axes with lines, bars or points."""
    image, draw = _canvas(1)
    draw.line((30, 10, 30, 290, 310, 290), 0, 2)
    x = np.linspace(32, 305, int(rng.integers(5, 60)))
    for _ in range(int(rng.integers(1, 5))):
        y = np.clip(150 + np.cumsum(rng.normal(0, 25, len(x))), 12, 288)
        shade, kind = int(rng.integers(180)), rng.integers(3)
        for place in range(len(x) - 1):
            if kind == 0:
                draw.line((x[place], y[place], x[place + 1], y[place + 1]), shade, 2)
            elif kind == 1:
                draw.rectangle((x[place], y[place], x[place] + 4, 290), shade)
            else:
                draw.ellipse((x[place], y[place], x[place] + 6, y[place] + 6), shade)
    return np.asarray(image) / 255


def _limb(rng: np.random.Generator) -> np.ndarray:
    """Bright tubes with dense edges and a joint in soft tissue on black, as in a radiograph of a limb or a hand."""
    y, x = np.mgrid[-1:1:320j, -1:1:320j]
    angle = rng.uniform(-0.5, 0.5) + (np.pi / 2 if rng.random() < 0.3 else 0)
    across, along = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    bones = int(rng.choice((1, 2, 5)))
    width = rng.uniform(0.12, 0.3) / (1 + 0.25 * bones)
    picture = np.zeros_like(x)
    for place in range(bones):
        middle = (place - (bones - 1) / 2) * width * rng.uniform(2.2, 3)
        joint = rng.uniform(-0.3, 0.3)
        radius = width * (1 + 0.6 * np.exp(-(((along - joint) / 0.2) ** 2)))
        distance = np.abs(across - middle) / radius
        picture += 0.25 * np.sqrt(np.clip(1 - (distance / 2.2) ** 2, 0, 1))  # soft tissue
        bone = np.sqrt(np.clip(1 - distance**2, 0, 1)) - 0.7 * np.sqrt(np.clip(1 - (distance / 0.75) ** 2, 0, 1))
        picture += bone * (np.abs(along - joint) > 0.02) * rng.uniform(0.8, 1.4)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    return np.asarray(image) / 255 + rng.normal(0, 0.01, picture.shape)


def _canvas(shade: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("L", (_SIDE, _SIDE), int(255 * shade))
    return image, ImageDraw.Draw(image)


_KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "blank": _blank,
    "page": _page,
    "window": _window,
    "chart": _chart,
    "limb": _limb,
}
