"""Convert a radiograph's pixels to the vision encoder's input, with settings that belong to the model.

The settings are stored in a bundle's manifest and in a checkpoint, from which training, export, benchmarks and the
runtime read them. For a released InstructBLIP checkpoint they come from its ``preprocessor_config.json``, so that the
input is the same as in transformers.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cbedge.images.intensity import to_uint8
from cbedge.images.radiograph import Radiograph

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_CHOICES = {
    "resample": tuple(RESAMPLING),
    "resize_mode": ("stretch",),
    "resize_dtype": ("float32", "uint8"),
    "colour": ("grey", "rgb"),
    "value_range": ("stretched", "stored"),
}
_LARGEST = 4096


@dataclass(frozen=True)
class Preprocessing:
    """Settings of the preprocessing; the defaults are the mini model's.

    Attributes:
        image_size: rows and columns of the input, S.
        mean, std: per channel, after rescaling: the input is ``(value * rescale_factor - mean) / std``.
        rescale_factor: for values from 0 to 255.
        resample: resampling filter, a name in :data:`RESAMPLING`.
        resize_mode: ``stretch``: the whole image is scaled to S x S, whatever its aspect ratio, so nothing is cropped.
        resize_dtype: ``float32`` resizes with the full precision of the file; ``uint8`` rounds to 8 bits before
            and after resizing, as transformers' image processors do.
        colour: ``grey`` gives every channel the same grey plane; ``rgb`` keeps the colours of a colour file.
        value_range: ``stretched`` takes the values that :func:`~cbedge.images.radiograph.load_radiograph` maps to the
            range 0 to 1; ``stored`` takes the stored values of an 8-bit file. ``rgb`` requires ``stored``.

    Raises:
        ValueError: a setting is out of range or unknown; the message names it.
    """

    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    rescale_factor: float = 1 / 255
    resample: str = "bicubic"
    resize_mode: str = "stretch"
    resize_dtype: str = "float32"
    colour: str = "grey"
    value_range: str = "stretched"

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) or not 1 <= self.image_size <= _LARGEST:
            raise ValueError(f"preprocessing: image_size is {self.image_size!r}; give 1 to {_LARGEST:,}")
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"preprocessing: {key} is {values!r}; give three numbers")
        if min(self.std) <= 0 or not (math.isfinite(self.rescale_factor) and self.rescale_factor > 0):
            raise ValueError("preprocessing: std and rescale_factor must be above 0")
        for key, known in _CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"preprocessing: unknown {key} {getattr(self, key)!r}; known: {', '.join(known)}")
        if self.colour == "rgb" and self.value_range != "stored":
            raise ValueError("preprocessing: colour rgb needs value_range stored")

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Preprocessing":
        """Read settings from a manifest's JSON.

        Raises:
            ValueError, TypeError: a setting is unknown, missing or out of range.
        """
        lists = {key: tuple(map(float, values[key])) for key in ("mean", "std")}
        return cls(**{**values, **lists})


def preprocess(pixels: np.ndarray, settings: Preprocessing) -> np.ndarray:
    """Resize, rescale and normalize one image: the vision encoder's input, float32 [1, 3, S, S].

    Args:
        pixels: float [rows, columns] in 0..1, or uint8 [rows, columns] or [rows, columns, 3].
        settings: the model's settings.

    Raises:
        ValueError: the image has another shape, or colours that the settings do not allow.
    """
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3 or settings.colour != "rgb"):
        raise ValueError(f"pixels have shape {pixels.shape}, which does not match colour {settings.colour}")
    planes = np.moveaxis(pixels, 2, 0) if pixels.ndim == 3 else pixels[None]
    if settings.resize_dtype == "uint8":
        eight_bits = (plane if plane.dtype == np.uint8 else to_uint8(plane) for plane in planes)
        resized = np.stack([_resize(plane, settings) for plane in eight_bits])
        # transformers rescales in float64 and normalizes in float32
        values = (resized.astype(np.float64) * settings.rescale_factor).astype(np.float32)
    else:
        unit = (p / np.float32(255) if p.dtype == np.uint8 else p.astype(np.float32, copy=False) for p in planes)
        resized = np.clip(np.stack([_resize(plane, settings) for plane in unit]), 0.0, 1.0)
        values = resized * np.float32(255 * settings.rescale_factor)
    mean = np.asarray(settings.mean, np.float32)[:, None, None]
    std = np.asarray(settings.std, np.float32)[:, None, None]
    return ((values - mean) / std)[None]


def preprocess_radiograph(radiograph: Radiograph, settings: Preprocessing) -> np.ndarray:
    """The vision encoder's input for a radiograph, float32 [1, 3, S, S]; see :func:`preprocess`."""
    return preprocess(chosen_values(radiograph, settings), settings)


def chosen_values(radiograph: Radiograph, settings: Preprocessing) -> np.ndarray:
    """The values of a radiograph that the settings select, as input of :func:`preprocess`."""
    if settings.value_range == "stretched" or radiograph.stored is None:
        return radiograph.pixels
    if settings.colour == "grey" and radiograph.stored.ndim == 3:
        return np.asarray(Image.fromarray(radiograph.stored).convert("L"))
    return radiograph.stored


def _resize(plane: np.ndarray, settings: Preprocessing) -> np.ndarray:
    """[rows, columns] → [S, S], of the same type."""
    image = Image.fromarray(np.ascontiguousarray(plane))
    size = (settings.image_size, settings.image_size)
    return np.asarray(image if image.size == size else image.resize(size, RESAMPLING[settings.resample]))
