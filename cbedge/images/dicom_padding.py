"""Find the pixels of a DICOM radiograph that are not film: padding, and what a display shutter hides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from cbedge.images.dicom_pixels import Warnings, byte_order, number
from cbedge.images.intensity import blocks

if TYPE_CHECKING:
    from pydicom import Dataset

_MOST_HIDDEN = 0.98  # fraction of pixels; if there were more, the header would be wrong
_FARTHEST = 2**17  # coordinate of a shutter
_EDGES = ("LeftVertical", "UpperHorizontal", "RightVertical", "LowerHorizontal")


def padding_mask(dataset: Dataset, decoded: np.ndarray, values: np.ndarray, warnings: Warnings) -> np.ndarray | None:
    """Which pixels are padding, by PixelPaddingValue and PixelPaddingRangeLimit, or hidden by a display shutter, bool
    [rows, columns]; ``None`` if none are.

    Args:
        dataset: the header.
        decoded: pixels with all bits, because padding may use more bits than the image.
        values: from :func:`~cbedge.images.dicom_pixels.stored_values`.
        warnings: collects problems.
    """
    padded, hidden = _padding(dataset, decoded, values, warnings), _hidden(dataset, values.shape, warnings)
    if padded is not None and hidden is not None:
        padded |= hidden
        return padded if np.count_nonzero(padded) < _MOST_HIDDEN * padded.size else hidden
    return hidden if padded is None else padded


def crop_box(padded: np.ndarray) -> tuple[slice, slice]:
    """Slices of rows and columns without the edges that are padding only."""
    rows, columns = (np.flatnonzero(~padded.all(axis=axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _padding(dataset: Dataset, decoded: np.ndarray, values: np.ndarray, warnings: Warnings) -> np.ndarray | None:
    wide, stored = 8 * decoded.dtype.itemsize, int(dataset.BitsStored)
    limits = _limits(dataset, wide, decoded.dtype.kind == "i")
    if limits is None:
        return None
    padded = _within((decoded, values), limits)
    if not padded.any() and stored < wide:
        limits = _limits(dataset, stored, values.dtype.kind == "i")
        if limits is not None and np.count_nonzero(_within((values[[0, -1]][:, [0, -1]],), limits)) > 1:
            warnings.add("PixelPaddingValue", "does not fit BitsStored; its lowest bits were used")
            padded = _within((values,), limits)
    least = -(1 << (stored - 1)) if values.dtype.kind == "i" else 0
    if limits is not None and limits[0] < least + (1 << stored):  # a grey value of the film as well
        padded = _outside(padded)
    return padded if 0 < np.count_nonzero(padded) < _MOST_HIDDEN * decoded.size else None


def _outside(found: np.ndarray) -> np.ndarray:
    """The pixels from which a row or column leads to the edge through such pixels only: inside a film the padding value
    is a grey value like others, such as that of a saturated marker."""
    outside = np.zeros_like(found)
    for axis in (0, 1):
        outside |= np.logical_and.accumulate(found, axis)
        outside |= np.flip(np.logical_and.accumulate(np.flip(found, axis), axis), axis)
    return outside


def _within(arrays: tuple[np.ndarray, ...], limits: tuple[int, int]) -> np.ndarray:
    """Where one of the arrays is between the limits, bool [rows, columns]."""
    found = np.zeros(arrays[0].shape, bool)
    for rows in blocks(found):
        for array in arrays:
            found[rows] |= (array[rows] >= limits[0]) & (array[rows] <= limits[1])
    return found


def _limits(dataset: Dataset, bits: int, signed: bool) -> tuple[int, int] | None:
    """The least and the most padding value, read as numbers of so many bits."""
    found = [_raw_value(dataset, f"PixelPadding{name}") for name in ("Value", "RangeLimit")]
    if found[0] is None:
        return None
    values = [value % (1 << bits) for value in found if value is not None]
    values = [value - (1 << bits) if signed and value >> (bits - 1) else value for value in values]
    return min(values), max(values)


def _raw_value(dataset: Dataset, name: str) -> int | None:
    """A pixel value in the header, whatever its VR."""
    value: Any = dataset.get(name)
    if isinstance(value, bytes) and len(value) == 2:
        value = int.from_bytes(value, byte_order(dataset))
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _hidden(dataset: Dataset, shape: tuple[int, ...], warnings: Warnings) -> np.ndarray | None:
    """The pixels outside a display shutter (PS3.3 C.7.6.11), bool [rows, columns]; ``None`` if there are none."""
    shapes = dataset.get("ShutterShape") or ()
    hidden = np.zeros(shape, bool)
    for kind in [shapes] if isinstance(shapes, str) else shapes:
        inside = Image.new("1", (shape[1], shape[0]))
        try:
            _draw(ImageDraw.Draw(inside), dataset, str(kind).strip(" \0").upper())
        except (TypeError, ValueError):
            warnings.add("ShutterShape", "has no valid shutter and was ignored")
            continue
        hidden |= ~np.asarray(inside)
    if np.count_nonzero(hidden) > _MOST_HIDDEN * hidden.size:
        warnings.add("ShutterShape", "hides almost all pixels and was ignored")
        return None
    return hidden if hidden.any() else None


def _draw(draw: ImageDraw.ImageDraw, dataset: Dataset, kind: str) -> None:
    """Draw the visible area. The header counts rows and columns from 1; the edges themselves are hidden."""
    if kind == "RECTANGULAR":
        left, top, right, bottom = (_coordinates(dataset, f"Shutter{edge}Edge", 1)[0] for edge in _EDGES)
        draw.rectangle((left, top, right, bottom), fill=1, outline=0)
    elif kind == "CIRCULAR":
        row, column = _coordinates(dataset, "CenterOfCircularShutter", 2)
        radius = _coordinates(dataset, "RadiusOfCircularShutter", 1)[0] + 1
        draw.ellipse((column - radius, row - radius, column + radius, row + radius), fill=1, outline=0)
    elif kind == "POLYGONAL":
        numbers = _coordinates(dataset, "VerticesOfThePolygonalShutter", 6)
        draw.polygon([*zip(numbers[1::2], numbers[::2], strict=True)], fill=1, outline=0)
    else:
        raise ValueError("an unknown shape")


def _coordinates(dataset: Dataset, name: str, least: int) -> list[float]:
    """An attribute's numbers, less 1, so that the first row and column are 0.

    Raises:
        ValueError: there are fewer than ``least``, or they are too large.
    """
    found: list[float] = []
    while (value := number(dataset, name, len(found))) is not None:
        found.append(value - 1)
    if len(found) < least or max(map(abs, found)) > _FARTHEST:
        raise ValueError("no valid coordinates")
    return found
