"""Map pixel values of any bit depth to the range 0 (air, dark) to 1 (bone, bright), for all input formats.

The range lies between two quantiles of the image's own values, so that single saturated pixels, unused parts of the
value range and the bit depth do not matter. Everything is computed in blocks of rows, so that a large image needs no
second array of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

TAIL = 0.0002  # fraction of pixels below the range, and the same fraction above it
_MAX_LEVELS = 2**20
Transform = Callable[[np.ndarray], np.ndarray]


def stretch(
    values: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    transform: Transform | None = None,
    inverted: bool = False,
    factor: int = 1,
) -> np.ndarray:
    """Stretch values to 0..1 by their own robust range; values outside are clipped.

    Args:
        values: integers or floats [rows, columns], finite.
        counted: bool [rows, columns], pixels that determine the range; the others become 0. Default is all.
        transform: elementwise function that is applied first, float64 to finite float64.
        inverted: small values become bright.
        factor: finally average blocks of this many rows and columns; blocks at the edges may be smaller.

    Returns:
        float32 [ceil(rows / factor), ceil(columns / factor)]; all zero (one if inverted) if the counted pixels have a
        single value.
    """
    if values.dtype.kind in "iu":
        least, most = int(values.min()), int(values.max())
        if most - least < _MAX_LEVELS:
            levels = np.arange(least, most + 1, dtype=np.float64)
            levels = levels if transform is None else transform(levels)
            unit = _unit_levels(values, least, levels, counted)
            unit = 1 - unit if inverted else unit
            return _rendered(values, lambda block: unit[block.astype(np.intp) - least], counted, factor)
    low, high = _quantiles(values, counted, transform)

    def to_unit(block: np.ndarray) -> np.ndarray:
        unit = _scaled(block if transform is None else transform(block.astype(np.float64)), low, high)
        return 1 - unit if inverted else unit

    return _rendered(values, to_unit, counted, factor)


def blocks(values: np.ndarray, factor: int = 1, pixels: int = 2**20) -> Iterator[slice]:
    """Slices of rows, each a multiple of ``factor`` rows, to bound the memory of intermediate results."""
    rows = factor * max(1, pixels // max(1, values.shape[1] * factor))
    return (slice(start, start + rows) for start in range(0, values.shape[0], rows))


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Float in 0..1 of any shape → uint8."""
    eight_bits = np.empty(pixels.shape, np.uint8)
    for rows in blocks(pixels):
        eight_bits[rows] = np.rint(np.clip(pixels[rows], 0, 1) * 255)
    return eight_bits


def averaged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means of blocks of ``factor`` rows and columns; float32 or uint8 [rows, columns], or uint8 [rows, columns, 3]."""
    return pixels if factor == 1 else np.asarray(Image.fromarray(pixels).reduce(factor))


def turned(array: np.ndarray, transpose: bool, flip_rows: bool, flip_columns: bool) -> np.ndarray:
    """An array [rows, columns, ...] with rows and columns swapped, then flipped vertically and horizontally."""
    array = array.swapaxes(0, 1) if transpose else array
    array = array[::-1] if flip_rows else array
    return np.ascontiguousarray(array[:, ::-1] if flip_columns else array)


def _unit_levels(values: np.ndarray, least: int, levels: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """The mapped value, float32 [L], of each level ``least``, ``least + 1``, ...; ``levels`` is float64 [L]."""
    counts = np.zeros(len(levels), np.int64)
    for rows in blocks(values):
        block = values[rows] if counted is None else values[rows][counted[rows]]
        counts += np.bincount(block.ravel().astype(np.intp) - least, minlength=len(levels))
    order = np.argsort(levels, kind="stable")
    below = np.cumsum(counts[order])
    total = int(below[-1])
    if not total:
        return np.zeros(len(levels), np.float32)
    tail = int(TAIL * total)
    low = levels[order[np.searchsorted(below, tail, side="right")]]
    high = levels[order[np.searchsorted(below, total - tail, side="left")]]
    return _scaled(levels, float(low), float(high))


def _quantiles(values: np.ndarray, counted: np.ndarray | None, transform: Transform | None) -> tuple[float, float]:
    """The quantiles :data:`TAIL` and 1 - :data:`TAIL` of the values."""
    total = values.size if counted is None else int(np.count_nonzero(counted))
    if not total:
        return 0.0, 0.0
    tail = int(TAIL * total)
    lowest = highest = np.empty(0)
    for rows in blocks(values):
        block = values[rows].ravel() if counted is None else values[rows][counted[rows]]
        block = block if transform is None else transform(block.astype(np.float64))
        lowest, highest = np.concatenate([lowest, block]), np.concatenate([highest, block])
        if len(lowest) > tail + 1:
            lowest = np.partition(lowest, tail)[: tail + 1]
            highest = np.partition(highest, len(highest) - 1 - tail)[-1 - tail :]
    return float(lowest.max()), float(highest.min())


def _rendered(values: np.ndarray, to_unit: Transform, counted: np.ndarray | None, factor: int) -> np.ndarray:
    rows, columns = values.shape
    pixels = np.empty((-(-rows // factor), -(-columns // factor)), np.float32)
    for part in blocks(values, factor):
        unit = to_unit(values[part])
        if counted is not None:
            unit[~counted[part]] = 0
        start = part.start // factor
        unit = averaged(unit, factor)
        pixels[start : start + len(unit)] = unit
    return pixels


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if not high > low:
        return np.zeros(values.shape, np.float32)
    is_exact = values.ndim == 2 and (values.dtype.itemsize < 4 or values.dtype == np.float32)  # as float32
    scaled = np.subtract(values, low, dtype=np.float32 if is_exact else np.float64)
    scaled /= high - low
    return np.clip(scaled, 0, 1, out=scaled).astype(np.float32, copy=False)
