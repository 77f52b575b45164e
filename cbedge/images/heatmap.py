"""Attention heat map over the radiograph.

The map shows the Q-Former's cross-attention, averaged over heads and layers, for the image findings. It shows which
patches were attended to, not why, nor that the text is correct: attention is not an explanation (Jain and Wallace,
2019).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from cbedge.images.intensity import to_uint8
from cbedge.images.radiograph import Radiograph

CAVEAT = (
    "The map shows the Q-Former's cross-attention. It does not show why a sentence was written, nor that it is true."
)
MAX_SIDE = 1024


def scaled_map(attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Attention of patches [rows, columns] → float32 [size[1], size[0]], 0 (lowest) to 1 (highest)."""
    low, high = np.quantile(attention, 0.05), attention.max()
    levels = np.clip((attention - low) / max(float(high - low), 1e-9), 0, 1).astype(np.float32)
    image = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image, np.float32), 0, 1)


def overlay(radiograph: Radiograph, attention: np.ndarray, strength: float = 0.55) -> Image.Image:
    """The radiograph, scaled to at most 1,024 pixels per side, with the map as a colour overlay (orange to yellow).

    Args:
        radiograph: the radiograph that was drafted.
        attention: attention of patches, [rows, columns], from :attr:`cbedge.api.ReportStream.attention`.
        strength: opacity of the colour at the highest attention, 0 to 1.
    """
    grey = Image.fromarray(to_uint8(radiograph.pixels))
    grey.thumbnail((MAX_SIDE, MAX_SIDE))
    levels = scaled_map(attention, grey.size)[..., None]
    base = np.asarray(grey, np.float32)[..., None].repeat(3, axis=2)
    colour = np.concatenate([np.full_like(levels, 255), 90 + 165 * levels, 40 * levels], axis=2)
    mixed = base * (1 - strength * levels) + colour * strength * levels
    return Image.fromarray(mixed.astype(np.uint8))


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG, with the caveat as a comment."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", CAVEAT)
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()
