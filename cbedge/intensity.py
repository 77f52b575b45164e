"""Map pixel values of any depth to 0 (air, dark) to 1 (bone, bright), in one way for every kind of input.

The range is taken between two quantiles of the film's own values, so that a single saturated pixel, an unused part of
the file's range or another number of bits changes nothing.
"""

from __future__ import annotations

import numpy as np

TAIL = 0.0002  # share of the pixels that may lie below, and as many above, the range


def stretch(values: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Stretch values to 0..1 by their own robust range; what lies outside is clipped.

    Args:
        values: integers or floats [rows, columns], finite.
        counted: bool [rows, columns], the pixels that determine the range; default is all.

    Returns:
        float32 [rows, columns]; all zero where the pixels counted have one value.
    """
    if values.dtype == np.uint8 or (values.dtype.kind in "iu" and values.dtype.itemsize == 2):
        least = int(values.min())
        levels = np.arange(least, int(values.max()) + 1, dtype=np.float64)
        return stretch_levels(values, least, levels, counted)
    chosen = values if counted is None else values[counted]
    low, high = quantiles(chosen)
    return _scaled(values, low, high)


def stretch_levels(values: np.ndarray, least: int, levels: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """The same as :func:`stretch` of ``levels[values - least]``, computed on the few levels, not on the many pixels.

    Args:
        values: integers [rows, columns].
        least: the smallest of them.
        levels: what each value from ``least`` on means, float64 [L], finite, in any order.
        counted: as for :func:`stretch`.
    """
    counts = np.zeros(len(levels), np.int64)
    for rows in _blocks(values):
        block = values[rows] if counted is None else values[rows][counted[rows]]
        counts += np.bincount(block.ravel().astype(np.intp) - least, minlength=len(levels))
    order = np.argsort(levels, kind="stable")
    below = np.cumsum(counts[order])
    total = int(below[-1])
    if not total:
        return np.zeros(values.shape, np.float32)
    tail = int(TAIL * total)
    low = levels[order[np.searchsorted(below, tail, side="right")]]
    high = levels[order[np.searchsorted(below, total - tail, side="left")]]
    unit = _scaled(levels, float(low), float(high))
    pixels = np.empty(values.shape, np.float32)
    for rows in _blocks(values):
        pixels[rows] = unit[values[rows].astype(np.intp) - least]
    return pixels


def quantiles(values: np.ndarray) -> tuple[float, float]:
    """The values between which all but two tails of :data:`TAIL` lie."""
    flat = values.ravel()
    if not flat.size:
        return 0.0, 0.0
    tail = int(TAIL * flat.size)
    sorted_ends = np.partition(flat, (tail, flat.size - 1 - tail))
    return float(sorted_ends[tail]), float(sorted_ends[flat.size - 1 - tail])


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if not high > low:
        return np.zeros(values.shape, np.float32)
    scaled = np.subtract(values, low, dtype=np.float64 if values.ndim == 1 else np.float32)
    scaled /= high - low
    return np.clip(scaled, 0, 1, out=scaled).astype(np.float32, copy=False)


def _blocks(values: np.ndarray, pixels: int = 2**20) -> list[slice]:
    """Rows, some at a time, so that what is computed of them stays small."""
    rows = max(1, pixels // max(1, values.shape[1]))
    return [slice(start, start + rows) for start in range(0, values.shape[0], rows)]
