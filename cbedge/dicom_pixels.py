"""From a DICOM dataset to pixels as a viewer shows them: bits, modality and VOI transform, padding, inversion.

What a header says wrongly or not at all is replaced by what can be known without it, and a warning names the attribute.
Only pixels that cannot be decoded are refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.errors import RadiographError
from cbedge.intensity import stretch, stretch_levels

if TYPE_CHECKING:
    from pydicom import Dataset

_MOST_STRAY = 0.05  # share of the pixels above BitsStored that can be an overlay; more, and BitsStored is wrong
_LUT_ITEMS = 65536


class Warnings(list[str]):
    """Sentences about one header, each said once."""

    def say(self, attribute: str, what: str) -> None:
        """Say that an attribute could not be used, and what was done instead."""
        sentence = f"The DICOM attribute {attribute} {what}."
        if sentence not in self:
            self.append(sentence)


def integer(dataset: Dataset, name: str, default: int) -> int:
    """An attribute as an integer; the default where it is missing or unusable."""
    try:
        value = dataset.get(name)
        return default if value is None or value == "" else int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def number(dataset: Dataset, name: str, position: int = 0) -> float | None:
    """A (multi-valued) attribute's number at a position; ``None`` where it is missing or no finite number."""
    try:
        value: Any = dataset.get(name)
        if value is None or value == "":
            return None
        if not isinstance(value, str | bytes | int | float) and hasattr(value, "__len__"):
            value = value[position]
        elif position:
            return None
        found = float(value)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def repair_pixel_attributes(dataset: Dataset, warnings: Warnings) -> None:
    """Give the attributes that decoding needs usable values, in place."""
    allocated = integer(dataset, "BitsAllocated", 0)
    if allocated not in (1, 8, 16, 32):
        guess = 16 if integer(dataset, "BitsStored", 16) > 8 else 8
        warnings.say("BitsAllocated", f"is missing or unusable; {guess} was taken")
        allocated = dataset.BitsAllocated = guess
    stored = integer(dataset, "BitsStored", 0)
    if not 1 <= stored <= allocated:
        warnings.say("BitsStored", "is missing or unusable; all bits were taken")
        stored = dataset.BitsStored = allocated
    high = integer(dataset, "HighBit", -1)
    if not stored - 1 <= high < allocated:
        if "HighBit" in dataset and not warnings:
            warnings.say("HighBit", "does not fit BitsStored; the lowest bits were taken")
        dataset.HighBit = stored - 1
    if integer(dataset, "PixelRepresentation", -1) not in (0, 1):
        warnings.say("PixelRepresentation", "is missing or unusable; values were taken as unsigned")
        dataset.PixelRepresentation = 0
    if integer(dataset, "SamplesPerPixel", 0) not in (1, 3):
        dataset.SamplesPerPixel = 1
    photometric = str(dataset.get("PhotometricInterpretation") or "").strip(" \0").upper()
    known = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
    if photometric not in known:
        photometric = "MONOCHROME2" if dataset.SamplesPerPixel == 1 else "RGB"
        warnings.say("PhotometricInterpretation", f"is missing or unknown; {photometric} was taken")
    dataset.PhotometricInterpretation = photometric


def stored_values(dataset: Dataset, decoded: np.ndarray, warnings: Warnings) -> np.ndarray:
    """Decoded pixels without the bits that are no part of them (overlays), with their sign.

    Args:
        dataset: after :func:`repair_pixel_attributes`.
        decoded: integers [rows, columns].
        warnings: get what was found.
    """
    bits = int(dataset.BitsStored)
    if decoded.dtype.kind not in "iu" or bits >= 8 * decoded.dtype.itemsize:
        return decoded
    signed = dataset.PixelRepresentation == 1
    raw = decoded.view(f"u{decoded.dtype.itemsize}")
    shift = int(dataset.HighBit) + 1 - bits
    if shift and not dataset.file_meta.TransferSyntaxUID.is_compressed:
        raw = raw >> raw.dtype.type(shift)
    mask = raw.dtype.type((1 << bits) - 1)
    if signed:
        sign = raw.dtype.type(1 << (bits - 1))
        masked = ((raw & mask) ^ sign).astype(f"i{4 if raw.dtype.itemsize < 4 else 8}") - int(sign)
        stray = np.count_nonzero(masked != decoded) if not shift else 0
    else:
        masked = raw & mask
        stray = np.count_nonzero(masked != raw)
    if stray > _MOST_STRAY * raw.size and not _has_embedded_overlay(dataset):
        warnings.say("BitsStored", "is smaller than the stored values; all bits were taken")
        return decoded
    return masked


def padding_mask(dataset: Dataset, decoded: np.ndarray) -> np.ndarray | None:
    """Where pixels are padding by PixelPaddingValue and PixelPaddingRangeLimit, bool [rows, columns]; ``None`` for
    nowhere."""
    first = _raw_value(dataset, "PixelPaddingValue", decoded)
    if first is None:
        return None
    last = _raw_value(dataset, "PixelPaddingRangeLimit", decoded)
    low, high = (first, first) if last is None else (min(first, last), max(first, last))
    padded = (decoded >= low) & (decoded <= high)
    count = int(np.count_nonzero(padded))
    return padded if 0 < count < 0.98 * decoded.size else None


def crop_box(padded: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns without the edges that are padding throughout."""
    rows, columns = (np.flatnonzero(~padded.all(axis=axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def display_values(dataset: Dataset, values: np.ndarray, film: np.ndarray | None, warnings: Warnings) -> np.ndarray:
    """Stored values after modality and VOI transform, stretched to 0..1 by the film's own range, float32.

    Args:
        dataset: the header.
        values: of :func:`stored_values`.
        film: which pixels are no padding, bool [rows, columns]; ``None`` for all.
        warnings: get what could not be applied.
    """
    if values.dtype.kind not in "iu" or int(values.max()) - int(values.min()) >= 2**20:
        shown = _transformed(dataset, values.astype(np.float64), warnings)
        return stretch(shown, film)
    least = int(values.min())
    levels = np.arange(least, int(values.max()) + 1, dtype=np.float64)
    return stretch_levels(values, least, _transformed(dataset, levels, warnings), film)


def is_inverted(dataset: Dataset) -> bool:
    """Whether small values are bright: MONOCHROME1, or Presentation LUT Shape INVERSE, which says the same."""
    shape = str(dataset.get("PresentationLUTShape") or "").strip(" \0").upper()
    return dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE"


def check_codestream(dataset: Dataset, name: str) -> None:
    """See that compressed pixels have the size that the header tells, before they are decoded.

    Raises:
        RadiographError: they have another size, which could need any amount of memory.
    """
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    from pydicom.encaps import generate_frames

    frame = next(iter(generate_frames(dataset.PixelData, number_of_frames=1)), b"")
    size = _codestream_size(frame)
    if size is not None and size != (int(dataset.Rows), int(dataset.Columns)):
        raise RadiographError(
            f"{name} has compressed pixels of {size[1]:,} x {size[0]:,}, but Columns and Rows say "
            f"{int(dataset.Columns):,} x {int(dataset.Rows):,}: export it again"
        )


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream announces; ``None`` for others."""
    if frame[4:8] == b"jP  " or frame[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000, in its box file or bare
        start = frame.find(b"\xff\x4f\xff\x51")
        if start < 0 or len(frame) < start + 24:
            return None
        columns, rows, left, top = (int.from_bytes(frame[start + 8 + 4 * i : start + 12 + 4 * i], "big")
                                    for i in range(4))  # fmt: skip
        return rows - top, columns - left
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def _has_embedded_overlay(dataset: Dataset) -> bool:
    return any(
        element.tag.group & 0xFF00 == 0x6000 and element.tag.element == 0x0102 and element.value for element in dataset
    )


def _raw_value(dataset: Dataset, name: str, decoded: np.ndarray) -> int | None:
    """A pixel value of the header, read with the sign of the decoded pixels whatever its own VR was."""
    value = dataset.get(name)
    if isinstance(value, bytes) and len(value) == 2:
        value = int.from_bytes(value, "little")
    try:
        found = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    bits = 8 * decoded.dtype.itemsize
    found %= 1 << bits
    return found - (1 << bits) if decoded.dtype.kind == "i" and found >= 1 << (bits - 1) else found


def _transformed(dataset: Dataset, values: np.ndarray, warnings: Warnings) -> np.ndarray:
    rescaled = _modality(dataset, values, warnings)
    shown = _voi(dataset, rescaled, warnings)
    if shown is not None and (values.size < 2 or np.ptp(shown) > 0):
        return shown
    if shown is not None:
        warnings.say("WindowCenter", "leaves one value of the whole image; the image's own range was taken")
    return rescaled


def _modality(dataset: Dataset, values: np.ndarray, warnings: Warnings) -> np.ndarray:
    table = _lut(dataset, "ModalityLUTSequence", warnings)
    if table is not None:
        return _looked_up(values, *table)
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    if "RescaleSlope" in dataset and not slope:
        warnings.say("RescaleSlope", "is empty or unusable; 1 was taken")
    if "RescaleIntercept" in dataset and intercept is None:
        warnings.say("RescaleIntercept", "is empty or unusable; 0 was taken")
    return values * (slope or 1.0) + (intercept or 0.0)


def _voi(dataset: Dataset, values: np.ndarray, warnings: Warnings) -> np.ndarray | None:
    """After the first VOI LUT or the first usable window; ``None`` where the header has none."""
    table = _lut(dataset, "VOILUTSequence", warnings)
    if table is not None:
        return _looked_up(values, *table)
    if "WindowCenter" not in dataset and "WindowWidth" not in dataset:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip(" \0").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        warnings.say("VOILUTFunction", "is unknown; LINEAR was taken")
        function = "LINEAR"
    for position in range(64):
        centre, width = (number(dataset, name, position) for name in ("WindowCenter", "WindowWidth"))
        if centre is None and width is None:
            break
        if centre is None or width is None or width <= 0:
            continue
        if function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -60, 60)))
        if function == "LINEAR" and width >= 1:
            centre, width = centre - 0.5, max(width - 1, 1e-3)
        return np.clip((values - centre) / width + 0.5, 0, 1)
    warnings.say("WindowWidth", "gives no usable window; the image's own range was taken")
    return None


def _lut(dataset: Dataset, name: str, warnings: Warnings) -> tuple[int, np.ndarray] | None:
    """A sequence's first lookup table, (first value mapped, float64 table); ``None`` where none is usable."""
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
            table = np.frombuffer(data[: len(data) if narrow else len(data) // 2 * 2], "u1" if narrow else "<u2")
        else:
            table = np.atleast_1d(np.asarray(data, np.int64)) % 65536
        table = table[:count].astype(np.float64)
        if not table.size or np.ptp(table) == 0:
            raise ValueError("an empty table")
    except Exception:
        warnings.say(name, "holds no usable table; it was left out")
        return None
    if len(table) < count:
        warnings.say(name, "is shorter than it says; its last value was taken for the rest")
    return first, table


def _looked_up(values: np.ndarray, first: int, table: np.ndarray) -> np.ndarray:
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]
