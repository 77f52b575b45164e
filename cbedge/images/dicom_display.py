"""Map the stored values of a DICOM radiograph to displayed ones: modality and VOI transform, inversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cbedge.images.dicom_pixels import Warnings, byte_order, number
from cbedge.images.intensity import Transform, blocks, stretch
from cbedge.images.memory import reduction

if TYPE_CHECKING:
    from pydicom import Dataset

_LUT_ITEMS = 65536
_LEAST_GREY = 0.01  # fraction of pixels that a usable window shows neither black nor white


def display_values(dataset: Dataset, values: np.ndarray, film: np.ndarray | None, warnings: Warnings) -> np.ndarray:
    """Displayed values: after modality and VOI transform, stretched to the image's own range, inverted if the header
    says so. A window or VOI LUT that leaves almost no grey is ignored.

    Args:
        dataset, values: the header, and what :func:`~cbedge.images.dicom_pixels.stored_values` gave.
        film: which pixels are not padding, bool [rows, columns]; ``None`` for all.
        warnings: collects transforms that could not be applied.

    Returns:
        float32 in 0..1, padding black; very large images are reduced as in
        :attr:`cbedge.images.radiograph.Radiograph.pixels`.
    """
    rows, columns = values.shape
    factor, inverted = reduction(rows, columns, 4), _is_inverted(dataset)
    modality, voi = _modality(dataset, warnings), _voi(dataset, warnings)
    if dataset.get("PresentationLUTSequence"):
        warnings.add("PresentationLUTSequence", "is not applied: the image may be inverted, brighter or darker")
    if voi is not None:
        name, window = voi
        pixels = stretch(
            values, film, transform=lambda levels: window(modality(levels)), inverted=inverted, factor=factor
        )
        if _grey_pixels(pixels) > _LEAST_GREY * pixels.size:
            return pixels
        del pixels  # free the memory
        warnings.add(name, "shows almost all pixels black or white; the image's own range was used")
    return stretch(values, film, transform=modality, inverted=inverted, factor=factor)


def _grey_pixels(pixels: np.ndarray) -> int:
    """Number of pixels that are neither black nor white; float in 0..1."""
    return sum(int(np.count_nonzero(abs(pixels[rows] - 0.5) < 0.499)) for rows in blocks(pixels))


def _is_inverted(dataset: Dataset) -> bool:
    """Whether small values are bright: MONOCHROME1, or Presentation LUT Shape INVERSE."""
    shape = str(dataset.get("PresentationLUTShape") or "").strip(" \0").upper()
    return dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE"


def _modality(dataset: Dataset, warnings: Warnings) -> Transform:
    look_up = _lut(dataset, "ModalityLUTSequence", warnings)
    if look_up is not None:
        return look_up
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    if "RescaleSlope" in dataset and not slope:
        warnings.add("RescaleSlope", "is empty or invalid; 1 was used")
    if "RescaleIntercept" in dataset and intercept is None:
        warnings.add("RescaleIntercept", "is empty or invalid; 0 was used")
    return lambda values: values * (slope or 1.0) + (intercept or 0.0)


def _voi(dataset: Dataset, warnings: Warnings) -> tuple[str, Transform] | None:
    """The first VOI LUT or the first valid window, with its attribute; ``None`` if the header has neither."""
    look_up = _lut(dataset, "VOILUTSequence", warnings)
    if look_up is not None:
        return "VOILUTSequence", look_up
    if "WindowCenter" not in dataset and "WindowWidth" not in dataset:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip(" \0").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        warnings.add("VOILUTFunction", "is unknown; LINEAR was used")
        function = "LINEAR"
    for position in range(64):
        centre, width = (number(dataset, name, position) for name in ("WindowCenter", "WindowWidth"))
        if centre is None and width is None:
            break
        if centre is None or width is None or width <= 0:
            continue
        return "WindowCenter with WindowWidth", _window(function, centre, width)
    warnings.add("WindowWidth", "has no valid window; the image's own range was used")
    return None


def _window(function: str, centre: float, width: float) -> Transform:
    if function == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -60, 60)))
    if function == "LINEAR" and width >= 1:
        centre, width = centre - 0.5, max(width - 1, 1e-3)
    return lambda values: np.clip((values - centre) / width + 0.5, 0, 1)


def _lut(dataset: Dataset, name: str, warnings: Warnings) -> Transform | None:
    """Looks values up in a sequence's first table, float64; ``None`` if it is invalid."""
    sequence = dataset.get(name)
    if not sequence:
        return None
    try:
        item = sequence[0]
        count, first, bits = (int(value) for value in item.LUTDescriptor)
        first = first - 65536 if first > 32767 and dataset.PixelRepresentation == 1 else first
        count = count or _LUT_ITEMS
        data = item.LUTData
        if isinstance(data, bytes | bytearray):
            narrow = len(data) < 2 * count and (bits <= 8 or len(data) in (count, count + 1))
            kind = "u1" if narrow else "<u2" if byte_order(dataset) == "little" else ">u2"
            table = np.frombuffer(data[: len(data) if narrow else len(data) // 2 * 2], kind)
        else:
            table = np.atleast_1d(np.asarray(data, np.int64)) % 65536
        table = table[:count].astype(np.float64)
        if not table.size or np.ptp(table) == 0:
            raise ValueError("an empty table")
    except Exception:
        warnings.add(name, "has no valid table and was ignored")
        return None
    if len(table) < count:
        warnings.add(name, "is shorter than declared; its last value was used for the rest")
    return lambda values: table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]
