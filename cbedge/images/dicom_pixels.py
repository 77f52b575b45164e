"""From a DICOM dataset to pixels as a viewer shows them: bits, modality and VOI transform, padding, inversion.

What a header says wrongly or not at all is replaced by what can be known without it, and a warning names the attribute.
Only pixels that cannot be decoded are refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.errors import RadiographError
from cbedge.images.codestream import Codestream, CodestreamError, check_run_lengths, read_jpeg, read_jpeg2000
from cbedge.images.intensity import Transform, blocks, stretch
from cbedge.images.memory import kept_bytes, reduction

if TYPE_CHECKING:
    from pydicom import Dataset

_MOST_STRAY = 0.05  # share of the pixels above BitsStored that can be an overlay; more, and BitsStored is wrong
_LUT_ITEMS = 65536
_DECODER_BYTES = 4  # of a sample in the decoders of pylibjpeg, beside what they return


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


def decode_pixels(dataset: Dataset, name: str) -> tuple[np.ndarray, float]:
    """The pixels of a dataset after :func:`repair_pixel_attributes`, in grey; its Photometric Interpretation is made to
    fit, and compressed Pixel Data are removed.

    Returns:
        integers [rows, columns], in memory that may be the dataset's own; and how colourful they are, 0 to 1.

    Raises:
        RadiographError: they are damaged, of several frames, or of another size than the header says.
    """
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    decoder = get_decoder(syntax)
    options: dict[str, Any] = {"raw": True, "correct_unused_bits": False, "allow_excess_frames": False}
    options |= {"view_only": True} if decoder.is_native else {"index": 0}
    try:
        decoded, properties = decoder.as_array(dataset, **options)
    except Exception:
        raise RadiographError(
            f"{name} is damaged or cut short: its pixels cannot be decoded; export it again"
        ) from None
    if syntax.is_encapsulated:
        del dataset.PixelData
    decoded = decoded.astype(decoded.dtype.newbyteorder("="), copy=False)
    if decoded.ndim == 2:
        return decoded, 0.0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    return _in_grey(decoded, str(properties["photometric_interpretation"]).startswith("YBR_FULL"))


def _in_grey(decoded: np.ndarray, is_ybr: bool) -> tuple[np.ndarray, float]:
    """Grey values of colour pixels, integers [rows, columns, 3], and how colourful they are, 0 to 1."""
    from pydicom.pixels.processing import convert_color_space

    grey = np.empty(decoded.shape[:2], decoded.dtype)
    most, colour = 1.0, 0.0
    for rows in blocks(decoded):
        block = decoded[rows]
        if is_ybr:
            block = convert_color_space(np.ascontiguousarray(block), "YBR_FULL", "RGB")
        channels = block.astype(np.float32)
        most = max(most, float(channels.max()))
        colour += float(np.ptp(channels, axis=2).sum(dtype=np.float64))
        grey[rows] = np.rint(channels @ np.array([0.299, 0.587, 0.114], np.float32))
    return grey, colour / grey.size / most


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
    shift = 0 if dataset.file_meta.TransferSyntaxUID.is_compressed else shift
    mask, sign = raw.dtype.type((1 << bits) - 1), raw.dtype.type(1 << (bits - 1))
    values, stray = np.empty(raw.shape, f"{'i' if signed else 'u'}{raw.dtype.itemsize}"), 0
    for rows in blocks(raw):
        block = raw[rows] >> raw.dtype.type(shift)
        masked = block & mask
        values[rows] = ((masked ^ sign) - sign if signed else masked).view(values.dtype)
        if not shift:  # bits above are a sign, nothing, or something else
            stray += int(np.count_nonzero((block != masked) & (block != values[rows].view(raw.dtype))))
    if stray > _MOST_STRAY * raw.size and not _has_embedded_overlay(dataset):
        warnings.say("BitsStored", "is smaller than the stored values; all bits were taken")
        return decoded
    return values


def padding_mask(dataset: Dataset, decoded: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """Where pixels are padding by PixelPaddingValue and PixelPaddingRangeLimit, bool [rows, columns]; ``None`` for
    nowhere.

    Args:
        dataset: the header.
        decoded: pixels with all bits, which padding may take more of than the film does.
        values: of :func:`stored_values`.
    """
    first = _raw_value(dataset, "PixelPaddingValue", decoded)
    if first is None:
        return None
    last = _raw_value(dataset, "PixelPaddingRangeLimit", decoded)
    low, high = (first, first) if last is None else (min(first, last), max(first, last))
    padded = np.zeros(decoded.shape, bool)
    for rows in blocks(decoded):
        for array in (decoded, values):
            padded[rows] |= (array[rows] >= low) & (array[rows] <= high)
    count = int(np.count_nonzero(padded))
    return padded if 0 < count < 0.98 * decoded.size else None


def crop_box(padded: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns without the edges that are padding throughout."""
    rows, columns = (np.flatnonzero(~padded.all(axis=axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def display_values(dataset: Dataset, values: np.ndarray, film: np.ndarray | None, warnings: Warnings) -> np.ndarray:
    """Stored values as they are shown: after modality and VOI transform, stretched by the film's own range, inverted
    where the header says so.

    Args:
        dataset: the header.
        values: of :func:`stored_values`.
        film: which pixels are no padding, bool [rows, columns]; ``None`` for all.
        warnings: get what could not be applied.

    Returns:
        float32 in 0..1, padding dark; of the largest films averaged as in
        :attr:`cbedge.images.radiograph.Radiograph.pixels`.
    """
    rows, columns = values.shape
    return stretch(
        values, film, transform=_transform(dataset, values, warnings), inverted=_is_inverted(dataset),
        factor=reduction(rows, columns, 4),
    )  # fmt: skip


def _is_inverted(dataset: Dataset) -> bool:
    """Whether small values are bright: MONOCHROME1, or Presentation LUT Shape INVERSE, which says the same."""
    shape = str(dataset.get("PresentationLUTShape") or "").strip(" \0").upper()
    return dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE"


def check_pixels(dataset: Dataset, name: str, warnings: Warnings) -> int:
    """See that there are as many pixels as the header tells, before they are decoded.

    Args:
        dataset: after :func:`repair_pixel_attributes`; signed compressed pixels are signed in the header afterwards.
        name: what to call it in a message.
        warnings: get what contradicts the compressed pixels.

    Returns:
        Bytes of memory that decoding and mapping them takes, with Pixel Data themselves.

    Raises:
        RadiographError: they have another size or several frames, or none can be found.
    """
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
    count, wide, length = rows * columns * samples, -(-int(dataset.BitsAllocated) // 8), len(dataset.PixelData)
    pixels, kept = rows * columns, kept_bytes(rows, columns)
    mask = pixels if "PixelPaddingValue" in dataset else 0
    is_copied = samples > 1 or int(dataset.BitsStored) < 8 * wide  # by stored_values and the like
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        frames = 8 * length // (count * int(dataset.BitsAllocated))
        if frames > 1:
            raise RadiographError(f"{name} holds pixels for {frames:,} frames; give a single radiograph")
        unpacked = count * wide if dataset.PhotometricInterpretation == "YBR_FULL_422" else 0
        copied = pixels * wide if is_copied else 0
        return max(length + unpacked + copied, (copied or length) + kept) + mask
    frame = _only_frame(dataset.PixelData, name)
    try:
        found = _codestream(dataset, frame)
    except CodestreamError:
        raise RadiographError(
            f"{name} is damaged or cut short: its pixels cannot be decoded; export it again"
        ) from None
    if (found.rows, found.columns) != (rows, columns):
        raise RadiographError(
            f"{name} has compressed pixels of {found.columns:,} x {found.rows:,}, but Columns and Rows say "
            f"{columns:,} x {rows:,}: export it again"
        )
    if found.components != samples:
        raise RadiographError(
            f"{name} has compressed pixels of {found.components} components, but SamplesPerPixel says {samples}: "
            "export it again"
        )
    if found.is_signed and dataset.PixelRepresentation == 0:
        warnings.say("PixelRepresentation", "contradicts the compressed pixels, which are signed: so they were taken")
        dataset.PixelRepresentation = 1
    wide = max(wide, -(-found.bits // 8))
    decoding = length + len(frame) + count * (_DECODER_BYTES + 2 * wide) + found.overhead
    return max(decoding, (count + pixels) * wide + mask + kept)


def _only_frame(data: bytes, name: str) -> bytes:
    from pydicom.encaps import generate_frames

    offsets = int.from_bytes(data[4:8], "little") // 4
    if offsets > 1:
        raise RadiographError(f"{name} holds {offsets:,} frames; give a single radiograph")
    try:
        return next(generate_frames(data, number_of_frames=1), b"")
    except Exception:
        return b""


def _codestream(dataset: Dataset, frame: bytes) -> Codestream:
    from pydicom.uid import JPEG2000TransferSyntaxes, RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == RLELossless:
        rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
        check_run_lengths(frame, rows * columns, samples * int(dataset.BitsAllocated) // 8)
        return Codestream(rows, columns, samples, int(dataset.BitsAllocated))
    return read_jpeg2000(frame) if syntax in JPEG2000TransferSyntaxes else read_jpeg(frame)


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


def _transform(dataset: Dataset, values: np.ndarray, warnings: Warnings) -> Transform:
    """Modality and VOI transform of these values."""
    modality = _modality(dataset, warnings)
    voi = _voi(dataset, warnings)
    if voi is None:
        return modality

    def both(levels: np.ndarray) -> np.ndarray:
        return voi(modality(levels))

    lowest, highest = math.inf, -math.inf
    for rows in blocks(values):
        shown = both(values[rows].astype(np.float64))
        lowest, highest = min(lowest, shown.min()), max(highest, shown.max())
        if highest > lowest:
            return both
    warnings.say("WindowCenter", "leaves one value of the whole image; the image's own range was taken")
    return modality


def _modality(dataset: Dataset, warnings: Warnings) -> Transform:
    table = _lut(dataset, "ModalityLUTSequence", warnings)
    if table is not None:
        return lambda values: _looked_up(values, *table)
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    if "RescaleSlope" in dataset and not slope:
        warnings.say("RescaleSlope", "is empty or unusable; 1 was taken")
    if "RescaleIntercept" in dataset and intercept is None:
        warnings.say("RescaleIntercept", "is empty or unusable; 0 was taken")
    return lambda values: values * (slope or 1.0) + (intercept or 0.0)


def _voi(dataset: Dataset, warnings: Warnings) -> Transform | None:
    """The first VOI LUT or the first usable window; ``None`` where the header has none."""
    table = _lut(dataset, "VOILUTSequence", warnings)
    if table is not None:
        return lambda values: _looked_up(values, *table)
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
        return _window(function, centre, width)
    warnings.say("WindowWidth", "gives no usable window; the image's own range was taken")
    return None


def _window(function: str, centre: float, width: float) -> Transform:
    if function == "SIGMOID":
        return lambda values: 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -60, 60)))
    if function == "LINEAR" and width >= 1:
        centre, width = centre - 0.5, max(width - 1, 1e-3)
    return lambda values: np.clip((values - centre) / width + 0.5, 0, 1)


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
